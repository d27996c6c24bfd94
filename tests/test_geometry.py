"""Meshes, surface samples, voxels."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from mesh_files import GlbWriter, icosphere, quad, rasterise
from PIL import Image
from scipy.spatial import cKDTree

from near.errors import NearError
from near.geometry.cameras import camera_from_blender
from near.geometry.elimination import eliminate_samples
from near.geometry.mesh import Material, RawMesh, load_mesh, to_asset_space
from near.geometry.normals import corner_tangents
from near.geometry.surface import sample_surface, shade_points
from near.geometry.textures import LINEAR, WRAP_CLAMP, WRAP_MIRROR, WRAP_REPEAT, MipPyramid, Texture, TextureSlot
from near.geometry.voxels import voxelize


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def code_of(action, *args, **kwargs) -> str:
    with pytest.raises(NearError) as info:
        action(*args, **kwargs)
    assert info.value.what and info.value.remedy
    return info.value.code


# ---------------------------------------------------------------------------------------------------------- reading


def test_asset_space_of_a_glb(tmp_path):
    writer = GlbWriter()
    vertices, faces = icosphere(2)
    red, rough = writer.material(pbrMetallicRoughness={"baseColorFactor": [1, 0, 0, 1], "metallicFactor": 0.25}), writer.material(
        pbrMetallicRoughness={"roughnessFactor": 0.5, "metallicFactor": 0})
    parent = writer.add(writer.primitive(vertices, faces, vertices, material=red), translation=[3, 0, 0], scale=[2, 2, 2])
    child = writer.add(writer.primitive(vertices, faces, vertices, material=rough), root=False, translation=[0, 2, 0])
    writer.json["nodes"][parent]["children"] = [child]
    mesh = load_mesh(writer.write(tmp_path / "two.glb"))
    # Spheres of radius 2 at y = 0 and y = 4 of the file: 8 long along Z here.
    assert torch.allclose(mesh.vertices.amax(0) - mesh.vertices.amin(0), torch.tensor([0.5, 0.5, 1.0]), atol=2e-2)
    assert torch.allclose(mesh.vertices.amax(0) + mesh.vertices.amin(0), torch.zeros(3), atol=1e-6)
    back = torch.cat([mesh.vertices.double(), torch.ones(len(mesh.vertices), 1)], 1) @ mesh.source_from_asset.T
    assert torch.allclose(back[:, :3].mean(0), torch.tensor([3.0, 0, 2], dtype=torch.float64), atol=1e-4)
    by_z = shade_points(mesh, np.array([0, len(faces)]), np.full((2, 3), 1 / 3), 1e-6)
    assert np.allclose(by_z[:, 3:], [[1, 0, 0, 1, 0.25], [1, 1, 1, 0.5, 0]], atol=1e-6)
    assert len(mesh.sha256) == 64


def test_mirrored_node_keeps_outward_winding(tmp_path):
    writer = GlbWriter()
    vertices, faces = icosphere(2)
    writer.add(writer.primitive(vertices, faces, vertices), scale=[-1, 1, 1])
    samples = sample_surface(load_mesh(writer.write(tmp_path / "m.glb")), 300, 0)
    for normals in (samples.normals, samples.geometric_normals):
        assert bool(((normals * samples.points).sum(-1) > 0.4).all())


def test_quantised_positions_and_texture_transform(tmp_path):
    writer = GlbWriter()
    vertices, faces, uv = quad()
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[1, 0], pixels[1, 1] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    texture = writer.texture(png(pixels), {"wrapS": 33071, "wrapT": 33071, "magFilter": 9728})
    info = {"index": texture, "extensions": {"KHR_texture_transform": {"offset": [0.25, 0.0], "scale": [0.5, 0.5]}}}
    material = writer.material(pbrMetallicRoughness={"baseColorTexture": info})
    position = writer.accessor(np.round(vertices * 254).astype(np.int8), normalized=True)
    normal = writer.accessor(np.tile(np.array([0, 0, 127], np.int8), (4, 1)), normalized=True)
    coordinates = writer.accessor(np.round(uv * 65535).astype(np.uint16), normalized=True)
    writer.add(writer.primitive(position, faces, normal, coordinates, material))
    mesh = load_mesh(writer.write(tmp_path / "q.glb"))
    assert torch.allclose(mesh.normals, torch.tensor([0.0, -1.0, 0.0]).expand(4, 3), atol=1e-6)
    # The file corner (0, 0) has uv (0, 1) -> (0.25, 0.5), between red and blue; (1, 1) has (1, 0) -> (0.75, 0), on green.
    corner = shade_points(mesh, np.array([0, 0]), np.array([[1.0, 0, 0], [0, 0, 1.0]]), 1e-9)[:, 3:6]
    assert np.allclose(corner, [[0.5, 0, 0.5], [0, 1, 0]], atol=1e-2)


def test_missing_normals_are_flat_in_gltf_and_by_angle_in_ply(tmp_path):
    import trimesh

    box = trimesh.creation.box()
    writer = GlbWriter()
    sphere, sphere_faces = icosphere(3)
    writer.add(writer.primitive(sphere, sphere_faces))
    flat = load_mesh(writer.write(tmp_path / "s.glb"))
    assert len(flat.vertices) == 3 * len(sphere_faces)
    box.export(tmp_path / "box.ply")
    sharp = sample_surface(load_mesh(tmp_path / "box.ply"), 200, 0)
    assert bool(((sharp.normals.abs() > 0.999).sum(-1) == 1).all())
    trimesh.Trimesh(sphere, sphere_faces, process=False).export(tmp_path / "sphere.ply")
    smooth = sample_surface(load_mesh(tmp_path / "sphere.ply"), 4000, 0)
    assert float((smooth.normals * torch.nn.functional.normalize(smooth.points, dim=-1)).sum(-1).min()) > 0.998


def test_vertex_colours_multiply_and_ply_colours_are_srgb(tmp_path):
    import trimesh

    vertices, faces, _ = quad()
    writer = GlbWriter()
    colors = writer.accessor(np.tile(np.array([0.5, 0.25, 1, 1], np.float32), (4, 1)))
    writer.add(writer.primitive(vertices, faces, extra={"COLOR_0": colors}, material=writer.material(
        pbrMetallicRoughness={"baseColorFactor": [0.5, 1, 1, 1]})))
    samples = sample_surface(load_mesh(writer.write(tmp_path / "c.glb")), 10, 0)
    assert torch.allclose(samples.base_lin709, torch.tensor([0.25, 0.25, 1.0]).expand(10, 3), atol=1e-6)
    mesh = trimesh.Trimesh(vertices, faces, vertex_colors=np.tile(np.array([188, 0, 255, 255], np.uint8), (4, 1)), process=False)
    mesh.export(tmp_path / "c.ply")
    samples = sample_surface(load_mesh(tmp_path / "c.ply"), 10, 0)
    assert torch.allclose(samples.base_lin709, torch.tensor([0.503, 0.0, 1.0]).expand(10, 3), atol=2e-3)


OBJ = """mtllib m.mtl
v -1 0 1 \nv 1 0 1\nv 1 0 -1\nv -1 0 -1\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nvn 0 1 0
usemtl paint
f {polygon}
"""
MTL = "newmtl paint\nKd 0.2 0.4 0.6\nPr 0.3\nPm 0.75\nmap_Kd -s 1 1 1 sub\\paint.png\n"


@pytest.mark.parametrize("polygon", ["1/1/1 2/2/1 3/3/1 4/4/1", "-4/-4/-1 -3/-3/-1 -2/-2/-1 -1/-1/-1"])
def test_obj_with_pbr_material(tmp_path, polygon):
    (tmp_path / "m.obj").write_text(OBJ.format(polygon=polygon))
    (tmp_path / "m.mtl").write_text(MTL)
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2, :2] = 255  # top left of the image: u < 0.5, v > 0.5 of OBJ: x < 0, file z < 0, here y > 0
    (tmp_path / "paint.png").write_bytes(png(pixels))
    samples = sample_surface(load_mesh(tmp_path / "m.obj"), 2000, 0)
    assert torch.allclose(samples.normals, torch.tensor([0.0, 0, 1]).expand(2000, 3), atol=1e-5)
    assert torch.allclose(samples.roughness, torch.tensor(0.3)) and torch.allclose(samples.metallic, torch.tensor(0.75))
    inner = (samples.points[:, :2].abs() > 0.15).all(-1) & (samples.points[:, :2].abs() < 0.35).all(-1)
    white = (samples.points[:, 0] < 0) & (samples.points[:, 1] > 0)
    assert bool(((samples.base_lin709[:, 0] > 0.9) == white)[inner].all())


def test_obj_without_library_and_with_other_statements(tmp_path):
    (tmp_path / "a.obj").write_text("mtllib gone.mtl\no x\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 1 1 0\ns off\nf 1 2 3 # tail\nf 2//  4 3\nl 1 2\n".replace("2//  4", "2 4"))
    assert len(load_mesh(tmp_path / "a.obj").faces) == 2
    (tmp_path / "b.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n")
    assert code_of(load_mesh, tmp_path / "b.obj") == "mesh-unreadable"


def test_strip_fan_skin_and_morph(tmp_path):
    writer = GlbWriter()
    square = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)], np.float32)
    writer.add(writer.primitive(square, None, mode=5))
    writer.add(writer.primitive(square[[0, 1, 3, 2]], None, mode=6))
    mesh = load_mesh(writer.write(tmp_path / "strip.glb"))
    assert len(mesh.faces) == 4
    assert bool((sample_surface(mesh, 50, 0).geometric_normals[:, 1] < -0.99).all())
    writer = GlbWriter()
    joints = writer.accessor(np.zeros((4, 4), np.uint8))
    weights = writer.accessor(np.tile(np.array([1, 0, 0, 0], np.float32), (4, 1)))
    body = writer.primitive(square, None, mode=5, extra={"JOINTS_0": joints, "WEIGHTS_0": weights})
    body["targets"] = [{"POSITION": writer.accessor(np.array([(0, 0, 0), (1, 0, 0)] * 2, np.float32))}]
    node = writer.add(body, skin=0, translation=[100, 0, 0])
    writer.json["meshes"][-1]["weights"] = [1.0]
    writer.json["nodes"].append({"translation": [5, 0, 0]})
    writer.json["scenes"][0]["nodes"].append(node + 1)
    writer.json["skins"] = [{"joints": [node + 1]}]
    mesh = load_mesh(writer.write(tmp_path / "skin.glb"))
    # The joint moves it, its own node does not; the morph target doubles the width.
    assert torch.allclose(mesh.source_from_asset[:3, 3], torch.tensor([6.0, 0, 0.5], dtype=torch.float64))
    assert float(mesh.source_from_asset[0, 0]) == 2.0


def test_separate_gltf_files_and_their_limits(tmp_path):
    writer = GlbWriter()
    writer.add(writer.primitive(*quad()[:2]))
    data = json.loads(json.dumps({k: v for k, v in writer.json.items() if v != []}))
    data["buffers"] = [{"byteLength": len(writer.binary), "uri": "my%20data.bin"}]
    (tmp_path / "a.gltf").write_text(json.dumps(data))
    assert code_of(load_mesh, tmp_path / "a.gltf") == "mesh-part-missing"
    (tmp_path / "my data.bin").write_bytes(writer.binary)
    assert len(load_mesh(tmp_path / "a.gltf").faces) == 2
    for uri in ("../secret.bin", "/etc/hostname"):
        data["buffers"][0]["uri"] = uri
        (tmp_path / "b.gltf").write_text(json.dumps(data))
        assert code_of(load_mesh, tmp_path / "b.gltf") in ("mesh-outside", "mesh-part-missing")
    data["extensionsRequired"] = ["KHR_draco_mesh_compression"]
    (tmp_path / "b.gltf").write_text(json.dumps(data))
    assert code_of(load_mesh, tmp_path / "b.gltf") == "mesh-compressed"


def test_refused_meshes(tmp_path):
    vertices, faces, _ = quad()

    def write(v, f) -> str:
        writer = GlbWriter()
        writer.add(writer.primitive(v, f))
        return code_of(load_mesh, writer.write(tmp_path / "x.glb"))

    bad = vertices.copy()
    bad[1, 1] = np.nan
    assert write(bad, faces) == "mesh-not-finite"
    assert write(vertices, np.array([(0, 1, 7)])) == "mesh-unreadable"
    assert write(np.zeros((4, 3)), faces) == "mesh-flat"
    assert code_of(sample_surface, to_asset_space(RawMesh(vertices, np.array([(0, 1, 0)]))), 10, 0) == "mesh-flat"
    assert code_of(to_asset_space, RawMesh(vertices, np.zeros((0, 3), int))) == "mesh-empty"
    assert code_of(load_mesh, tmp_path / "none.glb") == "mesh-missing"
    assert code_of(load_mesh, tmp_path / "x.blend") == "mesh-format"
    writer = GlbWriter()
    writer.json["scenes"] = []
    assert code_of(load_mesh, writer.write(tmp_path / "x.glb")) == "mesh-empty"
    writer = GlbWriter()
    writer.add(writer.primitive(vertices, faces))
    writer.json["accessors"][-1]["count"] = 30_000_000  # ten million triangles are refused before they are read
    assert code_of(load_mesh, writer.write(tmp_path / "x.glb")) == "mesh-too-big"
    (tmp_path / "x.ply").write_bytes(b"ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nelement face 10000000\nend_header\n")
    assert code_of(load_mesh, tmp_path / "x.ply") == "mesh-too-big"
    (tmp_path / "x.stl").write_bytes(b"not a mesh")
    assert code_of(load_mesh, tmp_path / "x.stl") in ("mesh-unreadable", "mesh-empty")
    (tmp_path / "x.glb").write_bytes(b"")
    assert code_of(load_mesh, tmp_path / "x.glb") == "mesh-unreadable"


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_glb_is_refused_or_read_never_a_crash(tmp_path, data):
    writer = GlbWriter()
    vertices, faces, uv = quad()
    texture = writer.texture(png(np.full((4, 4, 3), 200, np.uint8)))
    writer.add(writer.primitive(vertices, faces, None, uv, writer.material(pbrMetallicRoughness={"baseColorTexture": {"index": texture}})))
    content = bytearray(writer.bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[:data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    (tmp_path / "d.glb").write_bytes(content)
    try:
        mesh = load_mesh(tmp_path / "d.glb")
        sample_surface(mesh, 20, 0)
    except NearError:
        pass


# --------------------------------------------------------------------------------------------------------- sampling


def sphere_mesh(subdivisions: int = 4):
    vertices, faces = icosphere(subdivisions)
    return to_asset_space(RawMesh(vertices, faces, vertices))


def test_samples_cover_a_sphere_evenly():
    samples = sample_surface(sphere_mesh(), 5000, 3)
    again = sample_surface(sphere_mesh(), 5000, 3)
    assert len(samples) == 5000 and torch.equal(samples.points, again.points)
    assert samples.area == pytest.approx(math.pi, rel=0.01)
    distance = cKDTree(samples.points).query(samples.points, k=2)[0][:, 1]
    ideal = math.sqrt(2 * samples.area / (math.sqrt(3) * 5000))  # hexagonal packing
    assert distance.min() > 0.5 * ideal and distance.mean() > 0.7 * ideal
    octant = torch.unique((samples.points > 0).long() @ torch.tensor([4, 2, 1]), return_counts=True)[1]
    assert int(octant.min()) > 0.97 * 625 and int(octant.max()) < 1.03 * 625
    unit = torch.nn.functional.normalize(samples.points, dim=-1)
    assert float((samples.normals * unit).sum(-1).min()) > 0.999


def test_elimination_keeps_the_two_sides_of_a_thin_wall():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.random((4000, 3)) * (1, 1, 0), rng.random((4000, 3)) * (1, 1, 0) + (0, 0, 1e-3)])
    normals = np.repeat([(0.0, 0, -1), (0.0, 0, 1)], 4000, axis=0)
    kept = eliminate_samples(points, normals, 1000, 2.0)
    assert len(kept) == 1000 and 470 < (kept < 4000).sum() < 530
    side = points[kept[kept < 4000]]
    assert cKDTree(side).query(side, k=2)[0][:, 1].min() > 0.02


def test_small_and_odd_meshes_are_sampled():
    triangle = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0)], float)
    one = to_asset_space(RawMesh(triangle, np.array([(0, 1, 2)])))
    assert len(sample_surface(one, 1, 0)) == 1
    # Three faces on one edge, a doubled face and a degenerate one.
    vertices = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1)], float)
    faces = np.array([(0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 1, 2), (2, 2, 3)])
    samples = sample_surface(to_asset_space(RawMesh(vertices, faces)), 500, 0)
    assert len(samples) == 500 and bool(torch.isfinite(samples.normals).all())
    assert code_of(sample_surface, one, 0, 0) == "samples-invalid"


def test_fine_texture_is_averaged_not_aliased(tmp_path):
    writer = GlbWriter()
    vertices, faces, uv = quad()
    checker = np.indices((256, 256)).sum(0) % 2 * np.uint8(255)
    rough = np.stack([np.zeros_like(checker), checker, 255 - checker], -1).astype(np.uint8)
    material = writer.material(pbrMetallicRoughness={"metallicRoughnessTexture": {"index": writer.texture(png(rough))}, "roughnessFactor": 0.8})
    writer.add(writer.primitive(vertices, faces, None, uv, material))
    samples = sample_surface(load_mesh(writer.write(tmp_path / "t.glb")), 400, 0)
    assert float((samples.roughness - 0.4).abs().max()) < 0.02 and float((samples.metallic - 0.5).abs().max()) < 0.02


def test_masked_parts_are_left_out(tmp_path):
    writer = GlbWriter()
    vertices, faces, uv = quad()
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[:, 4:, 3] = 0
    info = {"baseColorTexture": {"index": writer.texture(png(pixels), {"wrapS": 33071, "wrapT": 33071})}}
    writer.add(writer.primitive(vertices, faces, None, uv, writer.material(pbrMetallicRoughness=info, alphaMode="MASK")))
    samples = sample_surface(load_mesh(writer.write(tmp_path / "t.glb")), 400, 0)
    assert float(samples.points[:, 0].max()) < 0.02 and samples.area == pytest.approx(0.5, abs=0.02)
    pixels[..., 3] = 0
    writer = GlbWriter()
    info = {"baseColorTexture": {"index": writer.texture(png(pixels))}}
    writer.add(writer.primitive(vertices, faces, None, uv, writer.material(pbrMetallicRoughness=info, alphaMode="BLEND")))
    assert code_of(sample_surface, load_mesh(writer.write(tmp_path / "t.glb")), 400, 0) == "mesh-transparent"


@pytest.mark.parametrize("wrap", [WRAP_REPEAT, WRAP_MIRROR, WRAP_CLAMP])
def test_texture_lookup_agrees_with_its_plain_twin(wrap):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (5, 8, 3)).astype(np.uint8)
    uv = rng.uniform(-2.5, 2.5, (300, 2))
    got = MipPyramid(Texture(pixels, (wrap, wrap)), srgb=False).fetch(uv, np.full(300, 1e-3))
    padding = {WRAP_REPEAT: "wrap", WRAP_MIRROR: "symmetric", WRAP_CLAMP: "edge"}[wrap]
    tiled = np.pad(LINEAR[pixels], ((20, 20), (32, 32), (0, 0)), padding)
    image = torch.from_numpy(tiled).permute(2, 0, 1)[None]
    place = torch.from_numpy((uv * (8, 5) + (32, 20)) / (72, 45) * 2 - 1).float()[None, None]
    want = torch.nn.functional.grid_sample(image, place, align_corners=False, mode="bilinear")[0, :, 0].T
    assert np.abs(got - want.numpy()).max() < 1e-4


def test_coarse_mip_levels_keep_the_mean():
    pixels = np.random.default_rng(2).integers(0, 256, (64, 32, 4)).astype(np.uint8)
    pyramid = MipPyramid(Texture(pixels), srgb=True)
    mean = pyramid.levels[0].mean((0, 1))
    assert np.allclose(pyramid.levels[-1][0, 0], mean, atol=1e-5)
    assert np.allclose(pyramid.fetch(np.array([[0.3, 0.9]]), np.array([1e12]))[0], mean, atol=1e-5)


@given(st.floats(0.05, 3.1), st.booleans(), st.floats(0.2, 4.0))
@settings(max_examples=30, deadline=None)
def test_tangents_follow_u_and_bitangents_point_up_in_the_image(angle, mirrored, scale):
    vertices, faces, uv = quad()
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    mapped = (vertices[:, :2] @ turn.T * scale * (1, -1)) * ((-1, 1) if mirrored else (1, 1))
    normals = np.tile(np.array([0, 0, 1], np.float32), (4, 1))
    frames = corner_tangents(vertices, normals, mapped.astype(np.float32), faces)
    bitangent = frames[..., 3:] * np.cross(normals[faces], frames[..., :3])
    for field, direction in ((frames[..., :3], np.array([1.0, 0])), (bitangent, np.array([0.0, -1]))):
        step = np.einsum("ij,fcj->fci", turn * scale, field[..., :2]) * (1, -1) * ((-1, 1) if mirrored else (1, 1))
        assert np.allclose(step / scale, direction, atol=1e-4)


def test_normal_map_bends_towards_the_image_axes():
    vertices, faces, uv = quad()
    pixels = np.tile(np.array([[[218, 128, 218]]], np.uint8), (4, 4, 1))  # +45 degrees towards +u
    material = Material(normal_map=TextureSlot(Texture(pixels)))
    mesh = to_asset_space(RawMesh(vertices, faces, np.tile([0, 0, 1.0], (4, 1)), (uv,), materials=(material,)))
    normal = sample_surface(mesh, 5, 0).normals.mean(0)
    assert torch.allclose(normal, torch.tensor([0.707, 0.0, 0.707]), atol=0.01)


@pytest.mark.parametrize("name", ["egyptian_cat", "seal_statuette"])
def test_materials_and_normals_agree_with_cycles(shared_dir, name):
    """Both files bring mirrored tangents; the G-buffer tells whether they were rebuilt from the UVs."""
    import OpenEXR

    bench = shared_dir / "bench" / "dev"
    model = next(m for m in json.loads((bench / "index.json").read_text())["models"] if m["model"] == name)
    mesh = load_mesh(bench / model["model_file"])
    view = model["views"][0]["camera"]
    camera = camera_from_blender(torch.tensor(view["matrix_world"]), torch.tensor(view["K"]), 256, 256).scaled(3)
    face, weights, _ = rasterise(mesh, camera)
    hit = face >= 0
    values = np.zeros((*face.shape, 8), np.float32)
    values[hit] = shade_points(mesh, face[hit], weights[hit], (2.0 / float(camera.K[0, 0])) ** 2)
    cover, mean = hit.reshape(256, 3, 256, 3).mean((1, 3)), values.reshape(256, 3, 256, 3, 8).mean((1, 3))
    channels = {k: np.asarray(c.pixels, np.float32) for k, c in OpenEXR.File(str(bench / name / "gbuffer" / "cam0.exr"), separate_channels=True).channels().items()}
    inner = (cover == 1) & (channels["A"] > 0.999)
    truth = np.stack([channels[k] for k in ("normal.X", "normal.Y", "normal.Z", "R", "G", "B", "roughness", "metallic")], -1)[inner]
    ours = mean[inner]
    cosine = (ours[:, :3] * truth[:, :3]).sum(-1) / np.linalg.norm(ours[:, :3], axis=-1) / np.linalg.norm(truth[:, :3], axis=-1)
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    assert np.median(angle) < 1.5 and angle.mean() < 2.5
    assert np.abs(ours[:, 3:6] - truth[:, 3:6]).mean() < 0.015
    assert np.abs(ours[:, 6:] - truth[:, 6:]).mean() < 0.01


# ----------------------------------------------------------------------------------------------------------- voxels


def clip_to_box(triangle: np.ndarray, low: np.ndarray) -> bool:
    """Plain oracle: cut the triangle by the six planes of the unit box at ``low``; is anything left?"""
    polygon = list(triangle)
    for axis in range(3):
        for sign, bound in ((1, low[axis]), (-1, -low[axis] - 1)):
            kept = []
            for p, q in zip(polygon, polygon[1:] + polygon[:1]):
                dp, dq = sign * p[axis] - bound, sign * q[axis] - bound
                if dp >= 0:
                    kept.append(p)
                if (dp >= 0) != (dq >= 0):
                    kept.append(p + (q - p) * (dp / (dp - dq)))
            polygon = kept
            if not polygon:
                return False
    return True


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7))
def test_voxels_agree_with_clipping(seed, resolution):
    triangle = np.random.default_rng(seed).uniform(-0.5, 0.5, (3, 3))
    ours = {tuple(v) for v in voxelize(triangle, np.array([(0, 1, 2)]), resolution).tolist()}
    grid = (np.clip(triangle, -0.5 + 1e-6, 0.5 - 1e-6) + 0.5) * resolution
    want = {c for c in np.ndindex((resolution,) * 3) if clip_to_box(grid, np.array(c))}
    assert ours == want


def test_voxels_equal_the_fixture(shared_dir, repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "tools"))
    from parity_checks.geometry import check_image_preprocess, check_voxelize

    for row in check_voxelize(shared_dir / "fixtures") + check_image_preprocess(shared_dir / "fixtures"):
        assert row.ok, row


def test_voxels_are_sorted_and_closed():
    vertices, faces = icosphere(3)
    coords = voxelize(vertices * 0.49, faces, 32)
    assert coords.dtype == torch.uint8
    key = coords.long() @ torch.tensor([65536, 256, 1])
    assert bool((key[1:] > key[:-1]).all())
    # A face on a grid plane touches the boxes on both of its sides.
    plane = np.array([(-0.4, -0.4, 0), (0.4, -0.4, 0), (0.4, 0.4, 0)])
    assert set(voxelize(plane, np.array([(0, 1, 2)]), 4)[:, 2].tolist()) == {1, 2}
    assert code_of(voxelize, plane, np.array([(0, 1, 2)]), 300) == "resolution-invalid"
