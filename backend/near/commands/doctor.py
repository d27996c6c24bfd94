"""``near doctor``: what works here, what is missing, what to do about it."""

from __future__ import annotations

import argparse

from near.commands import common

MARKS = {"ok": "ok      ", "note": "-       ", "warning": "WARNING ", "problem": "PROBLEM "}


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("doctor", help="what works here", description="Examine this machine and this installation. Exit status 2 where the main job cannot work.")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from near.doctor import PROBLEM, as_dicts, examine, worst

    findings = examine()
    lines = []
    for f in findings:
        lines.append(f"{MARKS[f.state]}{f.name}: {f.detail}")
        if f.remedy:
            lines.append(f"{'':8}  -> {f.remedy}")
    verdict = worst(findings)
    lines.append("The main job cannot work here yet; see PROBLEM above." if verdict == PROBLEM else "The main job works here.")
    common.emit(args, {"verdict": verdict, "findings": as_dicts(findings)}, lines)
    return 2 if verdict == PROBLEM else 0
