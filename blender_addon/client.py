"""Talks to a NeAR backend: non-blocking underneath, synchronous where that is wanted.

Standard library and pyzmq only, no threads: `poll()` does all the work, never waits longer than it is told and raises
nothing, so a timer in a user interface may call it; `call`, `upload`, `batch` wait by polling. Frames are given as
memory, in shared memory where that can be had: release them (or use `with`) when they have been read.
"""

from __future__ import annotations

import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from . import sharedmem, wire
from .connection import Connection, find_connection, process_alive
from .frames import Frame, Pending, Viewport
from .wirecodec import WireError

BatchItem = tuple[str, wire.Scene]


class Client:
    """One connection to a backend. `state`: connecting, ready, failed (then `error` says why)."""

    def __init__(self, connection: Connection, name: str = "client", shared_memory: bool = True,
                 silence_s: float = 10.0) -> None:
        self.connection, self.silence_s = connection, silence_s
        self.state, self.error = "connecting", None
        self.info: dict = {}
        self.beat: dict = {}                   # the newest heartbeat
        self.shared_memory = False             # whether frames come through it
        self.pending: dict[str, Pending] = {}
        self.viewports: dict[str, Viewport] = {}
        self._prefix, self._count = secrets.token_hex(4), 0
        self._attached = sharedmem.Attachments()
        self._last_news = time.monotonic()
        self._hello = {"client": name[:120], "shared_memory": shared_memory and bool(connection.token)}
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket] = {}
        self._poller = zmq.Poller()
        # A client that is dropped without close() must not take its context into a garbage collection: that could hang.
        self._shut = weakref.finalize(self, _shut, self._context, self._sockets)
        identity = b"c" + secrets.token_bytes(16)
        for lane in wire.LANES:
            self._open(lane, identity)
        self._send("control", wire.Hello(id=self.new_id(), schema=wire.SCHEMA.hash, **self._hello))

    @classmethod
    def connect(cls, where: str | Connection = "", timeout_s: float = 10.0, **options: Any) -> Client:
        """Waits for the backend's welcome. `where` as in `find_connection`.

        Raises:
            WireError: no backend, refused (token, key, version), or no answer in time.
        """
        connection = where if isinstance(where, Connection) else find_connection(where)
        client = cls(connection, **options)
        try:
            client.wait(lambda: client.state == "ready", timeout_s)
        except BaseException:
            client.close()
            raise
        return client

    def _open(self, lane: str, identity: bytes) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.routing_id = identity
        # No limit on what waits to be read: while Blender is busy for minutes nobody reads, a full queue would stop libzmq from hearing
        # heartbeats, and reading on after the reconnection that follows aborts the process (libzmq's restart_input assertion).
        socket.sndhwm, socket.rcvhwm = 256, 0
        socket.handshake_ivl = 5000
        socket.heartbeat_ivl, socket.heartbeat_timeout = 5000, 20_000
        socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 3000
        if self.connection.server_key:
            socket.curve_serverkey = self.connection.server_key.encode()
            socket.curve_publickey = self.connection.public_key.encode()
            socket.curve_secretkey = self.connection.secret_key.encode()
        else:
            socket.plain_username, socket.plain_password = b"near", self.connection.token.encode()
        if lane == "control":
            self._monitor = self._sockets["monitor"] = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
                                                      | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_SUCCEEDED)
            self._poller.register(self._monitor, zmq.POLLIN)
        socket.connect(self.connection.endpoints[lane])
        self._sockets[lane] = socket
        self._poller.register(socket, zmq.POLLIN)

    # -- without waiting -----------------------------------------------------------------------------------------

    def new_id(self) -> str:
        self._count += 1
        return f"{self._prefix}-{self._count}"

    def send(self, message: wire.Message, buffers: list[wire.Buffer] = (), lane: str = "",
             on_progress: Callable | None = None) -> Pending:
        """Sends a request; its `Pending` fills as `poll` reads."""
        pending = Pending(message)
        pending.on_progress = on_progress
        self.pending[message.id] = pending
        if not self._send(lane or type(message).LANES[0], message, buffers):
            self._finish(message.id, error=WireError("backend-busy", "The backend does not take any more requests just now.",
                                                     "Wait a moment and try again."))
        return pending

    def _send(self, lane: str, message: wire.Message, buffers: list[wire.Buffer] = ()) -> bool:
        try:
            # Copied, on purpose: for sending without a copy pyzmq starts a Python thread, which Blender does not bear.
            self._sockets[lane].send_multipart(wire.SCHEMA.encode(message, buffers), zmq.NOBLOCK)
            return True
        except zmq.Again:
            return False

    def poll(self, timeout_s: float = 0.0) -> int:
        """Reads what has arrived; waits at most `timeout_s` for the first of it. -> number of messages. Raises nothing."""
        if self.state == "closed":
            return 0
        ready = self._poller.poll(int(timeout_s * 1e3)) if timeout_s > 0 else True
        count = 0
        if ready:
            self._read_monitor()
            for lane in wire.LANES:
                for _ in range(256):
                    try:
                        frames = self._sockets[lane].recv_multipart(zmq.NOBLOCK, copy=False)
                    except zmq.Again:
                        break
                    count += 1
                    self._last_news = time.monotonic()
                    if self.state == "failed" and self.error.code == "backend-silent" and self.info:
                        self.state, self.error = "ready", None       # it was only slow
                    self._take([frame.buffer for frame in frames])
        self._look_for_silence()
        return count

    def _take(self, parts: list) -> None:
        try:
            header = wire.peek(parts)
            if header["protocol"] != wire.PROTOCOL:
                self._fail(wire.version_mismatch(header["protocol"], "client"))
                return
            message, buffers = wire.SCHEMA.decode(parts, "client")
        except WireError as error:
            self._fail(error)
            return
        if isinstance(message, wire.Beat):
            self.beat = message.state
        elif isinstance(message, wire.Welcome):
            self._welcome(message)
        elif isinstance(message, wire.FrameDone):
            self._frame(message, buffers)
        elif isinstance(message, wire.Progress):
            pending = self.pending.get(message.id)
            if pending is not None:
                pending.progress, pending.preview = message, (buffers[0] if buffers else pending.preview)
                if pending.on_progress is not None:
                    pending.on_progress(message, buffers[0] if buffers else None)
        elif isinstance(message, wire.Done):
            self._finish(message.id, result=message.result, buffers=buffers)
        elif isinstance(message, wire.Superseded):
            if message.id in self.pending and message.viewport in self.viewports:
                self.viewports[message.viewport].superseded += 1
            self._finish(message.id)
        elif isinstance(message, wire.Fault):
            self._fault(message)

    def _welcome(self, message: wire.Welcome) -> None:
        if message.schema != wire.SCHEMA.hash:
            self._fail(WireError("schema-mismatch", "The client and the backend come from different builds.",
                                 "Install the add-on and the backend from the same release."))
            return
        self.info, self.state, self.error = message.info, "ready", None
        if message.probe:
            try:
                probe = sharedmem.attach(message.probe)
            except OSError:
                return                       # another container, perhaps: the sockets will do
            proof = self.send(wire.SharedMemoryProof(id=self.new_id(), proof=probe.proof))
            proof.on_done = lambda result: setattr(self, "shared_memory", bool(result.get("shared_memory")))
            probe.close()

    def _fault(self, message: wire.Fault) -> None:
        error = WireError(message.code, message.what, message.remedy)
        if message.code == "not-greeted":    # the backend forgot us, e.g. after a long silence of ours
            self._send("control", wire.Hello(id=self.new_id(), schema=wire.SCHEMA.hash, **self._hello))
        if message.id in self.pending:
            self._finish(message.id, error=error)
        elif self.state == "connecting":
            self._fail(error)

    def _frame(self, message: wire.FrameDone, buffers: list[wire.Buffer]) -> None:
        try:
            frame = Frame(message, buffers, self._attached, lambda m: self._send(
                "view" if m.viewport else "batch", wire.Received(id=self.new_id(), target=m.id, slot=m.slot)))
        except (OSError, WireError):
            self._finish(message.id, error=WireError("frame-lost", "A frame could not be read from shared memory.",
                                                     "Connect again; if this returns, connect with shared_memory=False."))
            return
        viewport = self.viewports.get(message.viewport) if message.viewport else None
        if viewport is not None:
            viewport.arrived(frame)
            if message.final:
                self._finish(message.id)
            elif message.id in self.pending:
                self._end_older(self.pending[message.id].request)
        elif message.id in self.pending:
            self._finish(message.id, frame=frame)
        else:
            frame.release()

    def _finish(self, request_id: str, **values: Any) -> None:
        pending = self.pending.pop(request_id, None)
        if pending is None:
            return
        if isinstance(pending.request, wire.ViewRender):
            self._end_older(pending.request)
        for name, value in values.items():
            setattr(pending, name, value)
        pending.done = True
        if pending.on_done is not None and pending.result is not None:
            pending.on_done(pending.result)
        viewport = self.viewports.get(getattr(pending.request, "viewport", ""))
        if viewport is not None and pending.error is not None:
            viewport.error = pending.error

    def _end_older(self, request: wire.ViewRender) -> None:
        older = [key for key, p in self.pending.items() if isinstance(p.request, wire.ViewRender)
                 and p.request.viewport == request.viewport and p.request.seq < request.seq]
        for key in older:
            self.pending.pop(key).done = True
        if older and request.viewport in self.viewports:
            self.viewports[request.viewport].superseded += len(older)

    def _fail(self, error: WireError) -> None:
        self.state, self.error = "failed", error
        for request_id in list(self.pending):
            self._finish(request_id, error=error)

    def _read_monitor(self) -> None:
        while True:
            try:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.Again:
                return
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED or self.state == "ready":
                continue
            if self.connection.server_key:
                self._fail(WireError("key-refused", "The backend refused this computer's key, or it is not the backend "
                                     "that the key file was made for.", "Ask its owner for a new key file (near keys new)."))
            else:
                self._fail(WireError("token-refused", "The backend refused the token of the connection file.",
                                     "The backend was probably restarted: connect again, or restart it with near serve."))

    def _look_for_silence(self) -> None:
        silent = time.monotonic() - self._last_news
        if self.state == "failed" or silent < 1.5:
            return
        if self.connection.pid and not process_alive(self.connection.pid, self.connection.started):
            self._fail(WireError("backend-gone", "The NeAR backend has ended.", "Start it again with: near serve"))
        elif silent > self.silence_s and (self.pending or self.state == "connecting"):
            self._fail(WireError("backend-silent", f"The NeAR backend has not answered for {silent:.0f} seconds.",
                                 "Check that it runs and can be reached (near doctor), or restart it."))

    # -- waiting -------------------------------------------------------------------------------------------------

    def wait(self, ready: Callable[[], bool], timeout_s: float, stop: Callable[[], bool] | None = None) -> None:
        """Polls until `ready()`.

        Raises:
            WireError: the connection failed, `timeout`, or `cancelled` because `stop()` said so.
        """
        end = time.monotonic() + timeout_s
        self._last_news = max(self._last_news, time.monotonic() - 1.0)   # nobody listened before this call
        while not ready():
            if self.state in ("failed", "closed"):
                raise self.error or WireError("connection-closed", "The connection is closed.", "Connect again.")
            if stop is not None and stop():
                raise WireError("cancelled", "The work was cancelled.", "Start it again when you are ready.")
            left = end - time.monotonic()
            if left <= 0:
                raise WireError("timeout", f"The backend did not answer within {timeout_s:g} seconds.",
                                "Try again, or allow more time; near doctor tells whether the backend is well.")
            self.poll(min(left, 0.05))

    def call(self, message: wire.Message, buffers: list[wire.Buffer] = (), timeout_s: float = 30.0, lane: str = "",
             on_progress: Callable | None = None, stop: Callable[[], bool] | None = None) -> Pending:
        """Sends and waits; when it gives up, the request is cancelled.

        Raises:
            WireError: what the backend answered, or as `wait`.
        """
        pending = self.send(message, buffers, lane, on_progress)
        try:
            self.wait(lambda: pending.done, timeout_s, stop)
        except BaseException:
            if not pending.done:
                self.cancel(message.id)
            raise
        return pending.check()

    def cancel(self, request_id: str) -> Pending:
        """Asks for a request to be stopped; done when it has stopped."""
        return self.send(wire.Cancel(id=self.new_id(), target=request_id))

    def status(self, log_lines: int = 0) -> dict:
        return self.call(wire.Status(id=self.new_id(), log_lines=log_lines)).result

    def upload(self, data: bytes | memoryview, kind: str, timeout_s: float = 600.0) -> str:
        """Sends a file's content unless the backend has it; -> sha256. Raises as `call`."""
        import hashlib

        view = memoryview(data).cast("B")
        sha256 = hashlib.sha256(view).hexdigest()
        if not self.call(wire.Have(id=self.new_id(), sha256s=(sha256,))).result["missing"]:
            return sha256
        offset = 0
        while offset < len(view):
            piece = view[offset:offset + wire.MAX_CHUNK_BYTES]
            reply = self.call(wire.Upload(id=self.new_id(), sha256=sha256, type=kind, size=len(view), offset=offset),
                              [wire.Buffer("data", "u1", (len(piece),), piece)], timeout_s)
            offset = reply.result["offset"]
        return sha256

    def fetch(self, sha256: str, timeout_s: float = 600.0) -> bytes:
        """The content of an asset or export. Raises as `call`."""
        pieces, offset = [], 0
        while True:
            reply = self.call(wire.Fetch(id=self.new_id(), sha256=sha256, offset=offset), timeout_s=timeout_s)
            pieces.append(bytes(reply.buffers[0].data))
            offset += len(pieces[-1])
            if offset >= reply.result["size"] or not pieces[-1]:
                return b"".join(pieces)

    def batch(self, items: Iterable[BatchItem], window: int = 8, timeout_s: float = 900.0,
              stop: Callable[[], bool] | None = None) -> Iterator[tuple[str, Frame]]:
        """Renders (key, scene) pairs in order, `window` of them on their way at a time; release each frame.

        Raises:
            WireError: of the first frame that cannot be rendered; the others are cancelled.
        """
        waiting: list[tuple[str, Pending]] = []
        source = iter(items)
        try:
            while True:
                while len(waiting) < window and (item := next(source, None)) is not None:
                    waiting.append((item[0], self.send(wire.BatchFrame(id=self.new_id(), scene=item[1], key=item[0]))))
                if not waiting:
                    return
                key, pending = waiting[0]
                self.wait(lambda: pending.done, timeout_s, stop)
                waiting.pop(0)
                yield key, pending.check().frame
        finally:
            for _, pending in waiting:
                if pending.done and pending.frame is not None:
                    pending.frame.release()
                elif not pending.done and self.state == "ready":
                    self.cancel(pending.request.id)

    def viewport(self, name: str = "") -> Viewport:
        """A latest-wins viewport; see `frames.Viewport`."""
        name = name or f"{os.getpid()}-{len(self.viewports)}"
        return self.viewports.setdefault(name, Viewport(self, name))

    def close(self) -> None:
        """Leaves; frames that are still held stay readable."""
        if self.state == "closed":
            return
        if self.state == "ready":
            self._sockets["control"].linger = 200
            self._send("control", wire.Bye(id=self.new_id()))
        self.state = "closed"
        self._shut()
        self._attached.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _shut(context: zmq.Context, sockets: dict[str, zmq.Socket]) -> None:
    sockets["control"].disable_monitor()
    for socket in sockets.values():
        socket.close()
    context.term()
