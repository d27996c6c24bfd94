"""Malformed, mutated, replayed and disordered messages beside well-formed ones."""

from __future__ import annotations

import json
import random
import time

import zmq

from near import wire

from stress_parts.stand import Stand, scene


def captures(rng: random.Random, name: int) -> tuple[str, list]:
    """(lane, parts) of a well-formed request, one of each kind that clients send (but Bye and Shutdown)."""
    number = f"m{name}"
    sha = f"{rng.getrandbits(256):064x}"
    chunk = bytes(rng.getrandbits(8) for _ in range(16))
    choices = [
        ("control", wire.Hello(id=number, schema=wire.SCHEMA.hash), []), ("control", wire.Ping(id=number), []),
        ("control", wire.Status(id=number), []), ("control", wire.Cancel(id=number, target="nothing"), []),
        ("control", wire.SharedMemoryProof(id=number, proof=sha[:48]), []), ("control", wire.Have(id=number, sha256s=(sha,)), []),
        ("batch", wire.Upload(id=number, sha256=sha, type="photo", size=1000, offset=rng.choice((0, 16, 500))),
         [wire.Buffer("data", "u1", (16,), chunk)]),
        ("batch", wire.AddFile(id=number, type="mesh", path="../../etc/passwd"), []), ("batch", wire.Fetch(id=number, sha256=sha), []),
        ("batch", wire.Create(id=number, photo=sha), []), ("batch", wire.Encode(id=number, mesh=sha), []),
        ("batch", wire.Received(id=number, target=number, slot=rng.randrange(-1, 99)), []),
        ("view", wire.ViewRender(id=number, viewport="flood", seq=rng.randrange(1, 50), scene=scene(width=8, height=8)), []),
        ("view", wire.CloseViewport(id=number, viewport="flood"), []), ("view", wire.Received(id=number, target=number), [])]
    lane, message, buffers = rng.choice(choices)
    return lane, wire.SCHEMA.encode(message, buffers)


def mutate(parts: list, rng: random.Random) -> list:
    """One or two things wrong with a message."""
    parts = [bytes(part) for part in parts]
    for _ in range(rng.choice((1, 1, 2))):
        parts = rng.choice(_MUTATIONS)(parts, rng) or [b""]
    return parts


def _flip(parts: list, rng: random.Random) -> list:
    i = rng.randrange(len(parts))
    data = bytearray(parts[i] or b"x")
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(len(data))] = rng.getrandbits(8)
    return [*parts[:i], bytes(data), *parts[i + 1:]]


def _truncate(parts: list, rng: random.Random) -> list:
    i = rng.randrange(len(parts))
    return [*parts[:i], parts[i][:rng.randrange(len(parts[i]) + 1)], *parts[i + 1:]]


def _count(parts: list, rng: random.Random) -> list:
    return parts[:-1] if rng.random() < 0.5 else parts + [b"extra"] * rng.randrange(1, 40)


def _field(parts: list, rng: random.Random) -> list:
    try:
        header = json.loads(parts[0])
        key = rng.choice(list(header))
    except (ValueError, TypeError, IndexError, RecursionError):
        return parts
    header[key] = rng.choice([None, -1, 2 ** 70, 1e308, "", "\ud83d", "x" * 5000, [], {}, [[[[]]]], True, {"a": 1}, [1e9] * 16, "../" * 9])
    return [json.dumps(header).encode(), *parts[1:]]


def _shape(parts: list, rng: random.Random) -> list:
    try:
        header = json.loads(parts[0])
        header["buffers"] = [{"name": "data", "dtype": rng.choice(["f4", "f8", "O", "u1", ""]),
                              "shape": rng.choice([[2 ** 40], [2 ** 31, 2 ** 31], [-1], [0], [1] * 60, "no", [1.5], [10 ** 400]])}]
    except (ValueError, TypeError, RecursionError):
        return parts
    return [json.dumps(header).encode(), *(parts[1:] or [b"1234"])]


def _drop(parts: list, rng: random.Random) -> list:
    try:
        header = json.loads(parts[0])
        header.pop(rng.choice(list(header)))
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError):
        return parts
    return [json.dumps(header).encode(), *parts[1:]]


def _text(parts: list, rng: random.Random) -> list:
    return [rng.choice([b"\xff\xfe" + parts[0], b"[" * 20_000, b"{}", b"null", b"", b'{"kind":NaN}', b'{"a":1,"a":2}', b"\0" * 100,
                        bytes(rng.getrandbits(8) for _ in range(200)), b'{"kind":"Ping","protocol":99,"id":"x","buffers":[]}',
                        b'{"kind":"__class__","protocol":1,"id":"x","buffers":[]}', b"9" * 10_000]), *parts[1:]]


def _same(parts: list, rng: random.Random) -> list:
    return parts      # a replay, or out of order


_MUTATIONS = (_flip, _truncate, _count, _field, _shape, _drop, _text, _same)


def flood(count: int, seed: int = 1, ask_every: int = 50) -> dict:
    """Sends `count` bad messages from two known clients, strangers without greeting among them, and asks beside them.

    -> {"sent", "seconds", "asked", "answered", "worst_ms", "rss_before", "rss_after", "growth", "alive"}
    """
    import psutil

    rng = random.Random(seed)
    with Stand(limits={"clients": 4}) as stand:
        honest = stand.client(name="honest")
        honest.call(wire.BatchFrame(id=honest.new_id(), scene=scene(width=8, height=8))).frame.release()
        bad = stand.client(name="bad", shared_memory=False)
        sockets = _raw_sockets(stand)
        broker = psutil.Process(stand.process.pid)
        kept: list[tuple[str, list]] = []

        def burst(number: int) -> None:
            if kept and rng.random() < 0.1:
                lane, parts = rng.choice(kept)
            else:
                lane, parts = captures(rng, number)
                kept.append((lane, parts))
                del kept[:-200]
                parts = mutate(parts, rng)
            if rng.random() < 0.05:
                lane = rng.choice(wire.LANES)
            socket = bad._sockets[lane] if rng.random() < 0.7 else sockets[lane]
            while True:
                try:
                    socket.send_multipart(parts, zmq.NOBLOCK)
                    break
                except zmq.Again:
                    _drain(bad, sockets)
                    time.sleep(0.0005)
            if number % 64 == 0:
                _drain(bad, sockets)

        for number in range(min(2000, count // 4)):      # first the caches and allocators reach their size
            burst(number)
        honest.call(wire.Ping(id=honest.new_id()))
        before = broker.memory_info().rss
        asked = answered = 0
        worst = 0.0
        started = time.monotonic()
        for number in range(count):
            burst(number)
            if number % ask_every == 0:
                asked += 1
                begun = time.perf_counter()
                honest.call(wire.Ping(id=honest.new_id()))
                if asked % 20 == 0:
                    honest.call(wire.BatchFrame(id=honest.new_id(), scene=scene(number, 8, 8))).frame.release()
                worst = max(worst, time.perf_counter() - begun)
                answered += 1
        honest.call(wire.Ping(id=honest.new_id()))
        after = broker.memory_info().rss
        for socket in sockets.values():
            socket.close()
        return {"sent": count, "seconds": round(time.monotonic() - started, 2), "asked": asked, "answered": answered,
                "worst_ms": round(worst * 1e3, 1), "rss_before": before, "rss_after": after,
                "growth": round(after / before - 1, 4), "alive": stand.process.poll() is None,
                "internal_errors": stand.log().count("a request failed in the broker"),
                "parts_left": len(list((stand.home / "uploads").glob(".*.part")))}


def _raw_sockets(stand: Stand) -> dict[str, zmq.Socket]:
    """Sockets that know the token but never said hello."""
    sockets = {}
    for lane in wire.LANES:
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.linger = 0
        socket.plain_username, socket.plain_password = b"near", stand.connection.token.encode()
        socket.connect(stand.connection.endpoints[lane])
        sockets[lane] = socket
    return sockets


def _drain(bad, sockets: dict[str, zmq.Socket]) -> None:
    for socket in (*bad._sockets.values(), *sockets.values()):
        try:
            while True:
                socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            pass
