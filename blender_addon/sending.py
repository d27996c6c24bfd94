"""Files that viewports need in the backend: sent by the timer, a little at every tick, so that no drawing waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable

from . import transfer
from .client import Client
from .errors import NearError, as_near_error

BUDGET_S = 0.003                    # of one tick
_MOST_REMEMBERED = 1000


class Sender:
    """`sha256` says whether a file is there and sees to it; `advance` does the work. Standard library only."""

    def __init__(self) -> None:
        self._under_way: dict[str, transfer.Steps[str]] = {}
        self._there: dict[str, str] = {}
        self._refused: dict[str, NearError] = {}

    @property
    def busy(self) -> bool:
        return bool(self._under_way)

    def sha256(self, key: str, sending: Callable[[], transfer.Steps[str]]) -> str:
        """The file's hash once the backend has it; empty until then. `key` names the content, `sending` makes what sends it.

        Raises:
            NearError: it cannot be read, or the backend refused it; the same each time, until `pardon`.
        """
        if key in self._refused:
            raise self._refused[key]
        if key not in self._there and key not in self._under_way:
            self._under_way[key] = sending()
        return self._there.get(key, "")

    def advance(self, client: Client) -> bool:
        """Some work, for a few milliseconds; -> whether a file has arrived, or was refused."""
        if not self._under_way:
            return False
        key, steps = next(iter(self._under_way.items()))
        end = time.perf_counter() + BUDGET_S
        try:
            while time.perf_counter() < end:
                sent = len(client.pending)
                next(steps)
                if client.pending and len(client.pending) == sent:
                    break                           # it waits for an answer
            return False
        except StopIteration as done:
            self._there[key] = done.value
            while len(self._there) > _MOST_REMEMBERED:
                del self._there[next(iter(self._there))]
        except Exception as error:
            self._refused[key] = as_near_error(error)
        self._under_way.pop(key, None)
        return True

    def pardon(self) -> None:
        """What was refused is tried again when it is asked for."""
        self._refused.clear()

    def forget(self) -> None:
        """Another backend, or it lost what it had: everything is sent again when it is asked for."""
        for steps in self._under_way.values():
            steps.close()
        self._under_way.clear()
        self._there.clear()
        self._refused.clear()
