"""The homogeniser's per-voxel head and its training photos: analytic light on voxels, symmetry, learning."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from near.colour import LUMINANCE, agx_srgb
from near.errors import NearError
from near.geometry.cameras import orbit_camera
from near.lighting import prefilter
from near.lighting.samples import sample_environment
from near.models.anchors import build_anchors, decode_anchors
from near.models.compact_flows import CompactFlow, CompactFlowConfig
from near.models.evidence import GREY, explain, shown_by, voxel_view
from near.models.exchange import build_exchange
from near.models.harmonics import fibonacci_sphere
from near.models.lifting import lift_photo
from near.models.material import decode_material, encode_material, voxel_mean
from near.models.pointwise import CHANNELS, GLOBAL_CHANNELS, LOCAL_CHANNELS, prior_features, seen_otherwise
from near.models.shading import Surface, light_surface, shade_terms
from near.splatting import splat
from near.training.lights import LightLibrary
from near.training.pointwise import RelitData, head_loss, judge, shade_voxels
from near.training.relit import ROUGHNESS_KNOTS, RelitConfig, _warmth, build_relit, hidden_radiance, redress, repaint

RESOLUTION = 16


class OneLight(LightLibrary):
    """A light library of a sample environment, which never turns."""

    def __init__(self) -> None:
        env = sample_environment("studio")
        self.paths, self.invented, self._maps, self._prefiltered = {"studio": None}, [], {"studio": env}, {"studio": prefilter(env)}

    def get(self, name: str, _rotation: float, strength: float):
        return super().get(name, 0.0, strength)


def cached_ball() -> dict:
    """A cache entry without renders: a ball, red on one side, seen by two cameras."""
    normals = fibonacci_sphere(3000)
    points = normals * 0.45
    coords, anchors, rows = build_anchors(points, normals, normals, RESOLUTION, spread=0.6)
    cloud = decode_anchors(coords, anchors, RESOLUTION)
    base = torch.where(points[rows, :1] > 0, torch.tensor([0.7, 0.1, 0.1]), torch.tensor([0.2, 0.3, 0.4]))
    material = encode_material(base, torch.full((len(rows),), 0.4), torch.zeros(len(rows)))
    photos, cameras = [], []
    for view, yaw in enumerate((0.3, 2.0)):
        camera = orbit_camera(yaw, 0.2, 2.0, math.radians(40), 64, 64)
        alpha = splat(cloud.gaussians(), torch.zeros(len(cloud), 1), camera).alpha.clamp(0, 1)
        lifted = lift_photo(cloud, coords, RESOLUTION, torch.full((64, 64, 3), 0.5), alpha, camera)
        photos.append({"view": view, "features": lifted.features})
        cameras.append(camera.cam_from_world)
    return {"name": "ball", "coords": coords, "anchors": {k: getattr(anchors, k) for k in anchors.__dataclass_fields__},
            "material": material, "photos": photos, "cam_from_world": torch.stack(cameras), "K": camera.K}


@pytest.fixture(scope="module")
def ball():
    raw = cached_ball()
    return raw, build_relit(raw, [raw], OneLight(), RelitConfig(dressings=2, lights=2, conditions=1, voxels=64, resolution=RESOLUTION), 1)


def test_a_relit_object_holds_what_the_trainer_reads(ball):
    raw, made = ball
    count = len(raw["coords"])
    assert [p["dressing"] for p in made["photos"]] == [0] * 4 + [1] * 2  # its own paint from both views, the other from one
    assert len(made["conditions"]) == 2
    assert made["targets"].shape == (2, count, 8)
    assert all(p["features"].shape == (64, CHANNELS) and p["pixels"] in (88, 176) for p in made["photos"])
    # The photos show the paint: seen red voxels are redder than seen grey ones.
    photo = next(p for p in made["photos"] if p["dressing"] == 0 and p["view"] == 0)
    rows, shown = photo["rows"], photo["features"].float()
    known = shown[:, 8] > 0.5
    red = decode_material(made["targets"][0, rows, :5].float())[:, 0] > 0.5
    tint = shown[:, 0] - shown[:, 2]
    assert tint[known & red].mean() > tint[known & ~red].mean() + 0.2


@pytest.mark.parametrize("metallic", [0.0, 1.0])
def test_light_on_voxels_agrees_with_the_renderers(ball, metallic):
    """With roughness at a knot, prepared light times material is :func:`shade_terms` of the voxels' mean surface."""
    raw, made = ball
    from near.assets import Anchors

    cloud = decode_anchors(raw["coords"], Anchors(**raw["anchors"]), RESOLUTION)
    count = len(raw["coords"])
    mean = lambda x: voxel_mean(x, cloud.voxel, count)
    material = torch.tensor([0.5, 0.3, 0.2, ROUGHNESS_KNOTS[2], metallic]).expand(count, 5)
    surface = Surface(F.normalize(mean(cloud.normals), dim=-1), material[:, :3], material[:, 3], material[:, 4], mean(cloud.visibility),
                      mean(cloud.openness[:, None])[:, 0], mean((cloud.radii ** 2)[:, None])[:, 0])
    lights = OneLight()
    generator = torch.Generator().manual_seed(0)
    from near.training.relit import _conditions, _sight

    views = [_sight(raw, cloud, raw["coords"], 0, 88, RESOLUTION)]
    condition = _conditions(cloud, count, views, lights, generator, RelitConfig(conditions=1, light_stops=0.0))[0]
    env, light = lights.get("studio", 0.0, 1.0)
    eye = F.normalize(mean(views[0].eye), dim=-1)
    expected = shade_terms(surface, light_surface(surface, light, env), light, env, eye).combine()
    got = shade_voxels(material, {k: v.float() for k, v in condition.items() if k != "view"}, hidden_radiance([condition], material[None])[0, 0])
    assert (agx_srgb(got) - agx_srgb(expected)).abs().max() < 0.01


def test_a_warmer_light_is_as_bright():
    generator = torch.Generator().manual_seed(0)
    tints = torch.stack([_warmth(generator, 0.2) for _ in range(200)])
    assert torch.allclose(tints @ LUMINANCE, torch.ones(200)) and torch.allclose(_warmth(generator, 0.0), torch.ones(3))
    red, blue = (tints[:, 0] / tints[:, 1]).log(), (tints[:, 2] / tints[:, 1]).log()
    assert torch.allclose(red, -blue, atol=1e-5) and 0.15 < float(red.std()) < 0.25


def test_redressing_takes_over_the_means():
    generator = torch.Generator().manual_seed(3)
    own, other = torch.rand(500, 5, generator=generator) * 0.4, torch.rand(500, 5, generator=generator) * 0.3
    own[:, 4], other[:, 4] = 0, 1
    made = redress(own, other, (0, 1, 2))
    assert torch.allclose(made[:, :3].clamp_min(2e-3).log().mean(0), other[:, :3].clamp_min(2e-3).log().mean(0), atol=0.05)
    assert (made[:, 4] == 1).all() and made.min() >= 0 and made.max() <= 1


def open_view(lift: torch.Tensor):
    """How voxels answer light where nothing hides them."""
    visible = torch.zeros(len(lift), 25)
    visible[:, 0] = math.sqrt(4 * math.pi)
    return voxel_view(SimpleNamespace(normals=lift[:, 10:13], visibility=visible, voxel=torch.arange(len(lift))), lift, lift[:, 14:17])


def test_the_mirror_image_is_found(ball):
    """A ball is symmetric: nearly every voxel has its mirror image, and its normal agrees."""
    raw, _ = ball
    lift = raw["photos"][0]["features"]
    symmetry = prior_features(lift, open_view(lift), RESOLUTION)[0, LOCAL_CHANNELS + GLOBAL_CHANNELS - 2:][:2]
    assert (symmetry > 0.9).all()


def test_seeing_an_object_otherwise_is_exact(ball):
    """Features of a swapped, flipped object are the swapped, flipped features."""
    raw, made = ball
    lift = raw["photos"][0]["features"].clone()
    noise = torch.rand(len(lift), generator=torch.Generator().manual_seed(0))
    lift[:, :3] = (0.1 * noise + lift[:, 10:13] @ torch.tensor([0.3, 0.2, 0.4]))[:, None] * torch.tensor([1.0, 0.8, 0.6])
    turned = lift.clone()
    for start in (10, 14, 17):      # x, y -> y, -x
        turned[:, start], turned[:, start + 1] = lift[:, start + 1], -lift[:, start]
    expected = prior_features(turned, open_view(turned), RESOLUTION)
    error = (seen_otherwise(prior_features(lift, open_view(lift), RESOLUTION), True, (False, True)) - expected).abs()
    split = LOCAL_CHANNELS + GLOBAL_CHANNELS
    assert error[:, :split].max() < 1e-3
    # The directions that light is summed over do not turn with the object; hidden voxels may have two nearest ones.
    assert error[lift[:, 8] > 0.5, split:].max() < 0.05


def test_a_smooth_light_explains_a_grey_ball_and_leaves_its_paint(ball):
    """Under any light in few harmonics a grey ball is all shading; a stripe twice as bright stays over."""
    raw, _ = ball
    lift = raw["photos"][0]["features"]
    view = open_view(lift)
    light = torch.tensor([[2.0, 0.5, 0.8, -0.4] + [0.0] * 12]).expand(3, 16)
    shade = shown_by(GREY * view.diffuse + 0.04 * view.mirror, light)
    weight = (lift[:, 8] > 0.5).float()
    assert explain(view, shade, weight).rest[weight > 0].abs().max() < 0.1
    stripe = (lift[:, 19:20].abs() < 0.2).float() * weight[:, None]
    rest = explain(view, shade * (1 + stripe), weight).rest[:, 1]
    seen = weight > 0
    assert rest[seen & (stripe[:, 0] > 0)].mean() - rest[seen & (stripe[:, 0] == 0)].mean() > 0.35


def test_a_photo_that_sees_nothing_is_answered_all_the_same(ball):
    raw, _ = ball
    lift = raw["photos"][0]["features"].clone()
    lift[:, 6], lift[:, 8] = 0, 0
    assert prior_features(lift, open_view(lift), RESOLUTION).isfinite().all()


def test_repainting_keeps_the_patches(ball):
    raw, _ = ball
    own = decode_material(raw["material"].float())
    other = torch.cat([torch.tensor([[0.9, 0.8, 0.1, 0.2, 1.0]]).expand(500, 5), torch.tensor([[0.05, 0.05, 0.05, 0.9, 0.0]]).expand(500, 5)])
    made = repaint(own, other, (0, 1, 2), torch.Generator().manual_seed(1))
    red = own[:, 0] > 0.5
    assert made[red].std(0).max() < 0.02 and made[~red].std(0).max() < 0.02
    assert sorted(made[mask].mean(0)[4].round().item() for mask in (red, ~red)) in ([0.0, 1.0], [0.0, 0.0], [1.0, 1.0])
    assert (made[red].mean(0) - own[red].mean(0)).abs().max() > 0.1


def test_the_head_learns_the_ball(ball, tmp_path):
    """Some steps on one object lower the loss on lights that the photos never showed."""
    _, made = ball
    torch.save(made, tmp_path / "ball.pt")
    torch.manual_seed(0)
    data = RelitData([tmp_path / "ball.pt"], held_out=0)
    flow = CompactFlow(CompactFlowConfig(resolution=RESOLUTION, width=48, blocks=1, heads=2, io_width=16, with_shaded=True))
    head = flow.pointwise.train()
    sample = torch.cat([p["features"].float() for p in made["photos"]])
    for member in head.members:
        member.mean.copy_(sample.mean(0))
        member.std.copy_(sample.std(0).clamp_min(1e-3))
    optimiser = torch.optim.Adam(head.parameters(), 3e-3)

    def asked(seed: int, count: int):
        generator = torch.Generator().manual_seed(seed)
        batch = [data.sample(0, generator, rendered=True) for _ in range(count)]
        return head_loss(flow, head, batch, judge(batch))

    before = float(asked(1, 16)[0].detach())
    for step in range(60):
        loss, _ = asked(100 + step, 2)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    loss, numbers = asked(1, 16)
    assert math.isfinite(float(loss)) and float(loss) < before - 0.5
    assert numbers["relit_db"] > 15


def test_a_cache_of_an_earlier_version_is_refused(ball, tmp_path):
    _, made = ball
    old = dict(made, photos=[{k: v for k, v in p.items() if k != "features"} for p in made["photos"]])
    torch.save(old, tmp_path / "old.pt")
    with pytest.raises(NearError, match="earlier version"):
        RelitData([tmp_path / "old.pt"])


def test_paint_is_told_from_light(ball):
    """A ball of unknown stripes under a sunset, guessed plain grey: the fitted light takes the shading, the stripes remain."""
    raw, _ = ball
    from near.assets import Anchors
    from near.models.anchors import view_directions
    from near.models.evidence import unexplained

    cloud = decode_anchors(raw["coords"], Anchors(**raw["anchors"]), RESOLUTION)
    camera = orbit_camera(0.3, 0.2, 2.0, math.radians(40), 64, 64)
    view = view_directions(cloud.points, camera)
    env = sample_environment("sunset")
    light = prefilter(env)
    stripes = torch.where((cloud.points[:, 2] * 12).floor().long() % 2 == 0, 0.6, 0.3)

    def material(base):
        return torch.cat([base[:, None].expand(-1, 3), torch.full((len(cloud), 1), 0.9), torch.zeros(len(cloud), 1)], 1)

    truth = cloud.surface(material(stripes))
    radiance = shade_terms(truth, light_surface(truth, light, env), light, env, view).combine()
    seen = ((cloud.disc_normals * view).sum(-1) > 0.1).float()
    rest = unexplained(cloud, build_exchange(cloud, RESOLUTION), material(torch.full((len(cloud),), 0.4)), radiance, seen, view)
    assert (rest[seen == 0] == 0).all()
    steep = (rest[(seen > 0) & (stripes > 0.5)].median(0).values - rest[(seen > 0) & (stripes < 0.5)].median(0).values)
    assert (steep - math.log(2)).abs().max() < 0.2


def test_unseen_paint_has_no_voxel_edges(ball):
    """A ball that grows lighter from left to right, one value per voxel: blended, neighbours differ far less, and the course of
    it is kept."""
    from near.assets import Anchors
    from near.pipeline.compact_assets import between_voxels

    raw, _ = ball
    cloud = decode_anchors(raw["coords"], Anchors(**raw["anchors"]), RESOLUTION)
    material = voxel_mean(cloud.points[:, :1].expand(-1, 5) * 1.6, cloud.voxel, len(raw["coords"]))
    smooth, ramp = between_voxels(cloud, torch.arange(len(cloud)), material, RESOLUTION)[:, 0], cloud.points[:, 0] * 1.6
    assert smooth.shape == ramp.shape
    assert (smooth - ramp).std() < 0.6 * (material[cloud.voxel, 0] - ramp).std()
    flat = torch.full((len(raw["coords"]), 5), 0.3)
    assert torch.allclose(between_voxels(cloud, torch.arange(len(cloud)), flat, RESOLUTION), torch.tensor(0.3), atol=1e-5)
