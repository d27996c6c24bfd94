"""The broker's hold on its worker process: start, talk, notice silence, end, start again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import zmq

from near import wire
from near.server import link
from near.server.auth import WORKER, Door, new_token
from near.server.config import ServeConfig
from near.server.log import LOGGER


@dataclass(frozen=True)
class Loss:
    """A worker has ended: `by` is exit, signal, start, or the reason it was killed for: silence, nonsense, memory,
    deadline, stall, cancel."""
    by: str
    exit_code: int | None
    last_words: tuple[str, ...]


class WorkerLink:
    """At most one worker at a time. `state`: off, starting, ready, waiting (until it may be started again)."""

    def __init__(self, context: zmq.Context, door: Door, config: ServeConfig) -> None:
        self._context, self._door, self._config = context, door, config
        self.state, self.info, self.memory = "off", {}, {}
        self.active_at = self.busy_at = 0.0       # when its job last polled or reported; when it last used the processor
        self._ticks, self._cpu_s = -1, 0.0
        self.starts, self.failures, self.useful = 0, 0, False
        self.socket: zmq.Socket | None = None
        self._process: subprocess.Popen | None = None
        self._reader: threading.Thread | None = None
        self._built_pid = 0                       # the worker that has said, through its output, that its models stand
        self._heard = self._since = self._retry_at = 0.0
        self._kill_reason = ""
        self._words: deque[str] = deque(maxlen=30)
        self.wake = context.socket(zmq.PULL)          # rung by the reader thread when the worker's output ends
        self.wake.bind("inproc://worker-ended")

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    # -- life ----------------------------------------------------------------------------------------------------

    def ensure(self, now: float) -> bool:
        """Starts a worker if there is none and it is time to. -> whether one is ready for work."""
        if self.state == "off" or (self.state == "waiting" and now >= self._retry_at):
            self._start(now)
        return self.state == "ready"

    def _start(self, now: float) -> None:
        token = new_token()
        self._door.worker_token = token
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.plain_server, self.socket.zap_domain = True, WORKER
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        orders = {"endpoint": f"tcp://127.0.0.1:{port}", "token": token, "device": self._config.device,
                  "pack": self._config.pack, "uploads": str(self._config.home / "uploads"),
                  "assets": str(self._config.home / "assets"), "beat_s": self._config.times.worker_beat, "broker_pid": os.getpid()}
        quiet = {"creationflags": 0x08000000} if sys.platform == "win32" else {}   # no console window
        environment = {**os.environ, "PYTHONUNBUFFERED": "1",
                       "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen([sys.executable, "-m", "near.server.worker"], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, **quiet)
        self._process.stdin.write(json.dumps(orders).encode() + b"\n")
        self._process.stdin.flush()                    # and it stays open: our end closes it
        self._reader = threading.Thread(target=self._read, args=(self._process,), name="worker-output", daemon=True)
        self._reader.start()
        self.state, self._since, self._heard, self._kill_reason = "starting", now, now, ""
        self.useful = False
        self._ticks, self._cpu_s, self.active_at, self.busy_at, self.memory = -1, 0.0, now, now, {}
        self._words.clear()
        self.starts += 1
        LOGGER.info("worker %d started", self._process.pid)

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            text = line.decode("utf-8", "replace").rstrip()[:500]
            if text == link.BUILT:
                self._built_pid = process.pid
            elif text:
                self._words.append(text)
                LOGGER.info("worker %d: %s", process.pid, text)
        try:
            with self._context.socket(zmq.PUSH) as bell:
                bell.linger = 0
                bell.connect("inproc://worker-ended")
                bell.send(b"", zmq.NOBLOCK)
        except zmq.ZMQError:
            pass      # the broker is ending too

    def kill(self, reason: str) -> None:
        """Ends the worker at once; the loss is reported by `receive`."""
        if self._process is not None and not self._kill_reason:
            LOGGER.warning("worker %d is ended: %s", self._process.pid, reason)
            self._kill_reason = reason
            self._process.kill()

    def stop(self) -> None:
        """Ends the worker without replacing it, e.g. to give memory back; no loss is reported."""
        if self._process is not None:
            self._process.kill()
            self._bury()
        self.state = "off"

    def close(self) -> None:
        self.stop()
        self.wake.close()

    def _bury(self) -> int:
        process, self._process = self._process, None
        code = process.wait()
        process.stdin.close()
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        for folder in ("assets", "exports"):   # what it was writing when it died: nobody else writes there
            for leftover in (self._config.home / folder).rglob(".*"):
                _remove(leftover)
        return code

    # -- talk ----------------------------------------------------------------------------------------------------

    def send(self, message: wire.Message, buffers: list[wire.Buffer] = ()) -> None:
        if self.socket is not None:
            try:
                self.socket.send_multipart(link.LINK.encode(message, buffers), zmq.NOBLOCK)
            except zmq.Again:
                pass   # it has just died; its loss will be noticed at the next look

    def receive(self, now: float) -> tuple[list[tuple[wire.Message, list[wire.Buffer]]], Loss | None]:
        """What has arrived, and the worker's loss when it has ended or has been silent for too long."""
        try:
            while True:
                self.wake.recv(zmq.NOBLOCK)
        except zmq.Again:
            pass
        if self._process is None:
            return [], None
        ended = self._process.poll() is not None   # asked first: all that it said is then there to be read
        messages = []
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            self._heard = now
            try:
                message, buffers = link.LINK.decode([frame.buffer for frame in frames])
            except wire.WireError as error:
                LOGGER.error("worker %d was not understood: %s", self.pid, error)
                self.kill("nonsense")
                break
            if isinstance(message, link.WorkerBeat):
                self._beat(message, now)
            elif isinstance(message, link.Ready):
                self.state = "ready"
                self.info = message.info or self.info
            else:
                messages.append((message, buffers))
        if ended:
            return messages, self._lost(now)
        times = self._config.times
        limit = times.worker_start if self.state == "starting" else times.worker_silence
        if now - self._heard > limit:
            self.kill("silence" if self.state == "ready" else "start")
        if self._config.worker_memory and self.memory.get("resident_bytes", 0) > self._config.worker_memory:
            self.kill("memory")
        return messages, None

    def _beat(self, message: link.WorkerBeat, now: float) -> None:
        self.memory = message.memory
        if message.ticks != self._ticks:
            self._ticks, self.active_at = message.ticks, now
        if message.cpu_s - self._cpu_s > 0.02 * self._config.times.worker_beat:   # more than beating costs
            self.busy_at = now
        self._cpu_s = message.cpu_s

    def _lost(self, now: float) -> Loss:
        reason, pid = self._kill_reason, self.pid
        code = self._bury()
        self._reader.join(0.5)     # its last words; a pipe keeps what a message on its way would lose
        by = reason or ("start" if not (self.useful or self._built_pid == pid) else "signal" if code < 0 else "exit")
        # A worker that did something useful is replaced at once; one that keeps dying, more and more slowly.
        self.failures = 0 if self.useful else self.failures + 1
        times = self._config.times
        wait = 0.0 if self.useful else min(times.restart_first * 2 ** min(self.failures - 1, 20), times.restart_most)
        self.state, self._retry_at = "waiting", now + wait
        LOGGER.warning("worker %d ended (%s, exit code %s); it may start again in %.1f s", pid, by, code, wait)
        return Loss(by, code, tuple(self._words))


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass
