"""One session log for the broker and its worker, rotating, without secrets."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from collections import deque
from pathlib import Path

LOGGER = logging.getLogger("near.server")
_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


class Tail(logging.Handler):
    """The last lines, for the panel's "Copy report"."""

    def __init__(self, most: int = 400) -> None:
        super().__init__()
        self.lines: deque[str] = deque(maxlen=most)
        self.setFormatter(logging.Formatter(_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record)[:1000])


def open_session_log(path: Path, verbose: bool = False, most_bytes: int = 2_000_000) -> Tail:
    """Sends the backend's log to `path` (five files of `most_bytes`), and to the terminal when `verbose`."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    close_log()
    tail = Tail()
    handlers: list[logging.Handler] = [tail, logging.handlers.RotatingFileHandler(
        path, maxBytes=most_bytes, backupCount=4, encoding="utf-8", errors="replace")]
    if verbose:
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
        LOGGER.addHandler(handler)
    return tail


def close_log() -> None:
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()
