"""The Light panel of the NeAR tab."""

from __future__ import annotations

import bpy

from ..operators.light import PREVIEW
from ..scene import lighting
from .main import NearPanel, wrapped


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
        image = bpy.data.images.get(PREVIEW)
        if image is not None and image.preview is not None:
            layout.template_icon(icon_value=image.preview.icon_id, scale=6)
        if light.source == "PROBE" and (warning := lighting.far_field_warning(context.evaluated_depsgraph_get())):
            wrapped(layout.column(align=True), warning, context.region.width - 40, "INFO")


register, unregister = bpy.utils.register_classes_factory((NEAR_PT_light,))
