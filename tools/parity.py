"""Compare every group of a fixture folder with our modules.

    python tools/parity.py DIR [--group NAME ...] [--json]

Prints, per tensor, the largest absolute error and the tolerance used; exit status 1 if anything fails or is missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]  # this file runs as a script: `parity_checks` and `tools.parity_checks` both resolve

from parity_checks import AREAS, Row  # noqa: E402


def discover() -> dict[str, list[Callable[[Path], list[Row]]]]:
    """Group name -> checks, from the modules of `parity_checks` that exist; several areas may check parts of one group."""
    checks: dict[str, list] = {}
    for area in AREAS:
        try:
            module = importlib.import_module(f"parity_checks.{area}")
        except ModuleNotFoundError as error:
            if error.name != f"parity_checks.{area}":
                raise
            continue
        for name, check in vars(module).items():
            if name.startswith("check_") and check.__module__ == module.__name__:
                checks.setdefault(name.removeprefix("check_"), []).append(check)
    return checks


def groups_in(folder: Path) -> list[str]:
    """Groups a fixture folder holds."""
    return sorted(p.stem for p in folder.glob("*.safetensors"))


def run(folder: Path, wanted: list[str] | None = None) -> list[Row]:
    """All rows; a group without a check, or whose check raises, is one failed row."""
    checks, rows = discover(), []
    for group in wanted or groups_in(folder):
        if group not in checks:
            rows.append(Row(group, "-", float("inf"), 0.0, False, "no check for this group"))
            continue
        for check in checks[group]:
            try:
                rows += check(folder) or [Row(group, "-", float("inf"), 0.0, False, "nothing was compared")]
            except Exception as error:  # a broken group must not hide the others
                traceback.print_exc()
                rows.append(Row(group, "-", float("inf"), 0.0, False, f"{type(error).__name__}: {error}"))
    return rows


def table(rows: list[Row]) -> str:
    """Aligned text."""
    names = [f"{r.group}/{r.tensor}" for r in rows]
    width = max(map(len, names), default=0)
    return "\n".join(f"{n:<{width}}  {r.max_abs:9.2e}  tol {r.tol:7.1e}  {'ok' if r.ok else 'FAIL':4}  {r.note}".rstrip()
                     for n, r in zip(names, rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help="folder with the fixtures' .safetensors and .json files")
    parser.add_argument("--group", action="append", help="only this group (repeatable)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    if not args.dir.is_dir():
        print(f"{args.dir} is not a folder. Give the folder that holds the fixture files.", file=sys.stderr)
        return 2
    rows = run(args.dir, args.group)
    print(json.dumps([asdict(r) for r in rows], indent=1) if args.json else table(rows))
    failed = sum(not r.ok for r in rows)
    if not args.json:
        print(f"\n{len({r.group for r in rows})} groups, {len(rows)} tensors, {failed} failed")
    return int(failed > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
