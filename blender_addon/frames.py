"""A request under way, a received frame, a viewport that shows the newest one; standard library (numpy if asked for)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import sharedmem, wire
from .wirecodec import WireError


class Pending:
    """A request under way: `done` once it has `result` and `buffers`, a `frame`, or an `error`."""

    def __init__(self, request: wire.Message) -> None:
        self.request, self.done = request, False
        self.result: dict | None = None
        self.buffers: list[wire.Buffer] = []
        self.frame: Frame | None = None
        self.error: WireError | None = None
        self.on_done: Callable[[dict], None] | None = None
        self.progress: wire.Progress | None = None
        self.preview: wire.Buffer | None = None
        self.on_progress: Callable[[wire.Progress, wire.Buffer | None], None] | None = None

    def check(self) -> Pending:
        """Raises the error of a failed request."""
        if self.error is not None:
            raise self.error
        return self


class Frame:
    """Pixels as memory: `layers[name]` = Buffer(name, dtype "f2"/"f4", shape (h, w, c), data), premultiplied linear.

    The memory may be shared with the backend: `release()` it once read, after which it must not be touched.
    """

    def __init__(self, message: wire.FrameDone, buffers: list[wire.Buffer], attached: sharedmem.Attachments,
                 confirm: Callable[[wire.FrameDone], Any]) -> None:
        self.message, self._confirm = message, confirm
        if message.slot >= 0:
            try:
                buffers = _shared(message, attached.get(message.segment))
            except OSError:
                confirm(message)
                raise
        elif message.layout or not buffers:
            raise wire.malformed("a frame has neither buffers nor shared memory")
        self.layers = {buffer.name: buffer for buffer in buffers}
        if message.slot < 0:
            self._received()           # it is ours already

    @property
    def order(self) -> tuple[int, bool]:
        """Frames of a viewport in the order in which they may be shown."""
        return self.message.seq, self.message.final

    def array(self, name: str) -> Any:
        """numpy array [h, w, c] of a layer, without a copy; valid until `release`."""
        import numpy

        layer = self.layers[name]
        return numpy.frombuffer(layer.data, f"<{layer.dtype}").reshape(layer.shape)

    def copy(self) -> dict[str, bytes]:
        """The layers' bytes, safe after `release`."""
        return {name: bytes(layer.data) for name, layer in self.layers.items()}

    def _received(self) -> None:
        confirm, self._confirm = self._confirm, None
        if confirm is not None:
            confirm(self.message)

    def release(self) -> None:
        """Gives the memory back; may be called twice."""
        if self.message.slot >= 0 and self._confirm is not None:
            self.layers = {}
            self._received()

    def __enter__(self) -> Frame:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


def _shared(message: wire.FrameDone, segment: sharedmem.Segment) -> list[wire.Buffer]:
    data, start, found = segment.data, message.start, []
    for entry in message.layout:
        try:
            size = wire.buffer_bytes(entry)
            name, shape = entry["name"], tuple(entry["shape"])
        except (KeyError, TypeError):
            raise wire.malformed("a shared frame's layout is damaged") from None
        if start + size > len(data):
            raise wire.malformed("a shared frame does not fit its segment")
        found.append(wire.Buffer(name, entry["dtype"], shape, data[start:start + size]))
        start += size
    return found


class Viewport:
    """One view of the scene: `submit` as often as the camera moves, `take` what is newest, in any rhythm.

    A frame is never given after a newer one, whatever arrives in whatever order.
    """

    def __init__(self, client: Any, name: str) -> None:
        self._client, self.name = client, name
        self.seq = 0
        self.error: WireError | None = None      # of the last request that failed; cleared by the next frame
        self.shown: tuple[int, bool] = (0, False)
        self.arrived_count = self.superseded = self.stale = self.unseen = 0
        self._latest: Frame | None = None

    def submit(self, scene: wire.Scene) -> int:
        """Asks for the scene as it is now; -> its number. Never waits; what it replaces will not be answered."""
        self.seq += 1
        self._client.send(wire.ViewRender(id=self._client.new_id(), viewport=self.name, seq=self.seq, scene=scene))
        return self.seq

    def arrived(self, frame: Frame) -> None:
        """Called by the client when a frame comes in."""
        self.arrived_count += 1
        self.error = None
        newest = max(self.shown, self._latest.order if self._latest is not None else self.shown)
        if frame.order <= newest:
            self.stale += 1
            frame.release()
            return
        if self._latest is not None:
            self.unseen += 1
            self._latest.release()
        self._latest = frame

    def take(self) -> Frame | None:
        """The newest frame that has not been taken yet; release it when it has been read."""
        frame, self._latest = self._latest, None
        if frame is not None:
            self.shown = frame.order
        return frame

    def close(self) -> None:
        """Ends the viewport here and in the backend."""
        if self._latest is not None:
            self._latest.release()
            self._latest = None
        self._client.viewports.pop(self.name, None)
        if self._client.state == "ready":
            self._client.send(wire.CloseViewport(id=self._client.new_id(), viewport=self.name))
