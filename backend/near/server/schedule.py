"""What the worker does next: pure bookkeeping, no sockets, no clock of its own.

Order: small requests; viewports that wait (fair between clients, then between a client's viewports); refining still
viewports; batch. Batch work never keeps a viewport waiting for long (a long batch frame is put back), and busy viewports
never stop a batch: one frame comes at least every `batch_patience` seconds.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from near.server.config import Times
from near.server.session import Job, Session, Viewport

MOST_PUT_BACK = 3


class Scheduler:
    """All queued work; `running` is kept by the dispatcher."""

    def __init__(self, times: Times) -> None:
        self._times = times
        self.sessions: dict[bytes, Session] = {}
        self.quick: deque[Job] = deque()
        self._view_clock = self._batch_clock = 0.0   # virtual times: an idle client gains no credit
        self._batch_waiting_since = 0.0
        self.frame_seconds = 0.0                     # running mean of a batch frame's time

    # -- arrivals ------------------------------------------------------------------------------------------------

    def add_view(self, session: Session, job: Job) -> tuple[list[Job], Job | None]:
        """Newest wins. -> (jobs that this one replaces, a running job to stop). `job` itself is in the list when it is old."""
        name, seq = job.request.viewport, job.request.seq
        viewport = session.viewports.get(name)
        if viewport is None:
            viewport = session.viewports[name] = Viewport(name, session)
        if seq <= viewport.last_seq:
            return [job], None
        viewport.last_seq = seq
        replaced = [old for old in (viewport.pending, viewport.refine) if old is not None]
        if not any(v.pending or v.running for v in session.viewports.values()):
            session.view_cost = max(session.view_cost, self._view_clock)
        quality = job.request.scene.quality
        job.quality, job.final = ("draft", False) if quality == "progressive" else (quality, True)
        viewport.pending, viewport.refine = job, None
        running = viewport.running
        stop = running if running is not None and running.quality == "full" and job.quality == "draft" else None
        return replaced, stop

    def add_batch(self, session: Session, job: Job, now: float) -> None:
        if not session.queue:
            session.batch_cost = max(session.batch_cost, self._batch_clock)
        if not self.batch_waits():
            self._batch_waiting_since = now
        session.queue.append(job)

    def find_frame(self, identity: tuple[str, str]) -> Job | None:
        """The queued batch frame that is the same one."""
        return next((job for session in self.sessions.values() for job in session.queue
                     if job.kind == "frame" and job.identity == identity), None)

    def put_back(self, job: Job, now: float) -> Job | None:
        """Work whose run ended early waits again, first in its line. -> it, when something newer makes it needless."""
        job.sent_at = job.started_at = job.stopped_at = 0.0
        job.stopping = ""
        if job.kind == "view":
            viewport = self.viewport_of(job)
            if viewport is None or viewport.pending is not None:
                return job
            viewport.pending = job
        elif job.kind == "quick":
            self.quick.appendleft(job)
        else:
            if not self.batch_waits():
                self._batch_waiting_since = now
            job.session.queue.appendleft(job)
        return None

    def viewport_of(self, job: Job) -> Viewport | None:
        return job.session.viewports.get(job.request.viewport)

    # -- choice --------------------------------------------------------------------------------------------------

    def batch_waits(self) -> bool:
        return any(session.queue for session in self.sessions.values())

    def pick(self, now: float, beside: Job | None = None) -> Job | None:
        """Takes the next job out of its queue; `beside` a running long job, only what may be nested in it."""
        if self.quick:
            return self.quick.popleft()
        if beside is None and self._batch_starves(now) and (job := self._next_batch(now)):
            return job
        return self._next_view(now) or self._next_refine(now) or (self._next_batch(now) if beside is None else None)

    def _batch_starves(self, now: float) -> bool:
        return self.batch_waits() and now - self._batch_waiting_since > self._times.batch_patience

    def _waiting_viewports(self, now: float) -> list[Viewport]:
        return [v for session in self.sessions.values() if not session.lost_since for v in session.viewports.values()
                if v.pending is not None and v.running is None and v.open(now, self._times.window)]

    def _next_view(self, now: float) -> Job | None:
        waiting = self._waiting_viewports(now)
        if not waiting:
            return None
        viewport = min(waiting, key=lambda v: (v.session.view_cost, v.served_at))
        self._view_clock = max(self._view_clock, viewport.session.view_cost)
        viewport.running, viewport.pending = viewport.pending, None
        viewport.served_at = now
        return viewport.running

    def _next_refine(self, now: float) -> Job | None:
        due = [v for session in self.sessions.values() if not session.lost_since for v in session.viewports.values()
               if v.refine is not None and v.pending is None and v.running is None and v.refine_due <= now
               and v.open(now, self._times.window)]
        if not due:
            return None
        viewport = min(due, key=lambda v: (v.session.view_cost, v.refine_due))
        viewport.running, viewport.refine = viewport.refine, None
        viewport.served_at = now
        return viewport.running

    def _next_batch(self, now: float) -> Job | None:
        ready = [s for s in self.sessions.values() if s.queue and not s.lost_since and not s.outbox["batch"]]
        if not ready:
            return None
        session = min(ready, key=lambda s: s.batch_cost)
        self._batch_clock = max(self._batch_clock, session.batch_cost)
        self._batch_waiting_since = now
        return session.queue.popleft()

    def should_put_back(self, running: Job, now: float) -> bool:
        """Whether a batch frame has to make room for a viewport that would otherwise wait too long."""
        if running.kind != "frame" or running.stopping or running.put_back >= MOST_PUT_BACK or not running.started_at:
            return False
        if not self._waiting_viewports(now):
            return False
        left = max(self.frame_seconds - (now - running.started_at), 0.0)
        longest_wait = now - min(v.pending.queued_at for v in self._waiting_viewports(now))
        return left > self._times.view_patience or longest_wait > self._times.view_patience

    def next_due(self, now: float) -> float:
        """Seconds until a refinement, or a viewport whose window was shut, may be due."""
        times = [v.refine_due - now for s in self.sessions.values() for v in s.viewports.values() if v.refine is not None]
        shut = any(v.pending is not None and v.unconfirmed for s in self.sessions.values() for v in s.viewports.values())
        return max(0.0, min([*times, 0.05 if shut else 10.0]))

    # -- ends ----------------------------------------------------------------------------------------------------

    def finished(self, job: Job, seconds: float, now: float, delivered: bool) -> None:
        """Books the worker's time; after a draft of a progressive request, its refinement is prepared."""
        if job.kind == "view":
            job.session.view_cost += seconds
            viewport = self.viewport_of(job)
            if viewport is not None and viewport.running is job:
                viewport.running = None
                if delivered and not job.final and viewport.pending is None:
                    viewport.refine = dataclasses.replace(job, quality="full", final=True, number=f"{job.number}r", slot=-1,
                                                          segment="", sent_at=0.0, started_at=0.0, attempts=0,
                                                          waiting_cancels=[], followers=[])
                    viewport.refine_due = now + self._times.settle
        elif job.kind in ("frame", "job"):
            job.session.batch_cost += seconds
            self._batch_waiting_since = now
            if delivered and job.kind == "frame":
                self.frame_seconds = seconds if not self.frame_seconds else 0.7 * self.frame_seconds + 0.3 * seconds

    def remove(self, session: Session, target: str) -> Job | None:
        """Takes a waiting job with this request id out of its queue."""
        for viewport in session.viewports.values():
            for slot in ("pending", "refine"):
                job = getattr(viewport, slot)
                if job is not None and job.request.id == target:
                    setattr(viewport, slot, None)
                    return job
        for queue in (session.queue, self.quick):
            for job in queue:
                if job.session is session and job.request.id == target:
                    queue.remove(job)
                    return job
        return None

    def drop(self, session: Session) -> list[Job]:
        """Everything a leaving client had waiting."""
        dropped = [j for v in session.viewports.values() for j in (v.pending, v.refine) if j is not None]
        dropped += [*session.queue, *(j for j in self.quick if j.session is session)]
        self.quick = deque(j for j in self.quick if j.session is not session)
        session.queue.clear()
        session.viewports.clear()
        return dropped

    def counts(self) -> dict[str, int]:
        views = [v for s in self.sessions.values() for v in s.viewports.values()]
        return {"view": sum(v.pending is not None for v in views), "refine": sum(v.refine is not None for v in views),
                "batch": sum(len(s.queue) for s in self.sessions.values()), "quick": len(self.quick)}
