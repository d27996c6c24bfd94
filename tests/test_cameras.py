"""Cameras: conventions against fixture and bench, invariants of moving and scaling, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from near.errors import NearError
from near.geometry.cameras import (
    Camera,
    camera_from_blender,
    orbit_camera,
    pinhole_intrinsics,
    published_hammersley,
    published_orbit,
    published_spiral,
    sphere_hammersley,
    split_similarity,
    trellis_yaw,
)

angles = st.floats(-math.pi, math.pi)
pitches = st.floats(-math.pi / 2, math.pi / 2)


def similarity(yaw: float, pitch: float, roll: float, scale: float, shift: tuple[float, float, float]) -> torch.Tensor:
    def turn(axis: int, angle: float) -> torch.Tensor:
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        m = torch.eye(3, dtype=torch.float64)
        m[i, i] = m[j, j] = math.cos(angle)
        m[i, j], m[j, i] = -math.sin(angle), math.sin(angle)
        return m

    m = torch.eye(4, dtype=torch.float64)
    m[:3, :3] = turn(2, yaw) @ turn(1, pitch) @ turn(0, roll) * scale
    m[:3, 3] = torch.tensor(shift, dtype=torch.float64)
    return m


similarities = st.builds(similarity, angles, angles, angles, st.floats(0.05, 20), st.tuples(*[st.floats(-3, 3)] * 3))


def test_published_cameras_match_fixture(shared_dir):
    fixture = load_file(shared_dir / "fixtures" / "camera.safetensors")
    rows = zip(fixture["yaw_pitch_r_fov_deg"].tolist(), fixture["extrinsics"], fixture["intrinsics"], strict=True)
    for (yaw, pitch, radius, fov), extrinsics, intrinsics in rows:
        camera = published_orbit(math.radians(yaw), math.radians(pitch), radius, math.radians(fov), size=512)
        torch.testing.assert_close(camera.cam_from_world, extrinsics, atol=1e-6, rtol=0)
        torch.testing.assert_close(camera.K / torch.tensor([512, 512, 1.0])[:, None], intrinsics, atol=1e-6, rtol=0)
    spiral = torch.stack([c.cam_from_world for c in published_spiral(8)])
    torch.testing.assert_close(spiral, fixture["spiral8_extrinsics"], atol=1e-6, rtol=0)
    points = torch.tensor([sphere_hammersley(i, 10) for i in range(10)], dtype=torch.float64)
    torch.testing.assert_close(points, fixture["hammersley10_yaw_pitch"], atol=1e-12, rtol=0)
    assert len(published_hammersley(5)) == 5


def test_orbit_and_blender_cameras_match_the_bench(shared_dir):
    index = json.loads((shared_dir / "bench" / "dev" / "index.json").read_text())
    for model in index["models"]:
        for view in model["views"]:
            c = view["camera"]
            size = c["resolution"]
            orbit = orbit_camera(c["yaw"], c["pitch"], c["radius"], math.radians(c["fov_deg"]), *size)
            blender = camera_from_blender(c["matrix_world"], c["K"], *size)
            torch.testing.assert_close(orbit.cam_from_world, blender.cam_from_world, atol=2e-6, rtol=0)
            torch.testing.assert_close(orbit.K, blender.K, atol=1e-4, rtol=0)
            torch.testing.assert_close(orbit.position, torch.tensor(c["position"]), atol=2e-6, rtol=0)
            assert math.isclose(trellis_yaw(c["yaw"]), c["trellis_yaw"], abs_tol=1e-6)


@given(yaw=angles, pitch=pitches, radius=st.floats(0.1, 50), width=st.integers(1, 300), height=st.integers(1, 300))
def test_orbit_looks_at_the_origin(yaw, pitch, radius, width, height):
    camera = orbit_camera(yaw, pitch, radius, 0.7, width, height)
    where = torch.tensor([math.sin(yaw) * math.cos(pitch), -math.cos(yaw) * math.cos(pitch), math.sin(pitch)]) * radius
    torch.testing.assert_close(camera.position, where, atol=1e-5 * radius, rtol=0)
    pixel, depth = camera.project(torch.zeros(1, 3))
    torch.testing.assert_close(pixel[0], torch.tensor([width / 2, height / 2]), atol=1e-3, rtol=0)
    torch.testing.assert_close(depth[0], torch.tensor(radius, dtype=torch.float32))
    torch.testing.assert_close(camera.forward, -where / radius, atol=1e-5, rtol=0)
    assert torch.linalg.det(camera.cam_from_world[:3, :3]) > 0.99
    up_pixel, _ = camera.project(torch.tensor([[0, 0, 1e-3]]))
    assert up_pixel[0, 1] <= pixel[0, 1] + 1e-4  # +Z is up on the image


@settings(deadline=None)
@given(world_from_asset=similarities, orthographic=st.booleans(), yaw=angles, pitch=pitches)
def test_moved_camera_sees_the_asset_where_the_world_camera_does(world_from_asset, orthographic, yaw, pitch):
    orbit = orbit_camera(yaw, pitch, 30.0, 0.6, 200, 100)
    kind = {"K": torch.tensor([[9.0, 0, 90], [0, 9, 60], [0, 0, 1]]), "projection": "orthographic"} if orthographic else {"K": orbit.K}
    camera = Camera(orbit.cam_from_world, width=200, height=100, near=0.5, far=99, **kind)
    moved = camera.moved(world_from_asset)
    scale = split_similarity(world_from_asset)[2]
    points = torch.rand(20, 3, dtype=torch.float64) - 0.5
    in_world = points @ world_from_asset[:3, :3].T + world_from_asset[:3, 3]
    pixels, depths = camera.project(in_world)
    pixels_moved, depths_moved = moved.project(points)
    torch.testing.assert_close(pixels_moved, pixels, atol=5e-2, rtol=1e-3)
    torch.testing.assert_close(depths_moved * scale, depths, atol=1e-3, rtol=1e-4)
    assert math.isclose(moved.near * scale, 0.5, rel_tol=1e-6) and math.isclose(moved.far * scale, 99, rel_tol=1e-6)


def test_scaled_keeps_the_view():
    camera = Camera(torch.eye(4), torch.tensor([[90.0, 0, 31], [0, 80, 22], [0, 0, 1]]), 60, 40)
    double = camera.scaled(2)
    assert (double.width, double.height) == (120, 80)
    points = torch.tensor([[0.1, 0.2, 1.0], [-0.3, 0.1, 2.0]])
    torch.testing.assert_close(double.project(points)[0], camera.project(points)[0] * 2)
    third = camera.scaled(1 / 3)  # 13.3 rows become 13: K follows what the size became
    assert (third.width, third.height) == (20, 13)
    torch.testing.assert_close(third.project(points)[0][:, 1], camera.project(points)[0][:, 1] * 13 / 40)


def test_blender_camera_ignores_scale_but_not_mirrors():
    m = torch.eye(4)
    m[:3, :3] *= 3.0
    m[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    camera = camera_from_blender(m, pinhole_intrinsics(0.7, 64, 48), 64, 48)
    torch.testing.assert_close(camera.position, torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(camera.forward, torch.tensor([0.0, 0.0, -1.0]))
    m[0, 0] = -3
    with pytest.raises(NearError, match="mirrors") as error:
        camera_from_blender(m, pinhole_intrinsics(0.7, 64, 48), 64, 48)
    assert error.value.code == "camera-not-rigid"


K = [[50.0, 0, 32], [0, 50, 32], [0, 0, 1]]
EYE = torch.eye(4)


@pytest.mark.parametrize("code, change", [
    ("camera-size", {"width": 0}),
    ("camera-size", {"height": -3}),
    ("camera-size", {"width": 20000}),
    ("camera-size", {"width": 16384, "height": 16384}),
    ("camera-not-finite", {"cam_from_world": EYE * math.nan}),
    ("camera-not-finite", {"K": [[math.inf, 0, 32], [0, 50, 32], [0, 0, 1]]}),
    ("camera-shape", {"K": [[1.0, 0], [0, 1]]}),
    ("camera-shape", {"cam_from_world": torch.eye(3)}),
    ("camera-intrinsics", {"K": [[0.0, 0, 32], [0, 50, 32], [0, 0, 1]]}),
    ("camera-intrinsics", {"K": [[50.0, 0, 32], [0, -50, 32], [0, 0, 1]]}),
    ("camera-intrinsics", {"K": [[50.0, 2, 32], [0, 50, 32], [0, 0, 1]]}),
    ("camera-not-rigid", {"cam_from_world": torch.diag(torch.tensor([2.0, 2, 2, 1]))}),
    ("camera-not-rigid", {"cam_from_world": torch.diag(torch.tensor([-1.0, 1, 1, 1]))}),
    ("camera-not-rigid", {"cam_from_world": torch.zeros(4, 4)}),
    ("camera-clip", {"near": 0.0}),
    ("camera-clip", {"near": 5.0, "far": 5.0}),
    ("camera-clip", {"near": math.nan}),
    ("camera-projection", {"projection": "fisheye"}),
])
def test_refusals(code, change):
    with pytest.raises(NearError) as error:
        Camera(**{"cam_from_world": EYE, "K": K, "width": 64, "height": 64} | change)
    assert error.value.code == code


def test_refuses_transforms_that_are_not_similarities():
    camera = Camera(EYE, K, 64, 64)
    stretched, mirrored, flat = torch.diag(torch.tensor([1.0, 2, 1, 1])), torch.diag(torch.tensor([-1.0, 1, 1, 1])), torch.zeros(4, 4)
    for matrix in (stretched, mirrored, flat, EYE * math.nan):
        with pytest.raises(NearError) as error:
            camera.moved(matrix)
        assert error.value.code == "scale-not-uniform"
