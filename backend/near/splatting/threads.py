"""Compiled functions that release the GIL, and a frame's work shared among threads."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba

# No "nnan" and "ninf": numbers that are not finite must fail the comparisons that screen them.
FASTMATH = {"contract", "arcp", "nsz", "reassoc"}
SLICES = 8  # shares of a frame per thread: late threads get less
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a forked child has the pool's object but not its threads


def compiled(function: Callable) -> Callable:
    """Compile on first call and keep the result: beside the source, or in the user's cache folder where that is read-only.

    The functions run on ordinary threads (:func:`run_shared`): numba's own pool allows one caller at a time on some systems,
    and its parallel loops take seconds more to compile.
    """
    options = {"nogil": True, "fastmath": FASTMATH, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # numba found no folder it may write to: compile in every process
        return numba.njit(function, **options)


def run_shared(task: Callable[[int, int], None], slices: int = SLICES) -> None:
    """task(k, n) for every k below n = ``slices`` per thread. Threads: ``numba.set_num_threads``, the caller among them."""
    global _pool
    threads = numba.get_num_threads()
    if threads == 1:
        task(0, 1)
        return
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(numba.config.NUMBA_NUM_THREADS, thread_name_prefix="near-splat")
        pool = _pool
    total = threads * slices
    shares = itertools.count()

    def work() -> None:
        while (k := next(shares)) < total:
            task(k, total)

    helpers = [pool.submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        # One that has not started finds nothing left to do; waiting for it would mean waiting for other frames.
        if not helper.cancel():
            helper.result()
