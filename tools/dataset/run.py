"""A job from start to end: what is left to do, the workers, the quarantine, the reports. Can be killed at any time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dataset.job import Item, JobConfig, claim, list_items
from dataset.lights import prepare_lights
from dataset.pool import Machine, Result, run_local, run_ray
from dataset.report import write_reports


@dataclass(frozen=True)
class Options:
    """How a job is run, not what comes out. processes and threads per process (0: share the cores); ray: address of a cluster,
    or None; timeout_s: an object that takes longer is set aside; retry: try quarantined objects again."""

    processes: int = 1
    threads: int = 0
    ray: str | None = None
    timeout_s: float = 900.0
    retry: bool = False


def run_job(config: JobConfig, out: Path, *, assets: Path | None = None, hdris: Path | None = None, options: Options = Options(),
            tell: Callable[[str], None] = print) -> dict:
    """Make what is missing of the job in ``out``; returns the report.

    Objects are in ``out/objects/<shard>/<key>.npz``, lights in ``out/hdris``, objects that failed in ``out/quarantine.json``,
    one line for each attempt in ``out/log.jsonl``; ``index.json``, ``report.json``, ``report.md`` and ``contact_sheet.png`` are
    written at the end, also of a job that is stopped.

    Raises:
        JobError: the job cannot start. NearError: files that cannot be read or written.
    """
    import os

    items = list_items(config, assets)
    lights = prepare_lights(out / "hdris", config, hdris)
    claim(out, config, lights)
    quarantine = Quarantine(out / "quarantine.json")
    path_of = lambda item: out / item.file(config.shards)  # noqa: E731
    waiting = [i for i in items if not path_of(i).is_file() and (options.retry or i.key not in quarantine)]
    for item in items:
        path_of(item).parent.mkdir(parents=True, exist_ok=True)
    for half in out.glob("objects/*/.*.part.npz"):  # what a kill left behind
        half.unlink(missing_ok=True)
    tell(f"{len(items)} objects: {sum(path_of(i).is_file() for i in items)} made before, {len(waiting)} to make, {len(quarantine)} in quarantine")
    progress = _Progress(out / "log.jsonl", quarantine, len(waiting), tell)
    threads = options.threads or max((os.cpu_count() or 1) // max(options.processes, 1), 1)
    machine = Machine(config, (out / "hdris").resolve(), None if assets is None else assets.resolve(), threads, options.timeout_s)
    try:
        if waiting and options.ray is not None:
            run_ray(waiting, machine, options.ray, path_of, progress)
        elif waiting:
            run_local(waiting, machine, options.processes, path_of, progress)
    finally:
        report = write_reports(out, items, config, quarantine.entries, progress.session())
    tell(f"{report['objects']} objects in {out}, {len(quarantine)} in quarantine; report.md and contact_sheet.png tell more")
    return report


class Quarantine:
    """Objects that failed, with the reason, in a file that is whole at every moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, result: Result) -> None:
        self.entries[result.item.key] = {"source": result.item.asset or result.item.kind, "status": result.status, "reason": result.reason}
        self._write()

    def remove(self, key: str) -> None:
        if self.entries.pop(key, None) is not None:
            self._write()

    def _write(self) -> None:
        from near.atomic import write_bytes

        write_bytes(self.path, (json.dumps(dict(sorted(self.entries.items())), indent=1) + "\n").encode())


class _Progress:
    """Takes results: the log, the quarantine, a line with the time left."""

    def __init__(self, log: Path, quarantine: Quarantine, total: int, tell: Callable[[str], None]) -> None:
        self.log, self.quarantine, self.total, self.tell = log, quarantine, total, tell
        self.start, self.done, self.made, self.cpu_seconds = time.monotonic(), 0, 0, 0.0

    def __call__(self, result: Result) -> None:
        self.done += 1
        if result.status == "made":
            self.made += 1
            self.cpu_seconds += result.cpu_seconds
            self.quarantine.remove(result.item.key)
        else:
            self.quarantine.add(result)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": result.item.key, "status": result.status, "seconds": round(result.seconds, 2),
                                   "cpu_seconds": round(result.cpu_seconds, 2), "reason": result.reason,
                                   **({"node": result.where} if result.where else {})}) + "\n")
        spent = time.monotonic() - self.start
        left = spent / self.done * (self.total - self.done)
        what = f"{result.seconds:.1f} s" if result.status == "made" else f"set aside: {result.reason}"
        self.tell(f"[{self.done}/{self.total}] {result.item.key}  {what}  (about {left / 60:.0f} min left)")

    def session(self) -> dict:
        """Throughput of this run."""
        spent = time.monotonic() - self.start
        return {"made": self.made, "wall_seconds": round(spent, 1), "objects_per_hour": round(self.made / spent * 3600, 1) if self.made else 0.0,
                "core_seconds_per_object": round(self.cpu_seconds / self.made, 2) if self.made else None}
