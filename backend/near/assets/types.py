"""The relightable asset as plain data (DESIGN section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from near.errors import NearError

MAX_RESOLUTION = 256  # coords are one byte each
MAX_VISIBILITY = 64  # spherical-harmonic coefficients an anchor may carry


def _invalid(what: str) -> NearError:
    return NearError("asset-invalid", f"The asset is not consistent: {what}.", "Create it again from the photo or the mesh.")


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        raise _invalid(f"{name} is {getattr(tensor, 'dtype', type(tensor).__name__)}, expected {dtype}")
    if tensor.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, tensor.shape)):
        wanted = "[" + ", ".join("?" if s is None else str(s) for s in shape) + "]"
        raise _invalid(f"{name} has shape {list(tensor.shape)}, expected {wanted}")


@dataclass(frozen=True)
class Anchors:
    """Surface discs of an asset, quantised; they follow each other in the order of the asset's ``coords``.

    counts: int32 [L], discs per voxel. offsets: uint8 [M, 3], position inside the voxel, (q + 0.5) / 256 of its side.
    normals, disc_normals: int8 [M, 3], shading and geometric normal times 127, asset space. radii: float16 [M], standard
    deviation in asset units. detail: int8 [M, 5], residual of base colour, roughness, metallic. visibility: int8 [M, K],
    spherical-harmonic coefficients.

    Raises:
        NearError: ``asset-invalid`` when dtypes, shapes or counts disagree.
    """

    counts: Tensor
    offsets: Tensor
    normals: Tensor
    disc_normals: Tensor
    radii: Tensor
    detail: Tensor
    visibility: Tensor

    def __post_init__(self) -> None:
        _expect("anchors.offsets", self.offsets, torch.uint8, (None, 3))
        count = len(self.offsets)
        _expect("anchors.counts", self.counts, torch.int32, (None,))
        _expect("anchors.normals", self.normals, torch.int8, (count, 3))
        _expect("anchors.disc_normals", self.disc_normals, torch.int8, (count, 3))
        _expect("anchors.radii", self.radii, torch.float16, (count,))
        _expect("anchors.detail", self.detail, torch.int8, (count, 5))
        _expect("anchors.visibility", self.visibility, torch.int8, (count, None))
        if self.visibility.shape[1] > MAX_VISIBILITY:
            raise _invalid(f"anchors.visibility has {self.visibility.shape[1]} coefficients, at most {MAX_VISIBILITY} fit")
        if len(self.counts) and int(self.counts.min()) < 0:
            raise _invalid("a voxel has a negative number of anchors")
        if int(self.counts.sum(dtype=torch.int64)) != count:
            raise _invalid(f"the voxels name {int(self.counts.sum(dtype=torch.int64))} anchors, {count} are there")
        if not bool(torch.isfinite(self.radii).all()) or bool((self.radii < 0).any()):
            raise _invalid("an anchor's radius is negative or not finite")

    def __len__(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True)
class Asset:
    """A relightable neural asset.

    coords: uint8 [L, 3] occupied voxels of a grid of ``resolution`` per side. feats: float16 [L, C], the (lighting
    homogenised) SLAT. anchors: surface discs (compact pack). color_feats, brm_feats: float16 [L, C'] or None (published
    example files; the compact pack keeps the shaded SLAT in ``color_feats``). proxy_vertices: float32 [V, 3] in asset
    space and proxy_faces: int32 [F, 3], a light mesh for selecting, shadows and holdouts. meta: JSON data (pack id and
    sha256, photo and mesh sha256, seed, provenance, licence).

    Raises:
        NearError: ``asset-invalid`` when the parts disagree.
    """

    coords: Tensor
    feats: Tensor
    resolution: int
    anchors: Anchors | None = None
    color_feats: Tensor | None = None
    brm_feats: Tensor | None = None
    proxy_vertices: Tensor | None = None
    proxy_faces: Tensor | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.resolution <= MAX_RESOLUTION:
            raise _invalid(f"resolution is {self.resolution}, expected 1 to {MAX_RESOLUTION}")
        _expect("coords", self.coords, torch.uint8, (None, 3))
        count = len(self.coords)
        if count == 0:
            raise NearError("asset-empty", "The asset has no voxels.", "Create it again from a photo or mesh that shows something.")
        if int(self.coords.max()) >= self.resolution:
            raise _invalid(f"a voxel lies at {int(self.coords.max())}, outside the grid of {self.resolution}")
        for name in ("feats", "color_feats", "brm_feats"):
            value = getattr(self, name)
            if value is None and name != "feats":
                continue
            _expect(name, value, torch.float16, (count, None))
            if not bool(torch.isfinite(value).all()):
                raise _invalid(f"{name} holds a value that is not finite")
        if self.anchors is not None and len(self.anchors.counts) != count:
            raise _invalid(f"{len(self.anchors.counts)} anchor counts for {count} voxels")
        self._check_proxy()

    def _check_proxy(self) -> None:
        if (self.proxy_vertices is None) != (self.proxy_faces is None):
            raise _invalid("the proxy mesh needs both vertices and faces")
        if self.proxy_vertices is None:
            return
        _expect("proxy_vertices", self.proxy_vertices, torch.float32, (None, 3))
        _expect("proxy_faces", self.proxy_faces, torch.int32, (None, 3))
        if not bool(torch.isfinite(self.proxy_vertices).all()):
            raise _invalid("a vertex of the proxy mesh is not finite")
        if self.proxy_faces.numel() and (int(self.proxy_faces.min()) < 0 or int(self.proxy_faces.max()) >= len(self.proxy_vertices)):
            raise _invalid("a face of the proxy mesh names a vertex that does not exist")

    def __len__(self) -> int:
        return len(self.coords)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the name they have in the file (``anchors.normals`` ...)."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        if self.anchors is not None:
            own |= {f"anchors.{f.name}": getattr(self.anchors, f.name) for f in fields(self.anchors)}
        return own
