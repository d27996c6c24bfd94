"""Row-parallel work on the CPU: Python threads that each run torch single-threaded on a cache-sized piece.

Torch parallelises inside every operation, which pays a barrier per operation and streams large intermediates through
memory. Pieces that stay in a core's cache, one thread per piece, reach the cores' full 16-bit rate; and where other
programs (Blender) use the cores too, one wait at the end replaces hundreds of barriers that each wait for the slowest.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ROWS = 1024  # rows per piece: a few MB of activations at width 768

_pools: dict[int, ThreadPoolExecutor] = {}
_here = threading.local()  # .threads: what `run_all` may use in this thread, while torch itself is set to one


def _begin_worker() -> None:
    _here.threads = 1
    torch.set_num_threads(1)


def parallel_threads() -> int:
    """Threads that `run_all` would use here: 1 inside a worker and while gradients are recorded."""
    if torch.is_grad_enabled():
        return 1
    return getattr(_here, "threads", None) or torch.get_num_threads()


@contextlib.contextmanager
def piecewise() -> Iterator[None]:
    """Inside, torch's operations in this thread run single-threaded and `run_all` uses the threads torch had.

    Wrap code that mixes `run_all` with small operations. Changes nothing while gradients are recorded: a training step
    is made of large operations whose pieces autograd could not join cheaply.
    """
    threads = torch.get_num_threads()
    if torch.is_grad_enabled() or threads == 1 or getattr(_here, "threads", None):
        yield
        return
    _here.threads = threads
    torch.set_num_threads(1)  # of this thread; MKL's is the process's, which is why workers alone cannot set it
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _here.threads = None


def run_all(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run independent CPU tasks, in parallel where that is possible, and return their results in order.

    The first exception is raised after the tasks that have not begun are dropped.
    """
    count = parallel_threads()
    if min(count, len(tasks)) <= 1:
        return [task() for task in tasks]
    inference = torch.is_inference_mode_enabled()

    def run(task: Callable[[], T]) -> T:
        with torch.inference_mode(inference), torch.set_grad_enabled(False):  # both are per thread
            return task()

    if count not in _pools:
        _pools[count] = ThreadPoolExecutor(count, thread_name_prefix="near-cpu", initializer=_begin_worker)
    with piecewise():
        futures = [_pools[count].submit(run, task) for task in tasks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def by_rows(function: Callable[..., Tensor], *rows: Tensor, chunk: int = ROWS) -> Tensor:
    """``function(*rows)`` for a function that treats every row by itself, in parallel pieces on the CPU."""
    count = len(rows[0])
    if rows[0].device.type != "cpu" or count <= chunk or parallel_threads() == 1:
        return function(*rows)
    return torch.cat(run_all([lambda s=s: function(*(r[s : s + chunk] for r in rows)) for s in range(0, count, chunk)]))
