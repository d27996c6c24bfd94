"""The published pipeline end to end: pull, verify, load, photo -> asset -> frame; visible-first shading; caches."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from near.assets import Asset
from near.colour import agx_srgb
from near.errors import Cancelled, NearError
from near.geometry.cameras import orbit_camera
from near.geometry.photo import Photo
from near.lighting import Environment, condition_published, environment_from_array, rotation_z, texel_directions
from near.models.basis import NeuralBasisConfig
from near.models.gaussians import RepresentationConfig
from near.models.homogenizer import HomogenizerConfig, LoraSettings, make_theta, save_adapter
from near.models.iad import SLatGaussianDecoderConfig
from near.models.lad_config import SLatGaussianRendererConfig
from near.models.tokenizer import HdriEncoderConfig
from near.pipeline.published import ADAPTER_FILE, PublishedPipeline, choose_precision, find_checkpoint
from near.pipeline.published_assets import voxel_hull
from near.pipeline.published_bench import bench_published, random_renderer, report, shell_asset, soft_sky
from near.pipeline.published_frame import PublishedRenderer
from near.pipeline.published_parts import LruCache, lit_slots, seen_by_gradient
from near.pipeline.types import PASSES, PlacedAsset
from near.weights import manage

ALL_PASSES = tuple(PASSES)


def sizes(head_layout: str = "overlapped") -> dict:
    gaussians = RepresentationConfig(num_gaussians=8, scaling_bias=0.03, opacity_bias=0.7)
    return {"decoder": SLatGaussianDecoderConfig(16, 48, 8, 48, 2, 4, window_size=4),
            "renderer": SLatGaussianRendererConfig(16, 48, 48, 48, 2, 4, representation=gaussians, head_layout=head_layout),
            "encoder": HdriEncoderConfig(48, 64, 16, 4, 1, backbone="convnext_atto"), "basis": NeuralBasisConfig()}


@pytest.fixture(scope="module")
def renderer() -> PublishedRenderer:
    return random_renderer(dtype="float32", **sizes())


@pytest.fixture(scope="module")
def asset() -> Asset:
    return shell_asset(16, voxels=700)


def view(yaw: float = 0.4, size: int = 64):
    return orbit_camera(yaw, 0.3, 2.0, 0.7, size, size)


def colour(frame) -> torch.Tensor:
    return agx_srgb(frame.layers["color"][..., :3])


# -- end to end from a local hub --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hub(tmp_path_factory, repository):
    sys.path.insert(0, str(repository / "tools"))
    from make_synthetic_checkpoint import write_hub

    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder)
    return folder


@pytest.fixture(scope="module")
def home(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    manage.pull(["near", "dinov2"], accept=lambda p: True, location=str(hub), home=home, say=lambda s: None)
    manage.verify([], home=home, say=lambda s: None)
    return home


@pytest.fixture(scope="module")
def photo() -> Photo:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 80), torch.linspace(-1, 1, 90), indexing="ij")
    inside = (x**2 + y**2 < 0.5).float()
    return Photo(torch.stack([x * 0.5 + 0.5, y * 0.5 + 0.5, 0.3 + 0 * x], -1) * inside[..., None], inside, "0" * 64)


def test_photo_to_asset_to_frame_with_a_pulled_checkpoint(home, photo):
    pipeline = PublishedPipeline.load("official", home=home, dtype="float32")
    told = []
    asset = pipeline.create(photo, seed=1, progress=lambda *a: told.append(a))
    assert asset.resolution == 16 and asset.feats.shape[1] == 8 and asset.meta["geometry"] == "structure"
    assert asset.meta["pack_sha256"] and asset.proxy_faces is not None
    assert told[-1][1] == pytest.approx(1.0) and [f for _, f, _ in told] == sorted(f for _, f, _ in told)
    frame = pipeline.render([PlacedAsset(asset)], soft_sky(), view(size=48), passes=ALL_PASSES)
    for name, layer in frame.layers.items():
        assert layer.shape == (48, 48, PASSES[name]) and (torch.isfinite(layer).all() or name == "depth")
    assert float(frame.layers["alpha"].max()) > 0.1
    same = pipeline.create([photo, photo], seed=1, steps=1)
    assert same.meta["steps"] == 1
    pipeline.unload()


def test_a_mesh_gives_the_voxels(home, photo):
    from types import SimpleNamespace

    vertices, faces = voxel_hull(torch.tensor([[1, 1, 1], [1, 1, 2], [2, 2, 2]], dtype=torch.uint8), 4)
    mesh = SimpleNamespace(vertices=vertices, faces=faces.long(), sha256="m")
    asset = PublishedPipeline.load("near", home=home).create(photo, mesh=mesh, steps=1)
    assert asset.meta["geometry"] == "mesh" and asset.meta["mesh_sha256"] == "m" and 50 < len(asset) < 4096


def test_an_adapter_beside_the_pipeline_makes_it_two_stage(hub, home, photo):
    root = hub / "luh0502" / "NeAR"
    pipeline = PublishedPipeline(root, home=home, dtype="float32")
    config = HomogenizerConfig(lora=LoraSettings(rank=4))
    save_adapter(root / ADAPTER_FILE, make_theta(pipeline._model("slat_flow_model"), config), config.lora, config)
    try:
        asset = pipeline.create(photo, steps=1)
        assert asset.meta["homogenizer"] == "two_stage" and asset.color_feats is not None
    finally:
        (root / ADAPTER_FILE).unlink()


def test_a_tampered_checkpoint_is_refused_by_name(home):
    file = home / "near" / "ckpts" / "renderer.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(NearError) as error:
            PublishedPipeline.load("official", home=home)
        assert error.value.code == "weights-tampered" and "ckpts/renderer.safetensors" in error.value.what
    finally:
        file.write_bytes(content)


def test_a_matte_comes_from_the_photo_the_network_or_the_built_in_method(home, photo, monkeypatch):
    pipeline = PublishedPipeline.load("near", home=home)
    assert pipeline.matte(photo) is photo
    bare = Photo(photo.srgb, torch.ones_like(photo.alpha))
    assert pipeline.matte(bare).has_matte
    lock = {"birefnet": None}
    monkeypatch.setattr("near.pipeline.published.read_lock", lambda home: lock)
    monkeypatch.setattr("near.pipeline.published.installed", lambda name, home: home / name)
    with pytest.raises(NearError) as error:
        pipeline.matte(bare)
    assert error.value.code == "weights-missing"  # its folder is empty here


def test_create_can_be_cancelled(home, photo):
    with pytest.raises(Cancelled):
        PublishedPipeline.load("near", home=home).create(photo, cancelled=lambda: True)


def test_where_checkpoints_are_looked_for(home, hub):
    assert find_checkpoint("luh0502/NeAR", home) == find_checkpoint("official", home) == home / "near"
    assert find_checkpoint(hub / "luh0502" / "NeAR") == hub / "luh0502" / "NeAR"
    with pytest.raises(NearError) as error:
        find_checkpoint("nobody/nothing", home)
    assert error.value.code == "weights-missing"


# -- frames -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("yaw", [0.0, 1.7, 4.1])
def test_visible_first_shading_changes_nothing(renderer, asset, yaw):
    placed = [PlacedAsset(asset)]
    fast = renderer.render(placed, soft_sky(), view(yaw), passes=("color", "shadow"))
    shaded = renderer.stats.shaded / renderer.stats.voxels
    full = renderer.render(placed, soft_sky(), view(yaw), passes=("color", "shadow"), visible_first=False)
    assert renderer.stats.shaded == renderer.stats.voxels and shaded < 0.95
    assert float((colour(fast) - colour(full)).abs().max()) < 1e-3
    assert float((fast.layers["shadow"] - full.layers["shadow"]).abs().max()) < 1e-3
    assert float(colour(full).std()) > 0.01


def test_what_is_seen_is_found_by_tiles_and_by_gradient_alike(renderer, asset):
    from near.splatting import PUBLISHED, visible

    cloud = renderer._cloud(PlacedAsset(asset), view(0.8, 32))
    gaussians = cloud.gaussians(cloud.state.view_scales)[:1500]
    by_tiles, by_gradient = visible(gaussians, view(0.8, 32), PUBLISHED, floor=0.0), seen_by_gradient(gaussians, view(0.8, 32), "reference")
    assert 0.02 < float(by_tiles.float().mean()) < 0.98
    assert float((by_tiles != by_gradient).float().mean()) < 2e-3  # a rounding at the 1/255 threshold may fall either way


def test_an_asset_outside_the_frame_leaves_it_empty(renderer, asset):
    away = replace(view(), cam_from_world=torch.diag(torch.tensor([1.0, -1, -1, 1])) @ view().cam_from_world)
    frame = renderer.render([PlacedAsset(asset)], soft_sky(), away, passes=ALL_PASSES)
    assert renderer.stats.shaded == 0 and float(frame.layers["color"].abs().max()) == 0
    assert bool(torch.isinf(frame.layers["depth"]).all())


def test_the_sequential_map_shades_every_voxel(asset):
    """Its view-pass scales depend on the light, so nothing is known to be hidden before shading."""
    renderer = random_renderer(dtype="float32", **sizes("sequential"))
    placed = [PlacedAsset(asset)]
    fast = renderer.render(placed, soft_sky(), view())
    full = renderer.render(placed, soft_sky(), view(), visible_first=False)
    assert torch.equal(fast.layers["color"], full.layers["color"])
    assert bool(lit_slots(renderer.models.renderer, False).all())


def test_unlit_slots_follow_the_column_map():
    from near.models.lad import SLatGaussianRenderer

    with torch.device("meta"):
        full = SLatGaussianRenderer(SLatGaussianRendererConfig())
    lit = lit_slots(full, with_shadow=False)
    assert lit.tolist() == [False] * 17 + [True] * 15  # spec 5.5: slots 0-13 gs, 14-16 pbr, 17-19 scale, 20-31 rgb
    assert bool(lit_slots(full, with_shadow=True).all())


def test_frame_equals_the_models_called_by_hand(renderer, asset):
    """The cached, visible-first frame against the plain forward passes and the reference rasteriser's inputs."""
    from near.models.gaussians import GaussianGeometry, activate_scales
    from near.nn import SparseTensor
    from near.splatting import PUBLISHED, Gaussians, splat

    m, camera, light = renderer.models, view(0.9), soft_sky()
    with torch.no_grad():
        h, registers = m.decoder(SparseTensor.create(asset.feats.float(), asset.coords.int()))
        tokens = m.encoder(condition_published(light.rgb_lin709, 0.0)[None])
        raw = m.renderer(h, registers, tokens, camera.cam_from_world[None])
        rep = m.renderer.config.representation
        geometry = GaussianGeometry.from_raw(raw, rep)
        scales = activate_scales(raw["_scaling_view"].flatten(0, 1), rep)
        normals = geometry.normals(scales, camera.position, "unit_cube")
        values = m.basis(raw["_rgb"].flatten(0, 1), normals)[:, :3]
        expected = splat(Gaussians(geometry.means, geometry.quats, scales, geometry.opacities), values, camera, PUBLISHED)
    frame = renderer.render([PlacedAsset(asset)], light, camera)
    assert torch.allclose(frame.layers["color"][..., :3], expected.channels.clamp_min(0), atol=2e-4)
    assert torch.allclose(frame.layers["color"][..., 3], expected.alpha, atol=1e-4)


def test_turning_the_asset_is_turning_camera_and_light_the_other_way(renderer, asset):
    angle = 0.7
    turn = torch.eye(4)
    turn[:3, :3] = rotation_z(angle)
    turned = renderer.render([PlacedAsset(asset, turn)], soft_sky(), view(0.4 + angle))
    still = renderer.render([PlacedAsset(asset)], soft_sky().rotated(rotation_z(-angle)), view(0.4))
    unturned = renderer.render([PlacedAsset(asset)], soft_sky(), view(0.4))
    # A mean, not a maximum: the published view code multiplies rounding by up to 2^11 (spec section 16).
    error, effect = (float((still.layers["color"] - f.layers["color"]).abs().mean()) for f in (turned, unturned))
    assert error < 5e-6 and effect > 10 * error


def test_scale_and_shift_move_the_frame_not_the_shading(renderer, asset):
    place = torch.eye(4) * 2.5
    place[:, 3] = torch.tensor([1.0, -2.0, 0.5, 1.0])
    camera = view(0.4)
    pose = camera.cam_from_world.clone()
    pose[:3, 3] = 2.5 * pose[:3, 3] - pose[:3, :3] @ place[:3, 3]
    moved = renderer.render([PlacedAsset(asset, place)], soft_sky(), replace(camera, cam_from_world=pose), passes=("color", "depth"))
    still = renderer.render([PlacedAsset(asset)], soft_sky(), camera, passes=("color", "depth"))
    assert float((moved.layers["color"] - still.layers["color"]).abs().mean()) < 5e-6
    seen = still.layers["color"][..., 3:] > 0.5
    assert torch.allclose(moved.layers["depth"][seen], 2.5 * still.layers["depth"][seen], rtol=1e-3)


def test_published_rotation_puts_the_same_light_where_a_baked_turn_does(renderer):
    """The first six channels of spec 8.3's rotation equal those of a map that was itself turned."""
    directions = texel_directions(64, 128)
    light = environment_from_array((0.5 + 0.4 * directions).contiguous())
    angle = 0.8
    ours = renderer.light_condition(light, rotation_z(angle).double())
    baked = condition_published(Environment(light.rgb_lin709, rotation_z(angle)).lookup(directions.reshape(-1, 3)).reshape(64, 128, 3), 0.0)
    inner = slice(40, 470)  # columns near the seam sample a wrapped texel in one and a border in the other
    assert float((ours[:6] - baked[:6])[:, 20:-20, inner].abs().median()) < 0.02
    tilt = torch.tensor([[1.0, 0, 0], [0, math.cos(0.3), -math.sin(0.3)], [0, math.sin(0.3), math.cos(0.3)]]).double()
    assert renderer.light_condition(light, tilt).shape == (9, 512, 512)


def test_large_maps_keep_a_small_sun(renderer):
    rgb = torch.full((1024, 2048, 3), 0.1)
    rgb[301, 601] = 5000.0  # between the texels that nearest-neighbour resizing keeps
    light = Environment(rgb)
    published = PublishedRenderer(renderer.models, conditioning="published")
    assert renderer.light_condition(light, torch.eye(3).double())[3:6].max() > published.light_condition(light, torch.eye(3).double())[3:6].max()


def test_several_assets_and_orthographic_cameras(renderer, asset):
    place = torch.eye(4)
    place[0, 3] = 0.4
    both = renderer.render([PlacedAsset(asset), PlacedAsset(asset, place)], soft_sky(), view(), passes=("color", "normal", "base_color"))
    one = renderer.render([PlacedAsset(asset)], soft_sky(), view())
    assert float(both.layers["color"][..., 3].sum()) > float(one.layers["color"][..., 3].sum())
    norm = both.layers["normal"].norm(dim=-1)
    assert bool(((norm < 1e-6) | ((norm - 1).abs() < 1e-4)).all())
    flat = replace(view(), projection="orthographic", K=torch.tensor([[40.0, 0, 32], [0, 40, 32], [0, 0, 1]]))
    assert float(renderer.render([PlacedAsset(asset)], soft_sky(), flat).layers["color"][..., 3].max()) > 0.1


def test_what_is_cached_and_what_a_draft_reuses(renderer, asset):
    renderer.clear()
    placed, light = [PlacedAsset(asset)], soft_sky()
    renderer.render(placed, light, view(0.2))
    assert renderer.stats.seconds["light"] > 0
    full = renderer.render(placed, light, view(0.2))
    draft = renderer.render(placed, light, view(0.2), quality="draft")
    assert torch.equal(draft.layers["color"], full.layers["color"])
    moved = renderer.render(placed, light, view(0.3), quality="draft")
    assert torch.isfinite(moved.layers["color"]).all()
    only_materials = renderer.render(placed, light, view(0.2), passes=("base_color", "depth"))
    assert "blocks" not in renderer.stats.seconds and set(only_materials.layers) == {"base_color", "depth"}


def test_cancel_and_foreign_assets(renderer, asset):
    with pytest.raises(Cancelled):
        renderer.render([PlacedAsset(asset)], soft_sky(), view(), cancelled=lambda: True)
    with pytest.raises(NearError) as error:
        renderer.render([PlacedAsset(shell_asset(32, voxels=100))], soft_sky(), view())
    assert error.value.code == "asset-pack"


def test_bfloat16_stays_close(renderer, asset):
    half = random_renderer(dtype="bfloat16", **sizes())
    a, b = (r.render([PlacedAsset(asset)], soft_sky(), view(), passes=("shadow", "base_color")).layers for r in (renderer, half))
    assert all(float((a[name] - b[name]).abs().mean()) < 3e-3 for name in a)


def test_bench_reports(renderer, asset):
    result = bench_published(asset, renderer=renderer, size=48, frames=2, dtype="float32")
    assert result.agx_error < 1e-3 and 0 < result.shaded_share <= 1 and len(report(result)) > 6


def test_precision_names():
    assert choose_precision("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    for name in ("float8", "float16"):
        with pytest.raises(NearError):
            choose_precision(name, torch.device("cpu"))


def test_a_voxel_hull_is_closed():
    vertices, faces = voxel_hull(torch.tensor([[0, 0, 0], [0, 0, 1], [3, 3, 3]], dtype=torch.uint8), 4)
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).tolist()
    assert sorted(map(tuple, edges)) == sorted((b, a) for a, b in edges)  # every edge is walked once each way
    corners = vertices[faces.long()].double()
    volume = (corners[:, 0] * torch.linalg.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert float(volume) == pytest.approx(3 / 64)
    assert bool((voxel_hull(torch.randint(0, 64, (30000, 3)).to(torch.uint8), 64)[1].shape[0] <= 20000))


def test_the_cache_drops_the_oldest():
    cache = LruCache(2)
    for key in (1, 2, 1, 3):
        cache.fetch(key, lambda: key)
    assert list(cache) == [1, 3]
