"""Copies the modules that the backend and the add-on share, byte for byte; `--check` only compares.

The backend's are the source. They import the standard library, pyzmq and each other, nothing else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE, COPY = REPOSITORY / "backend" / "near", REPOSITORY / "blender_addon"
SHARED = ("wire.py", "wirecodec.py", "sharedmem.py", "connection.py", "frames.py", "client.py")


def differing() -> list[str]:
    """Names of the copies that are missing or not equal to their source."""
    return [name for name in SHARED
            if not (COPY / name).is_file() or (COPY / name).read_bytes() != (SOURCE / name).read_bytes()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="do not copy; exit 1 if a copy differs")
    stale = differing()
    if parser.parse_args().check:
        print("\n".join(f"differs: blender_addon/{name}" for name in stale) or "the copies are equal")
        return 1 if stale else 0
    for name in stale:
        (COPY / name).write_bytes((SOURCE / name).read_bytes())
        print(f"copied {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
