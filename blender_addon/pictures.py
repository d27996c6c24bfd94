"""Small pictures for the panels: the photo, its mask, what a job shows. In background mode there are none."""

from __future__ import annotations

from pathlib import Path

import bpy
import bpy.utils.previews
import numpy as np

from . import wire
from .scene.place import preview_floats

_collection = None


def icon_of_file(path: str) -> int:
    """The icon of a picture file, loaded by Blender in its own time; 0 where there is none."""
    if _collection is None or not path or not Path(path).is_file():
        return 0
    key = f"{path} {Path(path).stat().st_mtime_ns}"
    if key not in _collection:
        _collection.load(key, path, "IMAGE")
    return _collection[key].icon_id


def show(name: str, pixels: np.ndarray) -> None:
    """Sets the picture `name`: uint8 [h, w, 3], top row first."""
    if _collection is None:
        return
    preview = _collection[name] if name in _collection else _collection.new(name)
    preview.image_size = (pixels.shape[1], pixels.shape[0])
    preview.image_pixels_float.foreach_set(preview_floats(pixels))


def icon(name: str) -> int:
    """Icon of a picture that was set; 0 where there is none."""
    return _collection[name].icon_id if _collection is not None and name in _collection else 0


def drop(name: str) -> None:
    if _collection is not None and name in _collection:
        del _collection[name]


def pixels_of(buffer: wire.Buffer) -> np.ndarray:
    """A preview of the wire as uint8 [h, w, 3]."""
    return np.frombuffer(buffer.data, np.uint8).reshape(buffer.shape)


def register() -> None:
    global _collection
    if not bpy.app.background:
        _collection = bpy.utils.previews.new()


def unregister() -> None:
    global _collection
    if _collection is not None:
        bpy.utils.previews.remove(_collection)
        _collection = None
