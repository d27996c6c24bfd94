"""Who is let in, and on which terms; and how a backend is found."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

pytest.importorskip("psutil")
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tools"))

from stress_parts.stand import Stand, scene  # noqa: E402

from near import wire  # noqa: E402
from near.client import Client  # noqa: E402
from near.connection import Connection, find_connection, load_connection, save_connection  # noqa: E402
from near.errors import NearError  # noqa: E402
from near.server.auth import KeyRing, is_loopback, lanes_at, show_key  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand sends POSIX signals")


def free_port() -> int:
    for port in range(42_000, 60_000, 7):
        try:
            for offset in range(3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + offset))
            return port
        except OSError:
            continue
    raise RuntimeError("no free ports")


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    address = f"tcp://127.0.0.1:{free_port()}"
    KeyRing(home).ticket("laptop", address, home / "laptop.json")
    with Stand(home, listen=address) as running:
        running.address = address
        yield running


def refused(code: str, work) -> NearError:
    with pytest.raises(NearError) as caught:
        work()
    assert caught.value.code == code, caught.value
    return caught.value


def test_wrong_token(stand):
    wrong = dataclasses.replace(stand.connection, token="wrong" * 8)
    assert "token" in refused("token-refused", lambda: Client.connect(wrong)).what


def test_keys_open_the_remote_door_and_give_frames(stand):
    with Client.connect(str(stand.home / "laptop.json")) as client:
        assert not client.shared_memory and client.info["protocol"] == wire.PROTOCOL
        client.call(wire.BatchFrame(id=client.new_id(), scene=scene(1))).frame.release()
        assert "Shutdown" in client.info["operations"]
        refused("not-allowed", lambda: client.call(wire.Shutdown(id=client.new_id())))


@pytest.mark.parametrize("change", ["unknown client", "other server", "token at the remote door"])
def test_wrong_keys(stand, change):
    ticket = load_connection(stand.home / "laptop.json")
    public, secret = (key.decode() for key in zmq.curve_keypair())
    wrong = {"unknown client": lambda: dataclasses.replace(ticket, public_key=public, secret_key=secret),
             "other server": lambda: dataclasses.replace(ticket, server_key=public),
             "token at the remote door": lambda: dataclasses.replace(ticket, server_key="", token=stand.connection.token)}[change]()
    with pytest.raises(NearError) as caught:
        Client.connect(wrong, timeout_s=3)
    assert caught.value.code in ("key-refused", "token-refused", "timeout"), caught.value
    assert change != "unknown client" or caught.value.code == "key-refused"
    assert all(stand.address not in line for line in stand.log().splitlines() if "came" in line)


def test_revoked_while_connected(stand, tmp_path):
    ring = KeyRing(stand.home)
    ring.ticket("guest", stand.address, tmp_path / "guest.json")
    with Client.connect(str(tmp_path / "guest.json")) as client:
        client.call(wire.Ping(id=client.new_id()))
        ring.revoke("guest")
        with Client.connect(stand.connection) as local:
            local.wait(lambda: local.beat.get("clients") == 1, 10)
        refused("not-greeted", lambda: client.call(wire.Ping(id=client.new_id())))
        with pytest.raises(NearError):
            client.wait(lambda: client.state == "failed", 2)
    refused("key-refused", lambda: Client.connect(str(tmp_path / "guest.json")))


def test_no_other_address_without_keys(tmp_path):
    for address, code in (("tcp://0.0.0.0:45671", "listen-refused"), ("tcp://*:45671", "listen-refused"), ("http://x", "listen-invalid"),
                          ("tcp://1.2.3.4:99999", "listen-invalid")):
        code_seen = subprocess.run(
            [sys.executable, "-m", "near.server.cli", "serve", "--listen", address], capture_output=True, text=True, timeout=60,
            env={**os.environ, "NEAR_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY / "backend")})
        assert code_seen.returncode == 2 and "Traceback" not in code_seen.stderr, code_seen.stderr
        assert ("near keys new" in code_seen.stderr) == (code == "listen-refused"), code_seen.stderr
        assert not (tmp_path / "run" / "default.json").exists()
    assert [is_loopback(a) for a in ("tcp://127.0.0.1:5", "tcp://[::1]:5", "tcp://localhost.evil:5", "tcp://127.evil.com:5", "tcp://*:5")] \
        == [True, True, False, False, False]
    assert lanes_at("tcp://host:5710") == {"control": "tcp://host:5710", "view": "tcp://host:5711", "batch": "tcp://host:5712"}


def raw_hello(stand, header: dict) -> dict:
    """The answer to a hello of our own making."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.routing_id = os.urandom(16).replace(b"\0", b"x")
        dealer.plain_username, dealer.plain_password = b"near", stand.connection.token.encode()
        dealer.connect(stand.connection.endpoints["control"])
        dealer.send(json.dumps(header).encode())
        assert dealer.poll(5000)
        return json.loads(dealer.recv())


@pytest.mark.parametrize("protocol, word", [(wire.PROTOCOL + 1, "backend"), (wire.PROTOCOL - 1, "add-on")])
def test_newer_and_older_protocols(stand, protocol, word):
    answer = raw_hello(stand, {"kind": "Hello", "protocol": protocol, "id": "h1", "buffers": [], "something": "new"})
    assert answer["kind"] == "Fault" and answer["code"] == "protocol-mismatch" and answer["id"] == "h1"
    assert str(protocol) in answer["what"] and str(wire.PROTOCOL) in answer["what"] and word in answer["remedy"]


def test_other_builds_of_the_same_protocol(stand):
    answer = raw_hello(stand, {"kind": "Hello", "protocol": wire.PROTOCOL, "id": "h2", "buffers": [], "schema": "0" * 16})
    assert answer["code"] == "schema-mismatch" and "same release" in answer["remedy"]


def test_nothing_is_served_before_hello(stand):
    for kind in ("Ping", "Status", "Shutdown"):
        answer = raw_hello(stand, {"kind": kind, "protocol": wire.PROTOCOL, "id": "h3", "buffers": []})
        assert answer["code"] == "not-greeted"


def test_a_client_tells_what_an_incompatible_backend_is(monkeypatch, stand):
    monkeypatch.setattr("near.wirecodec.PROTOCOL", 7)
    monkeypatch.setattr("near.wire.PROTOCOL", 7)
    error = refused("protocol-mismatch", lambda: Client.connect(stand.connection))
    assert "7" in error.what and "1" in error.what


# ---------------------------------------------------------------- finding a backend
def serve_command(home: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "near.server.cli", "serve", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "NEAR_HOME": str(home), "PYTHONPATH": str(REPOSITORY / "backend"), "OMP_NUM_THREADS": "1"})


def test_a_second_start_finds_the_first(tmp_path):
    first = serve_command(tmp_path, "--json", "--device", "cpu")
    try:
        told = json.loads(first.stdout.readline())
        second = serve_command(tmp_path, "--json")
        found = json.loads(second.communicate(timeout=30)[0])
        assert second.returncode == 0 and found["running"] and found["pid"] == told["pid"] == first.pid
        assert json.loads(serve_command(tmp_path, "--status", "--json").communicate(timeout=30)[0])["pid"] == first.pid
        assert serve_command(tmp_path, "--stop").wait(30) == 0
        assert first.wait(10) == 0
        assert not (tmp_path / "run" / "default.json").exists()
        text, _ = (again := serve_command(tmp_path, "--status")).communicate(timeout=30)
        assert again.returncode == 2 and "No NeAR backend is running" in text
    finally:
        first.kill()
        first.wait()
        first.stdout.close()


def test_connection_files_are_mistrusted(tmp_path):
    path = tmp_path / "c.json"
    lanes = {lane: "tcp://127.0.0.1:1" for lane in wire.LANES}
    save_connection(path, Connection(lanes, token="t", pid=os.getpid()))
    assert find_connection(str(path)).token == "t"
    os.chmod(path, 0o644)
    refused("connection-exposed", lambda: load_connection(path))
    os.chmod(path, 0o600)
    for text in ("", "{", "[]", "null", '{"endpoints": 5, "token": "t"}', json.dumps({"endpoints": {}, "token": "t"}),
                 json.dumps({"endpoints": {**lanes, "view": "ipc:///x"}, "token": "t"}), json.dumps({"endpoints": lanes, "token": "t", "pid": "x"})):
        path.write_text(text)
        refused("connection-invalid", lambda: load_connection(path))
    save_connection(path, Connection(lanes, token="t", pid=2 ** 22 + 12345))
    refused("backend-not-running", lambda: load_connection(path))
    refused("connection-missing", lambda: find_connection(str(tmp_path / "none.json")))


def test_keys_command(tmp_path):
    def keys(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "near.server.cli", "keys", *words], capture_output=True, text=True, timeout=60, cwd=tmp_path,
                              env={**os.environ, "NEAR_HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY / "backend")})

    assert keys("new", "laptop", "--address", "tcp://gpu.example:5710").returncode == 0
    ticket = tmp_path / "laptop.near-key.json"
    assert ticket.stat().st_mode & 0o777 == 0o600 and load_connection(ticket).endpoints["batch"] == "tcp://gpu.example:5712"
    assert keys("new", "laptop", "--address", "tcp://gpu.example:5710").returncode == 2     # does not overwrite
    assert keys("allow", "farm", "too short").returncode == 2
    listed = json.loads(keys("list", "--json").stdout)
    joined = keys("join", listed["server"], "--address", "tcp://gpu.example:5710").stdout
    public = joined.split("allow NAME ")[1].split()[0]
    assert keys("allow", "farm", public).returncode == 0
    listed = json.loads(keys("list", "--json").stdout)
    assert set(listed["clients"]) == {"laptop", "farm"} and listed["clients"]["farm"]["key"] == public
    own = load_connection(tmp_path / "backend.near-key.json")
    assert show_key(own.public_key) == public and show_key(own.server_key) == listed["server"]
    assert KeyRing(tmp_path / "home").allowed()[own.public_key] == "farm"
    assert keys("revoke", "farm").returncode == 0 and keys("revoke", "farm").returncode == 2
    for path in (tmp_path / "home" / "keys").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    assert load_connection(ticket).secret_key not in keys("list").stdout
