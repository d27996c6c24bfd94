"""Files to and from the backend as generators: each `yield` gives way, so a timer or a waiting loop can drive them.

A value travels out of a generator by `return`; `drive` waits for it, `jobs.Job` advances it a little at every tick.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from . import wire
from .client import Client
from .errors import Cancelled, NearError

T = TypeVar("T")
Steps = Generator[None, None, T]
HASH_BYTES = 512 * 1024             # about a millisecond of work
SEND_BYTES = 1024 * 1024


def waiting(pending: Any) -> Steps[Any]:
    """Gives way until a request is answered; -> the `Pending`. Raises what the backend answered."""
    while not pending.done:
        yield
    return pending.check()


def calling(client: Client, message: wire.Message, buffers: list = ()) -> Steps[Any]:
    """Sends a request and waits; cancels it in the backend when it is given up."""
    pending = client.send(message, list(buffers))
    try:
        return (yield from waiting(pending))
    finally:
        if not pending.done and client.state == "ready":
            client.cancel(message.id)


def reading(path: Path, what: str, code: str) -> Steps[bytes]:
    """A file's content, in pieces.

    Raises:
        NearError: `code` when it is not there or cannot be read.
    """
    pieces = []
    try:
        with open(path, "rb") as file:
            while piece := file.read(SEND_BYTES):
                pieces.append(piece)
                yield
    except OSError as error:
        raise NearError(code, f"The {what} {path.name} cannot be read ({error.strerror}).",
                        f"Check that {path} exists and may be read, or choose another file.") from None
    return b"".join(pieces)


def hashing(data: bytes) -> Steps[str]:
    """sha256 in pieces."""
    digest, view = hashlib.sha256(), memoryview(data)
    for start in range(0, len(view), HASH_BYTES):
        digest.update(view[start:start + HASH_BYTES])
        yield
    return digest.hexdigest()


def uploading(client: Client, data: bytes, kind: str, sha256: str = "") -> Steps[str]:
    """Sends a file's content unless the backend has it; -> sha256."""
    sha256 = sha256 or (yield from hashing(data))
    have = yield from calling(client, wire.Have(id=client.new_id(), sha256s=(sha256,)))
    if not have.result["missing"]:
        return sha256
    view, offset = memoryview(data), 0
    while offset < len(view):
        piece = view[offset:offset + SEND_BYTES]
        reply = yield from calling(client, wire.Upload(id=client.new_id(), sha256=sha256, type=kind, size=len(view), offset=offset),
                                   [wire.Buffer("data", "u1", (len(piece),), piece)])
        offset = reply.result["offset"]
    return sha256


def fetching(client: Client, sha256: str) -> Steps[bytes]:
    """The content of an asset or export."""
    pieces, offset = [], 0
    while True:
        reply = yield from calling(client, wire.Fetch(id=client.new_id(), sha256=sha256, offset=offset, length=SEND_BYTES))
        pieces.append(bytes(reply.buffers[0].data))
        offset += len(pieces[-1])
        if offset >= reply.result["size"] or not pieces[-1]:
            return b"".join(pieces)


def value_of(steps: Steps[T]) -> T:
    """The value of a generator that waits for nobody, at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def drive(steps: Steps[T], client: Client, should_stop: Callable[[], bool] = lambda: False) -> T:
    """Runs a generator to its end, reading what arrives meanwhile; -> its value.

    Raises:
        Cancelled: `should_stop()` said so. NearError: as the generator; the connection's own error when that fails.
    """
    try:
        while True:
            if should_stop():
                raise Cancelled()
            if client.state in ("failed", "closed"):
                raise client.error or NearError("connection-closed", "The connection is closed.", "Connect again.")
            next(steps)
            client.poll(0.02 if client.pending else 0.0)
    except StopIteration as end:
        return end.value
    finally:
        steps.close()
