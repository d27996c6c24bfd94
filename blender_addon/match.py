"""Look through the photo: a camera where the photo was taken from, with the photo behind the asset, and a wipe between both."""

from __future__ import annotations

import math
from pathlib import Path

import bpy
import numpy as np
from mathutils import Matrix, Vector

from .errors import NearError
from .scene.assetfile import read_record
from .scene.camera import CV_FROM_BLENDER
from .scene.objects import asset_path, is_proxy

NAME = "NeAR photo"
RADIUS, FOV_RAD = 2.0, math.radians(40)     # the camera that creation takes for granted: in front, level (asset units)


def camera_at_photo(scene: bpy.types.Scene, proxy: bpy.types.Object) -> bpy.types.Object:
    """A camera at the photo's pose, which follows the asset; the scene's camera from now on, its frame the photo's.

    Raises:
        NearError: `match-no-asset`, `photo-missing`, `photo-damaged`, those of the asset's file.
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
    data, (width, height) = camera.data, image.size
    known = photo_camera(proxy)
    if known is None:
        camera.matrix_basis = Matrix.Translation(Vector((0, -RADIUS, 0))) @ Matrix.Rotation(math.pi / 2, 4, "X")
        # The field of view spans the photo's width, whichever side is longer.
        data.sensor_fit, data.angle, data.shift_x, data.shift_y = "HORIZONTAL", FOV_RAD, 0.0, 0.0
    else:
        cam_from_asset, K, (seen_width, seen_height) = known
        camera.matrix_basis = (CV_FROM_BLENDER @ cam_from_asset).inverted()
        data.sensor_fit, data.lens = "HORIZONTAL", K[0][0] / seen_width * data.sensor_width
        data.shift_x, data.shift_y = 0.5 - K[0][2] / seen_width, (K[1][2] - seen_height / 2) / seen_width
    data.show_background_images = True
    data.background_images.clear()
    behind = data.background_images.new()
    behind.image, behind.alpha, behind.display_depth, behind.frame_method = image, 1.0, "BACK", "STRETCH"
    scene.camera = camera
    scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = width, height, 100
    scene.render.pixel_aspect_x = scene.render.pixel_aspect_y = 1.0
    return camera


def photo_camera(proxy: bpy.types.Object) -> tuple[Matrix, list[list[float]], tuple[int, int]] | None:
    """(cam_from_asset with OpenCV axes, K in pixels, (width, height)) that the asset was made with, where its file tells."""
    found = read_record(asset_path(proxy)).get("photo_camera")
    if not found:
        return None
    cam, K = np.array(found["cam_from_asset"], float).reshape(4, 4), np.array(found["K"], float).reshape(3, 3)
    return Matrix(cam.tolist()), K.tolist(), (int(found["width"]), int(found["height"]))


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
