"""Where a backend is found and how it is entered; standard library only, used by clients and by the backend.

A backend writes one connection file into the user's private folder, readable by nobody else: endpoints and a token. A
client of a remote backend has a file of the same form with CURVE keys instead of the token (`near keys`).
"""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .wirecodec import PROTOCOL, WireError

FORMAT = 1
_MAX_FILE_BYTES = 65_536


@dataclass(frozen=True)
class Connection:
    """Endpoints of the three lanes and what opens them: `token` (loopback) or the CURVE keys (Z85, 40 characters)."""
    endpoints: dict[str, str]
    token: str = ""
    server_key: str = ""
    public_key: str = ""
    secret_key: str = ""
    pid: int = 0
    started: str = ""
    version: str = ""
    protocol: int = PROTOCOL
    log: str = ""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if set(self.endpoints) != {"control", "view", "batch"} or not (self.token or self.server_key):
            raise WireError("connection-invalid", "The connection file does not describe a NeAR backend.",
                            "Start the backend again, or make a new key file with near keys.")

    def __repr__(self) -> str:  # logs must not show secrets
        return f"Connection({self.endpoints}, pid={self.pid}, {'curve' if self.server_key else 'token'})"


def home_folder() -> Path:
    """`$NEAR_HOME`, else `near-relight` in the platform's cache folder."""
    if home := os.environ.get("NEAR_HOME"):
        return Path(home).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "near-relight"


def connection_path(name: str = "default", home: Path | None = None) -> Path:
    """The file of the backend called `name`."""
    return (home or home_folder()) / "run" / f"{name}.json"


def private_folder(path: Path) -> Path:
    """Makes `path` with mode 0700.

    Raises:
        WireError: it belongs to somebody else.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid"):
        if path.stat().st_uid != os.getuid():
            raise WireError("folder-not-ours", f"The folder {path} belongs to another user.",
                            "Set NEAR_HOME to a folder of your own.")
        path.chmod(0o700)
    return path


def write_private(path: Path, text: str) -> None:
    """Writes a 0600 file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def save_connection(path: Path, connection: Connection) -> None:
    """Writes the connection file, for this user's eyes only."""
    private_folder(path.parent)
    write_private(path, json.dumps(asdict(connection), indent=1))


def load_connection(path: Path) -> Connection:
    """Reads a connection or key file.

    Raises:
        WireError: `backend-not-running` (no file, or its process is gone), `connection-exposed` (others may read it),
            `connection-invalid`.
    """
    try:
        info = path.stat()
        text = path.read_bytes()[:_MAX_FILE_BYTES].decode("utf-8")
    except FileNotFoundError:
        raise _not_running() from None
    except (OSError, UnicodeDecodeError) as error:
        raise WireError("connection-invalid", f"The connection file {path.name} cannot be read "
                        f"({type(error).__name__}).", "Start the backend again.") from None
    if hasattr(os, "getuid") and (info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077):
        raise WireError("connection-exposed", f"Other users can read the connection file {path}.",
                        "Delete it and start the backend again; key files need the mode 600.")
    try:
        data = json.loads(text)
        known = {field.name: str(field.type) for field in fields(Connection)}
        connection = Connection(**{key: value for key, value in data.items() if key in known})
        if not (isinstance(connection.endpoints, dict) and type(connection.pid) is int
                and all(isinstance(e, str) and e.startswith("tcp://") for e in connection.endpoints.values())):
            raise TypeError
    except (ValueError, TypeError, AttributeError):
        raise WireError("connection-invalid", f"The connection file {path.name} is damaged.",
                        "Delete it and start the backend again.") from None
    if connection.pid and not process_alive(connection.pid, connection.started):
        raise _not_running()
    return connection


def find_connection(where: str = "", home: Path | None = None) -> Connection:
    """`where`: empty, a backend's name, or the path of a connection or key file. Raises as `load_connection`."""
    if where.endswith(".json") or "/" in where or os.sep in where:
        path = Path(where).expanduser()
        if not path.is_file():
            raise WireError("connection-missing", f"There is no connection or key file {where}.",
                            "Check its path, or make one with near keys.")
        return load_connection(path)
    return load_connection(connection_path(where or "default", home))


def _not_running() -> WireError:
    return WireError("backend-not-running", "No NeAR backend is running.", "Start one with: near serve")


# ---------------------------------------------------------------- processes
def process_start(pid: int) -> str:
    """What tells this process from a later one with the same number; empty where the system does not say."""
    try:
        fields_ = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return ""
    return "" if fields_[0] in "ZX" else fields_[19]


def process_alive(pid: int, started: str = "") -> bool:
    """Whether `pid` runs (a zombie does not) and is still the process that had the start mark `started`."""
    if pid <= 0:
        return False
    if sys.platform == "win32":
        return _alive_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return not started
    if Path("/proc/self/stat").exists():
        mark = process_start(pid)
        return bool(mark) and (not started or mark == started)
    return True


def _alive_windows(pid: int) -> bool:
    import ctypes

    kernel = ctypes.windll.kernel32
    handle = kernel.OpenProcess(0x00100000, False, pid)  # SYNCHRONIZE
    if not handle:
        return False
    try:
        return kernel.WaitForSingleObject(handle, 0) == 0x102  # WAIT_TIMEOUT: still running
    finally:
        kernel.CloseHandle(handle)
