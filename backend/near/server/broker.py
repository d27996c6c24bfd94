"""The broker: one process, one thread, three lanes; never touches a model, so nothing that a model does can stop it."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from dataclasses import dataclass

import zmq

import near
from near import wire
from near.connection import Connection, connection_path, private_folder, process_start, save_connection
from near.errors import NearError
from near.server import auth, losses
from near.server.config import ServeConfig
from near.server.dispatch import Dispatcher
from near.server.lifetime import ParentWatch
from near.server.log import LOGGER, Tail
from near.server.requests import Desk
from near.server.session import Bucket, Session
from near.server.uploads import UploadStore
from near.server.workerlink import WorkerLink

# Messages read per lane and round: control first and often, uploads (4 MB each) one by one.
_PER_ROUND = {"control": 256, "view": 64, "batch": 4}
_RECEIVE_LIMIT = {"control": 512 * 1024, "view": 512 * 1024, "batch": wire.MAX_CHUNK_BYTES + 1024}
_REQUEST_BYTES = 64 * 1024        # of a request's header: queues hold many of them
_SEND_HWM = {"control": 64, "view": 8, "batch": 8}


@dataclass(eq=False)
class Lane:
    """One listening socket: a lane at a door (`local` with the token, `remote` with keys)."""
    name: str
    door: str
    socket: zmq.Socket


class Broker:
    """Call `serve` once.

    Raises (on construction):
        NearError: `listen-refused`, `listen-failed`, `listen-invalid`.
    """

    def __init__(self, config: ServeConfig, tail: Tail | None = None) -> None:
        self.config, self.tail = config, tail
        self.started = time.monotonic()
        private_folder(config.home)
        self._context = zmq.Context()
        self.keys = auth.KeyRing(config.home)
        self._token = auth.new_token()
        self.door = auth.Door(self._context, self._token, self.keys)
        self.lanes: list[Lane] = []
        self._listen()
        self.sessions: dict[tuple[str, bytes], Session] = {}
        self.uploads = UploadStore(config.home / "uploads", config.limits.upload_store, config.allow_roots)
        self.worker = WorkerLink(self._context, self.door, config)
        self.dispatcher = Dispatcher(config, self.worker, self.reply)
        self.desk = Desk(self)
        self.leaving = ""
        self.refused = 0
        self._strangers = Bucket(50, 100)
        self._parent = ParentWatch(config.parent_pid, config.parent_pipe)

    # -- sockets -------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if self.config.listen:
            remote = auth.lanes_at(self.config.listen)
            if not self.keys.allowed() and not auth.is_loopback(self.config.listen):
                raise NearError("listen-refused", f"The backend does not listen on {self.config.listen} without keys: "
                                "anybody in that network could use it.",
                                "Allow a client first: near keys new NAME --address tcp://THIS-HOST:PORT")
            for lane, endpoint in remote.items():
                self._bind(lane, "remote", endpoint, self.keys.server())
        local = {lane: self._bind(lane, "local", "tcp://127.0.0.1:*", None) for lane in wire.LANES}
        self.connection = Connection(local, token=self._token, pid=os.getpid(), started=process_start(os.getpid()),
                                     version=near.__version__, log=str(self.config.log_path))

    def _bind(self, lane: str, door: str, endpoint: str, keys: auth.KeyPair | None) -> str:
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 0
        socket.router_mandatory = 1      # a lost client is noticed, not written to for ever
        socket.router_handover = 1       # a client that reconnects keeps its name
        socket.maxmsgsize = _RECEIVE_LIMIT[lane]
        socket.sndhwm, socket.rcvhwm = _SEND_HWM[lane], 128
        socket.handshake_ivl = 5000
        socket.heartbeat_ivl, socket.heartbeat_timeout = 5000, 20_000
        auth.guard(socket, keys)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise NearError("listen-failed", f"The backend cannot listen on {endpoint} ({error}).",
                            "Another program may use this port or the address is not of this machine; choose another.") from None
        self.lanes.append(Lane(lane, door, socket))
        return socket.last_endpoint.decode()

    def reply(self, session: Session, lane: str, message: wire.Message, buffers: list = ()) -> None:
        """Sends without waiting; what the client does not read yet is kept, up to a limit."""
        parts = [session.peer, *wire.SCHEMA.encode(message, buffers)]
        box = session.outbox[lane]
        if not box and self._try_send(session, lane, parts):
            return
        if isinstance(message, (wire.Progress, wire.Beat)):
            return                        # old news are no news
        size = sum(len(part) for part in parts)
        if session.outbox_bytes + size > self.config.limits.outbox_per_client:
            LOGGER.warning("client %s does not read its replies: one was dropped", session.name)
            return
        box.append((parts, size))
        session.outbox_bytes += size

    def _try_send(self, session: Session, lane: str, parts: list) -> bool:
        socket = next(entry.socket for entry in self.lanes if entry.name == lane and entry.door == session.door)
        try:
            socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                if lane == "control" and not session.lost_since:
                    session.lost_since = time.monotonic()
                    LOGGER.info("client %s is out of reach", session.name)
                return False
            raise
        return True

    def _flush(self) -> None:
        for session in self.sessions.values():
            for lane, box in session.outbox.items():
                while box and self._try_send(session, lane, box[0][0]):
                    session.outbox_bytes -= box.popleft()[1]

    # -- life ----------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Runs until told to leave, by a client, a signal or the parent's end."""
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda number, _frame: setattr(self, "leaving", signal.Signals(number).name))
        path = connection_path(self.config.name, self.config.home)
        save_connection(path, self.connection)
        LOGGER.info("backend %s (near %s, protocol %d) serves on %s", os.getpid(), near.__version__, wire.PROTOCOL,
                    self.connection.endpoints["control"])
        if self.config.listen:
            LOGGER.info("and on %s for %d known clients", self.config.listen, len(self.keys.allowed()))
        try:
            self._loop()
        finally:
            path.unlink(missing_ok=True)
            self._close()

    def _loop(self) -> None:
        poller = zmq.Poller()
        for lane in self.lanes:
            poller.register(lane.socket, zmq.POLLIN)
        poller.register(self.door.socket, zmq.POLLIN)
        poller.register(self.worker.wake, zmq.POLLIN)
        watched = None
        next_beat = 0.0
        while not self.leaving:
            if self.worker.socket is not watched:
                if watched is not None:
                    poller.unregister(watched)
                watched = self.worker.socket
                if watched is not None:
                    poller.register(watched, zmq.POLLIN)
            now = time.monotonic()
            waits = [next_beat - now, self.dispatcher.scheduler.next_due(now), 0.25]
            if any(s.outbox_bytes for s in self.sessions.values()):
                waits.append(0.005)
            poller.poll(max(0, int(min(waits) * 1e3 + 0.999)))
            self.door.answer()
            for lane in self.lanes:
                self._read(lane)
            now = time.monotonic()
            self._dispatch(now)
            self._flush()
            if now >= next_beat:
                next_beat = now + self.config.times.beat
                self._beat(now)
        LOGGER.info("backend %s ends: %s", os.getpid(), self.leaving)

    def _dispatch(self, now: float) -> None:
        try:
            self.dispatcher.tick(now)
        except Exception:       # a fault of ours, or a worker gone mad: its clients are told, the service goes on
            LOGGER.exception("the dispatcher failed; the worker is replaced")
            self.worker.kill("nonsense")

    def _beat(self, now: float) -> None:
        if self._parent.gone():
            self.leaving = "its parent has ended"
        state = self.desk.state()
        for key, session in list(self.sessions.items()):
            if not session.outbox["control"]:
                mine = {**state, "mine": len(session.queue), "time": time.time()}
                self.reply(session, "control", wire.Beat(id="beat", state=mine))
            if not self.door.still_welcome(session.user):
                LOGGER.info("client %s is no longer allowed", session.name)
                self.end_session(key, now)
            elif session.lost_since and now - session.lost_since > self.config.times.client_grace:
                self.end_session(key, now)

    def end_session(self, key: tuple[str, bytes], now: float) -> None:
        """Forgets a client and drops its work."""
        session = self.sessions.pop(key, None)
        if session is None:
            return
        LOGGER.info("client %s left", session.name)
        self.dispatcher.drop(session, now)
        self.dispatcher.scheduler.sessions.pop(session.peer, None)
        self.uploads.forget(session.peer)
        session.close()

    def _close(self) -> None:
        for session in self.sessions.values():
            session.close()
        self.worker.close()
        for lane in self.lanes:
            lane.socket.close(linger=300)     # the answer to whoever asked us to leave
        self.door.close()
        self._context.term()

    # -- what arrives --------------------------------------------------------------------------------------------

    def _read(self, lane: Lane) -> None:
        for _ in range(_PER_ROUND[lane.name]):
            try:
                peer, *frames = lane.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._one(lane, bytes(peer.buffer), frames)

    def _one(self, lane: Lane, peer: bytes, frames: deque) -> None:
        """One message: whatever it is, it is answered or dropped, and nothing gets out of here."""
        session = self.sessions.get((lane.door, peer))
        parts = [frame.buffer for frame in frames]
        request_id = "0"
        try:
            if len(parts) and len(parts[0]) > _REQUEST_BYTES:
                raise wire.malformed(f"its header has {len(parts[0])} bytes, the limit is {_REQUEST_BYTES}")
            request_id = wire.peek(parts)["id"]
            message, buffers = wire.SCHEMA.decode(parts)
            if lane.name not in type(message).LANES:
                raise wire.malformed(f"{type(message).__name__} does not belong on the {lane.name} lane")
            if isinstance(message, wire.Hello):
                self.desk.hello(lane, peer, message, _user(frames))
                return
            if session is None:
                raise NearError("not-greeted", "The backend does not know this client (any more).", "Connect again.")
            if session.lost_since:
                session.lost_since = 0.0
            self.desk.handle(session, lane.name, message, buffers, bytes(parts[0]))
        except NearError as error:
            self._complain(lane, peer, session, request_id, error)
        except Exception as error:        # a fault of ours must not end the service
            LOGGER.exception("a request failed in the broker")
            self._complain(lane, peer, session, request_id, NearError(
                "internal-error", f"The backend failed on a request ({type(error).__name__}).",
                "Try again; if this returns, send the session log with a report."))

    def _complain(self, lane: Lane, peer: bytes, session: Session | None, request_id: str, error: NearError) -> None:
        if session is not None:
            # Requests that were understood always get their answer; a flood of nonsense does not.
            if error.code != "bad-message" or session.complaints.allow():
                self.reply(session, lane.name, losses.fault(request_id, error))
                return
        elif self._strangers.allow():
            try:
                lane.socket.send_multipart([peer, *wire.SCHEMA.encode(losses.fault(request_id, error))], zmq.NOBLOCK)
            except zmq.ZMQError:
                pass
            return
        self.refused += 1


def _user(frames: list) -> str:
    """Who the handshake found this connection to be."""
    try:
        return frames[0].get("User-Id")
    except (zmq.ZMQError, UnicodeDecodeError):
        return ""
