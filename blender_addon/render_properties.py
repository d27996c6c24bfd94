"""Settings of light, render and batch in the .blend: `scene.near_light`, `scene.near_render`, `view_layer.near_passes`."""

from __future__ import annotations

import bpy
from bpy.props import BoolProperty, EnumProperty, FloatProperty, IntProperty, PointerProperty, StringProperty

SOURCES = [
    ("WORLD", "World", "The World's nodes, exactly"),
    ("PROBE", "Probe at the Asset", "Everything around the asset: World, lamps, and the light that objects emit and reflect"),
    ("FILE", "File", "An equirectangular .exr or .hdr file, whatever the World is"),
]
SHOWN = [
    ("color", "Colour", "The lit asset"), ("base_color", "Base Colour", ""), ("roughness", "Roughness", ""), ("metallic", "Metallic", ""),
    ("shadow", "Shadow", "Share of the light that arrives"), ("normal", "Normal", "World space"), ("depth", "Depth", "Near is white"),
]


def _redraw(_settings, _context: bpy.types.Context) -> None:
    from .viewport import mark_changed

    mark_changed()


class NEAR_PG_light(bpy.types.PropertyGroup):
    """What the assets are lit by."""

    source: EnumProperty(name="Light", items=SOURCES, default="WORLD", update=_redraw)
    file: StringProperty(name="File", description="Equirectangular light, twice as wide as high", subtype="FILE_PATH", update=_redraw)
    rotation: FloatProperty(name="Rotation", description="Turns the light about Z, on top of the World's own rotation", subtype="ANGLE", update=_redraw)
    strength: FloatProperty(name="Strength", description="Factor on the light", default=1.0, min=0.0, soft_max=10.0, update=_redraw)
    rows: IntProperty(name="Rows", description="Height of the map when the World must be baked; a probe has half of it", default=512, min=64, max=4096, update=_redraw)
    samples: IntProperty(name="Samples", description="Cycles samples when the light must be baked", default=32, min=1, max=4096, update=_redraw)
    probe_object: PointerProperty(name="Probe At", description="Where the probe stands; empty: between the assets", type=bpy.types.Object,
                                  update=_redraw)
    probe_scene: PointerProperty(name="Probe Scene", description="Scene that the probe sees; empty: the scene itself", type=bpy.types.Scene)


class NEAR_PG_render(bpy.types.PropertyGroup):
    """How assets are seen in viewports."""

    shown: EnumProperty(name="Show", description="Pass that the viewport shows", items=SHOWN, default="color", update=_redraw)
    overlay: BoolProperty(name="Overlay", description="Draw the assets into the viewports of other engines", default=True, update=_redraw)
    wipe: FloatProperty(name="Photo", description="Share of the picture, from the left, that shows the photo over the asset", min=0.0, max=1.0,
                        subtype="FACTOR", update=_redraw)
    draft_scale: FloatProperty(name="Draft Size", description="Share of the viewport's pixels while something moves", default=0.5, min=0.1, max=1.0)


class NEAR_PG_passes(bpy.types.PropertyGroup):
    """Passes of a view layer beside Combined, Depth and Normal (which are Blender's own switches)."""

    use_base_color: BoolProperty(name="Base Colour", options=set())
    use_roughness: BoolProperty(name="Roughness", options=set())
    use_metallic: BoolProperty(name="Metallic", options=set())
    use_shadow: BoolProperty(name="Shadow", options=set())


class NEAR_PG_batch(bpy.types.PropertyGroup):
    """A queue of renders: cameras x lights x frames."""

    cameras: EnumProperty(name="Cameras", items=[("ACTIVE", "Active", "The scene's camera"), ("SELECTED", "Selected", "All selected cameras"),
                                                 ("ALL", "All", "All cameras of the scene")], default="ACTIVE")
    lights: StringProperty(name="Lights", description="Folder of .exr and .hdr files, each of which lights every frame; empty: the scene's light",
                           subtype="DIR_PATH")
    use_range: BoolProperty(name="Animation", description="The scene's frame range rather than the present frame")
    keep: BoolProperty(name="Keep Finished Frames", description="Do not render again what is on disc", default=True)
    output: StringProperty(name="Output", description="Folder of the pictures", default="//near_batch/", subtype="DIR_PATH")


_classes = (NEAR_PG_light, NEAR_PG_render, NEAR_PG_passes, NEAR_PG_batch)


def register() -> None:
    for cls in _classes:
        bpy.utils.register_class(cls)
    bpy.types.Scene.near_light = PointerProperty(type=NEAR_PG_light)
    bpy.types.Scene.near_render = PointerProperty(type=NEAR_PG_render)
    bpy.types.Scene.near_batch = PointerProperty(type=NEAR_PG_batch)
    bpy.types.ViewLayer.near_passes = PointerProperty(type=NEAR_PG_passes)


def unregister() -> None:
    del bpy.types.ViewLayer.near_passes
    del bpy.types.Scene.near_batch, bpy.types.Scene.near_render, bpy.types.Scene.near_light
    for cls in reversed(_classes):
        bpy.utils.unregister_class(cls)
