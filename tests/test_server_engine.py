"""The real engine in the worker: the same pixels as in-process, progress with previews, cancellation that reaches it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("psutil")
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tools"))

from stress_parts.stand import Stand  # noqa: E402

from near import wire  # noqa: E402
from near.errors import Cancelled, NearError  # noqa: E402
from near.geometry.cameras import orbit_camera  # noqa: E402
from near.lighting import environment_from_array, rotation_z  # noqa: E402
from near.pipeline.engine import Engine  # noqa: E402
from near.pipeline.types import PASSES, PlacedAsset  # noqa: E402
from near.server.remote import RemoteEngine  # noqa: E402

SAMPLES = REPOSITORY / "backend" / "near" / "samples"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="the stand sends POSIX signals")]


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    with Stand(tmp_path_factory.mktemp("home"), engine=True) as stand, RemoteEngine(str(stand.home / "run" / "default.json")) as engine:
        yield engine


@pytest.fixture(scope="module")
def asset(remote):
    seen = []
    made = remote.encode(SAMPLES / "teapot.glb", progress=lambda stage, fraction, preview=None: seen.append((stage, fraction)))
    assert seen and seen[-1][1] <= 1 and all(a[1] <= b[1] for a, b in zip(seen, seen[1:]))
    return made


@pytest.fixture(scope="module")
def light():
    pixels = np.random.default_rng(1).random((32, 64, 3), dtype=np.float32) * 3
    return environment_from_array(pixels).rotated(rotation_z(0.7)).scaled(1.25)


@pytest.mark.parametrize("quality", ["full", "draft"])
def test_the_same_pixels_as_in_process(remote, asset, light, quality):
    turned = torch.eye(4)
    turned[:3, :3] = rotation_z(0.4) * 0.8
    turned[0, 3] = 0.1
    placed, camera = [PlacedAsset(asset, turned)], orbit_camera(0.5, 0.3, 2.0, 0.7, 72, 50)
    theirs = remote.render(placed, light, camera, passes=tuple(PASSES), quality=quality)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours = Engine().render(placed, light, camera, passes=tuple(PASSES), quality=quality)
    finally:
        torch.set_num_threads(threads)
    assert ours.layers["alpha"].max() > 0.9
    for name in PASSES:
        assert torch.equal(theirs.layers[name], ours.layers[name]), name


def test_a_border_is_that_part_of_the_frame(remote, asset, light):
    camera = orbit_camera(0.5, 0.3, 2.0, 0.7, 64, 48)
    whole = remote.render([PlacedAsset(asset)], light, camera).layers["color"]
    from near.server.remote import spec_of_camera

    client = remote._client
    scene = wire.Scene(assets=(wire.PlacedSpec(remote._asset(asset)),), camera=spec_of_camera(camera), border=(20, 10, 50, 40), precision="f4",
                       light=wire.LightSpec(remote._light(light), env_from_world=tuple(light.env_from_world.flatten().tolist()), strength=light.strength))
    with client.call(wire.BatchFrame(id=client.new_id(), scene=scene)).frame as frame:
        part = torch.from_numpy(frame.array("color").copy())
    inside = (slice(2, -2), slice(2, -2))     # a pixel's filter reaches over the border's edge
    torch.testing.assert_close(part[inside], whole[10:40, 20:50][inside], atol=2e-3, rtol=0)


def test_cancel_reaches_the_engine_and_it_goes_on(remote, asset, light):
    """At several moments of a creation. The bound is loose because machines of tests are busy; tools/stress.py has the real one."""
    delays = iter([0.0, 0.3, 1.0])
    for delay in delays:
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            remote.create(SAMPLES / "teapot.png", steps=50, cancelled=lambda: time.monotonic() - begun > delay)
    assert remote._client.status()["starts"] == 1, "the worker was stopped, not killed"
    remote.render([PlacedAsset(asset)], light, orbit_camera(0.1, 0.3, 2.0, 0.7, 24, 24))


def test_the_engines_errors_arrive_as_they_are(remote, tmp_path, light):
    (tmp_path / "cut.png").write_bytes((SAMPLES / "teapot.png").read_bytes()[:500])
    with pytest.raises(NearError) as caught:
        remote.create(tmp_path / "cut.png")
    assert caught.value.code not in ("internal-error", "worker-crashed"), caught.value
    with pytest.raises(NearError) as caught:
        remote.render([], light, orbit_camera(0.1, 0.3, 2.0, 0.7, 24, 24))
    assert caught.value.code == "nothing-to-render"


def test_matte_shape_and_generator(remote):
    """What the add-on's Create panel asks for: a mask preview, style transfer, a geometry source by name."""
    client = remote._client
    photo = client.upload((SAMPLES / "teapot.png").read_bytes(), "photo")
    shape = client.upload(_disc_png(), "photo")
    seen = []
    told = client.call(wire.Matte(id=client.new_id(), photo=photo), timeout_s=120, on_progress=lambda m, b: seen.append(b)).result
    assert 0.05 < told["share"] < 0.9 and seen[-1] is not None and seen[-1].shape[2] == 3

    stages = {}
    call = {"timeout_s": 300, "on_progress": lambda m, b: stages.update({m.stage: b})}
    plain = client.call(wire.Create(id=client.new_id(), photo=photo, steps=1), **call).result
    assert stages["cut out"] is not None and stages["preview"].shape == (256, 256, 3)
    picture = np.frombuffer(stages["preview"].data, np.uint8).reshape(256, 256, 3).astype(int)
    assert abs(picture - 70).max() > 40                      # something stands before the grey
    transfer = client.call(wire.Create(id=client.new_id(), photo=photo, shape=shape, generator="silhouette", steps=1), **call).result
    assert transfer["sha256"] != plain["sha256"] and transfer["voxels"] != plain["voxels"]
    with pytest.raises(NearError, match="no geometry source"):
        client.call(wire.Create(id=client.new_id(), photo=photo, generator="none-such"), **call)


def _disc_png() -> bytes:
    from near.output import png_bytes

    y, x = np.mgrid[:96, :96] - 47.5
    pixels = np.full((96, 96, 4), 200, np.uint8)
    pixels[..., 3] = np.where(x * x + y * y < 40 ** 2, 255, 0)
    return png_bytes(pixels)
