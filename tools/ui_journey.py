"""A scripted user's journey through the add-on in a real Blender window, with a screenshot of each step.

    sudo python tools/ui_journey.py --root /var/tmp/near-stage --out out/journey

The stage is a Debian system in a folder (made on the first run, about 2 GB; `--root` may be kept). The backend is this
checkout's, run by `--python`. It prints what was measured; the screenshots, and journey.json, are in `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY / "tools") not in sys.path:
    sys.path.insert(0, str(REPOSITORY / "tools"))

import build_extension  # noqa: E402
from journey import stage  # noqa: E402


def journey(root: Path, out: Path, python: Path, archive: Path, *, size: str = "1280x800", timeout_s: float = 1500,
            quick: bool = False, setup: bool = False, steps: list[str] = ()) -> dict:
    """Runs it (`steps`: only these); -> what `inside.py` measured.

    Raises:
        RuntimeError: it did not arrive at its end; with Blender's last words.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="near-journey-") as scratch:
        folder = Path(scratch)
        shutil.copyfile(archive, folder / archive.name)
        bound = [REPOSITORY, folder, *_python_folders(python)]
        photos = root / "home" / "artist" / "photos"       # what the screenshots show as the photo's place
        photos.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / "backend" / "near" / "samples" / "teapot.png", photos / "teapot.png")
        plan = {"folder": str(folder), "archive": archive.name, "python": str(python), "photos": str(Path("/", "home", "artist", "photos")),
                "quick": quick, "setup": setup, "steps": list(steps)}
        environment = {"LIBGL_ALWAYS_SOFTWARE": "1", "NEAR_JOURNEY": json.dumps(plan), "NEAR_HOME": str(folder / "home"),
                       "BLENDER_USER_RESOURCES": str(folder / "user"), "OMP_NUM_THREADS": "1"}
        if setup:                                          # how this machine reaches its package index
            environment |= {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_CERT_")) or key.lower().endswith("_proxy")}
        with stage.mounted(root, bound), stage.screen(root, size) as name:
            width, height = size.split("x")
            command = ["blender", "--factory-startup", "-p", "0", "0", width, height, "--python",
                       str(REPOSITORY / "tools" / "journey" / "inside.py")]
            with open(out / "blender.log", "wb") as log:
                process = subprocess.Popen(stage.entered(root, command, {**environment, "DISPLAY": name}), stdout=log, stderr=subprocess.STDOUT,
                                           stdin=subprocess.DEVNULL)
                try:
                    process.wait(timeout_s)
                except subprocess.TimeoutExpired:
                    pass                                   # what it wrote so far says where it stood
                finally:
                    if process.poll() is None:
                        process.kill()
                        process.wait(30)
                    for picture in sorted(folder.glob("*.png")):
                        shutil.copyfile(picture, out / picture.name)
            left = _still_running(folder)
        words = (out / "blender.log").read_text(errors="replace").splitlines()
        result = folder / "journey.json"
        told = json.loads(result.read_text()) if result.is_file() else {"error": "it did not begin"}
        told["exit"], told["processes_left"] = process.returncode, left
        (out / "journey.json").write_text(json.dumps(told, indent=1))
    if told.get("error") or process.returncode != 0:
        raise RuntimeError(f"{told.get('step')}: {told.get('error') or 'Blender ended with ' + str(process.returncode)}\n" + "\n".join(words[-15:]))
    return told


def _python_folders(python: Path) -> list[Path]:
    """The environment, and the installation that it was made from."""
    environment = python.parent.parent
    base = Path(os.path.realpath(python)).parent.parent
    found = [] if environment.is_relative_to(REPOSITORY) else [environment]
    return found + [base]


def unusable(python: Path) -> str:
    """Why this Python's environment cannot serve inside the stage; empty when it can."""
    if Path(os.path.realpath(python)).parent.parent in (Path("/usr"), Path("/")):
        return f"{python} is the system's own Python, which is another one inside the stage"
    return ""


def _still_running(folder: Path) -> list[str]:
    """Backends of this journey that outlived Blender (they are given a few seconds)."""
    import time

    for _ in range(40):
        left = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if str(folder).encode() in path.read_bytes() and b"near" in (path.parent / "cmdline").read_bytes():
                    left.append(path.parent.name)
            except OSError:
                pass
        if not left:
            break
        time.sleep(0.25)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of the stage; made when it is not there")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "out" / "journey")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the environment that has near-relight; default: this one")
    parser.add_argument("--archive", type=Path, help="the extension; default: built now")
    parser.add_argument("--setup", action="store_true", help="set the backend up by the add-on's own button (downloads PyTorch)")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller frames")
    parser.add_argument("--steps", nargs="*", default=[], help="only these steps, by their names in tools/journey/inside.py")
    parser.add_argument("--make-only", action="store_true", help="make the stage, and go")
    args = parser.parse_args()
    if why := stage.missing():
        sys.exit(f"The stage cannot be made here: {why}.")
    stage.make(args.root.resolve())
    if args.make_only:
        print(f"The stage is there: {args.root}")
        return 0
    archive = args.archive
    if archive is None:
        work = REPOSITORY / "build" / "extension"
        archive = build_extension.build(work / "journey", work, ["linux-x64"], with_backend=args.setup, program=None)
    told = journey(args.root.resolve(), args.out, args.python, archive, quick=args.quick, setup=args.setup, steps=args.steps)
    print(json.dumps({key: value for key, value in told.items() if key != "steps"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
