"""Evenly spread surface samples of a mesh with their material (ANALYTIC.md section 5: anchors come from the surface)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from near.errors import NearError
from near.geometry.elimination import eliminate_samples
from near.geometry.mesh import BLEND, MASK, Material, PbrMesh
from near.geometry.neighbours import nearest
from near.geometry.normals import corner_tangents, face_normals
from near.geometry.textures import MipPyramid, TextureSlot

OVERSAMPLING = 4  # candidates drawn per sample kept
MAX_SAMPLES = 2_000_000
SAME_SKIN = 0.5  # candidates whose normals are within 60 degrees share a sample's footprint


@dataclass(frozen=True)
class SurfaceSamples:
    """Points on a surface, each standing for ``area / N`` of it; float32, asset space.

    points [N, 3]; normals [N, 3] shading normals (smooth, normal map applied); geometric_normals [N, 3]; base_lin709 [N, 3]
    linear Rec.709; roughness [N]; metallic [N]; area: of the whole surface, square asset units.
    """

    points: Tensor
    normals: Tensor
    geometric_normals: Tensor
    base_lin709: Tensor
    roughness: Tensor
    metallic: Tensor
    area: float

    def __len__(self) -> int:
        return len(self.points)


@dataclass
class _Candidates:
    """Points before thinning: face and barycentric coordinates of each."""

    face: np.ndarray
    weights: np.ndarray
    points: np.ndarray
    geometric: np.ndarray
    footprint: float
    frames: dict = field(default_factory=dict)  # tangent frames of the whole mesh by UV set


def sample_surface(mesh: PbrMesh, count: int, seed: int) -> SurfaceSamples:
    """``count`` samples, uniform in area and evenly spread; the same seed gives the same samples.

    Each sample's attributes are the mean over its own piece of the surface (the candidates nearest to it on the same
    skin), so textures finer than the samples are averaged, not aliased. Parts that alpha cuts away are left out.

    Raises:
        NearError: ``samples-invalid``, ``mesh-flat`` when the surface has no area, ``mesh-transparent`` when alpha hides all
            of it.
    """
    if not 1 <= count <= MAX_SAMPLES:
        raise NearError("samples-invalid", f"{count} surface samples were asked for.", f"Ask for 1 to {MAX_SAMPLES:,}.")
    vertices, faces = mesh.vertices.numpy(), mesh.faces.numpy()
    scaled = face_normals(vertices, faces)
    face_area = 0.5 * np.linalg.norm(scaled, axis=-1)
    area = float(face_area.sum())
    if not area > 1e-12:
        raise NearError("mesh-flat", "The mesh has no surface: all its triangles are degenerate.", "Choose a mesh with a surface.")
    candidates = _draw(mesh, face_area, scaled, max(count * OVERSAMPLING, 64), np.random.default_rng(seed))
    attributes, alpha = _attributes(mesh, candidates)
    seen = alpha > 0.0
    if not seen.all():
        if not seen.any():
            raise NearError("mesh-transparent", "The mesh's material makes all of it invisible.", "Check the alpha of its base colour.")
        area *= float(seen.mean())
        attributes, candidates.points, candidates.geometric = attributes[seen], candidates.points[seen], candidates.geometric[seen]
    kept = eliminate_samples(candidates.points, candidates.geometric, min(count, len(candidates.points)), area)
    mean = _footprint_mean(candidates, attributes, kept)
    normals = mean[:, :3] / np.maximum(np.linalg.norm(mean[:, :3], axis=-1, keepdims=True), 1e-12)
    lost = np.linalg.norm(mean[:, :3], axis=-1) < 1e-3
    normals[lost] = candidates.geometric[kept[lost]]

    def as_tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32))

    return SurfaceSamples(as_tensor(candidates.points[kept]), as_tensor(normals), as_tensor(candidates.geometric[kept]),
                          as_tensor(mean[:, 3:6].clip(0, None)), as_tensor(mean[:, 6].clip(0, 1)), as_tensor(mean[:, 7].clip(0, 1)), area)


def shade_points(mesh: PbrMesh, face: np.ndarray, weights: np.ndarray, footprint: float) -> np.ndarray:
    """Attributes at given points of the surface.

    Args: face int [N]; weights [N, 3] barycentric; footprint: area a point stands for, square asset units.
    Returns: float32 [N, 8]: shading normal, base colour (linear), roughness, metallic.
    """
    vertices, faces = mesh.vertices.numpy(), mesh.faces.numpy()
    scaled = face_normals(vertices, faces[face])
    geometric = scaled / np.maximum(np.linalg.norm(scaled, axis=-1, keepdims=True), 1e-30)
    points = np.einsum("nk,nkc->nc", weights, vertices[faces[face]])
    return _attributes(mesh, _Candidates(face, weights.astype(np.float32), points, geometric, footprint))[0]


def _draw(mesh: PbrMesh, face_area: np.ndarray, scaled: np.ndarray, count: int, rng: np.random.Generator) -> _Candidates:
    """Stratified along the running area, so every face gets its share to within one."""
    running = np.cumsum(face_area)
    at = (np.arange(count) + rng.random(count)) * (running[-1] / count)
    face = np.minimum(np.searchsorted(running, at, side="right"), len(face_area) - 1)
    root, v = np.sqrt(rng.random(count)), rng.random(count)
    weights = np.stack([1 - root, root * (1 - v), root * v], -1).astype(np.float32)
    points = np.einsum("nk,nkc->nc", weights, mesh.vertices.numpy()[mesh.faces.numpy()[face]])
    geometric = (scaled[face] / np.maximum(2 * face_area[face, None], 1e-30)).astype(np.float32)
    return _Candidates(face, weights, points, geometric, float(running[-1]) / count)


def _attributes(mesh: PbrMesh, c: _Candidates) -> tuple[np.ndarray, np.ndarray]:
    """[N, 8] normal, base colour, roughness, metallic, and alpha after the material's test [N]."""
    faces = mesh.faces.numpy()
    corner = faces[c.face]
    normals = np.einsum("nk,nkc->nc", c.weights, mesh.normals.numpy()[corner])
    out = np.empty((len(c.face), 8), np.float32)
    alpha = np.ones(len(c.face), np.float32)
    tint = np.ones((len(c.face), 4), np.float32)
    if mesh.colors is not None:
        tint = np.einsum("nk,nkc->nc", c.weights, mesh.colors.numpy()[corner])
    material_of = np.zeros(len(c.face), np.int64) if mesh.face_material is None else mesh.face_material.numpy()[c.face]
    pyramids: dict = {}
    for index, material in enumerate(mesh.materials):
        rows = np.nonzero(material_of == index)[0]
        if not len(rows):
            continue
        look = _Lookup(mesh, c, rows, pyramids)
        base = look.fetch(material.base_map, srgb=True)
        rgba = np.array(material.base_factor, np.float32) * tint[rows] * (1 if base is None else _rgba(base))
        out[rows, 3:6] = rgba[:, :3]
        out[rows, 6], out[rows, 7] = _roughness(material, look), material.metallic * look.channel(material.metallic_map)
        alpha[rows] = _alpha(material, rgba[:, 3])
        out[rows, :3] = _shading_normals(mesh, material, look, c, rows, normals[rows])
    # Cycles orients shading by the winding; a vertex normal that disagrees with it is turned round.
    out[np.einsum("nc,nc->n", out[:, :3], c.geometric) < -0.3, :3] *= -1
    return out, alpha


def _roughness(material: Material, look: _Lookup) -> np.ndarray:
    if material.glossiness_map is not None:
        return 1 - (1 - material.roughness) * look.channel(material.glossiness_map)
    return material.roughness * look.channel(material.roughness_map)


def _alpha(material: Material, alpha: np.ndarray) -> np.ndarray:
    if material.alpha_mode == MASK:
        return (alpha >= material.alpha_cutoff).astype(np.float32)
    if material.alpha_mode == BLEND:
        return (alpha >= 0.5).astype(np.float32)
    return np.ones_like(alpha)


def _rgba(texels: np.ndarray) -> np.ndarray:
    channels = texels.shape[1]
    rgb = texels[:, :3] if channels >= 3 else np.repeat(texels[:, :1], 3, 1)
    alpha = texels[:, -1:] if channels in (2, 4) else np.ones_like(texels[:, :1])
    return np.concatenate([rgb, alpha], 1)


def _shading_normals(mesh: PbrMesh, material: Material, look: _Lookup, c: _Candidates, rows: np.ndarray, smooth: np.ndarray) -> np.ndarray:
    """Cycles' normal map node: the interpolated normal and tangent, not normalised before they are combined."""
    length = np.linalg.norm(smooth, axis=-1, keepdims=True)
    unit = np.where(length > 1e-6, smooth / np.maximum(length, 1e-12), c.geometric[rows])
    if material.normal_map is None:
        return unit
    texels = look.fetch(material.normal_map, srgb=False)
    if texels is None or texels.shape[1] < 3:
        return unit
    vector = 2 * texels[:, :3] - 1
    vector[:, :2] *= material.normal_scale
    tangent, sign = look.tangents(material.normal_map.texcoord)
    # A degenerate UV patch has no tangent; the smooth normal stays.
    framed = np.linalg.norm(tangent, axis=-1) > 1e-6
    bitangent = sign[:, None] * np.cross(smooth, tangent)
    mapped = vector[:, :1] * tangent + vector[:, 1:2] * bitangent + vector[:, 2:3] * smooth
    size = np.linalg.norm(mapped, axis=-1, keepdims=True)
    return np.where(framed[:, None] & (size > 1e-6), mapped / np.maximum(size, 1e-12), unit)


class _Lookup:
    """Texture and tangent access for the candidates of one material."""

    def __init__(self, mesh: PbrMesh, c: _Candidates, rows: np.ndarray, pyramids: dict) -> None:
        self.mesh, self.c, self.rows, self.pyramids = mesh, c, rows, pyramids
        self.weights = c.weights[rows]
        self.uv_of_set: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def fetch(self, slot: TextureSlot | None, srgb: bool) -> np.ndarray | None:
        """[n, C] filtered over the footprint; None without a texture or its UV set."""
        if slot is None or slot.texcoord >= len(self.mesh.uvs):
            return None
        key = (id(slot.texture), srgb)
        if key not in self.pyramids:
            self.pyramids[key] = MipPyramid(slot.texture, srgb)
        uv, density = self._coordinates(slot.texcoord)
        height, width = slot.texture.pixels.shape[:2]
        texels = density * (self.c.footprint * abs(np.linalg.det(slot.uv_transform[:, :2])) * (height * width))
        return self.pyramids[key].fetch(uv @ slot.uv_transform[:, :2].T + slot.uv_transform[:, 2], texels)

    def channel(self, pair: tuple[TextureSlot, int] | None) -> np.ndarray | float:
        """One channel, or 1 without a texture; a grey image serves for any channel."""
        values = self.fetch(pair[0], srgb=False) if pair is not None else None
        return 1.0 if values is None else values[:, min(pair[1], 0 if values.shape[1] < 3 else values.shape[1] - 1)]

    def _coordinates(self, texcoord: int) -> tuple[np.ndarray, np.ndarray]:
        """UVs [n, 2] of the candidates, and UV area per surface area there [n]."""
        if texcoord not in self.uv_of_set:
            own, index = np.unique(self.c.face[self.rows], return_inverse=True)
            corner = self.mesh.faces.numpy()[own]
            p, t = self.mesh.vertices.numpy()[corner].astype(np.float64), self.mesh.uvs[texcoord].numpy()[corner].astype(np.float64)
            area = np.linalg.norm(np.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]), axis=-1)
            d1, d2 = t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]
            density = np.abs(d1[:, 0] * d2[:, 1] - d1[:, 1] * d2[:, 0]) / np.maximum(area, 1e-30)
            self.uv_of_set[texcoord] = np.einsum("nk,nkc->nc", self.weights, t[index]), density[index]
        return self.uv_of_set[texcoord]

    def tangents(self, texcoord: int) -> tuple[np.ndarray, np.ndarray]:
        """Interpolated tangents [n, 3] and bitangent signs [n] of the candidates' faces."""
        if texcoord not in self.c.frames:
            mesh = self.mesh
            self.c.frames[texcoord] = corner_tangents(mesh.vertices.numpy(), mesh.normals.numpy(), mesh.uvs[texcoord].numpy(), mesh.faces.numpy())
        frames = self.c.frames[texcoord][self.c.face[self.rows]]
        return np.einsum("nk,nkc->nc", self.weights, frames[..., :3]), frames[:, 0, 3]


def _footprint_mean(c: _Candidates, attributes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Mean over the candidates nearest to each kept sample that lie on its skin."""
    _, nearby = nearest(cKDTree(c.points[kept]), c.points, min(3, len(kept)))
    nearby = nearby.reshape(len(c.points), -1)
    owner = np.full(len(c.points), -1)
    for k in range(nearby.shape[1] - 1, -1, -1):
        same = np.einsum("nc,nc->n", c.geometric, c.geometric[kept][nearby[:, k]]) > SAME_SKIN
        owner[same] = nearby[same, k]
    owner[kept] = np.arange(len(kept))
    mine = owner >= 0
    total = np.stack([np.bincount(owner[mine], attributes[mine, k], len(kept)) for k in range(attributes.shape[1])], -1)
    return total / np.bincount(owner[mine], minlength=len(kept))[:, None]
