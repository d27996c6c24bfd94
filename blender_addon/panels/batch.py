"""The Batch panel of the NeAR tab."""

from __future__ import annotations

import bpy

from .. import batch
from .main import NearPanel


class NEAR_PT_batch(NearPanel, bpy.types.Panel):
    bl_label = "Batch"
    bl_order = 6
    bl_options = {"DEFAULT_CLOSED"}

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.near_batch
        layout.use_property_split, layout.use_property_decorate = True, False
        for name in ("cameras", "lights", "use_range", "output", "keep"):
            layout.prop(settings, name)
        queue = batch.current
        if queue is None:
            layout.operator("near.batch_render", icon="RENDER_ANIMATION")
            return
        left = f", {queue.eta_s:.0f} s left" if queue.eta_s >= 0 else ""
        row = layout.row(align=True)
        row.progress(factor=queue.fraction, text=f"{queue.done} of {len(queue.items)}{left}")
        row.operator("near.batch_stop", text="", icon="CANCEL")


register, unregister = bpy.utils.register_classes_factory((NEAR_PT_batch,))
