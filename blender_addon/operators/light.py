"""Operators of the Light panel."""

from __future__ import annotations

import bpy

from .. import session, viewport
from ..errors import as_near_error
from ..scene import lighting


class NEAR_OT_light_refresh(bpy.types.Operator):
    """Look at the light again, also where its change cannot be seen from outside (deformed meshes, edited files)"""

    bl_idname = "near.light_refresh"
    bl_label = "Refresh Light"

    def execute(self, context: bpy.types.Context) -> set[str]:
        lighting.forget()
        try:
            lighting.latest(context.evaluated_depsgraph_get())
        except Exception as error:
            session.get().report(as_near_error(error))
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        viewport.begin_ticking()
        viewport.mark_changed()
        return {"FINISHED"}


class NEAR_OT_light_preview(bpy.types.Operator):
    """Capture the light now, to see it in the panel"""

    bl_idname = "near.light_preview"
    bl_label = "Show Captured Light"

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            _, current = lighting.latest(context.evaluated_depsgraph_get())
        except Exception as error:
            session.get().report(as_near_error(error))
            return {"CANCELLED"}
        if not current:
            viewport.begin_ticking()
        session.get().notify()
        return {"FINISHED"}


_classes = (NEAR_OT_light_refresh, NEAR_OT_light_preview)
register, unregister = bpy.utils.register_classes_factory(_classes)
