"""Makes the backend's environment; run by Blender's Python as a process of its own, standard library only.

Each line of the news file is JSON: {"stage", "fraction"}, at a failure also {"error", "remedy"}. What pip says goes to
standard output, which the add-on keeps as the log. An interrupted run is taken up again by the next one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

STAMP = "near-environment.json"
NEEDED_GB = 6.0                          # with a CUDA build of torch
STEPS_OF_PIP = 40                       # about as many packages are collected, downloaded and installed


class Trouble(Exception):
    """What happened and what to do."""


class News:
    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8")

    def tell(self, stage: str, fraction: float, **more: str) -> None:
        print(f"[{fraction:4.0%}] {stage}", flush=True)
        self._file.write(json.dumps({"stage": stage, "fraction": round(fraction, 3), **more}) + "\n")
        self._file.flush()


def environment_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment(folder: Path, needed_gb: float, news: News) -> Path:
    """The environment's interpreter; made anew where it is missing or does not run."""
    python = environment_python(folder)
    if python.is_file() and subprocess.run([str(python), "-c", "import pip"], capture_output=True).returncode == 0:
        return python
    news.tell("making an environment", 0.02)
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise Trouble("This Blender's Python is not one that the backend runs on (3.11 to 3.13).",
                      "Install Python 3.11 to 3.13, near-relight in it, and choose it in the preferences.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < needed_gb * 1024 ** 3:
        raise Trouble(f"There is too little free space for the backend (it needs about {needed_gb:g} GB).", f"Free some space in {folder.parent}.")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)])
    if made.returncode != 0 or not python.is_file():
        raise Trouble("Blender's Python could not make an environment (its venv or ensurepip module may be missing).",
                      "Install Python 3.11 to 3.13, near-relight in it, and choose it in the preferences.")
    return python


def install(python: Path, source: str, torch_index: str, news: News) -> None:
    """pip, with its lines as news."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--upgrade"]
    if torch_index:
        command += ["--extra-index-url", torch_index]
    process = subprocess.Popen([*command, source], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace")
    steps, last = 0, ""
    for line in process.stdout:
        print(line.rstrip(), flush=True)
        line = line.strip()
        last = line if line.startswith("ERROR") else last
        if line.startswith(("Collecting", "Downloading", "Using cached", "Installing collected", "Building")):
            steps += 1
            news.tell(line[:100], 0.05 + 0.8 * (1 - math.exp(-steps / STEPS_OF_PIP)))
    if process.wait() != 0:
        raise Trouble(f"The backend's packages could not be installed. {last}"[:400],
                      "Check the connection to the internet and try again; it goes on where it stopped.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--source", required=True, help="what pip installs: a wheel, a checkout, or a name")
    parser.add_argument("--news", type=Path, required=True)
    parser.add_argument("--torch-index", default="")
    parser.add_argument("--needed-gb", type=float, default=NEEDED_GB, help="free space without which nothing is begun")
    args = parser.parse_args()
    news = News(args.news)
    try:
        (args.folder / STAMP).unlink(missing_ok=True)
        python = make_environment(args.folder, args.needed_gb, news)
        install(python, args.source, args.torch_index, news)
        news.tell("trying it out", 0.9)
        tried = subprocess.run([str(python), "-c", "import near.server.cli, near; print(near.__version__)"], capture_output=True, text=True)
        print(tried.stdout, tried.stderr, flush=True)
        if tried.returncode != 0:
            raise Trouble("The backend was installed but does not start.", "Look into the log, and set it up again.")
        version = tried.stdout.strip().splitlines()[-1]
        (args.folder / STAMP).write_text(json.dumps({"version": version, "source": os.path.basename(args.source)}), encoding="utf-8")
        news.tell(f"the backend {version} is ready", 1.0)
        return 0
    except Trouble as trouble:
        news.tell("failed", 0.0, error=trouble.args[0], remedy=trouble.args[1])
    except OSError as error:
        news.tell("failed", 0.0, error=f"The environment could not be written ({error.strerror}).", remedy="Check the free space and the folder's permissions.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
