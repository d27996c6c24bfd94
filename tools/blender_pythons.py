"""Makes environments with other versions of Blender as a Python module, for the compatibility tests.

    python tools/blender_pythons.py                 all of them, into build/bpy
    python tools/blender_pythons.py 4.2.23          one of them

Each download is about 350 MB. Where the Python that a version needs is not on this machine, it says so and goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "build" / "bpy"
# version: (Python, numpy that it works with)
VERSIONS = {"4.2.23": ("3.11", "numpy<2"), "4.5.15": ("3.11", "numpy<2"), "5.2.3": ("3.13", "numpy>=2.2,<3")}


def python_in(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment(version: str) -> Path | None:
    """The interpreter that has this bpy, if it was made: in `$NEAR_BPY_PYTHONS` (a folder of environments) or build/bpy."""
    folder = Path(os.environ.get("NEAR_BPY_PYTHONS") or FOLDER) / version
    return python_in(folder) if (folder / "complete").is_file() else None


def find_python(wanted: str) -> str | None:
    """A command or path of Python `wanted` ("3.13") that runs and can make environments."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [sys.executable, shutil.which(f"python{wanted}"), *sorted(map(str, pyenv.glob(f"{wanted}.*/bin/python")), reverse=True)]
    for candidate in filter(None, candidates):
        if _is(candidate, wanted):
            return candidate
    if uv := shutil.which("uv"):
        for step in ("find", "install", "find"):            # it is downloaded only where there is none
            found = subprocess.run([uv, "python", step, wanted], capture_output=True, text=True)
            if step == "find" and found.returncode == 0 and _is(found.stdout.strip(), wanted):
                return found.stdout.strip()
    return None


def _is(command: str, wanted: str) -> bool:
    """Whether the command is a Python of that version which can make environments."""
    try:
        told = subprocess.run([command, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True)
    except OSError:
        return False
    return told.returncode == 0 and told.stdout.strip() == wanted


def make(version: str, folder: Path) -> bool:
    """Makes one; -> whether it is there."""
    python, numpy = VERSIONS[version]
    target = folder / version
    if (target / "complete").is_file():
        print(f"bpy {version}: ready")
        return True
    command = find_python(python)
    if command is None:
        print(f"bpy {version}: left out, there is no Python {python} here")
        return False
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run([command, "-m", "venv", str(target)], check=True)
    done = subprocess.run([str(python_in(target)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"bpy=={version}", numpy])
    if done.returncode != 0:
        print(f"bpy {version}: pip could not install it")
        return False
    (target / "complete").touch()
    print(f"bpy {version}: ready")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--into", type=Path, default=FOLDER)
    args = parser.parse_args()
    unknown = sorted(set(args.versions) - set(VERSIONS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(VERSIONS)}")
    return 0 if all([make(version, args.into) for version in args.versions or VERSIONS]) else 1


if __name__ == "__main__":
    sys.exit(main())
