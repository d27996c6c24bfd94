"""How assets are seen and rendered: the viewport's pass, overlay, scene integration, and the passes of a view layer."""

from __future__ import annotations

import bpy

from .. import integration
from ..engine import ENGINE
from .main import NearPanel


class NEAR_PT_render(NearPanel, bpy.types.Panel):
    bl_label = "View and Render"
    bl_order = 4

    def draw(self, context: bpy.types.Context) -> None:
        layout, scene = self.layout, context.scene
        layout.use_property_split, layout.use_property_decorate = True, False
        layout.prop(scene.near_render, "shown")
        layout.prop(scene.near_render, "overlay")
        layout.prop(scene.near_render, "draft_scale", slider=True)
        if scene.render.engine == ENGINE:
            layout.label(text="Assets alone are rendered", icon="RENDER_STILL")
            return
        column = layout.column(align=True)
        if integration.is_on(scene):
            column.label(text="Integrated: F12 joins assets and scene", icon="CHECKMARK")
            column.operator("near.integration_enable", text="Update", icon="FILE_REFRESH")
            column.operator("near.integration_disable", icon="X")
        else:
            column.operator("near.integration_enable", icon="MOD_BOOLEAN")


class NEAR_PT_passes(bpy.types.Panel):
    """In the view layer's properties, where Blender's other engines have their passes."""

    bl_label = "Passes"
    bl_space_type, bl_region_type, bl_context = "PROPERTIES", "WINDOW", "view_layer"
    COMPAT_ENGINES = {ENGINE}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return context.engine in cls.COMPAT_ENGINES

    def draw(self, context: bpy.types.Context) -> None:
        layout, layer = self.layout, context.view_layer
        layout.use_property_split, layout.use_property_decorate = True, False
        column = layout.column(heading="Data", align=True)
        column.prop(layer, "use_pass_z", text="Depth")
        column.prop(layer, "use_pass_normal")
        column = layout.column(heading="Asset", align=True)
        for name in ("use_base_color", "use_roughness", "use_metallic", "use_shadow"):
            column.prop(layer.near_passes, name)


register, unregister = bpy.utils.register_classes_factory((NEAR_PT_render, NEAR_PT_passes))
