"""What a worker needs of the neural stack, as a small interface; and how failures are put into words."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from near import wire
from near.errors import NearError

DEFAULT = "near.server.engine_backend"


@dataclass(frozen=True)
class BackendSetup:
    """Where a backend finds things: `uploads` and `assets` are the broker's content-addressed folders."""
    device: str
    pack: str
    uploads: Path
    assets: Path


class Watch(Protocol):
    """Handed to every piece of work; both calls are cheap and may be made often."""

    def progress(self, stage: str, fraction: float, preview: Any = None) -> None:
        """News; between two calls, waiting viewports may be served."""

    def cancelled(self) -> bool:
        """True once the work should stop by raising `near.errors.Cancelled`."""


class Backend(Protocol):
    """The operations; results are plain JSON data, frames are float32 arrays or tensors [H, W, C] by pass name."""

    def info(self) -> dict: ...
    def frame(self, scene: wire.Scene, quality: str, watch: Watch) -> dict[str, Any]: ...
    def create(self, request: wire.Create, watch: Watch) -> dict: ...
    def matte(self, request: wire.Matte, watch: Watch) -> dict: ...
    def encode(self, request: wire.Encode, watch: Watch) -> dict: ...
    def export(self, request: wire.Export, watch: Watch) -> dict: ...
    def light(self, request: wire.SetLight, watch: Watch) -> dict: ...
    def assets(self, request: wire.Assets, watch: Watch) -> dict: ...
    def unload(self) -> None: ...
    def memory(self) -> dict: ...


def make_backend(setup: BackendSetup) -> Backend:
    """The engine; tests put a light one in its place by `NEAR_TEST_BACKEND=near_test_...`, a module on their own path."""
    name = os.environ.get("NEAR_TEST_BACKEND", "")
    module = importlib.import_module(name if name.startswith("near_test_") else DEFAULT)
    make: Callable[[BackendSetup], Backend] = module.make_backend
    return make(setup)


def explain(error: BaseException, doing: str) -> tuple[NearError, bool]:
    """-> (the error to show, whether the process must not be used any further)."""
    if isinstance(error, NearError):
        return error, False
    text = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    lowered = text.lower()
    if isinstance(error, MemoryError) or "out of memory" in lowered or "can't allocate memory" in lowered:
        # A CUDA allocator is sound after it ran out; memory of the system may be too scattered to go on with.
        return out_of_memory(doing), isinstance(error, MemoryError)
    if "cuda error" in lowered or "cudnn" in lowered or "cublas" in lowered:
        return NearError("gpu-fault", f"The GPU failed while {doing} ({text}).",
                         "The backend has been restarted; try again, and update the GPU driver if this returns."), True
    return NearError("internal-error", f"The backend failed while {doing} ({text}).",
                     "Try again; if this returns, send the session log with a report."), False


def out_of_memory(doing: str) -> NearError:
    return NearError("out-of-memory", f"Memory ran out while {doing}.",
                     "Render smaller or fewer assets, close other programs that use the GPU, or use --device cpu.")
