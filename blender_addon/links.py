"""A connection to the backend that comes up by itself, step by step."""

from __future__ import annotations

import time

from .client import Client
from .connection import process_alive
from .errors import NearError
from .process import Choice, LocalBackend

CONNECT_SECONDS = 20.0


class Link:
    """A connection that comes up by itself, step by step; used by one thread."""

    def __init__(self, local: LocalBackend, name: str) -> None:
        self._local, self._name = local, name
        self.client: Client | None = None
        self._since = 0.0

    @property
    def ready(self) -> bool:
        return self.client is not None and self.client.state == "ready"

    def advance(self, choice: Choice, may_start: bool) -> bool:
        """One step towards a connection; -> whether it is there. Never waits.

        Raises:
            NearError: there is no way; `drop` has been done, the next call begins anew.
        """
        if self.client is None:
            connection = self._local.find(choice, may_start)
            if connection is None:
                return False
            self.client, self._since = Client(connection, name=self._name), time.monotonic()
        self.client.poll()
        if self.client.state in ("failed", "closed"):
            error = self.client.error or NearError("connection-closed", "The connection is closed.", "Connect again.")
            self.drop()
            raise _remote(error) if choice.remote else error
        if self.client.state == "connecting" and time.monotonic() - self._since > CONNECT_SECONDS:
            self.drop()
            silent = NearError("backend-silent", "The NeAR backend does not answer.", "Stop it and start it again.")
            raise _remote(silent) if choice.remote else silent
        return self.ready

    def drop_if_dead(self) -> None:
        """Sees at once that a local backend has ended; the client itself notices only after a while of silence."""
        if self.client is not None and (pid := self.client.connection.pid) and not process_alive(pid, self.client.connection.started):
            self.drop()

    def drop(self) -> None:
        """Closes the connection."""
        client, self.client = self.client, None
        if client is not None:
            client.close()


def _remote(error: NearError) -> NearError:
    if error.code in ("backend-silent", "backend-gone", "timeout"):
        return NearError("remote-unreachable", "The backend on the other computer does not answer.",
                         "Check that it runs with --listen, and that the network and the address in the key file are right.")
    return error
