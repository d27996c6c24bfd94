"""The backend's parts alone: what is done next, what is stored, what memory is shared."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from near import sharedmem, wire
from near.errors import NearError
from near.frames import Frame, Viewport
from near.server.backend import explain
from near.server.config import ServeConfig, Times
from near.server.schedule import Scheduler
from near.server.session import Job, Session, Viewport as Mailbox
from near.server.uploads import UploadStore

PEER = b"peer-0123456789ab"


def scene(quality: str = "full", number: int = 0) -> wire.Scene:
    return wire.Scene(assets=(), light=wire.LightSpec(strength=number), camera=wire.CameraSpec(wire.EYE4, wire.EYE3, 8, 8), quality=quality)


def session_in(scheduler: Scheduler, name: bytes) -> Session:
    session = Session(name * 4, "local", "local", name.decode())
    scheduler.sessions[session.peer] = session
    return session


def view(session: Session, seq: int, quality: str = "draft", viewport: str = "v", at: float = 0.0) -> Job:
    request = wire.ViewRender(id=f"{session.name}-{viewport}-{seq}", viewport=viewport, seq=seq, scene=scene(quality))
    return Job(session, "view", request, b"", "view", queued_at=at)


def frame(session: Session, number: int) -> Job:
    return Job(session, "batch", wire.BatchFrame(id=f"{session.name}-f{number}", scene=scene(number=number)), b"", "frame")


# ---------------------------------------------------------------- the scheduler
@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["draft", "full", "progressive"]), st.booleans()), max_size=40))
@settings(max_examples=150, deadline=None)
def test_a_viewport_never_goes_back_and_never_piles_up(arrivals):
    scheduler = Scheduler(Times())
    session = session_in(scheduler, b"aaaa")
    shown, running, now = 0, None, 0.0
    answered: list[str] = []
    for number, (seq, quality, finish) in enumerate(arrivals):
        now += 0.01
        job = view(session, seq, quality)
        job.request = wire.ViewRender(id=f"r{number}", viewport="v", seq=seq, scene=scene(quality))
        replaced, _ = scheduler.add_view(session, job)
        answered += [old.request.id for old in replaced]
        box: Mailbox = session.viewports["v"]
        assert box.pending is None or box.pending.request.seq == box.last_seq
        if running is None:
            running = scheduler.pick(now)
            assert running is None or running.request.seq >= shown
        if running is not None and finish:
            shown = running.request.seq
            scheduler.finished(running, 0.01, now, delivered=True)
            running = None
        assert sum(j is not None for j in (box.pending, box.refine)) <= 1
    assert len(answered) == len(set(answered))


def test_clients_are_served_alike_whatever_their_number_of_viewports():
    scheduler = Scheduler(Times())
    greedy, modest = session_in(scheduler, b"gggg"), session_in(scheduler, b"mmmm")
    served = {greedy: 0, modest: 0}
    for turn in range(1, 200):
        for name in "abcdefgh":
            scheduler.add_view(greedy, view(greedy, turn, viewport=name))
        scheduler.add_view(modest, view(modest, turn))
        job = scheduler.pick(turn * 0.01)
        served[job.session] += 1
        scheduler.finished(job, 0.01, turn * 0.01, delivered=False)
    assert abs(served[greedy] - served[modest]) < 20


def test_a_late_client_gains_no_credit():
    scheduler = Scheduler(Times())
    old, new = session_in(scheduler, b"oooo"), session_in(scheduler, b"nnnn")
    for turn in range(1, 100):
        scheduler.add_view(old, view(old, turn))
        scheduler.finished(scheduler.pick(turn), 1.0, turn, delivered=False)
    served = {old: 0, new: 0}
    for turn in range(100, 200):
        scheduler.add_view(old, view(old, turn))
        scheduler.add_view(new, view(new, turn))
        job = scheduler.pick(turn)
        served[job.session] += 1
        scheduler.finished(job, 1.0, turn, delivered=False)
    assert abs(served[old] - served[new]) <= 4


def test_batch_waits_for_viewports_but_not_for_ever():
    scheduler = Scheduler(Times(batch_patience=1.0))
    looker, batcher = session_in(scheduler, b"llll"), session_in(scheduler, b"bbbb")
    for number in range(50):
        scheduler.add_batch(batcher, frame(batcher, number), 0.0)
    kinds, now = [], 0.0
    for turn in range(1, 301):
        now += 0.02
        scheduler.add_view(looker, view(looker, turn, at=now))
        job = scheduler.pick(now)
        kinds.append(job.kind)
        scheduler.finished(job, 0.02, now, delivered=True)
    assert 4 <= kinds.count("frame") <= 8       # six seconds
    assert [j.request.id for j in batcher.queue] == [f"bbbb-f{n}" for n in range(kinds.count("frame"), 50)]   # in order


def test_a_long_batch_frame_makes_room_but_not_always():
    scheduler = Scheduler(Times(view_patience=0.4))
    session = session_in(scheduler, b"aaaa")
    running = frame(session, 1)
    running.started_at = 10.0
    scheduler.frame_seconds = 5.0
    assert not scheduler.should_put_back(running, 11.0)
    scheduler.add_view(session, view(session, 1, at=11.0))
    assert scheduler.should_put_back(running, 11.0)
    scheduler.frame_seconds = 1.1
    assert not scheduler.should_put_back(running, 11.0)     # it is nearly done
    assert scheduler.should_put_back(running, 11.6)         # but it was not
    running.put_back = 3
    assert not scheduler.should_put_back(running, 99.0)


def test_a_client_that_does_not_read_is_not_rendered_for():
    scheduler = Scheduler(Times(window=2.0))
    session = session_in(scheduler, b"aaaa")
    scheduler.add_view(session, view(session, 1))
    session.viewports["v"].unconfirmed = {"x": 1.0, "y": 1.0}
    assert scheduler.pick(1.5) is None
    assert scheduler.pick(3.5) is not None


# ---------------------------------------------------------------- uploads
def upload(store: UploadStore, data: bytes, kind: str = "photo", sha256: str = "", chunk: int = 7) -> dict:
    sha256 = sha256 or hashlib.sha256(data).hexdigest()
    offset, reply = 0, {}
    while offset < len(data):
        piece = data[offset:offset + chunk]
        reply = store.chunk(PEER, wire.Upload(id="u", sha256=sha256, type=kind, size=len(data), offset=offset), memoryview(piece))
        offset = reply["offset"]
    return reply


def test_uploads_are_named_by_content(tmp_path):
    store = UploadStore(tmp_path / "u", 10_000)
    data = b"\x89PNG" + os.urandom(50)
    assert upload(store, data)["complete"]
    found = store.find(hashlib.sha256(data).hexdigest())
    assert found.read_bytes() == data and found.suffix == ".png"
    assert upload(store, data) == {"offset": len(data), "complete": True}      # known already
    with pytest.raises(NearError) as caught:
        upload(store, data[:-1] + b"!", sha256="ab" * 32)
    assert caught.value.code == "upload-damaged"
    for wrong in (b"MZ" + bytes(50), b"#!/bin/sh\n" + bytes(20)):
        with pytest.raises(NearError):
            upload(store, wrong)
    assert [p.name for p in (tmp_path / "u").iterdir()] == [found.name]


def test_uploads_out_of_order_repeated_and_abandoned(tmp_path):
    store = UploadStore(tmp_path / "u", 10_000)
    data = b"\x89PNG" + bytes(96)
    ask = dict(id="u", sha256=hashlib.sha256(data).hexdigest(), type="photo", size=100)
    with pytest.raises(NearError):
        store.chunk(PEER, wire.Upload(offset=50, **ask), memoryview(data[50:]))
    assert store.chunk(PEER, wire.Upload(offset=0, **ask), memoryview(data[:60]))["offset"] == 60
    with pytest.raises(NearError):
        store.chunk(PEER, wire.Upload(offset=80, **ask), memoryview(data[80:]))
    store.chunk(PEER, wire.Upload(offset=0, **ask), memoryview(data[:60]))
    with pytest.raises(NearError):
        store.chunk(PEER, wire.Upload(offset=60, **ask), memoryview(bytes(90)))     # more than it said
    for number in range(9):
        store.chunk(PEER, wire.Upload(id="u", sha256=f"{number:064d}", type="photo", size=100, offset=0), memoryview(data[:10]))
    assert len(list((tmp_path / "u").glob(".*.part"))) == 4
    store.forget(PEER)
    assert list((tmp_path / "u").iterdir()) == []


def test_the_store_keeps_to_its_quota(tmp_path):
    store = UploadStore(tmp_path / "u", 1000)
    for number in range(10):
        upload(store, b"\x89PNG" + bytes([number]) * 296, chunk=400)
        os.utime(next(p for p in (tmp_path / "u").iterdir() if p.stat().st_mtime > 1e9), (number, number))
    assert sum(p.stat().st_size for p in (tmp_path / "u").iterdir()) <= 1000
    with pytest.raises(NearError):
        upload(store, b"\x89PNG" + bytes(2000), chunk=400)


def glb(json_text: bytes) -> bytes:
    json_text += b" " * (-len(json_text) % 4)
    return b"glTF" + (2).to_bytes(4, "little") + (20 + len(json_text)).to_bytes(4, "little") + len(json_text).to_bytes(4, "little") + b"JSON" + json_text


@pytest.mark.parametrize("data, code", [
    (glb(b'{"images":[{"uri":"../../secret.png"}]}'), "mesh-references"), (glb(b'{"buffers":[{"uri":"file:///etc/passwd"}]}'), "mesh-references"),
    (b"v 0 0 0\nmtllib /etc/passwd\n", "mesh-references"), (glb(b'{"images":5}'), "mesh-damaged"), (glb(b"[[["), "mesh-damaged"),
    (glb(b'{"images":[{"uri":"data:image/png;base64,AA"}],"buffers":[{}]}'), ""), (b"v 0 0 0\nv 1 0 0\n", ""), (b"ply\nformat ascii 1.0\n", "")])
def test_meshes_may_not_point_at_files_of_the_backend(tmp_path, data, code):
    store = UploadStore(tmp_path / "u", 10_000)
    if not code:
        assert upload(store, data, "mesh", chunk=1000)["complete"]
        return
    with pytest.raises(NearError) as caught:
        upload(store, data, "mesh", chunk=1000)
    assert caught.value.code == code
    assert list((tmp_path / "u").iterdir()) == []


# ---------------------------------------------------------------- shared memory
def test_segments_between_processes(tmp_path):
    pool = sharedmem.Pool(tmp_path, most_bytes=10_000)
    slot, segment = pool.take(3000)
    segment.data[:5] = b"hello"
    code = "import sys; from near import sharedmem as s; g = s.attach(sys.argv[1]); print(bytes(g.data[:5]), g.proof); g.data[:2] = b'J!'"
    seen = subprocess.run([sys.executable, "-c", code, segment.name], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "backend")})
    assert seen.stdout.split() == ["b'hello'", segment.proof] and bytes(segment.data[:5]) == b"J!llo", seen.stderr
    assert pool.take(8000) is None, "over the limit: the socket must do"
    pool.give(slot)
    pool.give(slot)
    pool.give(99)
    assert pool.take(2900)[1] is segment, "used again"
    name = segment.name
    pool.close()
    with pytest.raises(OSError):
        sharedmem.attach(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "memfd", "memfd:1.2:3", "memfd:x.y:5:00", "file:/dev/zero:100:00", "file:/dev/null:10:ab", "memfd:999999.3:10:ab",
                                  "tag:x:1:2", "file:/etc/passwd:1:00"])
def test_wrong_segment_names(name):
    with pytest.raises(OSError):
        sharedmem.attach(name)


def test_segments_as_files_where_there_is_nothing_better(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    segment = sharedmem.create(100, tmp_path)
    assert segment.name.startswith("file:") and len(list(tmp_path.iterdir())) == 1
    other = sharedmem.attach(segment.name)
    other.data[:3] = b"abc"
    assert bytes(segment.data[:3]) == b"abc" and other.proof == segment.proof
    assert sharedmem.sweep(tmp_path) == 0
    next(tmp_path.iterdir()).rename(tmp_path / "frame-4194999-x.shm")
    assert sharedmem.sweep(tmp_path) == 1 and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the client's viewport
@given(st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.booleans()), max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_stale_frame_is_ever_shown(arrivals):
    confirmed = []
    viewport = Viewport(None, "v")
    shown = (0, False)
    for number, (seq, final, take) in enumerate(arrivals):
        message = wire.FrameDone(id=f"r{number}", seq=seq, viewport="v", final=final)
        viewport.arrived(Frame(message, [wire.Buffer("color", "u1", (1,), b"x")], sharedmem.Attachments(), confirmed.append))
        if take and (frame := viewport.take()) is not None:
            assert frame.order > shown
            shown = frame.order
    assert len(confirmed) == len(arrivals), "every frame is confirmed, shown or not"


# ---------------------------------------------------------------- words
def test_failures_are_put_into_words():
    for error, code, fatal in ((MemoryError(), "out-of-memory", True), (RuntimeError("CUDA out of memory. Tried"), "out-of-memory", False),
                               (RuntimeError("CUDA error: an illegal memory access"), "gpu-fault", True), (KeyError("x"), "internal-error", False),
                               (NearError("a", "b.", "c."), "a", False)):
        found, ends = explain(error, "testing")
        assert (found.code, ends) == (code, fatal)


def test_settings_are_checked(tmp_path):
    for wrong in ({"name": "../x"}, {"name": ""}, {"device": "quantum"}, {"allow_roots": (tmp_path / "none",)}):
        with pytest.raises(NearError):
            ServeConfig(home=tmp_path, **wrong)


def test_a_cancellation_spares_what_must_not_be_left_half_way():
    """Joining threads that native code started is such a place; waiting for our own pool's result is not."""
    import threading

    from near.server.worker import _fragile

    assert _fragile(threading.Thread.join.__code__)
    assert not _fragile(threading.Condition.wait.__code__)
