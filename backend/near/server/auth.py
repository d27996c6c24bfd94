"""Who may talk to a backend: a token on loopback, CURVE keys and an allow-list anywhere else.

Both are checked in the ZeroMQ handshake (ZAP, RFC 27), before a single message of a stranger is read. Loopback sockets
use the PLAIN mechanism with the token of the connection file as password; every other socket uses CURVE.
"""

from __future__ import annotations

import hmac
import json
import secrets
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import zmq
from zmq.utils import z85

from near.connection import Connection, private_folder, write_private
from near.errors import NearError

LOCAL, REMOTE, WORKER = b"near-local", b"near-remote", b"near-worker"   # ZAP domains


def new_token() -> str:
    return secrets.token_urlsafe(32)


def lanes_at(address: str) -> dict[str, str]:
    """tcp://host:port -> the three lanes on port, port + 1, port + 2.

    Raises:
        NearError: not such an address.
    """
    try:
        scheme, rest = address.split("://")
        host, port_text = rest.rsplit(":", 1)
        port = int(port_text)
        if scheme != "tcp" or not host or not 0 < port < 65_534:
            raise ValueError
    except ValueError:
        raise NearError("listen-invalid", f"{address!r} is not an address to listen on.",
                        "Write it as tcp://ADDRESS:PORT; three ports from PORT on are used.") from None
    return {lane: f"tcp://{host}:{port + i}" for i, lane in enumerate(("control", "view", "batch"))}


def is_loopback(address: str) -> bool:
    """Whether only processes of this machine can reach tcp://address:port."""
    host = address.split("://", 1)[-1].rsplit(":", 1)[0].strip("[]")
    return host == "::1" or (host.startswith("127.") and host.replace(".", "").isdigit())


@dataclass(frozen=True)
class KeyPair:
    public: str   # Z85, 40 characters
    secret: str


class KeyRing:
    """The backend's own CURVE keys and the clients it lets in, in `HOME/keys`."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "keys"
        self._stamp, self._allowed = None, {}

    @property
    def _list(self) -> Path:
        return self._folder / "allowed.json"

    def server(self) -> KeyPair:
        """The backend's keys, made on first use."""
        path = self._folder / "server.json"
        if path.is_file():
            data = _read(path)
            return KeyPair(data["public"], data["secret"])
        pair = KeyPair(*(key.decode() for key in zmq.curve_keypair()))
        private_folder(self._folder)
        write_private(path, json.dumps({"public": pair.public, "secret": pair.secret}))
        return pair

    def allowed(self) -> dict[str, str]:
        """public key -> client's name; read again when the file has changed."""
        try:
            info = self._list.stat()
        except FileNotFoundError:
            self._stamp, self._allowed = None, {}
            return {}
        stamp = (info.st_mtime_ns, info.st_size, info.st_ino)
        if stamp != self._stamp:
            data = _read(self._list)
            self._allowed = {entry["key"]: name for name, entry in data.items()}
            self._stamp = stamp
        return self._allowed

    def clients(self) -> dict[str, dict]:
        """name -> {"key", "since"}."""
        return _read(self._list) if self._list.is_file() else {}

    def allow(self, name: str, public: str) -> None:
        """Lets the owner of this public key (64 hexadecimal digits, or ZeroMQ's 40 characters) in.

        Raises:
            NearError: `key-invalid`, `key-name`.
        """
        _check_name(name)
        self._save({**self.clients(), name: {"key": parse_key(public), "since": date.today().isoformat()}})

    def revoke(self, name: str) -> None:
        """Shuts a client out, also from a session that is open.

        Raises:
            NearError: `key-unknown`.
        """
        clients = self.clients()
        if clients.pop(name, None) is None:
            raise NearError("key-unknown", f"No client called {name!r} is allowed.", "See: near keys list")
        self._save(clients)

    def _save(self, clients: dict) -> None:
        private_folder(self._folder)
        write_private(self._list, json.dumps(clients, indent=1))

    def ticket(self, name: str, address: str, path: Path) -> None:
        """Makes keys for a new client, allows them, and writes the one file that this client needs (mode 600)."""
        _check_name(name)
        self.allow(name, write_ticket(address, self.server().public, path))


def write_ticket(address: str, server_public: str, path: Path) -> str:
    """Makes a client's keys and writes its key file. -> the client's public key (Z85).

    Raises:
        NearError: `key-exists`, `listen-invalid`.
    """
    if path.exists():
        raise NearError("key-exists", f"{path} exists already.", "Choose another file name, or delete it first.")
    public, secret = (key.decode() for key in zmq.curve_keypair())
    connection = Connection(lanes_at(address), server_key=server_public, public_key=public, secret_key=secret)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, json.dumps(asdict(connection), indent=1))
    return public


def parse_key(text: str) -> str:
    """A public key as people copy it (hexadecimal: Z85 has signs that shells and option parsers take for their own) -> Z85.

    Raises:
        NearError: `key-invalid`.
    """
    try:
        raw = bytes.fromhex(text) if len(text) == 64 else z85.decode(text.encode())
        if len(raw) != 32:
            raise ValueError
        return z85.encode(raw).decode()
    except Exception:
        raise NearError("key-invalid", "That is not a public key.",
                        "A public key has 64 hexadecimal digits; near keys join prints the client's, near keys list the backend's.") from None


def show_key(z85_text: str) -> str:
    """A public key for people: 64 hexadecimal digits."""
    return z85.decode(z85_text.encode()).hex()


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise NearError("keys-damaged", f"The key file {path} cannot be read.",
                        "Restore it from a copy, or delete it and hand out new keys.") from None


def _check_name(name: str) -> None:
    if not name or len(name) > 60 or not all(c.isalnum() or c in "-_." for c in name):
        raise NearError("key-name", f"{name!r} is not a name for a client.", "Use letters, digits, '-', '_' and '.'.")


class Door:
    """Answers ZeroMQ's authentication requests from within the broker's own loop (no thread)."""

    def __init__(self, context: zmq.Context, token: str, keys: KeyRing) -> None:
        self._token, self._keys = token.encode(), keys
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")
        self.worker_token = ""   # of the one worker that is expected now
        self.refused = 0

    def answer(self) -> None:
        """Handles what has arrived, without waiting."""
        while True:
            try:
                version, request, domain, _address, _identity, mechanism, *credentials = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            user = self._user(domain, mechanism, credentials)
            if user is None:
                self.refused += 1
            status, text = (b"200", b"OK") if user is not None else (b"400", b"refused")
            self.socket.send_multipart([version, request, status, text, (user or "").encode(), b""])

    def _user(self, domain: bytes, mechanism: bytes, credentials: list[bytes]) -> str | None:
        if domain in (LOCAL, WORKER) and mechanism == b"PLAIN" and len(credentials) == 2:
            expected = self._token if domain == LOCAL else self.worker_token.encode()
            right = bool(expected) and hmac.compare_digest(credentials[1], expected)
            return domain.decode().removeprefix("near-") if right else None
        if domain == REMOTE and mechanism == b"CURVE" and len(credentials) == 1:
            name = self._keys.allowed().get(z85.encode(credentials[0]).decode())
            return f"key:{name}" if name is not None else None
        return None

    def still_welcome(self, user: str) -> bool:
        """False for a client whose key has been revoked since."""
        return user == "local" or user.removeprefix("key:") in self._keys.allowed().values()

    def close(self) -> None:
        self.socket.close()


def guard(socket: zmq.Socket, keys: KeyPair | None) -> None:
    """Sets the security of a listening socket; to be called before it binds."""
    if keys is None:
        socket.plain_server = True
        socket.zap_domain = LOCAL
    else:
        socket.curve_server = True
        socket.curve_secretkey, socket.curve_publickey = keys.secret.encode(), keys.public.encode()
        socket.zap_domain = REMOTE


__all__ = ["Door", "KeyPair", "KeyRing", "guard", "is_loopback", "lanes_at", "new_token"]
