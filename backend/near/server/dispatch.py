"""Between the queues and the worker: sends work, passes on news and results, and sees that nothing is lost or stuck."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from near import wire
from near.errors import NearError
from near.server import link, losses
from near.server.config import ServeConfig
from near.server.log import LOGGER
from near.server.schedule import Scheduler
from near.server.session import Job, Session
from near.server.workerlink import Loss, WorkerLink

Reply = Callable[[Session, str, wire.Message, list], None]
MOST_ATTEMPTS = 5


class Dispatcher:
    """`reply(session, lane, message, buffers)` hands an answer to the broker's sockets."""

    def __init__(self, config: ServeConfig, worker: WorkerLink, reply: Reply) -> None:
        self._config, self.worker, self._reply = config, worker, reply
        self.scheduler = Scheduler(config.times)
        self.main: Job | None = None            # what the worker does
        self.nested: Job | None = None          # what it does between the steps of a long job
        self.results: OrderedDict[tuple[str, str], tuple[wire.FrameDone, list, int]] = OrderedDict()
        self._result_bytes = 0
        self._used_at = time.monotonic()
        self.done = {"view": 0, "frame": 0, "job": 0, "quick": 0, "superseded": 0, "lost": 0, "put_back": 0}

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, job: Job, now: float) -> None:
        """Queues work.

        Raises:
            NearError: `queue-full`, `too-many-viewports`.
        """
        limits, session = self._config.limits, job.session
        self._used_at = now
        if job.request.id in session.cancelled_early:
            raise losses.cancelled()
        if job.kind == "view":
            if job.request.viewport not in session.viewports and len(session.viewports) >= limits.viewports_per_client:
                raise NearError("too-many-viewports", f"This client has {limits.viewports_per_client} viewports already.",
                                "Close a viewport.")
            replaced, stop = self.scheduler.add_view(session, job)
            for old in replaced:
                self._supersede(old, late=old is job)
            if stop is not None:
                self._stop(stop, "superseded", now)
            return
        if len(session.queue) + sum(j.session is session for j in self.scheduler.quick) >= limits.queued_per_client:
            raise NearError("queue-full", f"This client has {limits.queued_per_client} requests waiting already.",
                            "Wait for some of them to finish.")
        if job.kind == "quick":
            self.scheduler.quick.append(job)
        elif job.kind != "frame" or not self._same_frame(job):
            self.scheduler.add_batch(session, job, now)

    def _same_frame(self, job: Job) -> bool:
        """A frame that is queued, under way or finished is not rendered again."""
        kept = self.results.get(job.identity)
        if kept is not None:
            self._send_frame(job.session, job.request.id, job.lane, *kept[:2])
            job.session.held[job.request.id] = job.identity
            return True
        same = self.main if self.main is not None and self.main.kind == "frame" and not self.main.stopping \
            and self.main.identity == job.identity else self.scheduler.find_frame(job.identity)
        if same is None or (same.session.lost_since and same is not self.main):
            return False
        same.followers.append((job.session, job.request.id))
        return True

    def cancel(self, session: Session, target: str, cancel_id: str, now: float) -> None:
        """Stops a request; the `Cancel` itself is answered once it has stopped."""
        job = self.scheduler.remove(session, target)
        if job is not None:
            self._fail(job, losses.cancelled())
            self._reply(session, "control", wire.Done(id=cancel_id, result={"state": "queued"}), [])
            return
        for running in self._running():
            if running.session is session and running.request.id == target:
                running.waiting_cancels.append(cancel_id)
                self._stop(running, "cancelled", now)
                return
        session.cancelled_early.append(target)
        self._reply(session, "control", wire.Done(id=cancel_id, result={"state": "unknown"}), [])

    def close_viewport(self, session: Session, name: str, now: float) -> None:
        """A viewport is gone, with its work."""
        viewport = session.viewports.pop(name, None)
        if viewport is None:
            return
        for job in (viewport.pending, viewport.refine):
            if job is not None:
                self._supersede(job)
        if viewport.running is not None:
            self._stop(viewport.running, "superseded", now)

    def drop(self, session: Session, now: float) -> None:
        """A client has left for good."""
        for job in self.scheduler.drop(session):
            if job.followers:      # somebody else wants this frame too
                self._inherit(job)
                self.scheduler.add_batch(job.session, job, now)
        for job in self._running():
            job.followers = [f for f in job.followers if f[0] is not session]
            if job.session is session:
                if job.followers:
                    self._inherit(job)
                else:
                    self._stop(job, "client gone", now)

    @staticmethod
    def _inherit(job: Job) -> None:
        (job.session, follower), *job.followers = job.followers
        job.request = wire.build(wire.BatchFrame, {**wire.to_plain(job.request), "id": follower}, "BatchFrame")

    def release(self, what: str, now: float) -> bool:
        """Gives the worker's memory back, unless it works. -> whether it was idle."""
        if self.main is not None:
            return False
        if what == "process":
            self.worker.stop()
        elif self.worker.state == "ready":
            self.worker.send(link.Unload(id="unload"))
        return True

    # -- the round -----------------------------------------------------------------------------------------------

    def _running(self) -> list[Job]:
        return [job for job in (self.main, self.nested) if job is not None]

    def tick(self, now: float) -> None:
        """Reads the worker, watches the clocks, sends what can be sent."""
        messages, loss = self.worker.receive(now)
        for message, buffers in messages:
            self._hear(message, buffers, now)
        if loss is not None:
            self._lose(loss, now)
        self._watch(now)
        for _ in range(2):      # a main and a nested one
            self._send_next(now)

    def _send_next(self, now: float) -> None:
        beside = None
        if self.main is not None:
            if self.scheduler.should_put_back(self.main, now):
                self.done["put_back"] += 1
                self._stop(self.main, "put back", now)
            if self.main.kind != "job" or self.nested is not None or self.main.stopping:
                return
            beside = self.main
        waits = self.scheduler.counts()
        if not any(waits.values()):
            if self.main is None and self.worker.state == "ready" and now - self._used_at > self._config.times.idle_stop:
                LOGGER.info("idle: the worker's memory is given back")
                self.worker.stop()
            return
        self._used_at = now
        if not self.worker.ensure(now):
            return
        job = self.scheduler.pick(now, beside)
        if job is not None:
            self._send(job, beside is not None, now)

    def _send(self, job: Job, nested: bool, now: float) -> None:
        if job.kind in ("view", "frame"):
            job.quality = job.quality or ("full" if job.request.scene.quality == "progressive" else job.request.scene.quality)
            taken = job.session.pool.take(job.request.scene.frame_bytes()) if job.session.pool is not None else None
            job.slot, job.segment = (taken[0], taken[1].name) if taken else (-1, "")
        if nested:
            self.nested = job
        else:
            self.main = job
        job.sent_at = now
        self.worker.active_at = self.worker.busy_at = now
        header = wire.Buffer("request", "u1", (len(job.header),), job.header)
        self.worker.send(link.Run(id=job.number, quality=job.quality, segment=job.segment,
                                  nestable=job.kind in ("view", "quick")), [header])

    def _stop(self, job: Job, why: str, now: float) -> None:
        if not job.stopping or why in ("cancelled", "client gone"):
            job.stopping = why
        if not job.stopped_at:
            job.stopped_at = now
            self.worker.send(link.Stop(id=job.number))

    # -- news from the worker ------------------------------------------------------------------------------------

    def _hear(self, message: wire.Message, buffers: list, now: float) -> None:
        job = next((j for j in self._running() if j.number == message.id), None)
        if job is None:
            return
        if isinstance(message, link.Started):
            job.started_at = now
        elif isinstance(message, wire.Progress):
            self._progress(job, message, buffers, now)
        else:
            self.worker.useful = True
            self._end(job, message, buffers, now)

    def _progress(self, job: Job, message: wire.Progress, buffers: list, now: float) -> None:
        job.stage, job.fraction = message.stage, message.fraction
        elapsed = now - job.started_at
        eta = elapsed * (1 - message.fraction) / message.fraction if message.fraction > 0.02 else -1.0
        self._reply(job.session, job.lane, wire.Progress(id=job.request.id, stage=message.stage, fraction=message.fraction,
                                                         elapsed_s=elapsed, eta_s=min(eta, 1e9)), buffers)

    def _end(self, job: Job, message: wire.Message, buffers: list, now: float) -> None:
        seconds = now - (job.started_at or now)
        delivered = isinstance(message, (link.FrameReady, wire.Done)) and job.stopping != "client gone"
        self._clear(job)
        self.scheduler.finished(job, seconds, now, delivered)
        if delivered:
            self.done[job.kind] += 1
            if isinstance(message, link.FrameReady):
                self._frame(job, message, buffers, now)
            else:
                self._reply(job.session, job.lane, wire.Done(id=job.request.id, result=message.result), buffers)
        else:
            self._free(job)
            if job.stopping == "put back":
                job.put_back += 1
                self.scheduler.put_back(job, now)
            elif job.stopping == "superseded":
                self._supersede(job)
            elif isinstance(message, wire.Fault):
                self._fail(job, NearError(message.code, message.what, message.remedy))
        state = "finished" if delivered else "stopped"
        for cancel_id in job.waiting_cancels:
            self._reply(job.session, "control", wire.Done(id=cancel_id, result={"state": state}), [])
        job.waiting_cancels.clear()

    def _clear(self, job: Job) -> None:
        if self.main is job:
            self.main = self.nested        # a nested job that outlasts its host is now the only one
            self.nested = None
        elif self.nested is job:
            self.nested = None

    def _frame(self, job: Job, message: link.FrameReady, buffers: list, now: float) -> None:
        view = job.kind == "view"
        layout = tuple(job.request.scene.layout()) if message.shared else ()
        done = wire.FrameDone(
            id=job.request.id, seq=job.request.seq if view else 0, viewport=job.request.viewport if view else "",
            key="" if view else job.request.key, quality=job.quality, final=job.final, render_ms=message.render_ms,
            segment=job.segment if message.shared else "", slot=job.slot if message.shared else -1, layout=layout)
        if not message.shared:
            self._free(job)
        if view:
            viewport = self.scheduler.viewport_of(job)
            if viewport is not None:
                viewport.unconfirmed[job.request.id] = now
        elif not message.shared:
            self._keep(job, done, buffers)
        for session, follower in job.followers:
            copies = buffers or self._copies(job, layout)
            self._send_frame(session, follower, job.lane, done, copies)
        self._reply(job.session, job.lane, done, buffers)

    @staticmethod
    def _copies(job: Job, layout: tuple) -> list[wire.Buffer]:
        """The shared frame as buffers, for another client."""
        segment = job.session.pool.segment(job.slot) if job.session.pool is not None else None
        start, copies = 0, []
        for entry in layout if segment is not None else ():
            size = wire.buffer_bytes(entry)
            copies.append(wire.Buffer(entry["name"], entry["dtype"], tuple(entry["shape"]), bytes(segment.data[start:start + size])))
            start += size
        return copies

    def _send_frame(self, session: Session, request_id: str, lane: str, done: wire.FrameDone, buffers: list) -> None:
        mine = {**wire.to_plain(done), "id": request_id, "segment": "", "slot": -1, "layout": ()}
        self._reply(session, lane, wire.FrameDone(**mine), buffers)

    def _keep(self, job: Job, done: wire.FrameDone, buffers: list) -> None:
        """Holds a batch frame until its client confirms it, so that a client that comes back need not wait again."""
        size = sum(len(b.data) for b in buffers)
        self.results[job.identity] = (done, buffers, size)
        job.session.held[job.request.id] = job.identity
        self._result_bytes += size
        while self._result_bytes > self._config.limits.results:
            self._forget(next(iter(self.results)))

    def confirm(self, session: Session, target: str, slot: int) -> None:
        """The client has taken a frame over."""
        for viewport in session.viewports.values():
            viewport.unconfirmed.pop(target, None)
        if slot >= 0 and session.pool is not None:
            session.pool.give(slot)
        identity = session.held.pop(target, None)
        if identity is not None:
            self._forget(identity)

    def _forget(self, identity: Any) -> None:
        kept = self.results.pop(identity, None)
        if kept is not None:
            self._result_bytes -= kept[2]

    # -- what goes wrong -----------------------------------------------------------------------------------------

    def _watch(self, now: float) -> None:
        times = self._config.times
        for job in self._running():
            if job.stopped_at and now - job.stopped_at > times.cancel_grace:
                self.worker.kill("cancel")
            elif job.started_at and now - job.started_at > self._deadline(job):
                self.worker.kill("deadline")
            elif job is self.main and not job.started_at and now - job.sent_at > times.worker_start:
                self.worker.kill("stall")
            elif job is self.main and (now - self.worker.active_at > times.stall or
                                       now - max(self.worker.active_at, self.worker.busy_at) > times.idle_stall):
                self.worker.kill("stall")

    def _deadline(self, job: Job) -> float:
        times = self._config.times
        usual = {"view": times.view_deadline, "frame": times.frame_deadline}.get(job.kind, times.job_deadline)
        return getattr(job.request, "deadline_s", 0.0) or usual

    def _lose(self, loss: Loss, now: float) -> None:
        """The worker is gone: whoever caused it is told, everybody else's work is done again by the next one."""
        jobs, guilty = self._running(), self.main
        if loss.by == "deadline":
            guilty = next((j for j in jobs if j.started_at and now - j.started_at > self._deadline(j)), guilty)
        self.main = self.nested = None
        self.done["lost"] += 1
        for job in jobs:
            self._free(job)
            viewport = self.scheduler.viewport_of(job) if job.kind == "view" else None
            if viewport is not None and viewport.running is job:
                viewport.running = None
            job.attempts += 1
            blamed = job is guilty and loss.by in ("deadline", "stall", "memory")
            # Sent to a worker that was on its way out because of the job before: that one's error is not this one's.
            untouched = not job.started_at and loss.by in ("exit", "signal") and job.attempts < 2
            cancels, job.waiting_cancels = job.waiting_cancels, []
            if job.stopping == "cancelled":
                self._fail(job, losses.cancelled())
            elif job.stopping == "superseded" and job.kind == "view":
                self._supersede(job)
            elif job.stopping == "client gone":
                pass
            elif (job.kind == "job" and not untouched) or blamed or job.attempts >= (MOST_ATTEMPTS if job.kind == "frame" else 2):
                self._fail(job, losses.describe(loss, job))
            elif (old := self.scheduler.put_back(job, now)) is not None:
                self._supersede(old)
            for cancel_id in cancels:
                self._reply(job.session, "control", wire.Done(id=cancel_id, result={"state": "stopped"}), [])
        if self.worker.failures >= 3:     # it does not even start: nobody should wait for it in silence
            for job in self._all_waiting():
                self._fail(job, losses.describe(loss, job))

    def _all_waiting(self) -> list[Job]:
        found = []
        for session in self.scheduler.sessions.values():
            for viewport in session.viewports.values():
                found += [j for j in (viewport.pending, viewport.refine) if j is not None]
                viewport.pending = viewport.refine = None
            found += session.queue
            session.queue.clear()
        found += self.scheduler.quick
        self.scheduler.quick.clear()
        return found

    def _free(self, job: Job) -> None:
        if job.slot >= 0 and job.session.pool is not None:
            job.session.pool.give(job.slot)
        job.slot, job.segment = -1, ""

    def _supersede(self, job: Job, late: bool = False) -> None:
        """A viewport's request that will not be answered. The answer to the newer one says so by itself, which saves half
        the messages of a moving camera; only a late request, or one whose viewport is gone, is told."""
        self.done["superseded"] += 1
        viewport = self.scheduler.viewport_of(job)
        if viewport is None or late:
            by = viewport.last_seq if viewport is not None else 0
            self._reply(job.session, job.lane, wire.Superseded(id=job.request.id, viewport=job.request.viewport, by=by), [])

    def _fail(self, job: Job, error: NearError) -> None:
        for session, request_id in [(job.session, job.request.id), *job.followers]:
            self._reply(session, job.lane, losses.fault(request_id, error), [])
