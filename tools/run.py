#!/usr/bin/env python3
"""Set up and run the project from a fresh clone; needs nothing but a Python.

    python3 tools/run.py setup      make .venv, install everything, print its interpreter's path as the last line
    python3 tools/run.py demo       the same with what the demo needs, then the demo (further arguments go to it)
    python3 tools/run.py test       the same with what the tests need, then the tests (further arguments go to pytest)

A second run finds the environment as it left it and starts at once.
"""

from __future__ import annotations

import argparse
import ctypes.util
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
STAMP = VENV / "near-setup.json"
LOG = VENV / "near-setup.log"
# Blender's module has wheels for 3.11, so that comes first; the others run everything else.
PYTHONS = ("3.11", "3.12", "3.13")
EXTRAS = {"setup": {"dev", "blender"}, "demo": set(), "test": {"dev", "blender", "train", "ray"}}
# What the bpy wheel loads from the system, and the Debian package that holds it.
SYSTEM_LIBRARIES = {"X11": "libx11-6", "Xrender": "libxrender1", "Xfixes": "libxfixes3", "Xi": "libxi6",
                    "xkbcommon": "libxkbcommon0", "SM": "libsm6", "GL": "libgl1", "EGL": "libegl1"}


def say(text: str) -> None:
    print(f"[near] {text}", flush=True)


def fail(text: str) -> None:
    sys.stdout.flush()
    sys.exit(f"[near] {text}")


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def usable(command: list[str]) -> str | None:
    """The version ("3.11") of an interpreter that can make environments, else None."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        found = subprocess.run([*command, "-c", code], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    version = found.stdout.strip()
    return version if found.returncode == 0 and version in PYTHONS else None


def find_python() -> list[str]:
    """Command of the best interpreter of this machine."""
    for wanted in PYTHONS:
        candidates = [[sys.executable], [f"python{wanted}"], *([["py", f"-{wanted}"]] if os.name == "nt" else [])]
        for command in candidates:
            if (command[0] == sys.executable or shutil.which(command[0])) and usable(command) == wanted:
                return command
    fail(f"No Python {', '.join(PYTHONS)} that can make environments was found. Install one of them "
         "(on Debian and Ubuntu: python3 with python3-venv; elsewhere: python.org) and run this again.")


def fingerprint() -> str:
    """Hash of what decides what gets installed."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", CONSTRAINTS):
        digest.update(path.read_bytes())
    digest.update(str(ROOT).encode())  # an editable install points at its checkout
    return digest.hexdigest()


def installed() -> set[str] | None:
    """Extras the environment holds for the present files, None when it has to be made or brought up to date."""
    try:
        stamp = json.loads(STAMP.read_text())
        return set(stamp["extras"]) if stamp["fingerprint"] == fingerprint() and venv_python().exists() else None
    except (OSError, ValueError, KeyError):
        return None


def make_environment() -> None:
    if venv_python().exists() and usable([str(venv_python())]):
        return
    command = find_python()
    say(f"Making the environment .venv with {' '.join(command)} (Python {usable(command)}).")
    subprocess.run([*command, "-m", "venv", "--clear", str(VENV)], check=True, stdin=subprocess.DEVNULL)


def pip_install(extras: set[str]) -> None:
    """Install the project, editable, with the pinned versions; pip's full output goes to the log, its steps to the screen."""
    target = f"{ROOT}[{','.join(sorted(extras))}]" if extras else str(ROOT)
    command = [str(venv_python()), "-m", "pip", "install", "--disable-pip-version-check", "--no-input",
               "--constraint", str(CONSTRAINTS), "--editable", target]
    say("Installing the project and what it needs (PyTorch is the large part; the first time takes a few minutes)"
        + (f", with {', '.join(sorted(extras))}." if extras else "."))
    start, tail = time.monotonic(), []
    with LOG.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   text=True, encoding="utf-8", errors="replace")
        for line in process.stdout:
            log.write(line)
            log.flush()
            tail = [*tail[-24:], line.rstrip()]
            step = line.strip()
            if step.startswith(("Collecting", "Downloading", "Building", "Installing collected", "ERROR", "WARNING: Retrying")):
                print(f"  {time.monotonic() - start:4.0f} s  {step[:110]}", flush=True)
        if process.wait():
            print("\n".join(tail), flush=True)
            fail(f"The installation failed; the last lines are above, all of it is in {LOG.relative_to(ROOT)}. "
                 "A network error passes when the command is run again; it goes on where it stopped.")
    say(f"Installed in {time.monotonic() - start:.0f} s.")


def tell_missing_libraries() -> None:
    """Blender's module is optional: without its system libraries its tests are skipped, so only say what is missing."""
    if not sys.platform.startswith("linux"):
        return
    missing = [package for library, package in SYSTEM_LIBRARIES.items() if ctypes.util.find_library(library) is None]
    if missing:
        say(f"Blender's module needs system libraries that are not here: {' '.join(missing)}. "
            f"On Debian and Ubuntu: sudo apt-get install {' '.join(missing)}. Without them what needs Blender is skipped.")


def setup(extras: set[str]) -> None:
    """Bring .venv up to date with at least ``extras``."""
    have = installed()
    if have is not None and extras <= have:
        say("The environment is up to date.")
        return
    make_environment()
    wanted = extras | (have or set())
    pip_install(wanted)
    STAMP.write_text(json.dumps({"fingerprint": fingerprint(), "extras": sorted(wanted)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=sorted(EXTRAS))
    parser.add_argument("--extras", help="comma-separated extras of pyproject.toml instead of the action's own")
    args, passed_on = parser.parse_known_args()
    extras = EXTRAS[args.action] if args.extras is None else {e for e in args.extras.split(",") if e}
    setup(extras)
    python = str(venv_python())
    if args.action == "setup":
        print(python, flush=True)
        return 0
    if args.action == "demo":
        say("Running: near demo")
        command = [python, "-m", "near", "demo", *passed_on]
    else:
        if "blender" in extras:
            tell_missing_libraries()
        say("Running: pytest")
        command = [python, "-m", "pytest", *passed_on]
    try:
        # Nothing is printed after this: the last line is the demo's or pytest's own.
        return subprocess.call(command, cwd=ROOT)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
