"""Many Blenders: processes on this machine, or actors of a Ray cluster. Each object comes out the same either way."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dataset.job import Item, JobConfig, JobError

TOOLS = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "dataset.worker")
RENEW_AFTER = 60  # objects: Blender's memory grows slowly
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Result:
    """status: ``made``, ``refused`` (the object itself is at fault), ``crashed`` or ``slow`` (the process had to be replaced);
    where: node of a cluster."""

    item: Item
    status: str
    reason: str | None
    seconds: float
    cpu_seconds: float = 0.0
    where: str | None = None


@dataclass(frozen=True)
class Machine:
    """What a worker needs to know of its machine: folders, threads for each Blender, seconds an object may take."""

    config: JobConfig
    lights: Path
    assets: Path | None
    threads: int
    timeout_s: float


class Blender:
    """A worker process, started when first needed and replaced when it dies, hangs or has worked long."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.process: subprocess.Popen | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="near-worker-")
        self.made = 0

    def make(self, item: Item, output: Path) -> Result:
        """Make the object's file at ``output``."""
        start = time.monotonic()
        if self.process is None or self.process.poll() is not None or self.made >= RENEW_AFTER:
            self.close()
            self._start()
            if self._answer(START_TIMEOUT_S)[0] is None:
                raise JobError(f"Blender's Python module does not start ({self._last_words()}). With Python 3.11: pip install 'near-relight[blender]'.")
        self._order({"item": asdict(item), "output": str(output)})
        answer, slow = self._answer(self.machine.timeout_s)
        seconds = time.monotonic() - start
        if answer is None:
            said = self._last_words()
            self.close()
            limit = f"it took longer than {self.machine.timeout_s:.0f} s"
            return Result(item, "slow", limit, seconds) if slow else Result(item, "crashed", f"Blender ended ({said})", seconds)
        self.made += 1
        return Result(item, "made" if answer["ok"] else "refused", answer["reason"], seconds, answer["cpu_seconds"])

    def _start(self) -> None:
        settings = Path(self.folder.name) / "settings.json"
        settings.write_text(json.dumps({"config": asdict(self.machine.config), "lights": str(self.machine.lights), "threads": self.machine.threads,
                                        "assets": None if self.machine.assets is None else str(self.machine.assets)}), encoding="utf-8")
        paths = [str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(self.machine.threads)}
        self.errors = (Path(self.folder.name) / "stderr").open("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen([*COMMAND, str(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True, env=environment)
        self.made = 0

    def _order(self, order: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, OSError):
            pass  # the missing answer tells

    def _answer(self, timeout_s: float) -> tuple[dict | None, bool]:
        """The next answer, or None when the process died; and whether it was killed for being slow."""
        slow = threading.Event()

        def give_up() -> None:
            slow.set()
            self.process.kill()

        timer = threading.Timer(timeout_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        return (json.loads(line) if line.endswith("\n") else None), slow.is_set()

    def _last_words(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        said = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return said[-1][:200] if said else f"status {self.process.returncode}"

    def close(self) -> None:
        """End the process now."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout, self.errors):
                try:
                    pipe.close()
                except OSError:
                    pass
            self.process = None


def run_local(items: Sequence[Item], machine: Machine, processes: int, path_of: Callable[[Item], Path], tell: Callable[[Result], None]) -> None:
    """Make all items with ``processes`` Blenders; ``tell`` is called from one thread.

    Raises:
        JobError: Blender's module cannot be used. KeyboardInterrupt passes; every process has ended then.
    """
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    stop = threading.Event()
    blenders = [Blender(machine) for _ in range(min(processes, len(items)))]

    def work(blender: Blender) -> None:
        try:
            while not stop.is_set():
                item = waiting.get_nowait()
                done.put(_with_second_chance(blender, item, path_of(item)))
        except queue.Empty:
            pass
        except Exception as error:
            done.put(error)
        finally:
            blender.close()

    threads = [threading.Thread(target=work, args=(b,), daemon=True) for b in blenders]
    for thread in threads:
        thread.start()
    try:
        for _ in items:
            result = done.get()
            if isinstance(result, Exception):
                raise result
            tell(result)
    finally:
        stop.set()
        for blender in blenders:
            if blender.process is not None and blender.process.poll() is None:
                blender.process.kill()
        for thread in threads:
            thread.join(timeout=30)


def _with_second_chance(blender: Blender, item: Item, output: Path) -> Result:
    """A crash or a hang may be the machine's fault once, not twice."""
    result = blender.make(item, output)
    return result if result.status in ("made", "refused") else blender.make(item, output)


def run_ray(items: Sequence[Item], machine: Machine, address: str, path_of: Callable[[Item], Path], tell: Callable[[Result], None]) -> None:
    """Make all items on a Ray cluster; the files come back through Ray, so only the assets' folder must be on every node.

    The nodes need this project and Blender's module installed; the code of this folder and the lights are sent.

    Raises:
        JobError: Ray is missing, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise JobError("Ray is not installed: pip install 'near-relight[ray]', or leave --ray out.") from error
    try:
        ray.init(address=address, runtime_env={"working_dir": str(TOOLS), "excludes": ["**/__pycache__"]}, log_to_driver=False)
    except Exception as error:
        raise JobError(f"The Ray cluster {address} cannot be reached ({str(error).splitlines()[0][:200]}).") from error
    try:
        slots = sum(int(node["Resources"].get("CPU", 0)) // machine.threads for node in ray.nodes() if node["Alive"])
        if not slots:
            raise JobError(f"No node of the Ray cluster has {machine.threads} cores: choose fewer --threads.")
        _farm_out(items, machine, min(slots, len(items)), path_of, tell)
    finally:
        ray.shutdown()


def _farm_out(items: Sequence[Item], machine: Machine, count: int, path_of: Callable[[Item], Path], tell: Callable[[Result], None]) -> None:
    """Make all items with ``count`` actors. What a lost node was at is made elsewhere, once."""
    import ray
    from near.atomic import write_bytes

    lights = ray.put({p.name: p.read_bytes() for p in sorted(machine.lights.glob("*.exr"))})
    new_worker = lambda: ray.remote(num_cpus=machine.threads)(RayWorker).remote(machine, lights)  # noqa: E731
    rest, running, idle, lost = list(reversed(items)), {}, [new_worker() for _ in range(count)], set()
    while rest or running:
        if rest and not idle and ray.available_resources().get("CPU", 0) >= machine.threads and len(running) < count:
            idle.append(new_worker())
        while rest and idle:
            worker, item = idle.pop(), rest.pop()
            running[worker.make.remote(item)] = (worker, item)
        if not running:
            raise JobError("The Ray cluster lost all its nodes. The same command goes on when they are back.")
        (ready,), _ = ray.wait(list(running), num_returns=1)
        worker, item = running.pop(ready)
        try:
            result, data = ray.get(ready)
        except ray.exceptions.RayActorError as error:  # with its node, or for want of memory
            if item.key not in lost:
                lost.add(item.key)
                rest.append(item)
                continue
            result, data, worker = Result(item, "crashed", f"its node was lost twice ({type(error).__name__})", 0.0), None, None
        if data is not None:
            write_bytes(path_of(item), data)
        tell(result)
        idle += [worker] if worker is not None else []


class RayWorker:
    """An actor that owns one Blender on its node."""

    def __init__(self, machine: Machine, lights: dict[str, bytes]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="near-ray-")
        here = Path(self.folder.name)
        (here / "lights").mkdir()
        for name, data in lights.items():
            (here / "lights" / name).write_bytes(data)
        self.blender = Blender(replace(machine, lights=here / "lights"))

    def make(self, item: Item) -> tuple[Result, bytes | None]:
        """What happened, and the file's content."""
        import ray

        output = Path(self.folder.name) / "object.npz"
        result = replace(_with_second_chance(self.blender, item, output), where=ray.get_runtime_context().get_node_id()[:12])
        return result, output.read_bytes() if result.status == "made" else None
