"""The local backend's life: set up, found, started, ended; subprocesses and files, no bpy, no waiting."""

from __future__ import annotations

import _thread
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .connection import Connection, connection_path, find_connection, load_connection
from .errors import NearError

START_SECONDS = 90.0
STAMP = "near-environment.json"


@dataclass(frozen=True)
class Choice:
    """Which backend is wanted, and how one of our own is started."""
    python: Path
    home: Path
    device: str = "auto"
    pack: str = "compact"
    key_file: str = ""
    remote: bool = False
    online: bool = False
    name: str = "default"


class LocalBackend:
    """Finds the backend of this user and starts it when it does not run; what it started ends with Blender.

    `find` may be called from Blender's render thread as well as from its timer: one of them at a time gets in. No thread is
    made here; the lock exists because Blender itself calls `RenderEngine.render` in a thread of its own.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._words: Path | None = None
        self._started_at = 0.0
        self._was_ready = False                # since its start the process has been seen to serve
        self._lock = _thread.allocate_lock()

    def find(self, choice: Choice, may_start: bool) -> Connection | None:
        """The connection; None while a start is under way (or another thread looks). Never waits.

        Raises:
            NearError: `backend-not-set-up`, `backend-not-running`, `backend-start`; for a remote one `remote-not-set`,
                `offline` and those of `load_connection`.
        """
        if choice.remote:
            return remote_connection(choice)
        if not self._lock.acquire(False):
            return None
        try:
            return self._find(choice, may_start)
        finally:
            self._lock.release()

    def _find(self, choice: Choice, may_start: bool) -> Connection | None:
        try:
            found = find_connection(str(connection_path(choice.name, choice.home)))
        except NearError as error:
            if error.code not in ("connection-missing", "backend-not-running"):
                raise
        else:
            self._was_ready = True
            return found
        if self._process is None:
            if not may_start:
                raise NearError("backend-not-running", "No NeAR backend is running.", "Start it.")
            self._start(choice)
        elif self._process.poll() is not None:
            self._ended()
        elif time.monotonic() - self._started_at > START_SECONDS:
            self.stop()
            raise NearError("backend-start", f"The backend did not start within {START_SECONDS:g} seconds.", "Look into its log.")
        return None

    def _start(self, choice: Choice) -> None:
        if not choice.python.is_file():
            raise NearError("backend-not-set-up", "The NeAR backend is not set up on this computer.",
                            "Set it up once (it downloads PyTorch), or choose a Python that has near-relight in the preferences.")
        logs = choice.home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._words = logs / f"{choice.name}-start.log"
        command = [str(choice.python), "-m", "near.server.cli", "serve", "--name", choice.name, "--device", choice.device,
                   "--pack", choice.pack, "--parent-pipe"]
        with open(self._words, "wb") as words:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=words, stderr=words, env=_environment(choice),
                                             cwd=str(choice.home), **quiet())
        self._started_at, self._was_ready = time.monotonic(), False

    def _ended(self) -> None:
        """Our process is gone: another Blender was quicker (then look again), or it could not start."""
        process, self._process = self._process, None
        process.stdin.close()
        if process.returncode != 0 and not self._was_ready:     # one that served and then died is simply started again
            raise NearError("backend-start", f"The backend did not start: {self.last_words().rstrip('.')}.",
                            "Set the backend up again, or look into its log.")

    def last_words(self) -> str:
        """The end of what the backend said when it started."""
        try:
            lines = self._words.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        except (OSError, AttributeError):
            lines = []
        return " ".join(lines)[:600] or "it said nothing"

    @property
    def ours(self) -> bool:
        """Whether a process that we started runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid if self.ours else 0

    def stop(self, patience_s: float = 0.0) -> None:
        """Ends what we started: closing its standard input is the sign; kills it after `patience_s`."""
        process, self._process = self._process, None
        if process is None:
            return
        process.stdin.close()
        if patience_s > 0:
            try:
                process.wait(patience_s)
                return
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        else:
            process.poll()
            _leaving.append(process)
            _leaving[:] = [p for p in _leaving if p.poll() is None]


_leaving: list[subprocess.Popen] = []          # told to end; kept so that they are reaped and not warned about


def remote_connection(choice: Choice) -> Connection:
    """Reads the key file.

    Raises:
        NearError: `remote-not-set`, `offline` and those of `load_connection`.
    """
    if not choice.key_file:
        raise NearError("remote-not-set", "No key file of the other computer's backend is chosen.",
                        "Choose the file that its owner made for you with: near keys new.")
    if not Path(choice.key_file).is_file():
        raise NearError("connection-missing", f"The key file {choice.key_file} is not there.", "Choose it again in the preferences.")
    connection = load_connection(Path(choice.key_file))
    if not choice.online and not all(_loopback(endpoint) for endpoint in connection.endpoints.values()):
        raise NearError("offline", "Blender's online access is off, and the backend is on another computer.",
                        "Allow online access in Preferences > System, or use a backend on this computer.")
    return connection


def _loopback(endpoint: str) -> bool:
    host = endpoint.removeprefix("tcp://").rsplit(":", 1)[0]
    return host in ("127.0.0.1", "localhost", "[::1]") or host.startswith("127.")


def _environment(choice: Choice) -> dict[str, str]:
    """Ours, without what would make the backend's Python load Blender's modules."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV")}
    return {**kept, "NEAR_HOME": str(choice.home), "PYTHONUTF8": "1"}


def quiet() -> dict:
    """No console window on Windows."""
    return {"creationflags": 0x08000000} if sys.platform == "win32" else {}


# ---------------------------------------------------------------- setting up
class Setup:
    """`setup_backend.py` as a subprocess: its news are the lines of a file that it writes, read here without waiting."""

    def __init__(self, folder: Path, source: str, log: Path, torch_index: str = "", needed_gb: float | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.news_path = log, log.with_suffix(".jsonl")
        self.news_path.unlink(missing_ok=True)
        self.stage, self.fraction, self.started = "starting", 0.0, time.monotonic()
        self.error: NearError | None = None
        self.done = False
        self._read = 0
        script = Path(__file__).with_name("setup_backend.py")
        command = [sys.executable, "-I", str(script), "--folder", str(folder), "--source", source, "--news", str(self.news_path)]
        if torch_index:
            command += ["--torch-index", torch_index]
        if needed_gb is not None:
            command += ["--needed-gb", str(needed_gb)]
        with open(log, "wb") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                             env=_environment(Choice(Path(), log.parent.parent)), **quiet())

    def poll(self) -> bool:
        """Reads the news; -> whether there were any. Never waits."""
        changed = self._take_news()
        if not self.done and self._process.poll() is not None:
            self._take_news()
            self.done = changed = True
            if self._process.returncode != 0 and self.error is None:
                self.error = NearError("setup-failed", f"The backend could not be set up: {self.stage}.",
                                       "Look into the log; a network error passes when it is tried again.")
        return changed

    def _take_news(self) -> bool:
        try:
            with open(self.news_path, "rb") as file:
                file.seek(self._read)
                lines = file.read(65_536).rpartition(b"\n")[0]
        except OSError:
            return False
        self._read += len(lines) + 1 if lines else 0
        for line in lines.splitlines():
            try:
                news = json.loads(line)
            except ValueError:
                continue
            self.stage, self.fraction = str(news.get("stage", self.stage))[:120], float(news.get("fraction", self.fraction))
            if "error" in news:
                self.error = NearError("setup-failed", str(news["error"])[:600], str(news.get("remedy", "Look into the log and try again."))[:300])
        return bool(lines)

    def cancel(self) -> None:
        """Ends it; what it made so far is used by the next attempt."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(3)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(3)
        self.done = True


def environment_stamp(folder: Path) -> dict:
    """What `setup_backend.py` noted when it was done; empty when the environment is not whole."""
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
