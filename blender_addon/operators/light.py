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
    """Show the captured light in the panel"""

    bl_idname = "near.light_preview"
    bl_label = "Show Captured Light"

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            light, current = lighting.latest(context.evaluated_depsgraph_get())
        except Exception as error:
            session.get().report(as_near_error(error))
            return {"CANCELLED"}
        if light is None:
            self.report({"INFO"}, "The light is being baked; try again in a moment.")
            viewport.begin_ticking()
            return {"CANCELLED"}
        show(light, context.scene)
        return {"FINISHED"}


PREVIEW = "NeAR light"
PREVIEW_ROWS = 64


def show(light: lighting.CapturedLight, scene: bpy.types.Scene) -> bpy.types.Image:
    """The map as a small image of the .blend, as the scene sees it: turned, with its strength; linear."""
    import numpy as np

    from .. import wire
    from ..scene import background

    rows = PREVIEW_ROWS
    image = bpy.data.images.get(PREVIEW) or bpy.data.images.new(PREVIEW, 2 * rows, rows, float_buffer=True)
    if light.file is not None and light.key not in lighting._maps:
        pixels = np.zeros((rows, 2 * rows, 3), np.float32)
    else:
        spec = wire.LightSpec(uniform_lin709=light.uniform_lin709, env_from_world=light.env_from_world, strength=light.strength)
        pixels = background.panorama(lighting.map_of(light), spec, rows)
    rgba = np.concatenate([pixels, np.ones_like(pixels[..., :1])], -1)[::-1]
    image.pixels.foreach_set(np.ascontiguousarray(rgba, np.float32).ravel())
    image.update()
    image.preview_ensure().reload()
    return image


_classes = (NEAR_OT_light_refresh, NEAR_OT_light_preview)
register, unregister = bpy.utils.register_classes_factory(_classes)
