"""Operators of scene integration."""

from __future__ import annotations

import bpy

from .. import integration, session
from ..errors import as_near_error


class NEAR_OT_integration_enable(bpy.types.Operator):
    """Put the assets among this scene's objects: they are occluded, occlude, and cast shadows; again to bring it up to date"""

    bl_idname = "near.integration_enable"
    bl_label = "Integrate Into Scene"
    bl_options = {"REGISTER", "UNDO"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            integration.enable(context.scene)
        except Exception as error:
            session.get().report(as_near_error(error))
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        return {"FINISHED"}


class NEAR_OT_integration_disable(bpy.types.Operator):
    """Remove the assets' scene and the compositor nodes that integration made"""

    bl_idname = "near.integration_disable"
    bl_label = "Remove Integration"
    bl_options = {"REGISTER", "UNDO"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return integration.is_on(context.scene)

    def execute(self, context: bpy.types.Context) -> set[str]:
        integration.disable(context.scene)
        return {"FINISHED"}


_classes = (NEAR_OT_integration_enable, NEAR_OT_integration_disable)
register, unregister = bpy.utils.register_classes_factory(_classes)
