"""What a backend is told at its start; checked on construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from near.connection import home_folder
from near.errors import NearError


@dataclass(frozen=True)
class Limits:
    """What clients may ask for at most. Bytes unless said otherwise."""
    clients: int = 16
    viewports_per_client: int = 16
    queued_per_client: int = 1024          # jobs and batch frames
    upload_store: int = 8 * 1024 ** 3      # uploaded files kept on disc
    shared_per_client: int = 512 * 1024 ** 2
    outbox_per_client: int = 128 * 1024 ** 2   # replies that a client has not read yet
    results: int = 256 * 1024 ** 2         # finished batch frames kept for a client that asks again


@dataclass(frozen=True)
class Times:
    """Seconds. A deadline counts from when the worker begins the work, not from when it was queued."""
    beat: float = 1.0
    worker_beat: float = 0.5
    worker_silence: float = 60.0    # no sign of life from the worker's own beat thread
    worker_start: float = 180.0
    idle_stall: float = 120.0       # a job neither reports, nor polls for cancellation, nor uses the processor: it hangs
    stall: float = 1800.0           # the same, but busy: compiling kernels may take minutes on a loaded machine
    view_deadline: float = 300.0
    frame_deadline: float = 1800.0
    job_deadline: float = 4 * 3600.0
    cancel_grace: float = 10.0      # after which a job that ignores its cancellation loses its worker
    settle: float = 0.15            # a viewport is still: refine
    view_patience: float = 0.4      # a batch frame that would make a viewport wait longer is put back
    batch_patience: float = 2.0     # a batch frame comes at least this often between busy viewports
    client_grace: float = 30.0      # a lost client may come back for its results
    window: float = 2.0             # after which an unconfirmed viewport frame counts as received
    idle_stop: float = 600.0        # the worker's memory is given back
    restart_first: float = 0.1
    restart_most: float = 10.0


@dataclass(frozen=True)
class ServeConfig:
    """One backend.

    Raises:
        NearError: a value that cannot work.
    """
    home: Path = field(default_factory=home_folder)
    name: str = "default"
    device: str = "auto"
    pack: str = "compact"
    listen: str = ""                # tcp://ADDRESS:PORT beside the loopback endpoints; needs keys
    allow_roots: tuple[Path, ...] = ()
    parent_pid: int = 0             # end when this process ends
    parent_pipe: bool = False       # end when standard input closes
    worker_memory: int = 0          # bytes of resident memory at which a worker is replaced; 0: never
    limits: Limits = Limits()
    times: Times = Times()

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise NearError("serve-name", f"{self.name!r} is not a name for a backend.", "Use letters, digits, - and _.")
        if self.device not in ("auto", "cpu") and not self.device.startswith("cuda"):
            raise NearError("device-unknown", f"There is no device {self.device!r}.", "Use auto, cuda or cpu.")
        for root in self.allow_roots:
            if not root.is_dir():
                raise NearError("root-missing", f"The allowed folder {root} does not exist.", "Create it or correct its path.")

    @property
    def log_path(self) -> Path:
        return self.home / "logs" / f"{self.name}.log"
