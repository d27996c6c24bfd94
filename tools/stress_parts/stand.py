"""A backend of one's own: in a folder of its own, with the light test engine unless asked otherwise, gone afterwards."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from near import wire
from near.client import Client
from near.connection import Connection, connection_path, find_connection
from near.errors import NearError
from near.server.config import Limits, ServeConfig, Times

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = REPOSITORY / "tests"


class Stand:
    """Context manager: a running backend, `connection` to it, `home` folder, `process`."""

    def __init__(self, home: Path | None = None, engine: bool = False, times: dict | None = None, limits: dict | None = None,
                 environment: dict | None = None, **options) -> None:
        self._made = None if home is not None else tempfile.TemporaryDirectory(prefix="near-stand-")
        self.home = Path(home if home is not None else self._made.name)
        self._orders = {"home": str(self.home), "times": times or {}, "limits": limits or {}, "parent_pid": os.getpid(), **options}
        self._environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
                             "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "backend"), str(TESTS), str(REPOSITORY / "tools")]),
                             **({} if engine else {"NEAR_TEST_BACKEND": "near_test_backend"}), **(environment or {})}
        self.clients: list[Client] = []

    def __enter__(self) -> Stand:
        self.process = subprocess.Popen([sys.executable, "-m", "stress_parts.stand", json.dumps(self._orders)],
                                        env=self._environment, stdin=subprocess.DEVNULL)
        end = time.monotonic() + 30
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.connection: Connection = find_connection(str(connection_path("default", self.home)))
                return self
            except NearError:
                time.sleep(0.02)
        raise RuntimeError("the backend did not start")

    def client(self, **options) -> Client:
        """A connected client that is closed with the stand."""
        client = Client.connect(self.connection, **options)
        self.clients.append(client)
        return client

    def log(self) -> str:
        path = self.home / "logs" / "default.log"
        return path.read_text() if path.is_file() else ""

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._made is not None:
            self._made.cleanup()


def scene(number: float = 0.0, width: int = 64, height: int = 48, seconds: float = 0.0, fault: int = 0, **values) -> wire.Scene:
    """A scene for the test engine: a frame of `seconds`, different for each `number`; see `near_test_backend`."""
    camera = wire.CameraSpec(wire.EYE4, wire.EYE3, width, height, near=float(fault) or 0.01, far=seconds or 1000.0)
    return wire.Scene(assets=(), light=wire.LightSpec(strength=float(number)), camera=camera, **values)


def children(pid: int) -> list[int]:
    """Process ids below `pid`, all generations."""
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def run(orders: dict) -> None:
    """The process of a stand."""
    from near.server.launch import serve

    orders["home"] = Path(orders["home"])
    orders["times"] = dataclasses.replace(Times(), **orders["times"])
    orders["limits"] = dataclasses.replace(Limits(), **orders["limits"])
    orders["allow_roots"] = tuple(Path(root) for root in orders.get("allow_roots", ()))
    try:
        serve(ServeConfig(**orders))
    except NearError as error:
        print(json.dumps(error.as_dict()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
