"""What happens by itself: the session's timer, and asset files that follow their .blend."""

from __future__ import annotations

import shutil
from pathlib import Path

import bpy
from bpy.app.handlers import persistent

from . import paths, session, viewport
from .errors import NearError
from .scene import objects

QUICK_S, CALM_S = 1 / 60, 0.25


def _tick() -> float:
    """The one timer; never raises (Blender would drop it), never waits."""
    here = session.get()
    here.poll()
    return QUICK_S if here.busy else CALM_S


def redraw_panels() -> None:
    """The sidebars of all 3D views, and the preferences."""
    for window in bpy.context.window_manager.windows:
        for area in window.screen.areas:
            if area.type == "VIEW_3D":
                for region in area.regions:
                    if region.type == "UI":
                        region.tag_redraw()
            elif area.type == "PREFERENCES":
                area.tag_redraw()


def begin_ticking() -> None:
    """After a file was loaded, too: persistent timers survive that, but another add-on may have cleared them."""
    if not bpy.app.background and not bpy.app.timers.is_registered(_tick):
        bpy.app.timers.register(_tick, persistent=True)


@persistent
def _load_pre(*_) -> None:
    """Jobs would put their result into the wrong file."""
    for job in list(session.get().jobs):
        job.cancel()
    session.get().jobs.clear()
    session.get().last_error = None


@persistent
def _load_post(*_) -> None:
    begin_ticking()
    tell_missing()


@persistent
def _save_pre(filepath: str = "", *_) -> None:
    """Assets made before the first save, or for a file that is saved elsewhere, come along."""
    if filepath:
        try:
            bring_assets(Path(filepath))
        except OSError as error:
            session.get().report(NearError("cannot-write", f"An asset could not be copied beside the .blend ({error.strerror}).",
                                           "Free some space there, or save in a folder that you may write to."))


@persistent
def _save_post(filepath: str = "", *_) -> None:
    """The add-on's own folder is a waiting room: what now lies beside the .blend leaves it."""
    folder = paths.beside_blend()
    if folder is None:
        return
    for sha256 in {obj.near_relight.sha256 for obj in bpy.data.objects if objects.is_proxy(obj) and obj.library is None}:
        kept, waiting = folder / f"{sha256}.near", paths.asset_store(create=False) / f"{sha256}.near"
        if kept.is_file() and waiting.is_file() and kept.stat().st_size == waiting.stat().st_size:
            waiting.unlink(missing_ok=True)
    viewport.mark_changed()                    # views must look for the files where they are now


def bring_assets(blend: Path) -> None:
    """Copies every asset beside `blend` and names it there. Lost ones are left alone. Raises OSError."""
    folder = blend.parent / "near_assets"
    for obj in bpy.data.objects:
        if not objects.is_proxy(obj) or obj.library is not None:
            continue
        target = folder / f"{obj.near_relight.sha256}.near"
        if not target.is_file():
            source = next((path for path in objects.candidate_paths(obj) if path.is_file()), None)
            if source is None:
                continue                       # lost, or packed only: the .blend is as good as it was
            folder.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(".part")
            shutil.copyfile(source, part)
            part.replace(target)
        obj.near_relight.asset_path = f"//near_assets/{target.name}"
        obj.near_relight.origin = str(folder)


def tell_missing() -> None:
    """Shows which assets of the file just loaded are lost."""
    lost = [obj.name for obj in bpy.data.objects if objects.is_proxy(obj) and obj.near_relight.packed is None
            and not any(path.is_file() for path in objects.candidate_paths(obj))]
    if lost:
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        session.get().report(NearError("asset-file-missing", f"The asset file of {names} is not there.",
                                       "Find the file, or create the asset again."))


_HANDLERS = {"load_pre": _load_pre, "load_post": _load_post, "save_pre": _save_pre, "save_post": _save_post}


def register() -> None:
    for name, function in _HANDLERS.items():
        getattr(bpy.app.handlers, name).append(function)
    session.get().on_change(redraw_panels)
    begin_ticking()


def unregister() -> None:
    if bpy.app.timers.is_registered(_tick):
        bpy.app.timers.unregister(_tick)
    for name, function in _HANDLERS.items():
        found = getattr(bpy.app.handlers, name)
        if function in found:
            found.remove(function)
    session.close()
