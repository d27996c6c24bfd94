"""The Light panel of the NeAR tab."""

from __future__ import annotations

import bpy

import numpy as np

from .. import pictures, wire
from ..scene import background, lighting
from .main import NearPanel, wrapped

PREVIEW_ROWS = 64
_pictured: tuple = ()        # what the picture "light" shows


def light_picture(light: lighting.CapturedLight) -> np.ndarray:
    """uint8 [rows, 2 rows, 3]: the light as the world has it, turned and with its strength; bright parts are compressed."""
    spec = wire.LightSpec(uniform_lin709=light.uniform_lin709, env_from_world=light.env_from_world, strength=light.strength)
    linear = background.panorama(lighting.map_at_hand(light), spec, PREVIEW_ROWS)
    return (np.clip(linear / (1 + linear) * 1.6, 0, 1) ** (1 / 2.2) * 255).astype(np.uint8)


def light_icon(scene: bpy.types.Scene) -> int:
    """The newest captured light as an icon; 0 before there is one."""
    global _pictured
    light = lighting.shown(scene)
    if light is None or (light.file is not None and lighting.map_at_hand(light) is None):
        return 0
    what = (light.key, light.env_from_world, light.strength, light.uniform_lin709)
    if what != _pictured:
        pictures.show("light", light_picture(light))
        _pictured = what
    return pictures.icon("light")


class NEAR_PT_light(NearPanel, bpy.types.Panel):
    bl_label = "Light"
    bl_order = 3

    def draw(self, context: bpy.types.Context) -> None:
        layout, light = self.layout, context.scene.near_light
        layout.use_property_split, layout.use_property_decorate = True, True
        layout.prop(light, "source")
        if light.source == "FILE":
            layout.prop(light, "file")
        elif light.source == "PROBE":
            layout.prop(light, "probe_object")
        layout.prop(light, "rotation")
        layout.prop(light, "strength")
        if light.source != "FILE":
            column = layout.column(heading="Baking")
            column.prop(light, "rows")
            column.prop(light, "samples")
        row = layout.row(align=True)
        row.operator("near.light_refresh", icon="FILE_REFRESH")
        row.operator("near.light_preview", text="Show", icon="IMAGE_DATA")
        if lighting.baking():
            layout.label(text="The light is being baked", icon="TIME")
        if icon := light_icon(context.scene):
            layout.template_icon(icon_value=icon, scale=6)
        if light.source == "PROBE" and (warning := lighting.far_field_warning(context.evaluated_depsgraph_get())):
            wrapped(layout.column(align=True), warning, context.region.width - 40, "INFO")


register, unregister = bpy.utils.register_classes_factory((NEAR_PT_light,))
