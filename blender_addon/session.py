"""The one session of this Blender with its backend: connects, starts it when needed, carries files and jobs.

Everything in Blender's main thread goes through one timer that never waits (`poll`). `RenderEngine.render` runs in a thread
that Blender makes, or in `-b` in the main thread where no timer fires: there `ensure` and `put_*` wait by polling. Sockets
belong to one thread, so the render thread gets a connection of its own (`links.Link`).
"""

from __future__ import annotations

import _thread
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from . import transfer
from .client import Client
from .errors import Cancelled, NearError, as_near_error
from .jobs import Job
from .links import Link
from .process import Choice, LocalBackend, Setup
from .scene import assetfile
from .sending import Sender

_LOST = ("backend-gone", "backend-silent", "token-refused", "backend-not-running", "connection-closed")
_RETRY_FIRST, _RETRY_MOST = 1.0, 30.0
_SLOW_MS = 20.0


class Session:
    """See the module. `state`: idle, starting, connecting, ready, failed."""

    def __init__(self, choose: Callable[[], Choice], auto_start: Callable[[], bool] = lambda: True) -> None:
        self._choose, self._auto_start = choose, auto_start
        self._main_thread = _thread.get_ident()
        self.local = LocalBackend()
        self._links = {True: Link(self.local, "blender"), False: Link(self.local, "blender render")}
        self._wanted = False
        self._retry_at, self._retry_wait = 0.0, _RETRY_FIRST
        self._known: set[tuple[str, str]] = set()      # (backend, sha256) that it has from us
        self._sender = Sender()
        self._sender_of = ""                           # the backend that it sends to
        self._callbacks: list[Callable[[], None]] = []
        self.state = "idle"
        self.last_error: NearError | None = None
        self.jobs: list[Job] = []
        self.setup: Setup | None = None
        self.on_setup_done: Callable[[], None] | None = None
        self.ticks_ms: deque[float] = deque(maxlen=20_000)   # how long each tick held Blender's main thread
        self.slow_ticks: deque[str] = deque(maxlen=50)
        self.lines: deque[str] = deque(maxlen=200)          # for "Copy report"

    # -- the connection ------------------------------------------------------------------------------------------

    @property
    def _link(self) -> Link:
        return self._links[_thread.get_ident() == self._main_thread]

    @property
    def client(self) -> Client | None:
        """This thread's client, when it is ready."""
        return self._link.client if self._link.ready else None

    @property
    def info(self) -> dict:
        """What the backend said of itself at its welcome."""
        client = self._links[True].client
        return client.info if client is not None else {}

    @property
    def beat(self) -> dict:
        """The backend's newest heartbeat."""
        client = self._links[True].client
        return client.beat if client is not None else {}

    def want(self) -> None:
        """Begins to connect (and to start the backend, where that is allowed); the timer goes on with it. Never waits."""
        if not self._wanted and time.monotonic() >= self._retry_at:
            self._wanted = True

    def ensure(self, timeout_s: float = 120.0, should_stop: Callable[[], bool] = lambda: False) -> Client:
        """Waits for this thread's connection; starts the backend when it may.

        Raises:
            NearError: no backend and none can be started, refused, another version, `timeout`; `Cancelled`.
        """
        link, end, tries = self._link, time.monotonic() + timeout_s, 0
        while True:
            if should_stop():
                raise Cancelled()
            try:
                link.drop_if_dead()
                if link.advance(self._choose(), self._auto_start()):
                    self._wanted = True
                    return link.client
            except NearError as error:
                tries += 1
                if error.code not in _LOST or tries > 3 or (error.code == "backend-not-running" and not self._auto_start()):
                    raise
            if time.monotonic() > end:
                raise NearError("timeout", f"The backend was not ready within {timeout_s:g} seconds.", "Try again, or look into its log.")
            if link.client is not None:
                link.client.poll(0.02)
            else:
                time.sleep(0.02)

    def poll(self) -> None:
        """The timer's work: reads what arrived and takes a small step of everything. Never raises, never waits."""
        begun = time.perf_counter()
        before = (self.state, self.last_error, len(self.jobs))
        stage = self.jobs[0].stage if self.jobs else self.state
        changed = False
        try:
            changed = self._advance()
            changed = self._advance_jobs() or changed
            changed = self._advance_sending() or changed
            changed = self._advance_setup() or changed
        except Exception as error:             # a raise would silently end Blender's timer
            self.report(as_near_error(error))
        if changed or before != (self.state, self.last_error, len(self.jobs)):
            self.notify()
        self.ticks_ms.append((time.perf_counter() - begun) * 1e3)
        if self.ticks_ms[-1] > _SLOW_MS:
            self.slow_ticks.append(f"{self.ticks_ms[-1]:.0f} ms: {stage}")

    def _advance(self) -> bool:
        link = self._links[True]
        if not (self._wanted or self.jobs):
            return False
        if link.ready:
            count = link.client.poll()
            if link.ready:
                return count > 0 and bool(link.client.viewports)
        if time.monotonic() < self._retry_at:
            return False
        try:
            if link.advance(self._choose(), self._auto_start() or bool(self.jobs)):
                self.state, self._retry_wait = "ready", _RETRY_FIRST
                self._sender.pardon()
                if self.last_error is not None and self.last_error.code in _LOST:
                    self.last_error = None
            else:
                self.state = "connecting" if link.client is not None else "starting"
        except NearError as error:
            self._lost(error)
        return False

    def _lost(self, error: NearError) -> None:
        """A lost backend is tried again, after a longer and longer while; other failures wait for the user."""
        self._retry_at = time.monotonic() + self._retry_wait
        self._retry_wait = min(self._retry_wait * 2, _RETRY_MOST)
        if error.code == "backend-gone" and self._auto_start():
            self.state = "starting"
            self.log(f"{error.what} It is started again.")
            return
        self.state, self._wanted = "failed", False
        for job in self.jobs:
            job.fail(error)
        self.jobs.clear()
        self.report(error)

    def start(self) -> None:
        """As `want`, at the user's word: at once, whatever failed before."""
        self._retry_at, self._retry_wait, self._wanted, self.last_error = 0.0, _RETRY_FIRST, True, None
        if self.state == "failed":
            self.state = "idle"

    def disconnect(self) -> None:
        """Closes this Blender's connections; the backend goes on if it is not ours."""
        for job in self.jobs:
            job.cancel()
        self.jobs.clear()
        for link in self._links.values():
            link.drop()
        self._wanted, self.state = False, "idle"
        self.forget_files()

    def stop(self, patience_s: float = 0.0) -> None:
        """Disconnects and ends the backend that we started."""
        self.disconnect()
        self.local.stop(patience_s)
        self.notify()

    def close(self) -> None:
        """At the end of the add-on or of Blender."""
        if self.setup is not None:
            self.setup.cancel()
            self.setup = None
        self._callbacks.clear()
        self.stop(patience_s=5.0)

    @property
    def busy(self) -> bool:
        """Whether the timer should be quick."""
        link = self._links[True]
        return bool(self.jobs or self._sender.busy or self.state in ("starting", "connecting") or (link.client is not None and link.client.pending))

    # -- files ---------------------------------------------------------------------------------------------------

    def put_asset(self, path: Path, should_stop: Callable[[], bool] = lambda: False) -> str:
        """The asset's sha256, known to the backend from now on; waits while it is sent, once per backend.

        Raises:
            NearError: `asset-file-missing`, no backend, what it answered; `Cancelled`.
        """
        try:
            sha256 = assetfile.sha256_of(path)
        except OSError as error:
            raise NearError("asset-file-missing", f"The asset file {path.name} cannot be read ({error.strerror}).",
                            "Find the file, or create the asset again.") from None
        if not self.known(sha256):
            self.put_file(path, "asset", should_stop)
        return sha256

    def put_file(self, source: Path | bytes | memoryview, kind: str, should_stop: Callable[[], bool] = lambda: False) -> str:
        """Sends a file's content unless the backend has it (`kind` as `wire.UPLOAD_KINDS`); waits. -> sha256. Raises as `put_asset`."""
        client = self.ensure(should_stop=should_stop)
        sha256 = transfer.drive(self.putting(client, source, kind), client, should_stop)
        return sha256

    def putting(self, client: Client, source: Path | bytes | memoryview, kind: str) -> transfer.Steps[str]:
        """`put_file` for a job: the same without waiting."""
        if isinstance(source, Path):
            source = yield from transfer.reading(source, kind, "asset-file-missing" if kind == "asset" else f"{kind}-missing")
        sha256 = yield from transfer.uploading(client, source, kind)
        self._known.add((_backend_of(client), sha256))
        return sha256

    def known(self, sha256: str) -> bool:
        """Whether this thread's backend has that file from us."""
        client = self.client
        return client is not None and (_backend_of(client), sha256) in self._known

    def mark_known(self, client: Client, sha256: str) -> None:
        """The backend made this asset itself."""
        self._known.add((_backend_of(client), sha256))

    def forget_files(self) -> None:
        """Send everything again: the backend said that it lacks a file it once had."""
        self._known.clear()
        self._sender.forget()

    def soon(self, key: str, source: Callable[[], transfer.Steps[bytes]], kind: str) -> str:
        """For drawing: the sha256 of a file once the backend has it; empty while the timer sends it. Never waits. `key` names the
        content that `source` reads, `kind` as for `put_file`.

        Raises:
            NearError: it could not be read or was refused.
        """
        def sending() -> transfer.Steps[str]:
            data = yield from source()
            return (yield from self.putting(self._links[True].client, data, kind))

        return self._sender.sha256(key, sending)

    def _advance_sending(self) -> bool:
        client = self._links[True].client
        if client is None or client.state != "ready":
            return False
        if self._sender_of != _backend_of(client):
            self._sender_of = _backend_of(client)
            self._sender.forget()
        return self._sender.advance(client)

    # -- jobs and the setup --------------------------------------------------------------------------------------

    def run(self, job: Job) -> Job:
        """Begins a job; the timer goes on with it, one after the other."""
        if not self.jobs:
            self._retry_at = 0.0
        self.jobs.append(job)
        self.last_error = None
        self.notify()
        return job

    def finish(self, job: Job, should_stop: Callable[[], bool] = lambda: False) -> Job:
        """Carries a job out here and now; waits. Raises its error."""
        client = self.ensure(should_stop=should_stop)
        transfer.drive(job.steps(client), client, should_stop)
        return job

    def _advance_jobs(self) -> bool:
        client = self._links[True].client
        if not self.jobs or client is None or client.state != "ready":
            return False
        job = self.jobs[0]
        changed = job.advance(client)
        if job.state != "running" and job in self.jobs:
            self.jobs.remove(job)
            if job.error is not None and job.state == "failed":
                self.report(job.error)
        return changed

    def run_setup(self, setup: Setup, on_done: Callable[[], None] | None = None) -> None:
        """Watches a setup that was begun."""
        self.setup, self.on_setup_done = setup, on_done
        self.last_error = None
        self.notify()

    def _advance_setup(self) -> bool:
        if self.setup is None:
            return False
        changed = self.setup.poll()
        if self.setup.done:
            setup, self.setup = self.setup, None
            if setup.error is not None:
                self.report(setup.error)
            elif self.on_setup_done is not None:
                self.on_setup_done()
        return changed

    # -- news ----------------------------------------------------------------------------------------------------

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls back, in the main thread, when something to be seen has changed."""
        if callback not in self._callbacks:
            self._callbacks.append(callback)

    def off_change(self, callback: Callable[[], None]) -> None:
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def notify(self) -> None:
        for callback in list(self._callbacks):
            callback()

    def report(self, error: BaseException) -> None:
        """Shows an error in the panel, until the next success or until it is dismissed."""
        self.last_error = as_near_error(error)
        self.log(f"[{self.last_error.code}] {self.last_error.what}")
        if _thread.get_ident() == self._main_thread:
            self.notify()

    def clear_error(self) -> None:
        self.last_error = None
        self._sender.pardon()
        self.notify()

    def log(self, text: str) -> None:
        """A line of the session's report."""
        self.lines.append(f"{time.strftime('%H:%M:%S')} {text}")


def _backend_of(client: Client) -> str:
    return f"{client.connection.pid} {client.connection.started} {client.connection.endpoints['control']}"


# ---------------------------------------------------------------- the one of this process
_session: Session | None = None


def get() -> Session:
    """This Blender's session."""
    global _session
    if _session is None:
        from . import settings_now

        _session = Session(settings_now.choice, settings_now.auto_start)
    return _session


def close() -> None:
    """Ends it, and the backend that it started."""
    global _session
    if _session is not None:
        _session.close()
        _session = None
