"""Blender's cameras as `wire.CameraSpec`: the only place where OpenGL axes become OpenCV's (DESIGN section 4).

Lens, sensor fit, shift, pixel aspect and orthographic scale are not computed again: they are read out of the projection
matrix that Blender makes of them, so that they cannot disagree with what Blender draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mathutils import Matrix

from .. import wire
from ..errors import NearError

CV_FROM_BLENDER = Matrix.Diagonal((1.0, -1.0, -1.0, 1.0))
RIGID_TOLERANCE = 1e-4      # of a float32 matrix against an orthonormal one
NEAREST_M = 1e-3            # where an orthographic view's first plane is put


@dataclass(frozen=True)
class ViewCamera:
    """A viewport's camera. `pushed_back_m`: how far it stands behind the view's own plane z = 0 (orthographic views see
    what is behind them); a depth z of the frame is z - `pushed_back_m` in the view's coordinates."""
    spec: wire.CameraSpec
    pushed_back_m: float


def render_size(render) -> tuple[int, int]:
    """(width, height) in pixels of `scene.render`, as Blender rounds them."""
    share = render.resolution_percentage
    return render.resolution_x * share // 100, render.resolution_y * share // 100


def border_pixels(render, width: int, height: int) -> tuple[int, ...]:
    """The render border as (x0, y0, x1, y1) pixels, half open, rows from the top; empty without one.

    The products are float32 and cut off, as in Blender: the result must have exactly the size that it expects.
    """
    if not render.use_border:
        return ()
    x0, x1 = (int(np.float32(b) * np.float32(width)) for b in (render.border_min_x, render.border_max_x))
    low, high = (int(np.float32(b) * np.float32(height)) for b in (render.border_min_y, render.border_max_y))
    if x1 <= x0 or high <= low:
        raise NearError("border-empty", "The render border holds no pixel.", "Draw a larger border (Ctrl-B in the camera view).")
    return x0, height - high, x1, height - low


def camera_spec(camera, scene, depsgraph=None, *, width: int, height: int, world_from_camera: Matrix | None = None) -> wire.CameraSpec:
    """The camera object as it renders a frame of `width` x `height` pixels.

    Args:
        world_from_camera: instead of the object's own matrix (`RenderEngine.camera_model_matrix`, for stereo).
    Raises:
        NearError: `camera-missing`, `camera-panoramic`, `camera-not-rigid`.
    """
    if camera is None or camera.type != "CAMERA":
        raise NearError("camera-missing", "The scene has no camera.", "Add a camera and make it the scene's active one.")
    if depsgraph is None:
        import bpy

        depsgraph = bpy.context.evaluated_depsgraph_get()
    camera = camera.evaluated_get(depsgraph)
    if camera.data.type not in ("PERSP", "ORTHO"):
        raise NearError("camera-panoramic", f"The camera {camera.name!r} is panoramic; relightable assets are seen through a lens or in parallel.",
                        "Set its type to Perspective or Orthographic.")
    render = scene.render
    projection = camera.calc_matrix_camera(depsgraph, x=width, y=height, scale_x=render.pixel_aspect_x, scale_y=render.pixel_aspect_y)
    return _spec(_cam_from_world(world_from_camera or camera.matrix_world, camera.name), projection, width, height,
                 camera.data.clip_start, camera.data.clip_end, camera.data.type == "PERSP")


def view_camera_spec(region, region_data, scale: float = 1.0) -> ViewCamera:
    """The camera of a 3D viewport's region, with `scale` times its pixels.

    Raises:
        NearError: `camera-not-rigid` (a camera with mirrored axes is looked through).
    """
    width, height = max(1, round(region.width * scale)), max(1, round(region.height * scale))
    P, view = region_data.window_matrix, region_data.view_matrix
    cam_from_world = _cam_from_world(view.inverted(), "of the view")
    if region_data.is_perspective:
        near, far = P[2][3] / (P[2][2] - 1), P[2][3] / (P[2][2] + 1)
        return ViewCamera(_spec(cam_from_world, P, width, height, near, far, True), 0.0)
    near, far = (P[2][3] + 1) / P[2][2], (P[2][3] - 1) / P[2][2]
    back = max(0.0, NEAREST_M - near)
    cam_from_world = Matrix.Translation((0, 0, back)) @ cam_from_world
    return ViewCamera(_spec(cam_from_world, P, width, height, near + back, far + back, False), back)


def _cam_from_world(world_from_camera: Matrix, name: str) -> Matrix:
    """OpenCV camera from world; like Blender, ignores the lengths of the axes."""
    m = world_from_camera.copy()
    for column in range(3):
        axis = m.col[column].xyz.normalized()
        m.col[column] = (*axis, 0.0)
    rotation = m.to_3x3()
    gram = rotation.transposed() @ rotation
    off = max(abs(gram[i][j] - (i == j)) for i in range(3) for j in range(3))
    if off > RIGID_TOLERANCE or rotation.determinant() < 0:
        raise NearError("camera-not-rigid", f"The camera {name} is sheared or mirrored by its scale or its parents'.",
                        "Apply the scale of the camera and of its parents (Ctrl-A); it must be positive.")
    # The transpose is the inverse, and more exactly so than a numeric one.
    turn = rotation.transposed()
    cam_from_world = turn.to_4x4()
    cam_from_world.translation = -(turn @ m.translation)
    return CV_FROM_BLENDER @ cam_from_world


def _spec(cam_from_world: Matrix, P: Matrix, width: int, height: int, near: float, far: float, perspective: bool) -> wire.CameraSpec:
    """K from an OpenGL projection matrix: x_ndc = (P00 X + P02 Z) / -Z, or P00 X + P03; rows of pixels run down."""
    shift_x, shift_y = (-P[0][2], P[1][2]) if perspective else (P[0][3], -P[1][3])
    K = (P[0][0] * width / 2, 0.0, (1 + shift_x) * width / 2, 0.0, P[1][1] * height / 2, (1 + shift_y) * height / 2, 0.0, 0.0, 1.0)
    numbers = tuple(float(v) for row in cam_from_world for v in row)
    return wire.CameraSpec(numbers, K, width, height, near, far, "perspective" if perspective else "orthographic")
