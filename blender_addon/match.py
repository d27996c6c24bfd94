"""Look through the photo: a camera where the photo was taken from, with the photo behind the asset, and a wipe between both."""

from __future__ import annotations

import math
from pathlib import Path

import bpy
from mathutils import Matrix, Vector

from .errors import NearError
from .scene.objects import is_proxy

NAME = "NeAR photo"
RADIUS, FOV_RAD = 2.0, math.radians(40)     # the camera that creation takes for granted: in front, level (asset units)


def camera_at_photo(scene: bpy.types.Scene, proxy: bpy.types.Object) -> bpy.types.Object:
    """A camera at the photo's pose, which follows the asset; the scene's camera from now on, its frame the photo's.

    Raises:
        NearError: `match-no-asset`, `photo-missing`, `photo-damaged`.
    """
    if not is_proxy(proxy):
        raise NearError("match-no-asset", "No relightable asset is selected.", "Select one and try again.")
    image = photo_of(proxy)
    camera = next((child for child in proxy.children if child.type == "CAMERA" and child.name.startswith(NAME)), None)
    if camera is None:
        camera = bpy.data.objects.new(NAME, bpy.data.cameras.new(NAME))
        scene.collection.objects.link(camera)
        camera.parent = proxy
    camera.matrix_parent_inverse = Matrix.Identity(4)
    camera.matrix_basis = Matrix.Translation(Vector((0, -RADIUS, 0))) @ Matrix.Rotation(math.pi / 2, 4, "X")
    data, (width, height) = camera.data, image.size
    # The field of view spans the photo's width, whichever side is longer.
    data.sensor_fit, data.angle = "HORIZONTAL", FOV_RAD
    data.show_background_images = True
    data.background_images.clear()
    behind = data.background_images.new()
    behind.image, behind.alpha, behind.display_depth, behind.frame_method = image, 1.0, "BACK", "STRETCH"
    scene.camera = camera
    scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = width, height, 100
    scene.render.pixel_aspect_x = scene.render.pixel_aspect_y = 1.0
    return camera


def photo_of(proxy: bpy.types.Object) -> bpy.types.Image:
    """The photo that the asset was made from. Raises as `camera_at_photo`."""
    path = Path(bpy.path.abspath(proxy.near_relight.photo, library=proxy.library)) if proxy.near_relight.photo else None
    if path is None or not path.is_file():
        raise NearError("photo-missing", f"The photo of {proxy.name} is not there ({proxy.near_relight.photo or 'no path'}).",
                        "Only assets made from a photo have one; find the file if it was moved.")
    image = bpy.data.images.load(str(path), check_existing=True)
    if not image.size[0] or not image.size[1]:
        raise NearError("photo-damaged", f"The photo {path.name} cannot be read.", "Choose another file.")
    return image


def is_matched(scene: bpy.types.Scene) -> bool:
    """Whether the scene is looked at through a photo's camera."""
    return scene.camera is not None and scene.camera.name.startswith(NAME) and scene.camera.parent is not None
