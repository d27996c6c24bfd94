"""The head of the NeAR tab: what is going on, and what went wrong."""

from __future__ import annotations

import textwrap

import bpy

from .. import pictures, session
from ..errors import NearError, fix_of
from ..jobs import Job

CATEGORY = "NeAR"
_CHARACTER_PIXELS = 7.5


class NearPanel:
    """Where all panels of the tab are."""

    bl_space_type, bl_region_type, bl_category = "VIEW_3D", "UI", CATEGORY


def wrapped(layout: bpy.types.UILayout, text: str, width_pixels: float, icon: str = "NONE") -> None:
    """A text over as many lines as it needs."""
    scale = bpy.context.preferences.system.ui_scale or 1.0      # without a window it is 0
    for line in textwrap.wrap(text, max(int(width_pixels / (_CHARACTER_PIXELS * scale)), 16)):
        layout.label(text=line, icon=icon)
        icon = "BLANK1" if icon != "NONE" else "NONE"


def draw_error(layout: bpy.types.UILayout, error: NearError, width_pixels: float) -> None:
    """One sentence what happened, one what to do, and the button that does it."""
    box = layout.box()
    box.alert = True
    column = box.column(align=True)
    wrapped(column, error.what, width_pixels - 60, "ERROR")
    wrapped(column, error.remedy, width_pixels - 60, "BLANK1")
    row = box.row()
    row.alert = False
    fix = fix_of(error.code)
    if fix is not None:
        row.operator_context = "INVOKE_DEFAULT"
        row.operator(fix.operator, text=fix.text, icon=fix.icon)
    row.operator("near.error_dismiss", text="" if fix is not None else "Dismiss", icon="X")


def draw_job(layout: bpy.types.UILayout, job: Job, waiting: int) -> None:
    """Stage, progress, time left, picture, Cancel."""
    column = layout.column()
    left = f", {job.eta_s:.0f} s left" if job.eta_s >= 1 else ""
    column.label(text=job.title + (f" ({waiting} more waiting)" if waiting else ""), icon="TIME")
    row = column.row(align=True)
    row.progress(factor=min(max(job.fraction, 0.0), 1.0), text=f"{job.stage}, {job.fraction:.0%}{left}")
    row.operator("near.cancel", text="", icon="CANCEL")
    if job.preview is not None:
        # Set where it is drawn: panels are drawn in the main thread, once per new picture.
        if getattr(job, "shown", 0) != job.preview_count:
            pictures.show("job", pictures.pixels_of(job.preview))
            job.shown = job.preview_count
        if icon := pictures.icon("job"):
            column.template_icon(icon_value=icon, scale=8)


class NEAR_PT_main(NearPanel, bpy.types.Panel):
    bl_label = "NeAR Relight"
    bl_idname = "NEAR_PT_main"
    bl_order = 0

    def draw(self, context: bpy.types.Context) -> None:
        here, layout = session.get(), self.layout
        if here.last_error is not None:
            draw_error(layout, here.last_error, context.region.width)
        if here.setup is not None:
            column = layout.column()
            column.label(text="Setting up the backend", icon="IMPORT")
            row = column.row(align=True)
            row.progress(factor=here.setup.fraction, text=here.setup.stage)
            row.operator("near.backend_setup_cancel", text="", icon="CANCEL")
        elif here.jobs:
            draw_job(layout, here.jobs[0], len(here.jobs) - 1)
        else:
            layout.label(text=status_text(here), icon=status_icon(here))


def status_text(here: session.Session) -> str:
    """One line about the backend."""
    if here.state == "ready":
        device = here.beat.get("device") or here.info.get("device", "")
        return f"Ready ({device}, {here.info.get('pack', '')})"
    return {"idle": "The backend starts when it is needed", "starting": "The backend is starting", "connecting": "Connecting to the backend",
            "failed": "No backend"}[here.state]


def status_icon(here: session.Session) -> str:
    return {"ready": "CHECKMARK", "failed": "ERROR", "idle": "PAUSE"}.get(here.state, "TIME")


register, unregister = bpy.utils.register_classes_factory((NEAR_PT_main,))
