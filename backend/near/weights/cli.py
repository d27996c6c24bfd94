"""``near weights``: the command line of :mod:`near.weights.manage`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from near.errors import NearError
from near.weights import manage
from near.weights.packs import PACKS, PARTS, Part


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the ``weights`` command; its namespace carries ``run(args) -> exit code``."""
    parser = subparsers.add_parser("weights", help="list, pull, verify and remove weights")
    commands = parser.add_subparsers(dest="weights_command", required=True)

    listing = commands.add_parser("list", help="what there is and what is installed")
    listing.add_argument("--json", action="store_true", help="machine-readable")
    listing.set_defaults(run=_list)

    pull = commands.add_parser("pull", help="download a pack or a part, after showing its licences",
                               epilog="Checksums that are not known in advance are pinned on the first pull.")
    pull.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join([*PACKS, *PARTS])}")
    pull.add_argument("--accept-licences", action="store_true", help="accept the licences shown, without asking")
    pull.add_argument("--from", dest="location", metavar="FOLDER_OR_URL", help="local folder or mirror instead of the hub")
    pull.add_argument("--update", action="store_true", help="take the present revision, forget the pinned one")
    pull.add_argument("--offline", action="store_true", help="never touch the network")
    pull.set_defaults(run=_pull)

    verify = commands.add_parser("verify", help="hash the installed files again")
    verify.add_argument("names", nargs="*", metavar="NAME")
    verify.add_argument("--offline", action="store_true", help="no effect: verifying never touches the network")
    verify.set_defaults(run=_verify)

    remove = commands.add_parser("remove", help="delete installed weights")
    remove.add_argument("names", nargs="+", metavar="NAME")
    remove.set_defaults(run=_remove)
    return parser


def _list(args: argparse.Namespace) -> int:
    rows = manage.list_weights()
    if args.json:
        print(json.dumps([{**asdict(row), "path": str(row.path) if row.path else None} for row in rows], indent=1))
        return 0
    width = max(len(row.name) for row in rows)
    for row in rows:
        revision = f" @{row.revision[:12]}" if row.revision else ""
        print(f"{row.name:<{width}}  {row.state:<10}  {row.size_mb:>5} MB  {row.licence}{revision}\n{'':<{width}}  {row.purpose}")
    return 0


def _pull(args: argparse.Namespace) -> int:
    def accept(part: Part) -> bool:
        print(manage.licence_text(part))
        if args.accept_licences:
            return True
        if not sys.stdin.isatty():
            raise NearError("licence-unanswered", f"The licence of {part.name} must be accepted first.",
                            "Run the command again with --accept-licences.")
        return input("Accept? [y/N] ").strip().lower() in ("y", "yes")

    manage.pull(args.names, accept=accept, location=args.location, offline=args.offline, update=args.update)
    return 0


def _verify(args: argparse.Namespace) -> int:
    manage.verify(args.names)
    return 0


def _remove(args: argparse.Namespace) -> int:
    manage.remove(args.names)
    return 0
