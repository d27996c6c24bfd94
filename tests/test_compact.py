"""The compact pack's parts: harmonics, visibility, shading, anchors, lifting, engine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from near.colour import agx_srgb
from near.errors import Cancelled, NearError
from near.geometry.cameras import orbit_camera
from near.geometry.mesh import PbrMesh, load_mesh
from near.geometry.photo import Photo
from near.lighting import Environment, prefilter, rotation_z, uniform_environment
from near.lighting.samples import sample_environment
from near.models.anchors import build_anchors, decode_anchors, front_facing, quaternion_from_z
from near.models.harmonics import fibonacci_sphere, sh_basis
from near.models.lifting import LIFT_CHANNELS, lift_photo
from near.models.material import decode_material, encode_material, voxel_mean, within_white
from near.models.shading import Surface, light_surface, shade_terms
from near.models.visibility import bake_visibility, evaluate_visibility
from near.pipeline.engine import Engine
from near.pipeline.types import PASSES, PlacedAsset


def sphere_samples(count: int = 4000, radius: float = 0.45):
    normals = fibonacci_sphere(count)
    return normals * radius, normals


@pytest.fixture(scope="module")
def box_mesh(tmp_path_factory):
    import trimesh

    path = tmp_path_factory.mktemp("mesh") / "box.ply"
    trimesh.creation.box((1.0, 0.7, 0.5)).subdivide().export(path)
    return load_mesh(path)


@pytest.fixture(scope="module")
def engine():
    return Engine("compact", "cpu")


@pytest.fixture(scope="module")
def asset(engine, box_mesh):
    return engine.encode(box_mesh)


@pytest.fixture(scope="module")
def light():
    return sample_environment("sunset")


def test_harmonics_are_orthonormal():
    basis = sh_basis(fibonacci_sphere(20000).double())
    gram = basis.T @ basis * 4 * math.pi / 20000
    assert (gram - torch.eye(25)).abs().max() < 1e-4


def test_a_sphere_sees_everything_above_its_horizon():
    points, normals = sphere_samples()
    (front, free), (_, back_free) = bake_visibility(points, normals, torch.full((len(points),), 0.02))
    assert free.min() > 0.95 and back_free.max() < 0.05
    assert evaluate_visibility(front, normals).min() > 0.85


def test_a_plate_over_a_floor_shadows_it():
    axis = torch.linspace(-0.45, 0.45, 50)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    floor = torch.stack([x, y, torch.full_like(x, -0.2)], -1).reshape(-1, 3)
    plate = torch.stack([x * 0.4, y * 0.4, torch.zeros_like(x)], -1).reshape(-1, 3)
    up = torch.tensor([[0.0, 0.0, 1.0]]).expand(len(floor), 3)
    (coefficients, free), _ = bake_visibility(torch.cat([floor, plate]), torch.cat([up, up]), torch.full((len(floor) * 2,), 0.018))
    under = floor[:, :2].norm(dim=-1) < 0.05
    assert free[: len(floor)][under].mean() < 0.45 and free[len(floor):].min() > 0.95
    assert evaluate_visibility(coefficients[: len(floor)][under], up[: int(under.sum())]).mean() < 0.35


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3).filter(lambda v: sum(x * x for x in v) > 1e-4))
def test_quaternion_takes_z_to_the_normal(values):
    n = F.normalize(torch.tensor([values]), dim=-1)
    w, x, y, z = quaternion_from_z(n)[0]
    turned = torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])
    assert torch.allclose(turned, n[0], atol=3e-2 if n[0, 2] < -0.999 else 1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_material_codes_round_trip(seed):
    m = torch.rand(20, 5, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(decode_material(encode_material(m[:, :3], m[:, 3], m[:, 4])), m, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 8), min_size=3, max_size=3))
def test_what_is_brighter_than_white_keeps_its_hue(rgb):
    colour = torch.tensor([rgb])
    limited = within_white(colour)
    assert float(limited.max()) <= 1 + 1e-6
    torch.testing.assert_close(limited * colour.max().clamp_min(1), colour)


def test_anchors_keep_positions_and_normals():
    points, normals = sphere_samples()
    coords, anchors, rows = build_anchors(points, normals, normals, 32, spread=0.5)
    cloud = decode_anchors(coords, anchors, 32)
    assert (cloud.points - points[rows]).abs().max() < 1 / 32 / 256
    assert ((cloud.normals * normals[rows]).sum(-1) > 0.999).all()
    assert (coords[1:].long() @ torch.tensor([1024, 32, 1]) > coords[:-1].long() @ torch.tensor([1024, 32, 1])).all()
    camera = orbit_camera(0.0, 0.0, 2.0, 0.7, 64, 64)
    assert 0.3 < len(front_facing(cloud, camera)) / len(cloud) < 0.5


def surface_of_sphere(roughness: float, metallic: float):
    points, normals = sphere_samples(2000)
    coords, anchors, _ = build_anchors(points, normals, normals, 32, spread=0.5)
    cloud = decode_anchors(coords, anchors, 32)
    material = torch.tensor([0.8, 0.5, 0.3, roughness, metallic]).expand(len(cloud), 5)
    return cloud, cloud.surface(material)


@pytest.mark.parametrize("metallic", [0.0, 1.0])
def test_a_white_world_returns_the_albedo(metallic):
    cloud, surface = surface_of_sphere(0.5, metallic)
    env = uniform_environment(1.0)
    lit = prefilter(env)
    view = cloud.normals
    shade = shade_terms(surface, light_surface(surface, lit, env), lit, env, view).combine()
    # An object never reflects more than it receives; a bright one returns most of it.
    assert shade.max() < 1.03
    assert torch.allclose(shade.mean(0), torch.tensor([0.8, 0.5, 0.3]), atol=0.1)


def test_shading_is_linear_in_the_light(light):
    cloud, surface = surface_of_sphere(0.4, 0.5)
    lit = prefilter(light)
    view = F.normalize(torch.tensor([0.0, -2.0, 0.5]) - cloud.points, dim=-1)

    def shade(env: Environment):
        return shade_terms(surface, light_surface(surface, lit, env), lit, env, view).combine()

    once, twice = shade(light), shade(Environment(light.rgb_lin709, light.env_from_world, 2.0))
    assert torch.allclose(twice, 2 * once, rtol=1e-4, atol=1e-6)


def test_lifting_takes_the_photos_colours():
    points, normals = sphere_samples(6000)
    coords, anchors, _ = build_anchors(points, normals, normals, 32, spread=0.6)
    cloud = decode_anchors(coords, anchors, 32)
    camera = orbit_camera(0.3, 0.2, 2.0, 0.7, 96, 96)
    srgb = torch.tensor([0.2, 0.6, 0.4]).expand(96, 96, 3)
    lifted = lift_photo(cloud, coords, 32, srgb, torch.ones(96, 96), camera)
    facing = (cloud.normals * F.normalize(camera.position - cloud.points, dim=-1)).sum(-1)
    assert lifted.features.shape == (len(coords), LIFT_CHANNELS) and torch.isfinite(lifted.features).all()
    assert (lifted.seen[facing > 0.5] > 0).float().mean() > 0.95 and (lifted.seen[facing < -0.2] > 0).float().mean() == 0
    assert torch.allclose(lifted.voxel_colour, srgb[0, :1].expand(len(coords), 3), atol=1e-3)


def test_discs_wear_what_splats_to_the_photo():
    from near.colour import agx_inverse, agx_srgb
    from near.models.backprojection import blend_matrix, photo_radiance

    points, normals = sphere_samples(20000)
    coords, anchors, _ = build_anchors(points, normals, normals, 32, spread=0.44)
    cloud = decode_anchors(coords, anchors, 32)
    camera = orbit_camera(0.3, 0.2, 2.0, 0.7, 200, 200)
    rows, columns = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    stripes = (0.5 + 0.4 * (columns * 0.6).sin())[..., None] * torch.tensor([1.0, 0.7, 0.4])  # of ten pixels; discs are three apart
    blend = blend_matrix(cloud, camera)
    alpha = torch.from_numpy(np.asarray(blend.sum(1))[:, 0]).view(200, 200).clamp(0, 1)
    lifted = lift_photo(cloud, coords, 32, stripes, alpha, camera)
    made = photo_radiance(cloud, lifted, stripes, alpha, camera)
    unseen = lifted.seen <= 0
    assert made.shape == (len(cloud), 3) and bool((made > 0).all()) and torch.isfinite(made).all()
    plain = agx_inverse(lifted.colour.clamp(0, 1)).clamp_min(2e-3)
    assert torch.equal(made[unseen], plain[unseen])

    def error(radiance):
        inner = alpha > 0.97
        shown = torch.from_numpy(blend @ radiance.numpy()).view(200, 200, 3)[inner] / alpha[inner, None]
        return float((agx_srgb(shown) - stripes[inner]).square().mean().sqrt())

    assert error(made) < 0.6 * error(plain)


def test_voxel_mean_is_weighted():
    mean = voxel_mean(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 2]), 3, torch.tensor([1.0, 3.0, 2.0]))
    assert mean[:, 0].tolist() == [2.5, 0.0, 5.0]


def test_every_pass_has_its_shape_and_range(engine, asset, light):
    camera = orbit_camera(0.4, 0.3, 2.0, 0.7, 80, 48)
    frame = engine.render([PlacedAsset(asset)], light, camera, passes=tuple(PASSES))
    assert {k: tuple(v.shape) for k, v in frame.layers.items()} == {k: (48, 80, c) for k, c in PASSES.items()}
    alpha, depth = frame.layers["alpha"][..., 0], frame.layers["depth"][..., 0]
    assert alpha.max() > 0.98 and alpha[0, 0] == 0 and math.isinf(depth[0, 0])
    inside = alpha > 0.99
    assert (depth[inside] > 1.2).all() and (depth[inside] < 2.6).all()
    assert torch.allclose(frame.layers["normal"][inside].norm(dim=-1), torch.ones(int(inside.sum())), atol=1e-3)
    assert torch.isfinite(frame.layers["color"]).all() and (frame.layers["color"] >= 0).all()


def psnr(a, b):
    return -10 * math.log10(max(float(((a - b) ** 2).mean()), 1e-12))


def test_turning_light_camera_and_asset_together_changes_nothing(engine, asset, light):
    camera = orbit_camera(0.4, 0.3, 2.0, 0.7, 96, 96)
    turn = torch.eye(4)
    turn[:3, :3] = rotation_z(0.8)
    before = engine.render([PlacedAsset(asset)], light, camera).layers["color"]
    after = engine.render([PlacedAsset(asset, turn)], light.rotated(turn[:3, :3]), camera.moved(torch.linalg.inv(turn))).layers["color"]
    assert psnr(agx_srgb(before[..., :3]), agx_srgb(after[..., :3])) > 45


def test_twice_the_light_is_twice_the_radiance(engine, asset, light):
    camera = orbit_camera(0.4, 0.3, 2.0, 0.7, 64, 64)
    once = engine.render([PlacedAsset(asset)], light, camera).layers["color"]
    twice = engine.render([PlacedAsset(asset)], light.scaled(2.0), camera).layers["color"]
    assert torch.allclose(twice[..., :3], 2 * once[..., :3], rtol=1e-3, atol=1e-5)


def test_a_nearer_asset_hides_a_farther_one(engine, asset, light):
    camera = orbit_camera(0.0, 0.0, 4.0, 0.7, 64, 64)
    behind = torch.eye(4)
    behind[1, 3] = 1.5
    alone = engine.render([PlacedAsset(asset)], light, camera, passes=("depth",)).layers["depth"]
    both = engine.render([PlacedAsset(asset, behind), PlacedAsset(asset)], light, camera, passes=("depth",)).layers["depth"]
    covered = torch.isfinite(alone[..., 0])
    assert (both[covered] - alone[covered]).abs().median() < 0.02


def test_create_from_a_photo_and_a_mesh_is_reproducible(engine, box_mesh):
    camera = orbit_camera(0.5, 0.3, 2.0, 0.7, 96, 96)
    frame = engine.render([PlacedAsset(engine.encode(box_mesh))], uniform_environment(0.8), camera).layers["color"]
    photo = Photo(srgb=agx_srgb(frame[..., :3] / frame[..., 3:].clamp_min(1e-3)), alpha=frame[..., 3], sha256="0" * 64)
    stages = []
    first = engine.create(photo, mesh=box_mesh, camera=camera, progress=lambda s, f, p=None: stages.append((s, f)))
    second = engine.create(photo, mesh=box_mesh, camera=camera)
    assert torch.equal(first.feats, second.feats) and first.color_feats is not None
    assert [f for _, f in stages] == sorted(f for _, f in stages) and stages[-1][1] == 1.0
    shorter = engine.create(photo, mesh=box_mesh, camera=camera, exposure_stops=-2.0)
    assert shorter.meta["exposure_stops"] == -2.0 and "exposure_stops" not in first.meta
    assert shorter.feats[:, :3].float().mean() < first.feats[:, :3].float().mean() - 0.1


def test_cancel_stops_create(engine, box_mesh):
    photo = Photo(srgb=torch.full((64, 64, 3), 0.5), alpha=F.pad(torch.ones(32, 32), (16, 16, 16, 16)), sha256="0" * 64)
    with pytest.raises(Cancelled):
        engine.create(photo, mesh=box_mesh, cancelled=lambda: True)


@pytest.mark.parametrize("matrix, code", [
    (torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0])), "scale-not-uniform"),
    (torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])), "transform-mirrored"),
    (torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0])), "transform-invalid")])
def test_transforms_that_cannot_be_rendered_are_refused(asset, matrix, code):
    with pytest.raises(NearError) as caught:
        PlacedAsset(asset, matrix)
    assert caught.value.code == code


def test_unknown_pass_is_refused(engine, asset, light):
    with pytest.raises(NearError) as caught:
        engine.render([PlacedAsset(asset)], light, orbit_camera(0, 0, 2, 0.7, 32, 32), passes=("colour",))
    assert caught.value.code == "pass-unknown"


def test_discs_are_as_dense_whatever_the_surface():
    from near.demo import shipped_sample
    from near.geometry.mesh import PbrMesh, load_mesh
    from near.pipeline.compact_assets import DISC_SPACING, MAX_DISCS, MIN_DISCS, disc_count

    teapot = load_mesh(shipped_sample().mesh)
    assert disc_count(teapot) == MIN_DISCS  # 1.3 square sizes would be 66,000
    side = 0.5 * torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])

    def sheets(count):
        faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
        return PbrMesh(vertices=torch.cat([side] * count), faces=torch.cat([faces + 4 * k for k in range(count)]),
                       normals=torch.tensor([[0.0, 0, 1]]).expand(4 * count, 3))

    assert disc_count(sheets(4)) == pytest.approx(4 / DISC_SPACING ** 2, rel=1e-3) and disc_count(sheets(400)) == MAX_DISCS
