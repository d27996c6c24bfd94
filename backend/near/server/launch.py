"""Runs a backend in this process, finds the one that runs already, or starts one as a child."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from near import sharedmem
from near.client import Client
from near.connection import Connection, connection_path, find_connection, private_folder
from near.errors import NearError
from near.server.broker import Broker
from near.server.config import ServeConfig
from near.server.lifetime import InstanceLock, die_with_parent
from near.server.log import close_log, open_session_log


def running(name: str = "default", home: Path | None = None) -> Connection | None:
    """The backend of this name, if it runs and answers."""
    try:
        connection = find_connection(str(connection_path(name, home)))
        Client.connect(connection, name="near serve", timeout_s=5).close()
        return connection
    except NearError:
        return None


def serve(config: ServeConfig, verbose: bool = False, on_ready=None) -> Connection | None:
    """Serves until told to leave. -> None then; at once the connection of a backend of this name that runs already.

    Raises:
        NearError: as `Broker`; `backend-silent` when one holds the name but does not answer.
    """
    run_folder = private_folder(config.home / "run")
    lock = InstanceLock(run_folder / f"{config.name}.lock")
    if not lock.acquire():
        for _ in range(40):                       # it may be just about to start
            if (found := running(config.name, config.home)) is not None:
                return found
            time.sleep(0.25)
        raise NearError("backend-silent", f"A backend called {config.name!r} exists but does not answer.",
                        f"End it (its log is {config.log_path}) and start again.")
    try:
        if config.parent_pid and os.getppid() == config.parent_pid:
            die_with_parent(config.parent_pid, 15)
        sharedmem.sweep(run_folder)
        tail = open_session_log(config.log_path, verbose)
        broker = Broker(config, tail)
        if on_ready is not None:
            on_ready(broker.connection)
        broker.serve()
        return None
    finally:
        close_log()
        lock.release()


def arguments(config: ServeConfig) -> list[str]:
    """The command line that starts a backend of this kind."""
    words = [sys.executable, "-m", "near.server.cli", "serve", "--name", config.name, "--device", config.device, "--pack", config.pack]
    if config.parent_pid:
        words += ["--parent-pid", str(config.parent_pid)]
    if config.parent_pipe:
        words.append("--parent-pipe")
    if config.listen:
        words += ["--listen", config.listen]
    for root in config.allow_roots:
        words += ["--allow-root", str(root)]
    return words


def start(config: ServeConfig, timeout_s: float = 30.0) -> tuple[Connection, subprocess.Popen | None]:
    """Starts a backend as a child process, unless one runs; -> (connection, the process if it is new).

    Raises:
        NearError: `backend-start` with its last words.
    """
    found = running(config.name, config.home)
    if found is not None:
        return found, None
    environment = {**os.environ, "NEAR_HOME": str(config.home), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    detached = {} if config.parent_pid or config.parent_pipe else {"start_new_session": True}
    process = subprocess.Popen(arguments(config), stdin=subprocess.PIPE if config.parent_pipe else subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, **detached)
    end = time.monotonic() + timeout_s
    path = connection_path(config.name, config.home)
    while time.monotonic() < end:
        if process.poll() is not None:
            found = running(config.name, config.home)
            if found is not None:      # somebody else was quicker
                return found, None
            words = process.stderr.read().decode("utf-8", "replace").strip().splitlines()[-3:]
            raise NearError("backend-start", f"The backend did not start: {' '.join(words) or 'it said nothing'}",
                            "Run near doctor; it tells what is missing.")
        if path.is_file():
            try:
                connection = find_connection(str(path))
            except NearError:
                connection = None
            if connection is not None and connection.pid == process.pid:
                process.stderr.close()
                return connection, process
        time.sleep(0.02)
    process.kill()
    raise NearError("backend-start", f"The backend did not start within {timeout_s:g} seconds.", "Run near doctor.")
