"""What every test shares: where the shared data lies, one thread for torch, and a clean way out when bpy was used."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch or numba are imported: tests run beside other work, and kernels are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def shared_folder() -> Path | None:
    """Folder with the bench, fixtures and photos: ``$NEAR_SHARED`` or ``shared`` beside the checkout; None when absent."""
    folder = Path(os.environ.get("NEAR_SHARED") or REPOSITORY.parent / "shared")
    return folder if folder.is_dir() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="no CUDA device")
            for item in items:
                if "gpu" in item.keywords:
                    item.add_marker(skip)
    if any("bpy" in item.keywords for item in items):
        from importlib.util import find_spec

        if find_spec("bpy") is None:
            skip = pytest.mark.skip(reason="bpy is not installed")
            for item in items:
                if "bpy" in item.keywords:
                    item.add_marker(skip)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's top folder."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the bench, fixtures and photos; the test is skipped where it is absent."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("no shared data: neither $NEAR_SHARED nor ../shared is a folder")
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """One thread by default; a test that measures speed sets its own number and puts it back."""
    if "torch" in sys.modules or os.environ.get("PYTEST_XDIST_WORKER"):
        import torch

        torch.set_num_threads(1)
    yield


# Blender as a module can hang or crash when the interpreter finalises (handlers, engines still registered). Once it has
# been imported, leave without finalising: remember the status, let every other plug-in finish, flush, go.
_status: int | None = None


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    global _status
    _status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    if _status is None or "bpy" not in sys.modules:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status)
