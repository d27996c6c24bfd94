"""The selected asset."""

from __future__ import annotations

import bpy

from ..operators.export import FORMATS
from ..scene import objects
from .main import NearPanel


class NEAR_PT_asset(NearPanel, bpy.types.Panel):
    bl_label = "Asset"
    bl_idname = "NEAR_PT_asset"
    bl_order = 2

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return objects.is_proxy(context.object)

    def draw(self, context: bpy.types.Context) -> None:
        layout, obj = self.layout, context.object
        data = obj.near_relight
        found = next((path for path in objects.candidate_paths(obj) if path.is_file()), None)
        if found is not None:
            layout.label(text=f"{found.stem[:12]}, {found.stat().st_size / 1e6:.1f} MB", icon="FILE_TICK")
        else:
            layout.label(text="Packed in the .blend" if data.packed else "The asset file is not there", icon="PACKAGE" if data.packed else "ERROR")
        column = layout.column(align=True)
        column.operator_context = "INVOKE_DEFAULT"
        if found is None and data.packed is None:
            column.operator("near.asset_relink", icon="FILE_FOLDER")
        column.operator("near.asset_unpack" if data.packed else "near.asset_pack", icon="PACKAGE")
        column.operator("near.asset_mark", icon="ASSET_MANAGER")
        column = layout.column(align=True)
        column.operator_context = "INVOKE_DEFAULT"
        column.label(text="Export")
        for kind, text, _ in FORMATS:
            column.operator("near.export", text=text).format = kind
        layout.prop(data, "bake_onto")


register, unregister = bpy.utils.register_classes_factory((NEAR_PT_asset,))
