"""When the light is looked at again, what is told about it, and what colours mean; nothing here renders for long."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("bpy")
sys.path.insert(0, str(Path(__file__).parent))

import bpy  # noqa: E402
import engine_stage as stage  # noqa: E402

pytestmark = [pytest.mark.bpy, pytest.mark.timeout(600)]


def graph():
    bpy.context.view_layer.update()
    return bpy.context.evaluated_depsgraph_get()


def gradient_world(scene):
    """-> the ramp's brighter end, to be changed."""
    world = scene.world = bpy.data.worlds.new("world")
    world.use_nodes = True
    nodes, links = world.node_tree.nodes, world.node_tree.links
    ramp = nodes.new("ShaderNodeValToRGB")
    links.new(nodes.new("ShaderNodeTexGradient").outputs[0], ramp.inputs[0])
    links.new(ramp.outputs[0], nodes["Background"].inputs["Color"])
    scene.near_light.rows, scene.near_light.samples = 64, 4
    return ramp.color_ramp.elements[1]


def test_a_viewport_gets_the_light_without_waiting():
    from blender_addon.scene import lighting

    lighting.forget()
    scene = stage.new_scene()
    gradient_world(scene)
    light, current = lighting.latest(graph())
    assert light is None and not current and lighting.baking()
    end = time.monotonic() + 120
    longest = 0.0
    while not lighting.poll():
        begun = time.monotonic()
        lighting.latest(graph())
        longest = max(longest, time.monotonic() - begun)
        assert time.monotonic() < end
        time.sleep(0.01)
    light, current = lighting.latest(graph())
    assert current and light.how == "baked" and light.rgb_lin709.shape == (64, 128, 3) and not lighting.baking()
    assert longest < 5, "only what is there is looked at"


def test_each_frame_has_its_own_light_when_nodes_are_keyframed():
    from blender_addon.scene import lighting

    scene = stage.new_scene()
    element = gradient_world(scene)
    key = lighting.wanted(graph()).key
    assert lighting.wanted(graph()).key == key, "nothing changed"
    element.color = (0.2, 0.4, 0.6, 1)
    assert lighting.wanted(graph()).key != key
    strength = scene.world.node_tree.nodes["Background"].inputs["Strength"]
    for frame, value in ((1, 1.0), (10, 2.0)):
        strength.default_value = value
        strength.keyframe_insert("default_value", frame=frame)
    keys = []
    for frame in (1, 5, 10, 1):
        scene.frame_set(frame)
        keys.append(lighting.wanted(graph()).key)
    assert len(set(keys)) == 3 and keys[0] == keys[3]


def test_a_texture_is_read_once_and_its_turn_and_strength_are_numbers():
    from blender_addon.scene import lighting

    scene = stage.new_scene()
    mapping = stage.set_world(scene, stage.hdri_pixels(16), (0, 0, 0.5), 1.5)
    first = lighting.capture(graph())
    mapping.inputs["Rotation"].default_value[2] = 0.9
    scene.near_light.strength, scene.near_light.rotation = 2.0, 0.1
    second = lighting.capture(graph())
    assert second.key == first.key and second.rgb_lin709 is first.rgb_lin709
    assert (first.strength, second.strength) == (1.5, 3.0)
    angle = np.arctan2(second.env_from_world[3], second.env_from_world[0])
    assert angle == pytest.approx(1.0, abs=1e-5)
    # The file that is sent holds the values exactly, as half floats where those suffice.
    import io

    from blender_addon import transfer

    sent = np.load(io.BytesIO(transfer.value_of(lighting.light_file(first))))
    assert sent.dtype == np.float16 and np.array_equal(sent.astype(np.float32), stage.hdri_pixels(16))


def test_lights_that_cannot_be_had_say_so(tmp_path):
    from blender_addon.errors import NearError
    from blender_addon.scene import lighting

    scene = stage.new_scene()
    scene.near_light.source = "FILE"
    for path, code in (("", "light-not-set"), (str(tmp_path / "gone.exr"), "light-missing")):
        scene.near_light.file = path
        with pytest.raises(NearError) as caught:
            lighting.wanted(graph())
        assert caught.value.code == code


def test_the_far_field_warning():
    from blender_addon.scene import lighting

    scene = stage.new_scene()
    proxy = stage.add_proxy(scene, Path("none.near"))
    assert lighting.far_field_warning(graph()) == ""
    lamp = bpy.data.objects.new("desk lamp", bpy.data.lights.new("desk lamp", "POINT"))
    scene.collection.objects.link(lamp)
    lamp.location = (1, 0, 1)
    assert "desk lamp" in lighting.far_field_warning(graph())
    lamp.location = (9, 0, 1)
    assert lighting.far_field_warning(graph()) == ""
    other = proxy.copy()
    scene.collection.objects.link(other)
    other.location = (30, 0, 0)
    assert "one map" in lighting.far_field_warning(graph())


def test_working_spaces():
    """Published matrices of Rec.2020 (ITU-R BT.2087) and ACEScg to linear Rec.709; white stays white, and there is a way back."""
    from blender_addon.scene import colour

    known = {"Linear Rec.2020": [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
             "ACEScg": [[1.7051, -0.6218, -0.0833], [-0.1303, 1.1408, -0.0105], [-0.0240, -0.1290, 1.1530]]}
    rgb = np.random.default_rng(0).random((50, 3)).astype(np.float32)
    for name, matrix in known.items():
        assert np.abs(colour.lin709_from(name) - matrix).max() < 2e-4, name
        assert np.allclose(colour.to_lin709(np.ones(3, np.float32), name), 1, atol=1e-3)
        assert np.allclose(colour.from_lin709(rgb @ colour.lin709_from(name).T, name), rgb, atol=1e-5)
    assert colour.lin709_from("Linear Rec.709") is None and colour.from_lin709(rgb, "Linear Rec.709") is rgb


def test_the_panels_picture_of_the_light():
    """+X is the middle of the picture, up is its top: as the world has it, whatever the map's own turn."""
    from blender_addon.panels.light import light_picture
    from blender_addon.scene import lighting

    scene = stage.new_scene()
    pixels = np.full((32, 64, 3), 0.02, np.float32)
    pixels[4:8, 14:18] = 5.0                  # towards +Y, high up
    stage.set_world(scene, pixels)
    plain = light_picture(lighting.capture(graph()))
    assert plain.shape == (64, 128, 3) and plain[12, 32].min() > 200 and plain[12, 64].max() < 100 and plain[52, 32].max() < 100
    scene.near_light.rotation = np.pi / 2     # looked up a quarter further on: what was seen at +Y is now seen at +X
    turned = light_picture(lighting.capture(graph()))
    assert turned[12, 64].min() > 200 and turned[12, 32].max() < 100


def test_a_digest_of_nodes_grows_with_them_and_not_with_their_ways():
    """A socket knows its node, the node its sockets: to follow both held Blender up for a minute per Principled shader."""
    from blender_addon.scene import world

    bpy.ops.wm.read_factory_settings(use_empty=True)
    material = bpy.data.materials.new("m")
    material.use_nodes = True
    found: list[str] = []
    world._walk(material.node_tree, found, 0, set())
    assert 100 < len(found) < 2000
    before = world.digest(material.node_tree)
    material.node_tree.nodes["Principled BSDF"].inputs["Roughness"].default_value += 0.1
    assert world.digest(material.node_tree) != before
