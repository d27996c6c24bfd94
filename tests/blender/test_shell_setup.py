"""Setting up the managed backend: an environment of its own, progress, failure, cancel; with a tiny wheel in the backend's place."""

from __future__ import annotations

import sys
import time
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("bpy")
sys.path.insert(0, str(Path(__file__).parent))

import shell_stage as stage  # noqa: E402

pytestmark = [pytest.mark.bpy, pytest.mark.timeout(1200)]
WHEEL = "near_relight-9.8.7-py3-none-any.whl"


@pytest.fixture(scope="module")
def process():
    stage.enable()
    return stage.module("process")


def tiny_wheel(folder: Path) -> Path:
    """`near` with a version and a `near.server.cli`, and nothing else."""
    info = "near_relight-9.8.7.dist-info"
    files = {"near/__init__.py": '__version__ = "9.8.7"\n', "near/server/__init__.py": "", "near/server/cli.py": "",
             f"{info}/METADATA": "Metadata-Version: 2.1\nName: near-relight\nVersion: 9.8.7\n",
             f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return path


def follow(setup, timeout_s: float = 500.0) -> list[float]:
    """Polls as the timer does; -> the fractions that were shown."""
    seen, end = [], time.monotonic() + timeout_s
    while not setup.done:
        assert time.monotonic() < end, setup.stage
        if setup.poll():
            seen.append(setup.fraction)
        time.sleep(0.02)
    return seen


def test_it_is_made_used_and_made_again(process, tmp_path):
    folder, log = tmp_path / "user" / "backend", tmp_path / "home" / "logs" / "setup.log"
    setup = process.Setup(folder, str(tiny_wheel(tmp_path)), log, needed_gb=0.1)
    seen = follow(setup)
    assert setup.error is None, (setup.error, log.read_text())
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) >= 2
    assert process.environment_stamp(folder) == {"version": "9.8.7", "source": WHEEL} and "pip" not in setup.stage
    again = process.Setup(folder, str(tmp_path / WHEEL), log)          # the environment is kept
    follow(again)
    assert again.error is None and "making an environment" not in log.read_text()

    broken = process.Setup(folder, str(tmp_path / "nothing.whl"), log)   # what fails leaves no environment that looks whole
    follow(broken)
    assert broken.error.code == "setup-failed" and "could not be installed" in broken.error.what and broken.error.remedy
    assert process.environment_stamp(folder) == {}


def test_without_room_nothing_is_begun(process, tmp_path):
    folder = tmp_path / "user" / "backend"
    setup = process.Setup(folder, str(tiny_wheel(tmp_path)), tmp_path / "logs" / "setup.log", needed_gb=1e9)
    follow(setup)
    assert setup.error.code == "setup-failed" and "too little free space" in setup.error.what and str(folder.parent) in setup.error.remedy
    assert not folder.exists() and process.environment_stamp(folder) == {}


def test_cancel_ends_it(process, tmp_path):
    setup = process.Setup(tmp_path / "backend", str(tmp_path / "x.whl"), tmp_path / "logs" / "setup.log")
    pid = setup._process.pid
    setup.cancel()
    assert setup.done and setup._process.returncode is not None
    assert not Path(f"/proc/{pid}").exists() or not sys.platform.startswith("linux")
