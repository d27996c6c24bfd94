"""The worker process: owns the models, does one thing at a time, can always be told to stop, may die at any moment.

Three threads. The main one works. One speaks with the broker, so that cancellation and signs of life do not wait for the
work. One reads standard input, which the broker holds open: when it closes, the broker is gone and so are we.

Work stops where it polls `cancelled()` or reports. Where it does neither for a while, a signal raises `Cancelled` in the
main thread between two Python instructions, as Ctrl-C would (but never inside an import or a compilation).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

import zmq

from near import sharedmem, wire
from near.errors import Cancelled
from near.server import link
from near.server.backend import Backend, BackendSetup, explain, make_backend
from near.server.lifetime import block_interrupts, die_with_parent, prefer_as_victim
from near.server.pixels import layer_bytes, write_layers

PREVIEW_SIDE = 512
INTERRUPT_AFTER_S, INTERRUPT_AGAIN_S = 0.05, 0.5
_SIGNAL = signal.SIGINT if sys.platform == "win32" else signal.SIGUSR1
_NOT_INSIDE = ("importlib", f"{os.sep}numba{os.sep}", f"{os.sep}torch{os.sep}_dynamo{os.sep}", f"{os.sep}cpp_extension")
_DOING = {"ViewRender": "rendering a viewport", "BatchFrame": "rendering a frame", "Create": "creating an asset",
          "Matte": "cutting out a photo",
          "Encode": "encoding a mesh", "Export": "exporting", "SetLight": "preparing a light", "Assets": "loading an asset"}


def _fragile(code: Any) -> bool:
    """Code that must not be left half-way: half an import cannot be repaired, and native code that joins its own threads
    (scipy's trees) frees the memory they write to when an exception passes."""
    return any(mark in code.co_filename for mark in _NOT_INSIDE) or (code.co_name == "join" and code.co_filename == threading.__file__)


class Job:
    """One `Run`: also the `Watch` that its work sees."""

    def __init__(self, worker: Worker, run: link.Run, request: wire.Message) -> None:
        self.worker, self.run, self.request = worker, run, request
        self.stop, self.stopped_at = threading.Event(), 0.0
        self._sent = 0.0

    def cancelled(self) -> bool:
        self.worker.ticks += 1
        return self.stop.is_set()

    def progress(self, stage: str, fraction: float, preview: Any = None) -> None:
        worker, now = self.worker, time.monotonic()
        worker.ticks += 1
        if self.stop.is_set():
            raise Cancelled()
        if preview is not None or fraction >= 1 or now - self._sent > 0.05:
            self._sent = now
            buffers = [] if preview is None else [_preview(preview)]
            worker.send(wire.Progress(id=self.run.id, stage=str(stage)[:120], fraction=min(max(float(fraction), 0.0), 1.0)),
                        buffers)
        if not self.run.nestable:
            worker.serve_nestable()
            if self.stop.is_set():
                raise Cancelled()


def _preview(image: Any) -> wire.Buffer:
    """uint8 [h, w, 3] of at most PREVIEW_SIDE a side."""
    step = max(1, -(-max(image.shape[:2]) // PREVIEW_SIDE))
    small = image[::step, ::step, :3]
    return wire.Buffer("preview", "u1", tuple(small.shape), small.tobytes())


class Worker:
    """Main thread's side; `Link` below is the other one."""

    def __init__(self, setup: BackendSetup, endpoint: str, token: str, beat_s: float) -> None:
        self.setup, self.ticks = setup, 0
        self.backend: Backend | None = None
        self.memory: dict = {}
        self.jobs: deque[Job] = deque()
        self.current: Job | None = None       # whose work the main thread is doing: may be interrupted
        self._interrupted_at = 0.0
        signal.signal(_SIGNAL, self._on_signal)
        self.arrived = threading.Condition()
        self._attached = sharedmem.Attachments()
        context = zmq.Context()
        self._out = context.socket(zmq.PAIR)
        self._out.bind("inproc://out")
        self._link = Link(self, context, endpoint, token, beat_s)
        self._link.start()

    def send(self, message: wire.Message, buffers: list[wire.Buffer] = ()) -> None:
        self._out.send_multipart(link.LINK.encode(message, buffers), copy=False)

    def work(self) -> None:
        """Until the process is ended."""
        try:
            self._backend()
        except Exception:  # told again, as a fault, to whoever needs it first
            traceback.print_exc()
        while True:
            with self.arrived:
                while not self.jobs:
                    self.arrived.wait()
                job = self.jobs.popleft()
            self._do(job)

    def serve_nestable(self) -> None:
        """Viewports that wait while a long job runs are served between its steps."""
        while True:
            with self.arrived:
                job = next((j for j in self.jobs if j.run.nestable), None)
                if job is None:
                    return
                self.jobs.remove(job)
            self._do(job)

    def interrupt(self) -> None:
        """From the link's thread: makes the main one look at once whether its job was told to stop."""
        if sys.platform == "win32":
            import _thread

            _thread.interrupt_main(_SIGNAL)
        else:
            signal.pthread_kill(threading.main_thread().ident, _SIGNAL)

    def _on_signal(self, _number: int, frame: Any) -> None:
        job, now = self.current, time.monotonic()
        if job is None or not job.stop.is_set() or now - self._interrupted_at < INTERRUPT_AGAIN_S:
            return
        while frame is not None:
            if _fragile(frame.f_code):
                return                     # we are asked again soon
            frame = frame.f_back
        self._interrupted_at = now
        raise Cancelled()

    def _call(self, job: Job, operation: Any, *arguments: Any) -> Any:
        outer, self.current = self.current, job
        try:
            return operation(*arguments, job)
        finally:
            self.current = outer

    def _backend(self) -> Backend:
        if self.backend is None:
            self.backend = make_backend(self.setup)
            print(link.BUILT, flush=True)
            self.send(link.Ready(id="ready", info=self.backend.info()))
        return self.backend

    def _do(self, job: Job) -> None:
        request = job.request
        kind = type(request).__name__
        fatal = False
        outer, self.current = self.current, None
        self.send(link.Started(id=job.run.id))
        try:
            if job.stop.is_set():
                raise Cancelled()
            if kind == "Unload":
                if self.backend is not None:
                    self.backend.unload()
                self.send(wire.Done(id=job.run.id, result={}))
            elif kind in ("ViewRender", "BatchFrame"):
                self._frame(job)
            else:
                operation = {"Create": "create", "Matte": "matte", "Encode": "encode", "Export": "export", "SetLight": "light",
                             "Assets": "assets"}[kind]
                result = self._call(job, getattr(self._backend(), operation), request)
                self.send(wire.Done(id=job.run.id, result=result))
        except BaseException as caught:
            self.current = None
            error, fatal = explain(caught, _DOING.get(kind, "working"))
            if error is not caught:
                traceback.print_exc()
            self.send(wire.Fault(id=job.run.id, code=error.code[:80], what=error.what[:2000], remedy=error.remedy[:2000]))
        if self.backend is not None:
            self.memory = self.backend.memory()
        self.current = outer
        if fatal:
            self._link.finish()
            os._exit(70)

    def _frame(self, job: Job) -> None:
        scene = job.request.scene
        begun = time.perf_counter()
        layers = self._call(job, self._backend().frame, scene, job.run.quality or scene.quality)
        layout = scene.layout()
        buffers: list[wire.Buffer] = []
        shared = False
        if job.run.segment:
            try:
                write_layers(layers, layout, self._attached.get(job.run.segment).data)
                shared = True
            except OSError:
                traceback.print_exc()  # then through the socket
        if not shared:
            buffers = [wire.Buffer(entry["name"], entry["dtype"], tuple(entry["shape"]), layer_bytes(layers[entry["name"]], entry))
                       for entry in layout]
        elapsed_ms = (time.perf_counter() - begun) * 1e3
        self.send(link.FrameReady(id=job.run.id, render_ms=elapsed_ms, shared=shared), buffers)


class Link(threading.Thread):
    """Speaks with the broker; nothing here waits for the work."""

    def __init__(self, worker: Worker, context: zmq.Context, endpoint: str, token: str, beat_s: float) -> None:
        super().__init__(name="link", daemon=True)
        self._worker, self._beat_s = worker, beat_s
        self._in = context.socket(zmq.PAIR)
        self._in.connect("inproc://out")
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 2000
        self._socket.plain_username, self._socket.plain_password = b"worker", token.encode()
        self._socket.connect(endpoint)
        self._done, self._finish = threading.Event(), False
        # Recent jobs, so that a stop finds one that runs as well as one that waits.
        self._known: deque[Job] = deque(maxlen=16)

    def finish(self) -> None:
        """Sends what is waiting; to be called by the main thread just before it ends."""
        self._finish = True
        self._done.wait(3.0)

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._in, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        self._socket.send_multipart(link.LINK.encode(link.Ready(id="ready", info={})))
        next_beat = 0.0
        while True:
            stopping = self._stopping()
            ready = dict(poller.poll(50 if self._finish or stopping else max(1, int((next_beat - time.monotonic()) * 1e3))))
            if stopping is not None and time.monotonic() - stopping.stopped_at > INTERRUPT_AFTER_S:
                self._worker.interrupt()
            if self._in in ready:
                self._socket.send_multipart(self._in.recv_multipart(copy=False), copy=False)
            elif self._finish:
                self._socket.close()  # lingers until its messages are gone
                time.sleep(0.1)
                self._done.set()
                return
            if self._socket in ready:
                self._receive(self._socket.recv_multipart())
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self._beat_s
                self._socket.send_multipart(link.LINK.encode(link.WorkerBeat(
                    id="beat", ticks=self._worker.ticks, cpu_s=time.process_time(), memory={**self._worker.memory, "resident_bytes": resident_bytes()})))

    def _receive(self, parts: list) -> None:
        message, buffers = link.LINK.decode(parts)
        worker = self._worker
        if isinstance(message, link.Stop):
            self._stop(message.id)
        elif isinstance(message, (link.Run, link.Unload)):
            if isinstance(message, link.Run):
                request = wire.SCHEMA.decode([buffers[0].data])[0]
                job = Job(worker, message, request)
            else:
                job = Job(worker, link.Run(id=message.id), message)
            with worker.arrived:
                worker.jobs.append(job)
                self._known.append(job)
                worker.arrived.notify()

    def _stop(self, job_id: str) -> None:
        for job in self._known:
            if job.run.id == job_id and not job.stop.is_set():
                job.stopped_at = time.monotonic()
                job.stop.set()

    def _stopping(self) -> Job | None:
        job = self._worker.current
        return job if job is not None and job.stop.is_set() else None


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say without help."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        pass
    try:
        import psutil

        return psutil.Process().memory_info().rss
    except Exception:
        return 0


def _watch_broker() -> None:
    fd = os.dup(0)
    try:
        while os.read(fd, 4096):
            pass
    except OSError:
        pass
    os._exit(0)


def main() -> None:
    """Reads its orders from the first line of standard input: endpoint, token, setup."""
    block_interrupts()
    first = b""
    while not first.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(0)
        first += byte
    orders = json.loads(first)
    die_with_parent(orders["broker_pid"], 9)
    prefer_as_victim()
    threading.Thread(target=_watch_broker, name="broker-watch", daemon=True).start()
    setup = BackendSetup(orders["device"], orders["pack"], Path(orders["uploads"]), Path(orders["assets"]))
    try:
        Worker(setup, orders["endpoint"], orders["token"], orders["beat_s"]).work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)  # the normal way out could hang on a model's or driver's own threads


if __name__ == "__main__":
    main()
