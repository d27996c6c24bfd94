"""Compiling small functions with numba: kept on disk where that is possible, and never holding the GIL.

No numba threads: with OpenMP below them they spin while waiting, and on a machine busy with other work one call can then cost
seconds; the functions compiled here take milliseconds on one core.
"""

from __future__ import annotations

from collections.abc import Callable

import numba

# Fast arithmetic that still lets NaN and infinity fail comparisons ("nnan" and "ninf" are left out).
FINITE_OR_NOT = {"contract", "arcp", "nsz", "reassoc"}


def compiled(fastmath: bool | set[str] = False) -> Callable[[Callable], Callable]:
    """Decorator: compile on first call; cache beside the source, or in the user's cache folder where that is read-only."""

    def decorate(function: Callable) -> Callable:
        options = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
        try:
            return numba.njit(function, cache=True, **options)
        except RuntimeError:  # numba found no folder that it may write to: compile in every process
            return numba.njit(function, **options)

    return decorate
