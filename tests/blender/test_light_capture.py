"""The captured light is the scene's light: balls rendered by Cycles under the world itself and under our map look alike."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("bpy")
sys.path.insert(0, str(Path(__file__).parent))

import bpy  # noqa: E402
import engine_stage as stage  # noqa: E402
from mathutils import Matrix  # noqa: E402

pytestmark = [pytest.mark.bpy, pytest.mark.slow, pytest.mark.timeout(900)]

ALIKE_DB, ROOM_DB = 40.0, 35.0
SIDE = 40


@pytest.fixture(autouse=True)
def clean():
    yield
    from blender_addon.scene import lighting

    lighting.forget()


# ---------------------------------------------------------------- the worlds; each changes an empty scene
def nodes_of(scene):
    world = scene.world = bpy.data.worlds.new("world")
    world.use_nodes = True
    return world.node_tree.nodes, world.node_tree.links


def texture_with_rotation(scene):
    stage.set_world(scene, stage.hdri_pixels(), (0.4, -0.8, 2.0), 1.3)


def texture_mapping(scene):
    stage.set_world(scene, stage.hdri_pixels(), (0.7, 0.5, -1.0), 0.8, "TEXTURE")


def colour_and_strength(scene):
    stage.set_world(scene, stage.hdri_pixels(), (0, 0, 1.0), 1.5)
    tree = scene.world.node_tree
    tint = tree.nodes.new("ShaderNodeMix")
    tint.data_type, tint.blend_type = "RGBA", "MULTIPLY"
    tint.inputs["Factor"].default_value = 1.0
    colours = [socket for socket in tint.inputs if socket.type == "RGBA"]
    background = tree.nodes["Background"]
    tree.links.new(background.inputs["Color"].links[0].from_socket, colours[0])
    colours[1].default_value = (1.0, 0.7, 0.4, 1)
    tree.links.new(next(s for s in tint.outputs if s.type == "RGBA"), background.inputs["Color"])


def sky(scene):
    nodes, links = nodes_of(scene)
    texture = nodes.new("ShaderNodeTexSky")
    texture.sun_elevation, texture.sun_rotation, texture.sun_intensity = 0.6, 0.9, 0.3
    nodes["Background"].inputs["Strength"].default_value = 0.08
    links.new(texture.outputs[0], nodes["Background"].inputs["Color"])


def mix(scene):
    """Two backgrounds mixed by noise, and a trick that shows the camera another world than lights it."""
    nodes, links = nodes_of(scene)
    other, blend, trick, noise = (nodes.new(f"ShaderNode{kind}") for kind in ("Background", "MixShader", "MixShader", "TexNoise"))
    nodes["Background"].inputs["Color"].default_value = (0.9, 0.4, 0.1, 1)
    other.inputs["Color"].default_value = (0.1, 0.3, 0.8, 1)
    noise.inputs["Scale"].default_value = 2.0
    black = nodes.new("ShaderNodeBackground")
    black.inputs["Color"].default_value = (0, 0, 0, 1)
    links.new(noise.outputs[0], blend.inputs[0])
    links.new(nodes["Background"].outputs[0], blend.inputs[1])
    links.new(other.outputs[0], blend.inputs[2])
    links.new(nodes.new("ShaderNodeLightPath").outputs["Is Camera Ray"], trick.inputs[0])
    links.new(blend.outputs[0], trick.inputs[1])
    links.new(black.outputs[0], trick.inputs[2])
    links.new(trick.outputs[0], nodes["World Output"].inputs["Surface"])


def gradient(scene):
    nodes, links = nodes_of(scene)
    ramp, split = nodes.new("ShaderNodeValToRGB"), nodes.new("ShaderNodeSeparateXYZ")
    ramp.color_ramp.elements[0].color, ramp.color_ramp.elements[1].color = (0.02, 0.03, 0.05, 1), (0.7, 0.8, 1.0, 1)
    links.new(nodes.new("ShaderNodeTexCoord").outputs["Generated"], split.inputs[0])
    links.new(split.outputs["Z"], ramp.inputs[0])
    links.new(ramp.outputs[0], nodes["Background"].inputs["Color"])


def no_world(scene):
    scene.world = None


def small_sun(scene):
    pixels = stage.hdri_pixels(128) * np.float32(0.3)
    pixels[32, 70] = (9000.0, 8000.0, 6000.0)
    stage.set_world(scene, pixels, (0, 0, 0.5))


def lamp(scene, kind: str, energy: float, where, colour=(1, 1, 1), **values):
    data = bpy.data.lights.new(kind, kind)
    data.energy, data.color = energy, colour
    for name, value in values.items():
        setattr(data, name, value)
    item = bpy.data.objects.new(kind, data)
    scene.collection.objects.link(item)
    item.location = where
    item.rotation_euler = (-item.location).to_track_quat("-Z", "Y").to_euler()
    return item


def lamps_only(scene):
    scene.near_light.source = "PROBE"
    scene.near_light.rows, scene.near_light.samples = 256, 32
    lamp(scene, "SUN", 1.2, (5, -5, 6), (1, 0.9, 0.7), angle=0.15)
    lamp(scene, "POINT", 300_000, (-54, -42, 30), (0.5, 0.7, 1.0), shadow_soft_size=5.0)
    lamp(scene, "AREA", 200_000, (48, -12, -24), (1, 0.4, 0.3), size=18.0)


def room(scene):
    """Walls of three colours around the balls, open to nothing, a lamp under the ceiling."""
    scene.near_light.source = "PROBE"
    scene.near_light.rows, scene.near_light.samples = 128, 96
    lamp(scene, "AREA", 3000, (0, 0, 5.5), size=4.0)
    h = 6.0
    for name, axis, sign, colour in (("floor", 2, -1, (0.5, 0.5, 0.5)), ("ceiling", 2, 1, (0.8, 0.8, 0.8)), ("left", 0, -1, (0.8, 0.1, 0.1)),
                                     ("right", 0, 1, (0.1, 0.7, 0.1)), ("back", 1, 1, (0.2, 0.3, 0.8)), ("front", 1, -1, (0.6, 0.6, 0.2))):
        a, b = (i for i in range(3) if i != axis)
        corners = []
        for u, v in ((-h, -h), (h, -h), (h, h), (-h, h)):
            corner = [0.0, 0.0, 0.0]
            corner[axis], corner[a], corner[b] = sign * h, u, v
            corners.append(corner)
        mesh = bpy.data.meshes.new(name)
        mesh.from_pydata(corners, [], [(0, 1, 2, 3)])
        mesh.materials.append(material(name, colour, 0.9))
        wall = bpy.data.objects.new(name, mesh)
        scene.collection.objects.link(wall)


WORLDS = [texture_with_rotation, texture_mapping, colour_and_strength, sky, mix, gradient, no_world, small_sun, lamps_only, room]
AT_ONCE = {texture_with_rotation, texture_mapping, no_world, small_sun}       # no second Blender is needed for these


# ---------------------------------------------------------------- the balls
def material(name: str, colour, roughness: float, metallic: float = 0.0):
    made = bpy.data.materials.new(name)
    made.use_nodes = True
    shader = made.node_tree.nodes["Principled BSDF"]
    shader.inputs["Base Color"].default_value = (*colour, 1)
    shader.inputs["Roughness"].default_value, shader.inputs["Metallic"].default_value = roughness, metallic
    return made


def add_ball(scene):
    """It counts as an asset, so that a probe does not see it."""
    bpy.ops.mesh.primitive_uv_sphere_add(segments=48, ring_count=24, radius=0.5)
    ball = bpy.context.object
    bpy.ops.object.shade_smooth()
    ball.data.materials.append(None)
    ball.near_relight.is_proxy = True
    scene.camera.location, scene.camera.rotation_euler = (0, -4, 0), (math.pi / 2, 0, 0)
    scene.camera.data.lens = 110
    return ball


def cycles(scene, path: Path, samples: int) -> np.ndarray:
    """RGBA [h, w, 4] as Cycles renders the scene now."""
    from near.output import read_rgba

    scene.render.engine, scene.cycles.samples, scene.cycles.use_denoising = "CYCLES", samples, True
    scene.cycles.use_adaptive_sampling, scene.cycles.sample_clamp_indirect = False, 0.0
    scene.render.film_transparent = True
    if scene.world is not None:      # the table of where the light is: small maps need no large one, lamps on black a finer one than the map
        scene.world.cycles.sampling_method, scene.world.cycles.sample_map_resolution = "MANUAL", 256 if samples < 100 else 1024
    return read_rgba(stage.render(scene, path))


def show_captured(scene, light) -> None:
    """The captured light as the world; nothing else lights or stands around."""
    for item in scene.objects:
        if item.type == "LIGHT" or (item.type == "MESH" and not item.near_relight.is_proxy):
            item.hide_render = True
    pixels = light.rgb_lin709
    if pixels is None:
        pixels = np.broadcast_to(np.array(light.uniform_lin709, np.float32), (2, 4, 3)).copy()
    turn = Matrix(np.array(light.env_from_world).reshape(3, 3).tolist())
    stage.set_world(scene, pixels, turn.to_euler("XYZ"), light.strength)


@pytest.mark.parametrize("make", WORLDS, ids=lambda f: f.__name__)
def test_balls_look_alike_under_the_world_and_under_its_map(make, tmp_path):
    from blender_addon.scene import lighting
    from near.colour import agx_srgb

    scene = stage.new_scene(SIDE, SIDE)
    scene.near_light.rows = 256
    make(scene)
    ball = add_ball(scene)
    bpy.context.view_layer.update()
    light = lighting.capture(bpy.context.evaluated_depsgraph_get())
    assert (light.how == "exact") == (make in AT_ONCE)
    # A map is sampled otherwise than lamps are, so the noise of both differs.
    samples = 512 if light.how == "probe" else 48
    pictures = {"truth": {}, "ours": {}}
    looks = {"diffuse": material("diffuse", (0.8, 0.8, 0.8), 1.0), "glossy": material("glossy", (0.9, 0.9, 0.9), 0.3, 1.0)}
    for which in pictures:
        for name, look in looks.items():
            ball.data.materials[0] = look
            pictures[which][name] = cycles(scene, tmp_path / f"{which}_{name}.exr", samples)
        show_captured(scene, light)
    seen = pictures["ours"]["diffuse"][..., 3] > 0.99
    assert seen.mean() > 0.3
    for name in looks:
        truth, ours = (agx_srgb(pictures[which][name][seen][:, :3]) for which in pictures)
        score = stage.psnr(truth, ours)
        print(f"{make.__name__} {name}: {score:.1f} dB")
        assert score >= (ROOM_DB if make is room else ALIKE_DB), f"{name} ball: {score:.1f} dB"
