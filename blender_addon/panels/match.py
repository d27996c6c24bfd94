"""The Match panel of the NeAR tab: looking through the photo."""

from __future__ import annotations

import bpy

from .. import match
from .main import NearPanel


class NEAR_PT_match(NearPanel, bpy.types.Panel):
    bl_label = "Match"
    bl_order = 5
    bl_options = {"DEFAULT_CLOSED"}

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        layout.use_property_split, layout.use_property_decorate = True, False
        layout.operator("near.match_photo", icon="CAMERA_DATA")
        if match.is_matched(context.scene):
            layout.prop(context.scene.near_render, "wipe", slider=True)


register, unregister = bpy.utils.register_classes_factory((NEAR_PT_match,))
