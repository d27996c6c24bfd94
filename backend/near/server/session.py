"""One client of the broker, and one piece of its work."""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from near import sharedmem, wire

KIND_OF = {"ViewRender": "view", "BatchFrame": "frame", "Create": "job", "Matte": "job", "Encode": "job", "Export": "job",
           "SetLight": "quick", "Assets": "quick"}
_numbers = itertools.count(1)


@dataclass(eq=False)
class Job:
    """Work for the worker. `kind`: view, frame (batch), job (long), quick (small, asked by hand)."""
    session: Session
    lane: str
    request: wire.Message
    header: bytes                      # the request as it came: sent on unchanged
    kind: str
    quality: str = ""                  # a frame's, as dispatched: draft or full
    final: bool = True                 # false: a better frame of the same request follows
    number: str = field(default_factory=lambda: f"j{next(_numbers)}")
    queued_at: float = field(default_factory=time.monotonic)
    sent_at: float = 0.0
    started_at: float = 0.0            # 0 until the worker says that it began
    stopped_at: float = 0.0            # when it was told to stop
    stopping: str = ""                 # why: cancelled, superseded, put back, client gone
    attempts: int = 0                  # workers that died under it
    put_back: int = 0                  # times it made room for a viewport
    slot: int = -1                     # shared memory slot, and its segment's name
    segment: str = ""
    stage: str = ""
    fraction: float = 0.0
    waiting_cancels: list[str] = field(default_factory=list)  # ids of Cancel requests to answer when it ends
    followers: list[tuple[Session, str]] = field(default_factory=list)  # who asked for the same frame again

    @property
    def identity(self) -> tuple[str, str]:
        """What makes two batch frames the same one."""
        return self.request.key, self.request.scene.key()


@dataclass(eq=False)
class Viewport:
    """One-slot mailbox: at most one frame under way, one waiting; the newest wins."""
    name: str
    session: Session
    pending: Job | None = None
    running: Job | None = None
    refine: Job | None = None          # the full frame to follow a draft, unless the camera moves on
    refine_due: float = 0.0
    last_seq: int = 0
    served_at: float = 0.0
    unconfirmed: dict[str, float] = field(default_factory=dict)   # request id -> when its frame was sent

    def open(self, now: float, window_s: float, most: int = 2) -> bool:
        """Whether the client keeps up: fewer than `most` frames on their way to it."""
        for key in [k for k, sent in self.unconfirmed.items() if now - sent > window_s]:
            del self.unconfirmed[key]
        return len(self.unconfirmed) < most


class Bucket:
    """Allows `rate` events a second on average, `burst` at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst, self._level, self._at = rate, burst, burst, time.monotonic()

    def allow(self) -> bool:
        now = time.monotonic()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


class Session:
    """A client after its `Hello`; known by the routing id it uses on all three lanes."""

    def __init__(self, peer: bytes, door: str, user: str, name: str) -> None:
        self.peer, self.door, self.user, self.name = peer, door, user, name
        self.viewports: dict[str, Viewport] = {}
        self.queue: deque[Job] = deque()          # batch lane, in order
        self.outbox: dict[str, deque[tuple[list, int]]] = {lane: deque() for lane in wire.LANES}
        self.outbox_bytes = 0
        self.lost_since = 0.0
        self.view_cost = self.batch_cost = 0.0    # seconds of worker time, for fairness
        self.probe: sharedmem.Segment | None = None
        self.pool: sharedmem.Pool | None = None
        self.complaints = Bucket(20, 40)
        self.held: dict[str, Any] = {}            # batch frames sent, not yet confirmed: request id -> identity
        # Lanes are separate sockets, so a Cancel may overtake what it cancels; its target is then refused on arrival.
        self.cancelled_early: deque[str] = deque(maxlen=256)

    def close(self) -> None:
        """Frees what the client holds."""
        if self.probe is not None:
            self.probe.close()
        if self.pool is not None:
            self.pool.close()
        self.probe = self.pool = None
