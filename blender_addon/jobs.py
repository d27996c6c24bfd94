"""Long work for the user: create, encode, export. A generator that the timer advances, with news for the panel."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from . import transfer, wire
from .client import Client
from .errors import Cancelled, NearError, as_near_error

BUDGET_S = 0.003                  # of one tick


class Job:
    """`work(job, client)` is a generator (see `transfer`); its value is handed to `on_done` in Blender's main thread.

    `state`: running, done, failed, cancelled. `preview`: wire.Buffer u1 [h, w, 3], sRGB, top row first, or None.
    """

    def __init__(self, title: str, work: Callable[[Job, Client], transfer.Steps[Any]],
                 on_done: Callable[[Any], None] = lambda result: None) -> None:
        self.title, self._work, self._on_done = title, work, on_done
        self.stage, self.fraction, self.eta_s = "waiting for the backend", 0.0, -1.0
        self.preview: wire.Buffer | None = None
        self.preview_count = 0
        self.state, self.error, self.result = "running", None, None
        self.begun = time.monotonic()
        self._steps: transfer.Steps[Any] | None = None
        self._told: tuple = ()                 # what the panel was last drawn for

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.begun

    def news(self, message: wire.Progress, preview: wire.Buffer | None) -> None:
        """For `Pending.on_progress`."""
        self.stage, self.fraction, self.eta_s = message.stage, message.fraction, message.eta_s
        if preview is not None:
            self.preview, self.preview_count = preview, self.preview_count + 1

    def asking(self, client: Client, message: wire.Message) -> transfer.Steps[Any]:
        """Sends a long request and waits for its end, with its progress as this job's."""
        pending = client.send(message, on_progress=self.news)
        try:
            return (yield from transfer.waiting(pending))
        finally:
            if not pending.done and client.state == "ready":
                client.cancel(message.id)

    def steps(self, client: Client) -> transfer.Steps[Any]:
        """The whole job as one generator, for who waits for it."""
        try:
            self.result = yield from self._work(self, client)
            self.state, self.fraction = "done", 1.0
        except NearError as error:
            self.fail(error)
            raise
        except GeneratorExit:
            self.state, self.error = "cancelled", Cancelled()
            raise
        self._on_done(self.result)
        return self.result

    def advance(self, client: Client) -> bool:
        """Some work, for a few milliseconds; -> whether the panel should be drawn again."""
        if self._steps is None:
            self._steps, self.begun = self.steps(client), time.monotonic()
        end = time.perf_counter() + BUDGET_S
        try:
            while self.state == "running" and time.perf_counter() < end:
                sent = len(client.pending)
                next(self._steps)
                if client.pending and len(client.pending) == sent:
                    break                           # it waits for an answer
        except StopIteration:
            return True
        except Exception as error:
            self.fail(as_near_error(error))
            return True
        before, self._told = self._told, (self.stage, round(self.fraction, 3), self.preview_count)
        return before != self._told

    def fail(self, error: NearError) -> None:
        if self.state in ("running", "done"):
            self.state, self.error = ("cancelled" if error.code == "cancelled" else "failed"), error

    def cancel(self) -> None:
        """Stops here and in the backend."""
        if self.state == "running":
            self.state, self.error = "cancelled", Cancelled()
            if self._steps is not None:
                try:
                    self._steps.close()
                except ValueError:                  # asked from within the job itself: it ends with its present step
                    pass
