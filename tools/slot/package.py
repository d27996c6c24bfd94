"""One file with all that a training slot needs, data and code, and never larger than what may travel.

Objects are chosen at random (fixed seed) until the size is reached. Lights travel smaller than they were, as Radiance
pictures, so that the other machine needs no OpenEXR. Weights are not in it: they go from slot to slot by themselves.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TOP = "slot"  # folder inside the archive
CODE = ("backend/near", "tools/slot", "tools/train_compact.sh", "pyproject.toml")
CODE_SUFFIXES = (".py", ".json", ".npz", ".sh", ".toml")
SPARE = 40_000  # bytes kept free for the archive's own headers


@dataclass(frozen=True)
class Contents:
    """What a package holds: counts, bytes, and how many objects had no room."""

    objects: int
    lights: int
    wheels: int
    bytes: int
    left_out: int
    names: tuple[str, ...] = field(default=(), repr=False)


def rgbe_bytes(rgb_lin709: np.ndarray) -> bytes:
    """A Radiance picture of linear float [H, W, 3]; relative error below 1 % in a pixel's brightest channel."""
    rgb = np.clip(rgb_lin709, 0, 1e6).astype(np.float32)
    peak = rgb.max(-1)
    _, exponent = np.frexp(np.maximum(peak, 1e-30))
    rgbe = np.zeros((*peak.shape, 4), np.uint8)
    rgbe[..., :3] = np.minimum(np.floor(rgb * np.exp2(8.0 - exponent)[..., None] + 0.5), 255)
    rgbe[..., 3] = np.clip(exponent + 128, 0, 255)
    rgbe[peak < 1e-30] = 0
    height, width = peak.shape
    return b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n" + f"-Y {height} +X {width}\n".encode() + rgbe.tobytes()


def code_files(root: Path = ROOT) -> list[Path]:
    """What runs there: the package without weights and samples, and this tool."""
    found = []
    for name in CODE:
        path = root / name
        found += [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.suffix in CODE_SUFFIXES]
    return [p for p in found if "__pycache__" not in p.parts and p.parent.name not in ("samples", "compact") and p.is_file()]


def write_package(out: Path, objects: list[Path], hdris: Path, *, wheels: Path | None = None, limit_mb: float = 60.0,
                  light_width: int = 512, most_objects: int | None = None) -> Contents:
    """Write the archive and say what is in it.

    Args: objects: folders of training objects (.npz), searched through; hdris: their lights; wheels: Python packages that the other machine
    lacks; limit_mb: 10^6 bytes.
    Raises:
        NearError: ``slot-too-big`` when not even one object fits; ``training-data-missing``; ``training-lights-missing``.
    """
    from near.errors import NearError
    from near.lighting import load_environment, resample_equirect
    from near.training.lights import LightLibrary
    from near.training.starter import object_files

    limit = int(limit_mb * 1e6)
    files: dict[str, bytes] = {f"code/{p.relative_to(ROOT).as_posix()}": p.read_bytes() for p in code_files()}
    sources, lights = object_files(objects), LightLibrary(hdris).paths
    for path in lights.values():
        small = resample_equirect(load_environment(path, allow_repair=True).rgb_lin709, light_width // 2, light_width)
        files[f"hdris/{path.stem}.hdr"] = rgbe_bytes(small.numpy())
    carried = sorted(wheels.glob("*.whl")) if wheels else []
    files |= {f"wheels/{p.name}": p.read_bytes() for p in carried}
    random.Random(0).shuffle(sources)
    base = len(_archive(files))
    chosen, size = [], base
    for path in sources[:most_objects]:
        grown = size + path.stat().st_size + 1200  # objects are compressed already; headers and names
        if grown + SPARE <= limit:
            chosen.append(path)
            size = grown
    if not chosen:
        raise NearError("slot-too-big", f"Code, lights and wheels alone are {base / 1e6:.1f} MB of {limit_mb:g} MB.",
                        "Carry fewer wheels, make the lights narrower (--light-width), or allow more (--limit-mb).")
    for path in chosen:
        files[f"objects/{path.resolve().parent.parent.name}_{path.name}"] = path.read_bytes()
    files["contents.json"] = json.dumps({"objects": len(chosen), "lights": list(lights), "wheels": [p.name for p in carried]}).encode()
    data = _archive(files)
    if len(data) > limit:
        raise NearError("slot-too-big", f"The package came out at {len(data) / 1e6:.1f} MB of {limit_mb:g} MB.", "Allow more (--limit-mb).")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".part")
    temporary.write_bytes(data)
    temporary.replace(out)
    return Contents(len(chosen), len(lights), len(carried), len(data), len(sources) - len(chosen), tuple(p.name for p in chosen))


def _archive(files: dict[str, bytes]) -> bytes:
    """tar.gz of files; the same content gives the same bytes."""
    raw = io.BytesIO()
    with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6, mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name in sorted(files):
            info = tarfile.TarInfo(f"{TOP}/{name}")
            info.size, info.mode = len(files[name]), 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(info, io.BytesIO(files[name]))
    return raw.getvalue()


def unpack(package: Path, folder: Path) -> Path:
    """Unpack into a folder; returns the folder of its contents.

    Raises:
        NearError: ``slot-unreadable``.
    """
    from near.errors import NearError

    try:
        with tarfile.open(package) as tar:
            tar.extractall(folder, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise NearError("slot-unreadable", f"The package {package} cannot be unpacked ({type(error).__name__}).",
                        "Name the slot.tar.gz that prepare made, or copy it again.") from error
    return folder / TOP
