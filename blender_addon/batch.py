"""A queue of renders, cameras x lights x frames: planned as plain data, worked off one picture at a time, resumable."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import bpy

from .errors import NearError

LIGHT_SUFFIXES = (".exr", ".hdr")


@dataclass(frozen=True)
class Item:
    """One picture. `light` empty: the scene's own."""
    camera: str
    light: str
    frame: int
    output: Path


def plan(context: bpy.types.Context) -> list[Item]:
    """What the panel's settings ask for, in order; with "keep", without what is on disc.

    Raises:
        NearError: `batch-no-camera`, `batch-no-light`, `batch-no-folder`.
    """
    scene, settings = context.scene, context.scene.near_batch
    cameras = _cameras(context, settings.cameras)
    lights = _lights(settings.lights)
    if settings.output.startswith("//") and not bpy.data.filepath:
        raise NearError("batch-no-folder", "The output folder is beside the .blend, which is not saved yet.", "Save the file, or choose another folder.")
    folder = Path(bpy.path.abspath(settings.output))
    frames = range(scene.frame_start, scene.frame_end + 1, scene.frame_step) if settings.use_range else [scene.frame_current]
    suffix = scene.render.file_extension
    items = []
    for camera in cameras:
        for light in lights:
            place = folder / bpy.path.clean_name(camera.name) / (Path(light).stem if light else "")
            items += [Item(camera.name, light, frame, place / f"{frame:04d}{suffix}") for frame in frames]
    return [item for item in items if not (settings.keep and item.output.is_file())]


def _cameras(context: bpy.types.Context, which: str) -> list[bpy.types.Object]:
    scene = context.scene
    found = {"ACTIVE": [scene.camera] if scene.camera else [], "ALL": [o for o in scene.objects if o.type == "CAMERA"],
             "SELECTED": [o for o in scene.objects if o.type == "CAMERA" and o.select_get()]}[which]
    if not found:
        raise NearError("batch-no-camera", "There is no such camera in the scene.", "Add or select a camera.")
    return sorted(found, key=lambda o: o.name)


def _lights(folder: str) -> list[str]:
    if not folder:
        return [""]
    path = Path(bpy.path.abspath(folder))
    found = sorted(str(p) for p in path.glob("*") if p.suffix.lower() in LIGHT_SUFFIXES) if path.is_dir() else []
    if not found:
        raise NearError("batch-no-light", f"The folder {path.name} holds no .exr or .hdr file.", "Choose another folder, or leave it empty.")
    return found


class Queue:
    """The items under way: `prepare` sets the scene for the next one, `took` counts it, `restore` puts everything back."""

    def __init__(self, scene: bpy.types.Scene, items: list[Item]) -> None:
        self.items, self.done, self.error = items, 0, ""
        self._scene_name = scene.name
        self._began = time.monotonic()
        light = scene.near_light
        self._was = (scene.camera, scene.frame_current, scene.render.filepath, light.source, light.file)

    @property
    def fraction(self) -> float:
        return self.done / max(len(self.items), 1)

    @property
    def eta_s(self) -> float:
        """Seconds left at the pace so far; -1 before the first picture."""
        if not self.done:
            return -1.0
        return (time.monotonic() - self._began) / self.done * (len(self.items) - self.done)

    @property
    def scene(self) -> bpy.types.Scene:
        return bpy.data.scenes[self._scene_name]

    @property
    def finished(self) -> bool:
        return self.done >= len(self.items)

    def prepare(self) -> Item:
        """Sets camera, light, frame and output of the next item."""
        item, scene = self.items[self.done], self.scene
        scene.camera = scene.objects[item.camera]
        if item.light:
            scene.near_light.source, scene.near_light.file = "FILE", item.light
        scene.frame_set(item.frame)
        scene.render.filepath = str(item.output)
        item.output.parent.mkdir(parents=True, exist_ok=True)
        return item

    def took(self) -> None:
        """The item is on disc."""
        self.done += 1

    def restore(self) -> None:
        """Everything as before the first item."""
        scene = self.scene
        scene.camera, frame, scene.render.filepath, scene.near_light.source, scene.near_light.file = self._was
        scene.frame_set(frame)


current: Queue | None = None
