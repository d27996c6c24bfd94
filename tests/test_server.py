"""The backend with real sockets and processes on loopback: what issue 4 must show, in small; the full sizes are tools/stress.py's."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

pytest.importorskip("psutil")
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tools"))

from near_test_backend import SEED_STEPS, frame_values  # noqa: E402
from stress_parts.flood import flood  # noqa: E402
from stress_parts.kills import batch_under_fire, cancel_times, parent_dies  # noqa: E402
from stress_parts.stand import Stand, children, scene  # noqa: E402
from stress_parts.views import moving_viewports, transport  # noqa: E402

from near import wire  # noqa: E402
from near.client import Client  # noqa: E402
from near.connection import process_alive  # noqa: E402
from near.errors import NearError  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand sends POSIX signals")


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    (root / "inside.glb").write_bytes(b"ply\n" + bytes(100))
    with Stand(tmp_path_factory.mktemp("home"), allow_roots=[str(root)]) as running:
        running.root = root
        yield running


@pytest.fixture
def client(stand):
    with Client.connect(stand.connection, name="test") as connected:
        yield connected


def ask(client: Client, kind: type, timeout_s: float = 20, **values):
    return client.call(kind(id=client.new_id(), **values), timeout_s=timeout_s)


def refused(code: str, work) -> NearError:
    with pytest.raises(NearError) as caught:
        work()
    assert caught.value.code == code, caught.value
    assert caught.value.what.endswith((".", ")")) and len(caught.value.remedy) > 10
    return caught.value


# ---------------------------------------------------------------- the seven things
def test_1_malformed_messages():
    result = flood(3000)
    assert result["alive"] and result["answered"] == result["asked"] == 60
    assert result["internal_errors"] == 0
    assert result["growth"] < 0.05
    assert result["worst_ms"] < 2000


@pytest.mark.parametrize("shared_memory", [True, False])
def test_2_worker_killed_during_a_batch(shared_memory):
    result = batch_under_fire(frames=24, kills=3, frame_s=0.03, shared_memory=shared_memory)
    assert result["kills"] == 3 and result["lost_noticed"] >= 3
    assert (result["identical"], result["missing"], result["duplicates"]) == (24, 0, 0)
    assert result["leftovers"] == []
    assert result["longest_silence_s"] < 10


def test_3_viewports_and_a_batch_behind_them():
    result = moving_viewports(clients=3, seconds=3.0)
    for viewer in result["viewers"]:
        assert viewer["error"] == "" and viewer["stale_shown"] == 0
        assert viewer["shown"] >= 3 and viewer["age_p95_ms"] < 10_000      # generous: machines of tests are busy
    assert result["served"]["superseded"] > 0
    assert result["batch_frames"] >= 1


def test_4_cancel_within_200_ms():
    result = cancel_times(rounds=1)
    assert max(result[name] for name in ("create", "step", "frame", "queued")) < 200
    assert result["workers"] == 1, "a cancelled worker is not replaced, it goes on"
    assert result["next_frame"] < 500


def test_4_cancel_interrupts_work_that_never_asks(client):
    photo = client.upload(b"\x89PNG" + bytes(64), "photo")
    before = client.status()["starts"]
    for kind, values in ((wire.Create, {"photo": photo, "seed": 8}), (wire.BatchFrame, {"scene": scene(1, fault=8)})):
        pending = client.send(kind(id=client.new_id(), **values))
        client.wait(lambda: client.status()["job"] is not None, 10)
        time.sleep(0.1)
        begun = time.monotonic()
        client.cancel(pending.request.id)
        client.wait(lambda: pending.done, 10)
        assert pending.error.code == "cancelled" and time.monotonic() - begun < 1.0      # 0.06 s where the machine is free
        ask(client, wire.BatchFrame, scene=scene(2)).frame.release()
    assert client.status()["starts"] == max(before, 1)


def test_6_transport():
    result = transport(rounds=4, width=960, height=540)
    assert result["ping_ms"] < 5 and result["tcp_ms"] < 500 and result["shared_memory_ms"] < 500


@pytest.mark.parametrize("way", ["pid", "pipe"])
def test_7_parent_dies(tmp_path, way):
    result = parent_dies(tmp_path, way)
    assert result["processes_left"] == [] and result["segments_left"] == [] and not result["connection_file_left"]
    assert result["shared_memory_used"] or not sys.platform.startswith("linux")


# ---------------------------------------------------------------- frames
def test_frames_by_socket_and_by_shared_memory_are_equal(stand):
    asked = scene(3, 33, 21, passes=("color", "depth", "normal"), border=(3, 2, 30, 20))
    got = []
    for shared in (True, False):
        with Client.connect(stand.connection, shared_memory=shared) as client:
            client.wait(lambda: client.shared_memory == shared, 5)
            with ask(client, wire.BatchFrame, scene=asked).frame as frame:
                assert (frame.message.slot >= 0) == shared
                got.append({name: frame.array(name).copy() for name in frame.layers})
    for name, dtype in (("color", np.float16), ("depth", np.float32), ("normal", np.float16)):
        assert got[0][name].dtype == dtype
        np.testing.assert_array_equal(got[0][name], frame_values(asked, "full", name).astype(dtype))
        np.testing.assert_array_equal(got[0][name], got[1][name])


def test_progressive_viewport_is_refined_when_still(client):
    viewport = client.viewport("progressive")
    seen = []
    for number in range(5):
        viewport.submit(scene(number, seconds=0.04, quality="progressive"))
        client.poll(0.01)

    def settled() -> bool:
        frame = viewport.take()
        if frame is not None:
            with frame:
                seen.append((frame.message.seq, frame.message.quality, frame.message.final))
        return bool(seen) and seen[-1] == (5, "full", True)

    client.wait(settled, 10)
    assert (5, "draft", False) in seen and seen == sorted(seen, key=lambda s: (s[0], s[2]))
    assert not [s for s in seen if s[0] < 5 and s[1] == "full"], "no full frame of a camera that has moved on"
    viewport.close()


def test_old_and_repeated_view_requests_are_not_answered(client):
    viewport = client.viewport("order")
    viewport.seq = 10
    viewport.submit(scene(1))
    client.wait(lambda: viewport.take() is not None, 10)
    late = client.send(wire.ViewRender(id=client.new_id(), viewport="order", seq=11, scene=scene(2)))
    older = client.send(wire.ViewRender(id=client.new_id(), viewport="order", seq=3, scene=scene(3)))
    client.wait(lambda: late.done and older.done, 10)
    assert viewport.take() is None and viewport.superseded == 2


def test_view_work_goes_on_between_the_steps_of_a_long_job(client):
    photo = client.upload(b"\x89PNG" + bytes(64), "photo")
    stages = []
    create = client.send(wire.Create(id=client.new_id(), photo=photo, seed=30 * SEED_STEPS + 100),
                         on_progress=lambda p, preview: stages.append((p.stage, p.eta_s, preview)))
    client.wait(lambda: len(stages) > 2, 20)
    viewport = client.viewport("beside")
    begun = time.monotonic()
    viewport.submit(scene(1))
    client.wait(lambda: viewport.take() is not None, 10)
    assert time.monotonic() - begun < 1.5 and not create.done
    assert bytes(stages[1][2].data) == bytes([int(stages[1][0].split()[1])] * 192)
    client.wait(lambda: client.cancel(create.request.id) is not None and create.done, 5)
    assert create.error.code == "cancelled"


def test_create_gives_an_asset_that_can_be_fetched(client):
    photo = client.upload(b"\x89PNG" + bytes(range(256)) * 40_000, "photo")      # more than one chunk
    result = ask(client, wire.Create, photo=photo, seed=2 * SEED_STEPS).result
    assert hashlib.sha256(client.fetch(result["sha256"])).hexdigest() == result["sha256"]
    assert result["sha256"] in ask(client, wire.Assets).result["assets"]
    assert ask(client, wire.SetLight, light=wire.LightSpec()).result["lights"] >= 1


def test_the_same_frame_is_rendered_once(client, stand):
    before = client.status()["done"]["frame"]
    first = client.send(wire.BatchFrame(id=client.new_id(), scene=scene(77, seconds=0.3), key="a"))
    again = client.send(wire.BatchFrame(id=client.new_id(), scene=scene(77, seconds=0.3), key="a"))
    with Client.connect(stand.connection) as other:
        third = other.send(wire.BatchFrame(id=other.new_id(), scene=scene(77, seconds=0.3), key="a"))
        other.wait(lambda: third.done, 10)
        client.wait(lambda: first.done and again.done, 10)
        assert len({f.check().frame.copy()["color"] for f in (first, again, third)}) == 1
    assert client.status()["done"]["frame"] == before + 1
    for pending in (first, again):
        pending.frame.release()


# ---------------------------------------------------------------- failures of the worker
@pytest.mark.parametrize("fault, code", [(2, "worker-crashed"), (4, "out-of-memory"), (5, "internal-error")])
def test_a_failing_frame_gets_a_sentence_and_the_next_one_is_rendered(client, fault, code):
    error = refused(code, lambda: ask(client, wire.BatchFrame, scene=scene(1, fault=fault), timeout_s=40))
    assert "rendering a frame" in error.what and "Traceback" not in error.what
    ask(client, wire.BatchFrame, scene=scene(2)).frame.release()


def test_a_crash_during_a_job_is_told_and_queued_frames_survive(client):
    photo = client.upload(b"\x89PNG" + bytes(64), "photo")
    crash = client.send(wire.Create(id=client.new_id(), photo=photo, seed=2))
    frames = [client.send(wire.BatchFrame(id=client.new_id(), scene=scene(i))) for i in range(3)]
    client.wait(lambda: crash.done and all(f.done for f in frames), 20)
    assert crash.error.code == "worker-crashed" and "creating an asset" in crash.error.what
    for pending in frames:
        pending.check().frame.release()


def test_a_job_right_after_one_that_ran_out_of_memory_does_not_share_its_fate(stand):
    """The worker says what happened and ends; the next job may be on its way to it by then."""
    with Client.connect(stand.connection) as client:
        photo = client.upload(b"\x89PNG" + bytes(80), "photo")
        for _ in range(3):
            sent = [client.send(wire.Create(id=client.new_id(), photo=photo, seed=seed)) for seed in (4, 0)]
            client.wait(lambda: all(pending.done for pending in sent), 60)
            assert sent[0].error.code == "out-of-memory"
            assert sent[1].error is None and sent[1].result["sha256"]


def test_a_client_that_does_not_read_for_long_has_no_full_queue(stand):
    """A full queue stops libzmq from hearing heartbeats; after the reconnection, reading on would abort the whole process."""
    with Client.connect(stand.connection) as client:
        assert [client._sockets[lane].getsockopt(zmq.RCVHWM) for lane in wire.LANES] == [0, 0, 0]


def test_deadlines_hangs_and_memory(tmp_path):
    times = {"idle_stall": 2.5, "worker_silence": 2.5, "cancel_grace": 0.5, "idle_stop": 1.0}
    with Stand(tmp_path, times=times, worker_memory=400 * 1024 ** 2) as running:
        client = running.client()
        refused("deadline-exceeded", lambda: client.call(
            wire.BatchFrame(id=client.new_id(), scene=scene(1, seconds=50), deadline_s=0.3)))
        photo = client.upload(b"\x89PNG" + bytes(64), "photo")
        refused("worker-hung", lambda: ask(client, wire.Create, photo=photo, seed=6))      # neither polls nor reports
        refused("worker-hung", lambda: ask(client, wire.Create, photo=photo, seed=3))      # the whole process stands still
        refused("out-of-memory", lambda: ask(client, wire.Create, photo=photo, seed=7))    # grows and grows
        stubborn = client.send(wire.BatchFrame(id=client.new_id(), scene=scene(1, fault=6)))
        client.wait(lambda: (client.beat.get("job") or {}).get("kind") == "frame", 5)
        begun = time.monotonic()
        client.cancel(stubborn.request.id)
        client.wait(lambda: stubborn.done, 5)
        assert stubborn.error.code == "cancelled" and time.monotonic() - begun < 3
        ask(client, wire.BatchFrame, scene=scene(5)).frame.release()
        client.wait(lambda: client.beat.get("worker") == "off", 10)                        # idle: memory given back
        assert children(running.process.pid) == []
        ask(client, wire.BatchFrame, scene=scene(6)).frame.release()
        ask(client, wire.Release)
        assert client.status()["worker"] == "off"


def test_a_worker_that_cannot_start_is_told(tmp_path):
    with Stand(tmp_path, times={"restart_first": 0.05}, environment={"NEAR_TEST_FAIL_START": "1"}) as running:
        client = running.client()
        refused("worker-cannot-start", lambda: ask(client, wire.BatchFrame, scene=scene(1)))
        ask(client, wire.Ping)


# ---------------------------------------------------------------- clients that come, go, and ask for too much
def test_a_lost_client_frees_its_place_and_memory(tmp_path):
    with Stand(tmp_path, limits={"clients": 2}, times={"client_grace": 0.5}) as running:
        lost, other = running.client(), running.client()
        lost.send(wire.BatchFrame(id=lost.new_id(), scene=scene(1, seconds=30)))
        lost.poll(0.2)
        refused("too-many-clients", lambda: running.client())
        lost.state = "crashed"
        lost.close()                                # without a goodbye
        other.wait(lambda: other.beat.get("clients") == 1 and other.beat.get("job") is None, 10)
        ask(other, wire.BatchFrame, scene=scene(2)).frame.release()


def test_requests_that_cannot_be(client):
    refused("not-uploaded", lambda: ask(client, wire.Create, photo="0" * 64))
    refused("not-there", lambda: ask(client, wire.Fetch, sha256="0" * 64))
    refused("export-unsupported", lambda: ask(client, wire.Export, asset="0" * 64, format="ply"))
    refused("bad-message", lambda: client.call(wire.Ping(id=client.new_id()), [wire.Buffer("x", "u1", (1,), b"x")]))
    refused("bad-message", lambda: client.call(wire.Create(id=client.new_id(), photo="0" * 64), lane="control"))
    assert client.call(wire.Cancel(id=client.new_id(), target="never-was")).result == {"state": "unknown"}


def test_files_only_from_allowed_folders(client, stand, tmp_path):
    assert len(ask(client, wire.AddFile, type="mesh", path=str(stand.root / "inside.glb")).result["sha256"]) == 64
    (tmp_path / "secret.glb").write_bytes(b"ply\nsecret")
    os.symlink(tmp_path / "secret.glb", stand.root / "link.glb")
    for path in (tmp_path / "secret.glb", stand.root / "link.glb", stand.root / ".." / "x", stand.root, "/dev/zero", "inside.glb", ""):
        refused("path-refused", lambda: ask(client, wire.AddFile, type="mesh", path=str(path)))


def test_the_connection_file_is_private_and_the_log_has_no_secrets(stand):
    path = stand.home / "run" / "default.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stand.connection.token not in stand.log() and stand.connection.token not in repr(stand.connection)
    assert all(endpoint.startswith("tcp://127.0.0.1:") for endpoint in stand.connection.endpoints.values())


def test_broker_killed_worker_follows(tmp_path):
    with Stand(tmp_path) as running:
        client = running.client()
        ask(client, wire.BatchFrame, scene=scene(1)).frame.release()
        worker = client.status()["worker_pid"]
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
        pending = client.send(wire.Ping(id=client.new_id()))
        client.wait(lambda: pending.done, 10) if client.state == "ready" else None
        assert pending.error.code == "backend-gone"
        end = time.monotonic() + 5
        while process_alive(worker):
            assert time.monotonic() < end
            time.sleep(0.05)
        with Stand(tmp_path) as fresh:      # a stale connection file does no harm
            ask(fresh.client(), wire.Ping)
