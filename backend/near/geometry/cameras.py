"""Cameras: OpenCV axes, intrinsics in pixels, perspective or orthographic (DESIGN section 4, NEAR-SPEC section 9)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from near.errors import NearError

PROJECTIONS = ("perspective", "orthographic")
MAX_SIDE = 16384
MAX_PIXELS = 64 * 2**20
RIGID_TOLERANCE = 1e-3  # of R^T R against the identity; float32 matrices that went through a scene file reach 1e-5
CV_FROM_BLENDER = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Camera:
    """A camera in world space (or asset space, see :meth:`moved`). Any frame shape, any principal point.

    Attributes:
        cam_from_world: float32 [4, 4], a rotation and a translation; camera axes x right, y down, z forward.
        K: float32 [3, 3] pixels, no skew; pixel (column i, row j) has its centre at (i + 0.5, j + 0.5). Perspective: (u, v) =
            (fx x / z + cx, fy y / z + cy). Orthographic: (fx x + cx, fy y + cy), fx and fy in pixels per metre.
        width, height: pixels.
        near, far: clipping planes, metres of camera z.
        projection: "perspective" or "orthographic".

    Raises:
        NearError: ``camera-size``, ``camera-not-finite``, ``camera-shape``, ``camera-intrinsics``, ``camera-not-rigid``,
            ``camera-clip``, ``camera-projection``.
    """

    cam_from_world: Tensor
    K: Tensor
    width: int
    height: int
    near: float = 0.01
    far: float = 1000.0
    projection: str = "perspective"

    def __post_init__(self) -> None:
        for name in ("cam_from_world", "K"):
            value = torch.as_tensor(getattr(self, name)).detach()
            object.__setattr__(self, name, value.to(device="cpu", dtype=torch.float32).contiguous())
        for name, kind in (("width", int), ("height", int), ("near", float), ("far", float)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        _check_camera(self)

    @property
    def position(self) -> Tensor:
        """Where the camera is, in world space: float32 [3]."""
        m = self.cam_from_world.double()
        return -(m[:3, :3].T @ m[:3, 3]).float()

    @property
    def forward(self) -> Tensor:
        """Unit viewing direction in world space: float32 [3]."""
        return self.cam_from_world[2, :3].clone()

    @property
    def world_from_cam(self) -> Tensor:
        """Inverse of ``cam_from_world``: float32 [4, 4]."""
        return torch.linalg.inv(self.cam_from_world.double()).float()

    def scaled(self, scale: float) -> Camera:
        """The same view with ``scale`` times the pixels per side; the size is rounded, K follows the rounded size.

        Raises:
            NearError: ``camera-size`` when the result has no pixel or too many.
        """
        return self.resized(round(self.width * scale), round(self.height * scale))

    def resized(self, width: int, height: int) -> Camera:
        """The same view on another grid of pixels; K follows.

        Raises:
            NearError: ``camera-size`` when the result has no pixel or too many.
        """
        K = self.K.clone()
        K[0] *= width / self.width
        K[1] *= height / self.height
        return replace(self, K=K, width=width, height=height)

    def moved(self, world_from_asset: Tensor) -> Camera:
        """This camera seen from the space of an asset placed by ``world_from_asset``.

        Args:
            world_from_asset: [4, 4] rotation, uniform positive scale, translation.
        Returns:
            A rigid camera whose unit of length is the asset's: it draws the asset where this camera draws it in the
            world. Depths (and near, far) are in asset units; times the scale they are metres.
        Raises:
            NearError: ``scale-not-uniform``.
        """
        rotation, translation, scale = split_similarity(world_from_asset)
        ours = self.cam_from_world.double()
        cam_from_asset = torch.eye(4, dtype=torch.float64)
        cam_from_asset[:3, :3] = ours[:3, :3] @ rotation
        cam_from_asset[:3, 3] = (ours[:3, :3] @ translation + ours[:3, 3]) / scale
        K = self.K.clone()
        if self.projection == "orthographic":
            K[:2, :2] *= scale
        return replace(self, cam_from_world=cam_from_asset, K=K, near=self.near / scale, far=self.far / scale)

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel positions and depths of world points.

        Args: points [N, 3]. Returns: float [N, 2] pixels (behind a perspective camera: meaningless), [N] camera z.
        """
        m, K = self.cam_from_world.to(points), self.K.to(points)
        p = points @ m[:3, :3].T + m[:3, 3]
        z = p[:, 2]
        xy = p[:, :2] / z[:, None] if self.projection == "perspective" else p[:, :2]
        return xy * K.diagonal()[:2] + K[:2, 2], z


def _check_camera(camera: Camera) -> None:
    size = f"{camera.width} x {camera.height}"
    if camera.width < 1 or camera.height < 1:
        raise NearError("camera-size", f"The frame is {size} pixels.", "Give it at least one pixel each way.")
    if max(camera.width, camera.height) > MAX_SIDE or camera.width * camera.height > MAX_PIXELS:
        raise NearError("camera-size", f"The frame is {size} pixels.",
                        f"Stay below {MAX_SIDE} pixels a side and {MAX_PIXELS // 2**20} megapixels; render larger frames in parts.")
    for name, shape in (("cam_from_world", (4, 4)), ("K", (3, 3))):
        value = getattr(camera, name)
        if tuple(value.shape) != shape:
            raise NearError("camera-shape", f"The camera's {name} has shape {tuple(value.shape)}.", f"It must be {shape}.")
        if not torch.isfinite(value).all():
            raise NearError("camera-not-finite", f"The camera's {name} holds numbers that are not finite.",
                            "Check the camera's transform and lens.")
    K = camera.K
    if not (K[0, 0] > 0 and K[1, 1] > 0):
        raise NearError("camera-intrinsics", f"The camera's focal lengths are {K[0, 0]:g} and {K[1, 1]:g} pixels.",
                        "Both must be positive: check lens, sensor and orthographic scale.")
    rest = K.clone()
    rest[0, 0] = rest[1, 1] = rest[0, 2] = rest[1, 2] = 0
    if not torch.equal(rest, torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 1]])):
        raise NearError("camera-intrinsics", "The camera's K has skew, or its last row is not (0, 0, 1).",
                        "Use K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]].")
    m = camera.cam_from_world.double()
    error = (m[:3, :3].T @ m[:3, :3] - torch.eye(3, dtype=torch.float64)).abs().max()
    if error > RIGID_TOLERANCE or torch.linalg.det(m[:3, :3]) < 0 or not torch.equal(m[3], m.new_tensor([0, 0, 0, 1])):
        raise NearError("camera-not-rigid", "The camera's transform scales, shears or mirrors.",
                        "A camera may only be rotated and moved: clear its scale and its parents' scale.")
    if camera.projection not in PROJECTIONS:
        raise NearError("camera-projection", f"The projection {camera.projection!r} is not supported.",
                        f"Use a camera that is {' or '.join(PROJECTIONS)}.")
    if not (math.isfinite(camera.near) and camera.far > camera.near) or (camera.projection == "perspective" and camera.near <= 0):
        raise NearError("camera-clip", f"The camera clips from {camera.near:g} to {camera.far:g} m.",
                        "The start must be above zero and below the end.")


def split_similarity(matrix: Tensor) -> tuple[Tensor, Tensor, float]:
    """Rotation float64 [3, 3], translation float64 [3] and uniform positive scale of a [4, 4] similarity.

    Raises:
        NearError: ``scale-not-uniform`` for anything else.
    """
    m = torch.as_tensor(matrix).detach().to(device="cpu", dtype=torch.float64)
    determinant = torch.linalg.det(m[:3, :3]) if torch.isfinite(m).all() else torch.tensor(0.0)
    if determinant > 0:
        scale = float(determinant) ** (1 / 3)
        rotation = m[:3, :3] / scale
        if (rotation.T @ rotation - torch.eye(3, dtype=torch.float64)).abs().max() <= RIGID_TOLERANCE:
            return rotation, m[:3, 3], scale
    raise NearError("scale-not-uniform", "An object's transform is not a rotation with a uniform positive scale.",
                    "Apply a uniform, positive scale to the object: relightable assets keep their proportions.")


def pinhole_intrinsics(fov_x_rad: float, width: int, height: int) -> Tensor:
    """K float32 [3, 3] of square pixels and a centred principal point; ``fov_x_rad`` spans the width."""
    if not 0 < fov_x_rad < math.pi:
        raise NearError("camera-intrinsics", f"The field of view is {math.degrees(fov_x_rad):g} degrees.",
                        "It must lie between 0 and 180 degrees.")
    f = 0.5 * width / math.tan(0.5 * fov_x_rad)
    return torch.tensor([[f, 0, 0.5 * width], [0, f, 0.5 * height], [0, 0, 1]], dtype=torch.float32)


def _look_at_origin(azimuth_rad: float, pitch_rad: float, radius: float) -> Tensor:
    """cam_from_world of a camera at radius * (cos azimuth cos pitch, sin azimuth cos pitch, sin pitch), up +Z.

    Written in closed form: straight above and below, where up and forward are parallel, it is the limit in pitch.
    """
    ca, sa, cp, sp = math.cos(azimuth_rad), math.sin(azimuth_rad), math.cos(pitch_rad), math.sin(pitch_rad)
    return torch.tensor([[-sa, ca, 0, 0], [ca * sp, sa * sp, -cp, 0], [-ca * cp, -sa * cp, -sp, radius], [0, 0, 0, 1]],
                        dtype=torch.float64)


def orbit_camera(yaw_rad: float, pitch_rad: float, radius: float, fov_x_rad: float, width: int, height: int, **clip) -> Camera:
    """Camera that looks at the origin from radius * (sin yaw cos pitch, -cos yaw cos pitch, sin pitch): the bench's convention,
    yaw 0 looks along +Y. ``clip``: near, far of :class:`Camera`."""
    return Camera(_look_at_origin(yaw_rad - math.pi / 2, pitch_rad, radius), pinhole_intrinsics(fov_x_rad, width, height),
                  width, height, **clip)


def trellis_yaw(yaw_rad: float) -> float:
    """Our yaw <-> the published one (its own inverse)."""
    return math.pi - yaw_rad


def published_orbit(yaw_rad: float, pitch_rad: float, radius: float = 2.0, fov_x_rad: float = math.radians(40), size: int = 512,
                    near: float = 1.0, far: float = 3.0) -> Camera:
    """Camera of the published code (spec section 9): position radius * (sin yaw cos pitch, cos yaw cos pitch, sin pitch)."""
    return orbit_camera(trellis_yaw(yaw_rad), pitch_rad, radius, fov_x_rad, size, size, near=near, far=far)


def published_spiral(count: int, **orbit) -> list[Camera]:
    """The published turntable: once around, both ends included, pitch 0.25 + 0.5 sin; ``orbit`` as :func:`published_orbit`."""
    turns = torch.linspace(0, 2 * math.pi, count, dtype=torch.float64).tolist()
    return [published_orbit(a, 0.25 + 0.5 * math.sin(a), **orbit) for a in turns]


def radical_inverse(index: int, base: int) -> float:
    """Van der Corput: the digits of ``index`` in ``base``, mirrored at the point."""
    value, scale = 0.0, 1.0 / base
    while index:
        index, digit = divmod(index, base)
        value, scale = value + digit * scale, scale / base
    return value


def sphere_hammersley(index: int, count: int) -> tuple[float, float]:
    """Published yaw and pitch in radians of point ``index`` of ``count`` well-spread directions (spec section 9)."""
    return 2 * math.pi * radical_inverse(index, 2), math.acos(1 - 2 * index / count) - math.pi / 2


def published_hammersley(count: int, **orbit) -> list[Camera]:
    """The published views for baking materials; ``orbit`` as :func:`published_orbit`."""
    return [published_orbit(*sphere_hammersley(i, count), **orbit) for i in range(count)]


def camera_from_blender(matrix_world: Tensor, K: Tensor, width: int, height: int, **rest) -> Camera:
    """Camera from Blender's camera-to-world matrix [4, 4] (x right, y up, -z forward) and K as in :class:`Camera`.

    Like Blender, ignores the lengths of the matrix's axes. ``rest``: near, far, projection.

    Raises:
        NearError: ``camera-not-rigid`` for a matrix that mirrors or shears.
    """
    m = torch.as_tensor(matrix_world).detach().to(device="cpu", dtype=torch.float64).clone()
    if torch.isfinite(m).all():
        m[:3, :3] = m[:3, :3] / m[:3, :3].norm(dim=0).clamp_min(1e-30)
        # Tested here because the inverse of a singular matrix would fail with a less useful message.
        if (m[:3, :3].T @ m[:3, :3] - torch.eye(3, dtype=torch.float64)).abs().max() <= RIGID_TOLERANCE:
            m = CV_FROM_BLENDER @ torch.linalg.inv(m)
        else:
            m[:3, :3] = 0
    return Camera(m, K, width, height, **rest)
