"""The backend's panel and the add-on's preferences."""

from __future__ import annotations

import bpy

from .. import session
from ..operators.backend import set_up_already
from .main import NearPanel, draw_error, status_icon, status_text


class NEAR_PT_backend(NearPanel, bpy.types.Panel):
    bl_label = "Backend"
    bl_idname = "NEAR_PT_backend"
    bl_order = 100
    bl_options = {"DEFAULT_CLOSED"}

    def draw(self, _context: bpy.types.Context) -> None:
        draw_controls(self.layout)


def draw_controls(layout: bpy.types.UILayout) -> None:
    """State and buttons."""
    here = session.get()
    layout.label(text=status_text(here), icon=status_icon(here))
    memory = here.beat.get("memory", {})
    if here.state == "ready" and memory:
        gpu = memory.get("cuda_reserved_bytes", 0)
        layout.label(text=f"Memory: {memory.get('resident_bytes', 0) / 2**30:.1f} GB" + (f", GPU {gpu / 2**30:.1f} GB" if gpu else ""))
    column = layout.column(align=True)
    if not set_up_already():
        column.operator("near.backend_setup", icon="IMPORT")
    row = column.row(align=True)
    if here.state in ("ready", "starting", "connecting"):
        row.operator("near.backend_stop", icon="PAUSE")
    else:
        row.operator("near.backend_start", icon="PLAY")
    row.operator("near.backend_release", icon="TRASH")
    row = column.row(align=True)
    row.operator("near.open_log", icon="TEXT")
    row.operator("near.copy_report", icon="COPYDOWN")
    column.operator("near.open_preferences", icon="PREFERENCES")


def draw_preferences(layout: bpy.types.UILayout, prefs: bpy.types.AddonPreferences) -> None:
    """Edit > Preferences > Add-ons > NeAR Relight."""
    here = session.get()
    layout.use_property_split = True
    if here.last_error is not None:
        draw_error(layout, here.last_error, 700)
    layout.prop(prefs, "where", expand=True)
    if prefs.where == "REMOTE":
        layout.prop(prefs, "key_file")
    else:
        layout.prop(prefs, "auto_start")
        layout.prop(prefs, "device")
        layout.prop(prefs, "pack")
        layout.prop(prefs, "cache")
        layout.prop(prefs, "python")
        if here.setup is not None:
            row = layout.row(align=True)
            row.progress(factor=here.setup.fraction, text=here.setup.stage)
            row.operator("near.backend_setup_cancel", text="", icon="CANCEL")
        else:
            layout.operator("near.backend_setup", text="Set Up Backend" if not set_up_already() else "Set Up Backend Again", icon="IMPORT")
    draw_controls(layout.box())


register, unregister = bpy.utils.register_classes_factory((NEAR_PT_backend,))
