"""Splats and textured meshes show what the renderer shows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from near.colour import agx_srgb
from near.errors import NearError
from near.export import export_asset
from near.export.splats import splat_basis
from near.export.textured import texel_surface, triangle_uvs
from near.geometry.cameras import orbit_camera
from near.lighting import environment_from_array
from near.models.anchors import front_facing, view_directions
from near.pipeline.compact_assets import encode_mesh
from near.pipeline.engine import Engine
from near.pipeline.types import no_progress

SAMPLES = Path(__file__).resolve().parents[1] / "backend" / "near" / "samples"


@pytest.fixture(scope="module")
def engine():
    return Engine()


@pytest.fixture(scope="module")
def asset(engine):
    from near.geometry.mesh import load_mesh

    return encode_mesh(engine._compact(), load_mesh(SAMPLES / "teapot.glb"), seed=0, samples=6000, progress=no_progress, cancelled=None)


@pytest.fixture(scope="module")
def light():
    rows = np.full((16, 32, 3), 0.4, np.float32)
    rows[3:6, 4:8] = (8, 6, 4)
    return environment_from_array(rows)


def read_ply(data: bytes) -> dict[str, np.ndarray]:
    head, _, body = data.partition(b"end_header\n")
    names = [line.split()[-1].decode() for line in head.split(b"\n") if line.startswith(b"property")]
    table = np.frombuffer(body, "<f4").reshape(-1, len(names))
    return dict(zip(names, table.T))


def test_splats_have_the_colours_that_the_renderer_sees(engine, asset, light):
    splats = read_ply(export_asset(asset, "ply", light=light, engine=engine))
    state = engine.compact_renderer().discs(asset)
    assert len(splats["x"]) == len(state.cloud) and {"f_rest_23", "opacity", "scale_2", "rot_3"} <= set(splats)
    assert np.allclose(np.exp(splats["scale_0"]), state.gaussians.scales[:, 0]) and np.isfinite(np.stack(list(splats.values()))).all()
    coefficients = np.stack([np.stack([splats[f"f_dc_{c}"], *(splats[f"f_rest_{8 * c + k}"] for k in range(8))], -1) for c in range(3)], -1)
    for yaw, pitch in ((0.3, 0.2), (2.5, -0.4)):                       # views that were not fitted
        camera = orbit_camera(yaw, pitch, 2.5, 0.6, 32, 32)
        seen = front_facing(state.cloud, camera)
        basis = splat_basis(-view_directions(state.cloud.points, camera)).numpy()
        shown = np.einsum("mk,mkc->mc", basis, coefficients) + 0.5
        with torch.inference_mode():
            wanted = agx_srgb(engine.compact_renderer().radiance(asset, light, camera).clamp_min(0)).numpy()
        error = np.abs(shown - wanted)[seen]
        # A lamp twenty times as bright as the room on a glossy pot: nine harmonics blur its highlight.
        assert error.mean() < 0.06 and np.median(error) < 0.04 and np.abs(wanted - 0.5)[seen].mean() > 0.1, (error.mean(), np.median(error))


def test_glb_textures_are_the_materials_of_the_nearest_discs(engine, asset):
    import trimesh

    data = export_asset(asset, "glb", engine=engine)
    mesh = trimesh.load(io.BytesIO(data), file_type="glb", force="mesh")
    back = np.stack([mesh.vertices[:, 0], -mesh.vertices[:, 2], mesh.vertices[:, 1]], -1)
    assert np.allclose(back.min(0), asset.proxy_vertices.numpy().min(0), atol=1e-5) and len(mesh.faces) == len(asset.proxy_faces)
    base = np.asarray(mesh.visual.material.baseColorTexture.convert("RGB"), np.float32) / 255
    state = engine.compact_renderer().discs(asset)
    chosen = np.random.default_rng(0).integers(0, len(mesh.faces), 300)
    uv = mesh.visual.uv[mesh.faces[chosen]].mean(1)
    texel = base[((1 - uv[:, 1]) * base.shape[0]).astype(int), (uv[:, 0] * base.shape[1]).astype(int)]
    centre = back[mesh.faces[chosen]].mean(1)
    near = np.linalg.norm(state.cloud.points.numpy()[None] - centre[:, None], axis=-1).argsort(1)[:, :4]
    wanted = state.material[:, :3].numpy()[near].mean(1) ** (1 / 2.2)
    assert np.median(np.abs(texel - wanted)) < 0.05


def test_texels_lie_on_their_triangles():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1.0]])
    faces = np.array([[0, 1, 2], [1, 3, 2], [0, 2, 3]])
    uvs = triangle_uvs(3, 64)
    pixels, points, normals = texel_surface(vertices, faces, uvs, 64)
    assert len(np.unique(pixels, axis=0)) == len(pixels) and pixels.min() >= 0 and pixels.max() < 64
    for face, corners in enumerate(uvs):
        y, x = np.floor(corners.mean(0)[::-1]).astype(int)
        row = np.nonzero((pixels == (y, x)).all(1))[0][0]
        assert np.linalg.norm(points[row] - vertices[faces[face]].mean(0)) < 0.1


def test_refusals(engine, asset, light):
    with pytest.raises(NearError, match="no export format"):
        export_asset(asset, "fbx", engine=engine)
    with pytest.raises(NearError, match="cancelled"):
        export_asset(asset, "ply", light=light, engine=engine, cancelled=lambda: True)


def test_glb_on_the_users_uvs(engine, asset, tmp_path):
    """A mesh of the user's that lies on the asset: its UVs stay, each texel has the material of the surface it is on."""
    from dataclasses import replace

    import trimesh
    from scipy.spatial import cKDTree

    from near.colour import srgb_encode
    from near.export.onto import in_the_files_space, texels
    from near.geometry.mesh import load_mesh

    sphere = trimesh.creation.icosphere(subdivisions=4, radius=0.3)
    uv = 0.5 + 0.45 * sphere.vertices[:, :2] / 0.3                                                             # the upper half, from above
    upper = (sphere.vertices[sphere.faces][..., 2] > 0).all(-1)
    user = trimesh.Trimesh(sphere.vertices * (0.4, 0.4, 0.3) + (0.02, 0.01, 0.05), sphere.faces[upper], process=False, visual=trimesh.visual.TextureVisuals(uv=uv))
    turned = user.copy()
    turned.vertices = np.stack([user.vertices[:, 0], user.vertices[:, 2], -user.vertices[:, 1]], -1)          # glTF is Y-up
    (tmp_path / "user.glb").write_bytes(turned.export(file_type="glb"))
    onto = load_mesh(tmp_path / "user.glb")
    vertices, normals, faces, uvs = in_the_files_space(onto)
    assert np.allclose(np.sort(vertices, 0)[[0, -1]], np.sort(user.vertices[np.unique(user.faces)], 0)[[0, -1]], atol=1e-5), "as it lay in the file"
    pixels, points, sides = texels(vertices, normals, faces, uvs, 128)
    assert len(pixels) > 2000 and np.allclose(np.linalg.norm(sides, axis=-1), 1)
    again = np.stack([(points[:, 0] - 0.02) / 0.4, (points[:, 1] - 0.01) / 0.4], -1) / 0.3
    expected = np.stack([0.5 - 0.45 * again[:, 1], 0.5 + 0.45 * again[:, 0]], -1) * 128 - 0.5                   # (y down, x)
    assert np.abs(expected - pixels).max() < 0.6, "a texel lies where its UV says"

    data = export_asset(asset, "glb", engine=engine, onto=onto)
    made = trimesh.load(io.BytesIO(data), file_type="glb", force="mesh")
    assert len(made.faces) == len(faces) and np.allclose(np.sort(made.visual.uv, 0), np.sort(uvs * (1, -1) + (0, 1), 0), atol=1e-5)
    state = engine.compact_renderer().discs(asset)
    texture = np.asarray(made.visual.material.baseColorTexture)[..., :3] / 255
    seen, where, _ = texels(vertices, normals, faces, uvs, texture.shape[0])
    chosen = np.random.default_rng(0).choice(len(seen), 500)
    nearest = state.material.numpy()[cKDTree(state.cloud.points.numpy()).query(where[chosen])[1], :3]
    assert np.abs(texture[tuple(seen[chosen].T)] - srgb_encode(torch.from_numpy(nearest)).numpy()).mean() < 0.05

    for bad, code in ((replace(onto, uvs=()), "export-no-uvs"), (replace(onto, uvs=(onto.uvs[0] * 3,)), "export-uvs-outside")):
        with pytest.raises(NearError) as caught:
            export_asset(asset, "glb", engine=engine, onto=bad)
        assert caught.value.code == code
