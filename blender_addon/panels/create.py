"""Photo to asset, mesh to asset."""

from __future__ import annotations

import bpy

from .. import pictures, session
from .main import NearPanel


class NEAR_PT_create(NearPanel, bpy.types.Panel):
    bl_label = "Create"
    bl_idname = "NEAR_PT_create"
    bl_order = 1

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.near_relight
        row = layout.row(align=True)
        row.prop(settings, "photo", text="")
        row.operator("near.photo_pick", text="", icon="FILE_IMAGE")
        if settings.more_photos:
            row = layout.row(align=True)
            row.label(text=f"and {len(settings.more_photos)} more photos, an asset each")
            row.operator("near.photos_clear", text="", icon="X")
        self._pictures(layout, bpy.path.abspath(settings.photo))
        layout.prop(settings, "geometry", text="Shape")
        if settings.geometry == "MESH":
            layout.prop(settings, "mesh", text="Mesh")
            layout.prop(settings, "hide_mesh")
        elif settings.geometry == "GENERATOR":
            layout.prop(settings, "generator")
        if settings.geometry != "MESH":
            layout.prop(settings, "use_shape_photo")
            if settings.use_shape_photo:
                layout.prop(settings, "shape_photo", text="Shape from")
        layout.prop(settings, "exposure")
        layout.prop(settings, "seed")
        column = layout.column(align=True)
        big = column.row()
        big.scale_y = 1.4
        big.enabled = not session.get().jobs
        big.operator_context = column.operator_context = "INVOKE_DEFAULT"
        big.operator("near.create", icon="OUTLINER_OB_POINTCLOUD")
        column.operator("near.encode", icon="MESH_DATA")
        column.operator("near.asset_add", icon="FILE_FOLDER")

    def _pictures(self, layout: bpy.types.UILayout, photo: str) -> None:
        icon, mask = pictures.icon_of_file(photo), pictures.icon("mask")
        if not icon:
            return
        row = layout.row()
        row.template_icon(icon_value=icon, scale=6)
        if mask:
            row.template_icon(icon_value=mask, scale=6)
        layout.operator_context = "INVOKE_DEFAULT"
        layout.operator("near.photo_mask", icon="MOD_MASK")


register, unregister = bpy.utils.register_classes_factory((NEAR_PT_create,))
