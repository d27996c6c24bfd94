"""``near``: the command line. Only the command that is asked for is imported, so help and errors are instant."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence

from near import __version__
from near.errors import Cancelled, NearError

# name -> (module with add_parser(subparsers), one line of help); several commands may share a module.
COMMANDS = {
    "create": ("near.commands.create", "photo (and a mesh, if there is one) -> relightable asset"),
    "encode": ("near.commands.encode", "mesh with PBR materials -> relightable asset"),
    "render": ("near.commands.render", "asset + HDRI + camera -> picture, passes, video"),
    "inspect": ("near.commands.inspect", "what an asset file holds"),
    "demo": ("near.commands.demo", "sample photo to turntable, light sweep and contact sheet"),
    "eval": ("near.commands.eval", "the four tasks of a bench folder, with scores and sheets"),
    "ablation": ("near.commands.ablation", "what the renderer is given, and how deep it is, against the scores"),
    "bench": ("near.commands.bench", "how fast this machine is, beside Cycles where Blender's module is there"),
    "doctor": ("near.commands.doctor", "what works here, what is missing, what to do about it"),
    "weights": ("near.weights.cli", "list, pull, verify and remove weights"),
    "serve": ("near.server.cli", "the backend as a service, for Blender and other clients"),
    "keys": ("near.server.cli", "keys for a backend on another machine"),
    "train": ("near.training.cli", "train the compact models"),
}
EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def build_parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of ``wanted`` only; the other commands are just listed."""
    parser = argparse.ArgumentParser(prog="near", description="NeAR Relight: photos become relightable neural assets.")
    parser.add_argument("--version", action="version", version=f"near {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    mounted: set[str] = set()
    for name, (module, text) in COMMANDS.items():
        if name in mounted:
            continue
        if wanted is not None and COMMANDS.get(wanted, ("",))[0] == module:
            importlib.import_module(module).add_parser(commands)
            mounted.update(n for n, (m, _) in COMMANDS.items() if m == module)
        else:
            commands.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 well, 2 an error with a remedy, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    wanted = next((a for a in argv if not a.startswith("-")), None)
    _terminate_like_interrupt()
    try:
        args = build_parser(wanted).parse_args(argv)
        return args.run(args) or 0
    except NearError as error:
        return report_error(error, as_json="--json" in argv)
    except MemoryError:
        return report_error(NearError("out-of-memory", "There is not enough memory for this.",
                                      "Choose a smaller size, or close other programs."), as_json="--json" in argv)
    except KeyboardInterrupt:
        print("\nStopped; nothing half-written was left behind.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `near ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def report_error(error: NearError, as_json: bool = False) -> int:
    """Show an error in two lines on stderr (with ``--json`` also as an object on stdout); returns the exit status."""
    if as_json:
        print(json.dumps({"error": error.as_dict()}), flush=True)
    print(f"Error [{error.code}]: {error.what}\nWhat to do: {error.remedy}", file=sys.stderr, flush=True)
    return EXIT_INTERRUPTED if isinstance(error, Cancelled) else EXIT_ERROR


def _terminate_like_interrupt() -> None:
    """A polite kill cleans up as Ctrl-C does. Signals belong to the main thread only."""
    def stop(signum, frame):
        raise KeyboardInterrupt

    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, stop)
    except ValueError:
        pass


if __name__ == "__main__":
    sys.exit(main())
