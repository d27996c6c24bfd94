"""Operators of "Look through the photo"."""

from __future__ import annotations

import bpy

from .. import match, session
from ..errors import as_near_error


class NEAR_OT_match_photo(bpy.types.Operator):
    """Make a camera where the photo was taken from, with the photo behind the asset, and look through it"""

    bl_idname = "near.match_photo"
    bl_label = "Look Through the Photo"
    bl_options = {"REGISTER", "UNDO"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        from ..scene.objects import is_proxy

        cls.poll_message_set("Select a relightable asset")
        return is_proxy(context.object)

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            match.camera_at_photo(context.scene, context.object)
        except Exception as error:
            session.get().report(as_near_error(error))
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        if context.area is not None and context.area.type == "VIEW_3D":
            context.space_data.region_3d.view_perspective = "CAMERA"
        return {"FINISHED"}


register, unregister = bpy.utils.register_classes_factory((NEAR_OT_match_photo,))
