"""Builds the Blender extension: near_relight-VERSION.zip and a static repository around it.

    python tools/build_extension.py                     into dist/extension
    python tools/build_extension.py --no-backend        without the backend's wheel (small; the backend is then installed by hand)

The pyzmq wheels of all platforms are downloaded by pip into a build folder, checked by it, and never kept in the source tree.
The zip is checked by Blender's own program, which is part of the bpy wheel (or give it with --blender-ext).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "blender_addon"
LEFT_OUT = {"__pycache__"}
# What pip is asked for: Python 3.11 has a wheel of its own, 3.12 and later share one. Platform tags: the oldest that serve.
PLATFORMS = {"linux-x64": ["manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_26_x86_64"],
             "windows-x64": ["win_amd64"], "macos-x64": ["macosx_10_15_x86_64", "macosx_10_15_universal2"],
             "macos-arm64": ["macosx_11_0_arm64", "macosx_10_15_universal2"]}
PYTHONS = {"3.11": "cp311", "3.13": "cp313"}
PYZMQ = "pyzmq>=27,<28"
ZIP_DATE = (2026, 1, 1, 0, 0, 0)            # equal sources give equal zips


def version_of(manifest: str) -> str:
    return re.search(r'^version = "([^"]+)"', manifest, re.M)[1]


def fetch_wheels(folder: Path, platforms: list[str], index_options: list[str]) -> list[Path]:
    """One wheel per platform and kind of Python; -> files named as Blender wants them."""
    found: dict[str, Path] = {}
    for platform in platforms:
        for python, tag in PYTHONS.items():
            target = folder / f"{platform}-{tag}"
            if not any(target.glob("*.whl")):
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
                           "--implementation", "cp", "--python-version", python, "--dest", str(target)]
                command += [word for tags in PLATFORMS[platform] for word in ("--platform", tags)]
                command += [word for abi in (tag, "abi3") for word in ("--abi", abi)]
                if subprocess.run([*command, *index_options, PYZMQ]).returncode != 0:
                    sys.exit(f"No pyzmq wheel for {platform}, Python {python} could be downloaded; see pip's message above.")
            wheel = next(target.glob("*.whl"))
            found[blender_name(wheel.name)] = wheel
    return [_renamed(wheel, folder / "named" / name) for name, wheel in sorted(found.items())]


def blender_name(wheel: str) -> str:
    """Blender takes, of several wheels, each whose Python tag it can match exactly: a `cp312-abi3` wheel beside a `cp311` one
    would break Python 3.13, so it goes by the name of the newest Python that it is for."""
    return re.sub(r"-cp3\d+-abi3-", "-cp313-cp313-", wheel)


def _renamed(wheel: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(wheel, target)
    return target


def build_backend_wheel(folder: Path) -> Path:
    """The backend as a wheel, shipped weights and all, so that add-on and backend are always of one release."""
    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"                # a copy: setuptools would leave a build folder in the checkout
    shutil.copytree(REPOSITORY / "backend" / "near", source / "backend" / "near", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--wheel-dir", str(folder), str(source)]
    if subprocess.run(command).returncode != 0:
        sys.exit("The backend's wheel could not be built; see pip's message above.")
    return next(folder.glob("near_relight-*.whl"))


def manifest_with(manifest: str, wheels: list[Path], platforms: list[str]) -> str:
    """The manifest with the wheels and platforms filled in."""
    names = "".join(f'    "./wheels/{wheel.name}",\n' for wheel in wheels)
    filled = manifest.replace("wheels = []\n", f"wheels = [\n{names}]\n").replace(
        "# tools/build_extension.py fills in the wheels.\n", f"platforms = [{', '.join(repr(p) for p in platforms)}]\n".replace("'", '"'))
    if filled.count("wheels = [") != 1 or not names:
        sys.exit("The manifest has no place for the wheels.")
    return filled


def write_zip(target: Path, manifest: str, wheels: list[Path], backend: Path | None) -> None:
    """Sorted and dated alike, so that equal sources give an equal file."""
    files = {path.relative_to(SOURCE).as_posix(): path.read_bytes() for path in SOURCE.rglob("*")
             if path.is_file() and not LEFT_OUT & set(path.parts) and not path.name.startswith(".") and path.suffix != ".pyc"}
    files["blender_manifest.toml"] = manifest.encode()
    files |= {f"wheels/{wheel.name}": wheel.read_bytes() for wheel in wheels}
    if backend is not None:
        files[f"backend/{backend.name}"] = backend.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, ZIP_DATE)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, files[name])
    part.replace(target)


def find_blender_ext() -> Path | None:
    """Blender's extension program, in the bpy package of this environment."""
    spec = importlib.util.find_spec("bpy")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for found in Path(folder).glob("*/scripts/addons_core/bl_pkg/cli/blender_ext.py"):
            return found
    return None


def blender_ext(program: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        sys.exit(f"Blender's program refused ({arguments[0]}):\n{done.stdout}{done.stderr}")


def build(output: Path, work: Path, platforms: list[str], with_backend: bool = True, program: Path | None = None,
          index_options: list[str] = ()) -> Path:
    """-> the zip, in `output`, with index.json beside it. Exits with a message when something fails."""
    manifest = (SOURCE / "blender_manifest.toml").read_text(encoding="utf-8")
    wheels = fetch_wheels(work / "pyzmq", platforms, list(index_options))
    backend = build_backend_wheel(work / "backend") if with_backend else None
    target = output / f"near_relight-{version_of(manifest)}.zip"
    write_zip(target, manifest_with(manifest, wheels, platforms), wheels, backend)
    if program is not None:
        blender_ext(program, "validate", str(target))
        blender_ext(program, "server-generate", f"--repo-dir={output}")
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "dist" / "extension")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "extension", help="where wheels are downloaded to; kept for the next build")
    parser.add_argument("--platforms", default=",".join(PLATFORMS), help="default: %(default)s")
    parser.add_argument("--no-backend", action="store_true")
    parser.add_argument("--blender-ext", type=Path, help="Blender's blender_ext.py; default: that of the bpy package")
    parser.add_argument("--pip-option", action="append", default=[], help="handed on to pip download, e.g. --pip-option=--find-links=FOLDER")
    args = parser.parse_args()
    program = args.blender_ext or find_blender_ext()
    target = build(args.output, args.work, args.platforms.split(","), not args.no_backend, program, args.pip_option)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    checked = "checked by Blender's own program" if program is not None else "NOT checked: no bpy here, and no --blender-ext"
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, sha256 {digest}, {checked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
