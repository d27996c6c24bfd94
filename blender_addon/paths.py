"""Where the add-on keeps things: outside its own folder, as extensions must."""

from __future__ import annotations

import os
from pathlib import Path

import bpy


def user_folder(name: str = "", create: bool = True) -> Path:
    """A folder of the add-on's own that outlives updates; in Blender's user resources."""
    try:
        found = bpy.utils.extension_path_user(__package__, path=name, create=create)
    except ValueError:                       # used straight from a checkout, not installed as an extension
        found = bpy.utils.user_resource("DATAFILES", path=os.path.join("near_relight", name), create=create)
    return Path(found)


def asset_store(create: bool = True) -> Path:
    """Assets of files that were not saved yet, and copies of packed ones."""
    return user_folder("assets", create)


def beside_blend(filepath: str | None = None) -> Path | None:
    """`near_assets` beside the .blend; None while it has not been saved."""
    where = bpy.data.filepath if filepath is None else filepath
    return Path(where).parent / "near_assets" if where else None


def write_atomic(path: Path, data: bytes) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
