"""What each request of a client does in the broker."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import near
from near import sharedmem, wire
from near.errors import NearError
from near.server.log import LOGGER
from near.server.session import KIND_OF, Job, Session

if TYPE_CHECKING:
    from near.server.broker import Broker, Lane


class Desk:
    """One method per kind of message; each answers, queues, or raises NearError."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    # -- who is there --------------------------------------------------------------------------------------------

    def hello(self, lane: Lane, peer: bytes, message: wire.Hello, user: str) -> None:
        """A client introduces itself; saying hello again, after a lost connection, keeps its session."""
        broker = self._broker
        if message.schema != wire.SCHEMA.hash:
            raise NearError("schema-mismatch", f"The client and the backend both speak protocol {wire.PROTOCOL}, but from "
                            f"different builds (client {message.schema or 'unknown'}, backend {wire.SCHEMA.hash}).",
                            "Install the add-on and the backend from the same release.")
        key = (lane.door, peer)
        session = broker.sessions.get(key)
        if session is None:
            if len(peer) < 12 or peer in broker.dispatcher.scheduler.sessions:
                raise NearError("bad-message", "The client did not name itself by a random routing id.", "Update the client.")
            if len(broker.sessions) >= broker.config.limits.clients:
                self._make_room()
            session = Session(peer, lane.door, user, message.client or "client")
            broker.sessions[key] = session
            broker.dispatcher.scheduler.sessions[peer] = session
            LOGGER.info("client %s (%s) came", session.name, user)
        session.lost_since = 0.0
        if message.shared_memory and lane.door == "local" and session.probe is None and session.pool is None:
            try:
                session.probe = sharedmem.create(64, broker.config.home / "run")
            except OSError as error:
                LOGGER.warning("no shared memory: %s", error)
        broker.reply(session, "control", wire.Welcome(id=message.id, schema=wire.SCHEMA.hash, info=self.info(),
                                                      probe=session.probe.name if session.probe else ""))
        broker.worker.ensure(time.monotonic())    # whoever says hello will soon want something

    def _make_room(self) -> None:
        broker = self._broker
        lost = [key for key, session in broker.sessions.items() if session.lost_since]
        if not lost:
            raise NearError("too-many-clients", f"The backend serves {len(broker.sessions)} clients already.",
                            "Close a client, or start a backend with a higher --max-clients.")
        broker.end_session(lost[0], time.monotonic())

    def info(self) -> dict:
        """What a client should know of this backend."""
        config = self._broker.config
        return {"version": near.__version__, "protocol": wire.PROTOCOL, "pid": os.getpid(), "pack": config.pack,
                "device": config.device, "worker": self._broker.worker.info, "log": str(config.log_path),
                "operations": sorted(name for name, kind in wire.SCHEMA.kinds.items() if kind.LANES),
                "limits": {"side": wire.MAX_SIDE, "pixels": wire.MAX_PIXELS, "assets": wire.MAX_ASSETS,
                           "upload_bytes": wire.MAX_UPLOAD_BYTES, "viewports": config.limits.viewports_per_client,
                           "queued": config.limits.queued_per_client},
                "paths_allowed": bool(config.allow_roots)}

    def state(self) -> dict:
        """The heartbeat: is the worker there, what does it do, how long are the queues."""
        dispatcher, worker = self._broker.dispatcher, self._broker.worker
        main = dispatcher.main
        job = None if main is None else {"kind": main.kind, "stage": main.stage, "fraction": round(main.fraction, 4),
                                         "seconds": round(time.monotonic() - (main.started_at or main.sent_at), 2)}
        return {"worker": worker.state, "worker_pid": worker.pid, "starts": worker.starts, "memory": worker.memory,
                "device": worker.info.get("device", self._broker.config.device), "job": job, "queue": dispatcher.scheduler.counts(),
                "clients": len(self._broker.sessions)}

    # -- requests ------------------------------------------------------------------------------------------------

    def handle(self, session: Session, lane: str, message: wire.Message, buffers: list, header: bytes) -> None:
        """Raises NearError for what cannot be done."""
        kind = type(message).__name__
        now = time.monotonic()
        expected = 1 if kind == "Upload" else 0
        if len(buffers) != expected:
            raise wire.malformed(f"{kind} comes with {expected} buffers")
        if kind in KIND_OF:
            self._check_inputs(message)
            self._broker.dispatcher.submit(Job(session, lane, message, header, KIND_OF[kind], queued_at=now), now)
            return
        result = getattr(self, f"_{kind.lower()}")(session, message, buffers, now)
        if result is not None:
            reply_buffers = result.pop("buffers", [])
            self._broker.reply(session, lane, wire.Done(id=message.id, result=result), reply_buffers)

    def _check_inputs(self, message: wire.Message) -> None:
        """What was named must be there: better told now than by the worker, minutes later."""
        uploads = [(what, getattr(message, field, "")) for what, field in (("photo", "photo"), ("mesh", "mesh"), ("photo", "shape"))]
        light = getattr(message, "light", None) or getattr(getattr(message, "scene", None), "light", None)
        if light is not None:
            uploads.append(("HDRI", light.sha256))
        for what, sha256 in uploads:
            if sha256 and self._broker.uploads.find(sha256) is None:
                raise NearError("not-uploaded", f"The backend does not have the {what} {sha256[:12]}.", "Send it again.")

    def _ping(self, session, message, buffers, now) -> dict:
        return {}

    def _bye(self, session, message, buffers, now) -> None:
        self._broker.end_session((session.door, session.peer), now)

    def _sharedmemoryproof(self, session, message, buffers, now) -> dict:
        """From here on this client's frames go through shared memory."""
        probe, session.probe = session.probe, None
        if session.pool is None and probe is not None and message.proof == probe.proof:
            limits = self._broker.config.limits
            session.pool = sharedmem.Pool(self._broker.config.home / "run", limits.shared_per_client)
        if probe is not None:
            probe.close()
        return {"shared_memory": session.pool is not None}

    def _status(self, session, message, buffers, now) -> dict:
        broker = self._broker
        lines = list(broker.tail.lines)[-message.log_lines:] if broker.tail and message.log_lines else []
        while sum(len(line) for line in lines) > 100_000:
            lines.pop(0)
        return {**self.info(), **self.state(), "done": broker.dispatcher.done, "uptime_s": round(now - broker.started, 1),
                "refused": broker.refused, "strangers": broker.door.refused, "log_lines": lines,
                "shared_memory_bytes": sum(s.pool.bytes for s in broker.sessions.values() if s.pool is not None)}

    def _cancel(self, session, message, buffers, now) -> None:
        self._broker.dispatcher.cancel(session, message.target, message.id, now)

    def _release(self, session, message, buffers, now) -> dict:
        if not self._broker.dispatcher.release(message.what, now):
            raise NearError("busy", "The backend is working, so its memory cannot be released.", "Cancel the work or wait for its end.")
        return {}

    def _shutdown(self, session, message, buffers, now) -> dict:
        if session.door != "local":
            raise NearError("not-allowed", "Only a client on the backend's own machine may end it.", "Ask its owner.")
        self._broker.leaving = f"{session.name} asked for it"
        return {}

    def _have(self, session, message, buffers, now) -> dict:
        return {"missing": [sha for sha in message.sha256s if self._broker.uploads.find(sha) is None]}

    def _upload(self, session, message, buffers, now) -> dict:
        if buffers[0].dtype != "u1":
            raise wire.malformed("an upload's buffer is bytes (u1)")
        return self._broker.uploads.chunk(session.peer, message, buffers[0].data)

    def _addfile(self, session, message, buffers, now) -> dict:
        return {"sha256": self._broker.uploads.take_file(message.type, message.path)}

    def _fetch(self, session, message, buffers, now) -> dict:
        sha, home = message.sha256, os.fspath(self._broker.config.home)
        places = [f"{home}/assets/{sha[:2]}/{sha}.near", *(f"{home}/exports/{sha}.{kind}" for kind in wire.EXPORT_FORMATS),
                  f"{home}/uploads/{sha}.near"]
        found = next((place for place in places if os.path.isfile(place)), None)
        if found is None:
            raise NearError("not-there", f"The backend has no asset or export {message.sha256[:12]}.", "Create or export it again.")
        size = os.path.getsize(found)
        with open(found, "rb") as file:
            file.seek(min(message.offset, size))
            data = file.read(message.length)
        return {"size": size, "name": os.path.basename(found), "buffers": [wire.Buffer("data", "u1", (len(data),), data)]}

    def _closeviewport(self, session, message, buffers, now) -> dict:
        self._broker.dispatcher.close_viewport(session, message.viewport, now)
        return {}

    def _received(self, session, message, buffers, now) -> None:
        self._broker.dispatcher.confirm(session, message.target, message.slot)
