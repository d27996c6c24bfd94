"""Messages between the broker and its worker process; they never leave the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from near.wire import Done, Fault, Flag, Int, Json, Message, Num, Progress, Schema, Text

LINK = Schema()
for _shared in (Done, Fault, Progress):
    LINK(_shared)

# The line the worker prints once its models stand: output that was written outlives a crash, a message on its way does not.
BUILT = "near worker: models stand"

# The client's request travels as it came, as the first buffer of `Run`: it was checked once and is not made anew.


@LINK
@dataclass(frozen=True)
class Run(Message):
    """Do the request in the first buffer; `quality` overrides the scene's; a frame goes to `segment` when it has a name.

    `nestable` work may be done between the steps of a long job that is running.
    """
    quality: Annotated[str, Text(20)] = ""
    segment: Annotated[str, Text(300)] = ""
    nestable: Annotated[bool, Flag()] = False


@LINK
@dataclass(frozen=True)
class Stop(Message):
    """Cancel job `id`."""


@LINK
@dataclass(frozen=True)
class Unload(Message):
    """Give the models' memory back."""


@LINK
@dataclass(frozen=True)
class Ready(Message):
    """The worker listens; `info` is empty until its models' code is loaded."""
    info: Annotated[dict, Json()]


@LINK
@dataclass(frozen=True)
class Started(Message):
    """Job `id` has begun."""


@LINK
@dataclass(frozen=True)
class FrameReady(Message):
    """Frame of job `id`: in the segment it was given when `shared`, else as buffers."""
    render_ms: Annotated[float, Num(0)]
    shared: Annotated[bool, Flag()]


@LINK
@dataclass(frozen=True)
class WorkerBeat(Message):
    """Sign of life from the worker's own thread. `ticks` counts how often its job polled or reported; `cpu_s` is the
    processor time it has used."""
    ticks: Annotated[int, Int()]
    cpu_s: Annotated[float, Num(0)]
    memory: Annotated[dict, Json(4000)]
