"""What works on this machine, what is missing, and the remedy."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from near import __version__
from near.errors import NearError

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
NEEDED = ("torch", "numpy", "numba", "timm", "peft", "safetensors", "opencolorio", "OpenEXR", "pillow", "imageio-ffmpeg", "pyzmq")
MEMORY_GB, DISC_GB = 4.0, 2.0  # below these the main job has been seen to fail or to crawl


@dataclass(frozen=True)
class Finding:
    """One line of the report. state: ``ok``, ``note`` (optional and absent), ``warning``, ``problem`` (the main job will fail)."""

    name: str
    state: str
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Run every check; a check that itself fails is a finding, not an error."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += list(check())
        except NearError as error:
            findings.append(Finding(check.__name__.removeprefix("_"), PROBLEM, error.what, error.remedy))
        except Exception as error:  # doctor must report on a broken installation, whatever broke
            findings.append(Finding(check.__name__.removeprefix("_"), PROBLEM, f"{type(error).__name__}: {error}",
                                    "Install near-relight again; if it stays, report this line."))
    return findings


def worst(findings: list[Finding]) -> str:
    return max((f.state for f in findings), key=(OK, NOTE, WARNING, PROBLEM).index)


def as_dicts(findings: list[Finding]) -> list[dict[str, str]]:
    return [asdict(f) for f in findings]


def _versions() -> Iterator[Finding]:
    supported = sys.version_info >= (3, 11)
    yield Finding("near", OK, f"{__version__}, {platform.system()} {platform.machine()}")
    yield Finding("python", OK if supported else PROBLEM, platform.python_version(), "" if supported else "Use Python 3.11 or newer.")
    missing, found = [], []
    for name in NEEDED:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding("packages", PROBLEM, f"missing: {', '.join(missing)}", "pip install near-relight again, into this environment.")
    yield Finding("packages", OK, ", ".join(found))


def _device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield Finding("device", OK, f"CUDA: {torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    elif torch.version.cuda is None and shutil.which("nvidia-smi"):
        yield Finding("device", WARNING, "there is an NVIDIA driver, but this torch is a CPU build",
                      "Install torch with CUDA from pytorch.org into this environment.")
    else:
        yield Finding("device", OK, f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} used (no CUDA device; the compact pack does not need one)")


def _gsplat() -> Iterator[Finding]:
    import torch

    if find_spec("gsplat") is not None:
        yield Finding("gsplat", OK, version("gsplat"))
    elif torch.cuda.is_available():
        yield Finding("gsplat", WARNING, "not installed: frames on the GPU are splatted by the CPU",
                      "pip install 'near-relight[cuda]'; on Windows use gsplat's prebuilt wheels.")
    else:
        yield Finding("gsplat", NOTE, "not installed (only of use with a CUDA device)")


def _packs() -> Iterator[Finding]:
    from near.weights.manage import list_weights

    for row in list_weights():
        if row.state in ("shipped", "installed"):
            yield Finding(f"weights: {row.name}", OK, f"{row.state}, {row.size_mb} MB")
        elif row.name == "compact":
            yield Finding("weights: compact", PROBLEM, "the shipped models are missing", "Install near-relight again.")
        elif row.state.startswith("damaged"):
            yield Finding(f"weights: {row.name}", WARNING, row.state, f"near weights verify {row.name}, then near weights pull {row.name}.")
        else:
            yield Finding(f"weights: {row.name}", NOTE, f"not installed ({row.purpose})", f"near weights pull {row.name}")


def _compact_pack() -> Iterator[Finding]:
    from near.weights.integrity import verify_manifest
    from near.weights.packs import compact_dir

    if (compact_dir() / "manifest.json").is_file():
        verify_manifest(compact_dir(), "compact")
        yield Finding("compact checksums", OK, "every file is as it was shipped")


def _colour() -> Iterator[Finding]:
    import numpy as np

    from near.colour import agx_srgb

    shown = agx_srgb(np.full((1, 3), 0.18, np.float32))
    good = bool(np.isfinite(shown).all()) and 0.3 < float(shown.mean()) < 0.6
    yield Finding("AgX table", OK if good else PROBLEM, f"middle grey shows as {float(shown.mean()):.3f}", "" if good else "Install near-relight again.")


def _video() -> Iterator[Finding]:
    import imageio_ffmpeg

    tool = imageio_ffmpeg.get_ffmpeg_exe()
    result = subprocess.run([tool, "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    if "libx264" in result.stdout:
        yield Finding("video encoder", OK, f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()} with H.264")
    else:
        yield Finding("video encoder", WARNING, "ffmpeg has no H.264 encoder", "Write .gif or a folder of pictures, or reinstall imageio-ffmpeg.")


def _blender() -> Iterator[Finding]:
    if find_spec("bpy") is None:
        yield Finding("Blender module", NOTE, "not installed (only for comparisons with Cycles and for development)",
                      "pip install 'near-relight[blender]' on Python 3.11")
        return
    # In a process of its own: importing Blender here could hang this one when it ends.
    code = "import bpy, os, sys; print(bpy.app.version_string); sys.stdout.flush(); os._exit(0)"
    try:
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        yield Finding("Blender module", WARNING, "does not answer within a minute", "pip install --force-reinstall bpy")
        return
    if result.returncode == 0:
        yield Finding("Blender module", OK, result.stdout.strip().splitlines()[-1])
    else:
        said = (result.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("Blender module", WARNING, f"cannot be imported: {said}",
                      "On Debian and Ubuntu: apt-get install libx11-6 libxrender1 libxfixes3 libxi6 libxkbcommon0 libsm6 libgl1 libegl1")


def _resources() -> Iterator[Finding]:
    import psutil

    from near.weights.packs import weights_home

    memory = psutil.virtual_memory()
    enough = memory.available / 2**30 >= MEMORY_GB
    yield Finding("memory", OK if enough else WARNING, f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available",
                  "" if enough else f"Close programs: creating an asset wants {MEMORY_GB:g} GiB.")
    for name, folder in (("disc (here)", Path.cwd()), ("disc (cache)", weights_home())):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free / 2**30
        writable = os.access(folder, os.W_OK)
        state = PROBLEM if not writable and name != "disc (here)" else OK if free >= DISC_GB and writable else WARNING
        remedy = "" if state == OK else "Set NEAR_HOME to a folder with room that you may write to." if name == "disc (cache)" else "Work in a folder with room that you may write to."
        yield Finding(name, state, f"{free:.1f} GiB free{'' if writable else ', not writable'}", remedy)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_versions, _device, _gsplat, _packs, _compact_pack, _colour, _video, _blender, _resources)
