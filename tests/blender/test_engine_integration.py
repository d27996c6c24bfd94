"""An asset between two ordinary objects on a floor: right in front, right behind, its shadow on the floor, nothing twice."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("bpy")
sys.path.insert(0, str(Path(__file__).parent))

import bpy  # noqa: E402
import engine_stage as stage  # noqa: E402

pytestmark = [pytest.mark.bpy, pytest.mark.slow, pytest.mark.timeout(900)]

WIDTH, HEIGHT = 160, 112
FLOOR, BEHIND, BEFORE, ASSET = 1, 2, 3, 4


@pytest.fixture(scope="module")
def asset(tmp_path_factory):
    from near.server.remote import RemoteEngine

    with stage.backend() as connection, RemoteEngine(str(connection)) as engine:
        yield stage.teapot(engine, tmp_path_factory.mktemp("asset"))


def solid(name: str, index: int, colour, size, where):
    bpy.ops.mesh.primitive_cube_add(size=1, location=where)
    item = bpy.context.object
    item.name, item.scale, item.pass_index = name, size, index
    made = bpy.data.materials.new(name)
    made.use_nodes = True
    shader = made.node_tree.nodes["Principled BSDF"]
    shader.inputs["Base Color"].default_value, shader.inputs["Roughness"].default_value = (*colour, 1), 0.8
    item.data.materials.append(made)
    return item


def import_teapot():
    """The sample mesh as one object in asset space: centred, its longest side 1."""
    before = set(bpy.data.objects)
    bpy.ops.import_scene.gltf(filepath=str(stage.SAMPLES / "teapot.glb"))
    parts = [item for item in bpy.data.objects if item not in before and item.type == "MESH"]
    bpy.ops.object.select_all(action="DESELECT")
    for item in parts:
        item.select_set(True)
    bpy.context.view_layer.objects.active = parts[0]
    bpy.ops.object.parent_clear(type="CLEAR_KEEP_TRANSFORM")
    if len(parts) > 1:
        bpy.ops.object.join()
    item = bpy.context.view_layer.objects.active
    bpy.ops.object.transform_apply()
    points = np.array([v.co for v in item.data.vertices])
    low, high = points.min(0), points.max(0)
    item.data.vertices.foreach_set("co", (((points - (low + high) / 2) / (high - low).max())).astype(np.float32).ravel())
    item.data.update()
    item.pass_index = ASSET
    return item


@pytest.fixture()
def scene(asset):
    scene = stage.new_scene(WIDTH, HEIGHT)
    scene.render.engine, scene.cycles.samples = "CYCLES", 64
    scene.cycles.use_denoising = True
    scene.render.film_transparent = False
    solid("floor", FLOOR, (0.55, 0.5, 0.45), (8, 8, 0.1), (0, 0, -0.39))
    solid("behind", BEHIND, (0.2, 0.35, 0.6), (0.5, 0.2, 0.9), (0.3, 0.75, 0.1))
    solid("before", BEFORE, (0.6, 0.25, 0.15), (0.16, 0.16, 0.5), (-0.32, -0.6, -0.1))
    world = stage.hdri_pixels(64)
    world[12:18, 20:26] = (60, 55, 45)
    stage.set_world(scene, world)
    scene.world.cycles.sampling_method, scene.world.cycles.sample_map_resolution = "MANUAL", 256
    scene.camera.location = (0.25, -2.5, 0.75)
    scene.camera.rotation_euler = (1.3, 0, 0.1)
    scene.camera.data.lens = 50
    proxy = import_teapot()
    proxy.near_relight.is_proxy, proxy.near_relight.asset_path = True, str(asset)
    return scene


def picture(scene, path: Path) -> np.ndarray:
    from near.output import read_rgba

    return read_rgba(stage.render(scene, path))


def object_indices(scene, path: Path) -> np.ndarray:
    """Which object Cycles sees in each pixel."""
    from near.output import read_exr

    scene.view_layers[0].use_pass_object_index = True
    stage.set_exr(scene, multilayer=True)
    found = read_exr(stage.render(scene, path))
    stage.set_exr(scene)
    scene.view_layers[0].use_pass_object_index = False
    return next(value for name, value in found.items() if "Index" in name)


def test_occlusion_and_shadow_against_cycles(scene, tmp_path):
    from blender_addon import integration
    from near.colour import agx_srgb
    from near.output import png_bytes

    index = np.round(object_indices(scene, tmp_path / "index.exr"), 3)
    truth = picture(scene, tmp_path / "truth.exr")
    integration.enable(scene)
    ours = picture(scene, tmp_path / "ours.exr")
    for item in scene.objects:
        if item.pass_index == ASSET:
            item.hide_render = True
    integration.disable(scene)
    without = picture(scene, tmp_path / "without.exr")

    shown = {name: agx_srgb(value[..., :3]) for name, value in (("truth", truth), ("ours", ours), ("without", without))}
    (tmp_path / "integration.png").write_bytes(png_bytes((np.concatenate([shown[n] for n in ("truth", "ours", "without")], 1) * 255).astype(np.uint8)))
    assert (ours[..., 3] > 0.99).all(), "the picture stays opaque"

    def inner(mask: np.ndarray, by: int = 2) -> np.ndarray:
        """The mask without its rim, where the edges of two renderers differ."""
        out = mask.copy()
        for axis in (0, 1):
            for step in range(-by, by + 1):
                out &= np.roll(mask, step, axis)
        return out

    score = {name: stage.psnr(shown["truth"][mask], shown["ours"][mask]) for name, mask in
             (("before", inner(index == BEFORE)), ("behind", inner(index == BEHIND)), ("floor", inner(index == FLOOR)), ("asset", inner(index == ASSET)),
              ("all", index >= 0))}
    # What the difference is made of: the asset's own pixels and their rim; all that is neither is as Cycles has it.
    near = index == ASSET
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            near = near | np.roll(index == ASSET, step, axis)
    score["all but the asset"] = stage.psnr(shown["truth"][~near], shown["ours"][~near])
    error = ((shown["truth"] - shown["ours"]) ** 2).sum(-1)
    score["share of the error on the asset, %"] = float(100 * error[near].sum() / error.sum())
    print({name: round(value, 1) for name, value in score.items()})
    assert min(score["before"], score["behind"], score["floor"]) > 42, "ordinary objects are where and as they were"
    assert score["asset"] > 18 and score["all"] > 24
    assert score["all but the asset"] > 36 and score["share of the error on the asset, %"] > 85

    # The shadow: where Cycles' own mesh darkens the floor, so does the asset, as much.
    def light(value: np.ndarray) -> np.ndarray:
        return value[..., :3].mean(-1)

    shade = inner(index == FLOOR, 1) & (light(truth) < 0.8 * light(without))
    assert shade.sum() > 20
    assert light(ours)[shade].sum() == pytest.approx(light(truth)[shade].sum(), rel=0.08)


def test_one_click_on_and_off_leaves_nothing(scene):
    from blender_addon import integration

    scenes, groups = set(bpy.data.scenes), len(bpy.data.node_groups)
    for _ in range(3):
        other = integration.enable(scene)
        assert integration.enable(scene) == other, "twice is once"
        assert integration.is_on(scene) and len(other.collection.objects) == 1
        integration.disable(scene)
        assert set(bpy.data.scenes) == scenes and not integration.is_on(scene)
        tree = integration._tree(scene, create=False)
        assert not [node for node in tree.nodes if node.get(integration.MARK)]
    assert all(item.visible_camera for item in scene.objects)
    assert len(bpy.data.node_groups) <= groups + 1


def test_what_cannot_be_integrated_says_so(scene):
    from blender_addon import integration
    from blender_addon.errors import NearError

    scene.render.engine = "NEAR_RELIGHT"
    with pytest.raises(NearError) as caught:
        integration.enable(scene)
    assert caught.value.code == "integration-engine"
