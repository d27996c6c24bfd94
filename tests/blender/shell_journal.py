"""Run by a Blender module of any version (never collected by pytest): installs the extension as a user would, uses it hard, and
prints one line of JSON with what it saw. Leaves by os._exit: some versions hang when the interpreter ends.

    python shell_journal.py ZIP FOLDER [search path...]
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

archive, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.path += sys.argv[3:]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import shell_stage as stage  # noqa: E402

stage.prepare(folder)
import bpy  # noqa: E402

PACKAGE = "bl_ext.user_default.near_relight"
told: dict = {"blender": bpy.app.version_string, "python": sys.version.split()[0]}


def leftovers() -> dict:
    """Everything that an add-on could leave behind in this process."""
    ours = [f"{name}:{function.__module__}" for name in dir(bpy.app.handlers) if isinstance(getattr(bpy.app.handlers, name), list)
            for function in getattr(bpy.app.handlers, name) if "near_relight" in getattr(function, "__module__", "")]
    fds = []
    for fd in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            fds.append(os.readlink(f"/proc/self/fd/{fd}").split(":")[0])
        except OSError:
            pass
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[1] == str(os.getpid()) and fields[0] != "Z":
            children.append(path.parent.name)
    classes = [name for name in dir(bpy.types) if name.startswith(("NEAR_OT", "NEAR_PT", "NEAR_RE", "NEAR_PG", "NEAR_AP"))]
    timer = sys.modules.get(f"{PACKAGE}.handlers")
    return {"handlers": ours, "sockets": fds.count("socket"), "pipes": fds.count("pipe"), "eventfds": fds.count("anon_inode"), "children": children,
            "classes": classes, "timer": timer is not None and bpy.app.timers.is_registered(timer._tick),
            "engine": "NEAR_RELIGHT" in [getattr(cls, "bl_idname", "") for cls in bpy.types.RenderEngine.__subclasses__()
                                         if getattr(cls, "is_registered", False)]}


def enable(on: bool = True) -> None:
    (bpy.ops.preferences.addon_enable if on else bpy.ops.preferences.addon_disable)(module=PACKAGE)


def install() -> None:
    bpy.ops.extensions.package_install_files(filepath=str(archive), repo="user_default", enable_on_install=True, overwrite=True)
    assert PACKAGE in bpy.context.preferences.addons, "not enabled"
    import zmq

    told["zmq"] = zmq.__file__
    told["zmq_version"] = zmq.zmq_version()
    told["user_folder"] = str(stage.module("paths", PACKAGE).user_folder())


def create() -> bpy.types.Object:
    bpy.context.scene.near_relight.photo = str(stage.PHOTO)
    assert bpy.ops.near.create() == {"FINISHED"}
    return bpy.context.object


def many_times() -> None:
    before = leftovers()
    for _ in range(20):
        enable(False)
        enable()
    told["after_20_enables"] = [before, leftovers()]


def undo_and_redo() -> None:
    obj = create()
    name = obj.name
    bpy.ops.ed.undo_push(message="created")
    bpy.data.objects[name].location.x = 3
    bpy.ops.ed.undo_push(message="moved")
    for _ in range(50):
        bpy.ops.ed.undo()
        bpy.ops.ed.redo()
    found = bpy.data.objects[name]
    placed = stage.module("scene.objects", PACKAGE).placed_assets(bpy.context.evaluated_depsgraph_get())
    told["after_50_undos"] = [found.location.x, len(placed), placed[0].path.is_file()]
    found.name = "again"
    assert create().near_relight.sha256 == found.near_relight.sha256      # the session is as it was


def loads_and_engines() -> None:
    before = leftovers()
    for index in range(10):
        path = folder / f"file{index}.blend"
        bpy.ops.wm.save_as_mainfile(filepath=str(path))
        bpy.ops.wm.open_mainfile(filepath=str(path))
    scene = bpy.context.scene
    engines = ["BLENDER_WORKBENCH", "NEAR_RELIGHT", "CYCLES" if hasattr(scene, "cycles") else "BLENDER_WORKBENCH"]
    for index in range(60):
        scene.render.engine = engines[index % len(engines)]
    told["after_10_loads"] = [before, leftovers()]
    told["engine_back"] = scene.render.engine


def the_end() -> None:
    pid = stage.module("session", PACKAGE).get().local.pid
    enable(False)
    told["disabled"] = leftovers()
    told["backend_pid"] = pid
    bpy.ops.extensions.package_uninstall(repo_index=_repo_index(), pkg_id="near_relight")
    told["uninstalled"] = not any(path.name == "near_relight" for path in (folder / "user").rglob("near_relight/blender_manifest.toml"))


def _repo_index() -> int:
    return [repo.module for repo in bpy.context.preferences.extensions.repos].index("user_default")


try:
    for step in (install, many_times, undo_and_redo, loads_and_engines, the_end):
        told["step"] = step.__name__
        step()
    told["step"] = "done"
except BaseException:
    told["error"] = traceback.format_exc()
print("JOURNAL " + json.dumps(told), flush=True)
os._exit(0)
