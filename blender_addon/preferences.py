"""The add-on's preferences, and the same as plain data for everything that must not hold on to Blender's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import bpy
from bpy.props import BoolProperty, EnumProperty, StringProperty

from . import paths
from .connection import home_folder


@dataclass(frozen=True)
class Settings:
    """What a session needs to know. Empty `python`: the environment that "Set up backend" makes."""
    remote: bool = False
    key_file: str = ""
    python: str = ""
    device: str = "auto"
    pack: str = "compact"
    home: Path = Path()
    auto_start: bool = True
    online: bool = False


def addon_preferences() -> bpy.types.AddonPreferences | None:
    """None when the add-on was registered from a checkout, without being enabled in Blender."""
    addon = bpy.context.preferences.addons.get(__package__)
    return addon.preferences if addon is not None else None


def settings() -> Settings:
    """The preferences now; `NEAR_PYTHON`, `NEAR_HOME` and `NEAR_CONNECT` (a key file) in the environment override them, for farms."""
    prefs = addon_preferences()
    python, key_file = os.environ.get("NEAR_PYTHON", ""), os.environ.get("NEAR_CONNECT", "")
    online = bool(getattr(bpy.app, "online_access", True))
    if prefs is None:
        return Settings(remote=bool(key_file), key_file=key_file, python=python, home=home_folder(), online=online)
    home = home_folder() if os.environ.get("NEAR_HOME") or not prefs.cache else Path(bpy.path.abspath(prefs.cache))
    return Settings(remote=bool(key_file) or prefs.where == "REMOTE", key_file=key_file or bpy.path.abspath(prefs.key_file),
                    python=python or bpy.path.abspath(prefs.python), device=prefs.device, pack=prefs.pack.strip() or "compact", home=home,
                    auto_start=prefs.auto_start, online=online)


class NEAR_AP_preferences(bpy.types.AddonPreferences):
    """Edit > Preferences > Add-ons > NeAR Relight."""

    bl_idname = __package__

    where: EnumProperty(name="Backend", items=[
        ("LOCAL", "On This Computer", "A process that the add-on starts and ends"),
        ("REMOTE", "On Another Computer", "A backend that its owner started there and gave you a key file for")], default="LOCAL")
    key_file: StringProperty(name="Key File", description="The file that the owner of the backend made with: near keys new",
                             subtype="FILE_PATH")
    python: StringProperty(name="Python", description="Python of an environment with near-relight in it; empty: the one that Set Up Backend makes",
                           subtype="FILE_PATH")
    device: EnumProperty(name="Device", items=[("auto", "Automatic", "The GPU if there is one that can be used"), ("cuda", "GPU (CUDA)", ""),
                                               ("cpu", "CPU", "")], default="auto")
    pack: StringProperty(name="Weights", description="compact, or the name of an installed pack", default="compact")
    cache: StringProperty(name="Cache Folder", description="Uploads, assets and the log; empty: the usual folder of this system", subtype="DIR_PATH")
    auto_start: BoolProperty(name="Start When Needed", description="Start the backend by itself when something is to be rendered or created",
                             default=True)

    def draw(self, _context: bpy.types.Context) -> None:
        from .panels import backend

        backend.draw_preferences(self.layout, self)


def register() -> None:
    bpy.utils.register_class(NEAR_AP_preferences)


def unregister() -> None:
    bpy.utils.unregister_class(NEAR_AP_preferences)


def environment_folder() -> Path:
    """Where "Set up backend" makes its environment."""
    return paths.user_folder("backend", create=False)


def environment_python() -> Path:
    """That environment's interpreter."""
    return environment_folder() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
