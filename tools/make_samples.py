"""Make the sample photo and its mesh in backend/near/samples: python tools/make_samples.py (needs bpy)

A teapot of our own: a glazed body with a painted band, a wooden handle, brass on knob and spout. The mesh goes out as GLB;
the photo is what Cycles sees of it under one of the project's own lights, shown through AgX.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "backend" / "near" / "samples"
CAMERA_DEG = (22.0, 16.0, 1.7, 40.0)  # yaw, pitch, radius, horizontal field of view
LIGHT, LIGHT_TURN_DEG, LIGHT_STRENGTH = "studio", -20.0, 0.6
SIZE = 512


def lathe(profile: np.ndarray, segments: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn a profile [P, 2] (radius, height) about Z: vertices, quads, and UVs per vertex (u around, v along)."""
    angles = np.linspace(0, 2 * np.pi, segments + 1)  # the seam is doubled, for its UVs
    ring = np.stack([np.cos(angles), np.sin(angles)], -1)
    vertices = np.concatenate([np.concatenate([r * ring, np.full((len(ring), 1), z)], -1) for r, z in profile])
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(profile, axis=0), axis=1))])
    uv = np.stack(np.broadcast_arrays(np.linspace(0, 1, segments + 1)[None], (length / length[-1])[:, None]), -1).reshape(-1, 2)
    return vertices, grid_quads(len(profile), segments + 1), uv


def tube(path: np.ndarray, radii: np.ndarray, segments: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sweep ellipses with half-axes ``radii`` [P, 2] (sideways, in the plane) along a path [P, 2] in the XZ plane."""
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], -1)
    angles = np.linspace(0, 2 * np.pi, segments + 1)
    rings = []
    for p, n, (side, up) in zip(path, normal, radii):
        flat = p + np.sin(angles)[:, None] * n * up
        rings.append(np.stack([flat[:, 0], np.cos(angles) * side, flat[:, 1]], -1))
    uv = np.stack(np.meshgrid(np.linspace(0, 1, segments + 1), np.linspace(0, 1, len(path))), -1).reshape(-1, 2)
    return np.concatenate(rings), grid_quads(len(path), segments + 1), uv


def grid_quads(rows: int, columns: int) -> np.ndarray:
    """Faces of a grid of vertices in row order."""
    i = np.arange((rows - 1) * columns).reshape(rows - 1, columns)[:, :-1].ravel()
    return np.stack([i, i + 1, i + columns + 1, i + columns], -1)


def smooth_curve(points: list[tuple[float, float]], count: int) -> np.ndarray:
    """A Catmull-Rom curve through the points, sampled ``count`` times."""
    p = np.asarray(points, float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, len(points) - 1, count)
    k = np.minimum(t.astype(int), len(points) - 2)
    f = (t - k)[:, None]
    a, b, c, d = (p[k + i] for i in range(4))
    return 0.5 * (2 * b + (c - a) * f + (2 * a - 5 * b + 4 * c - d) * f ** 2 + (3 * b - a - 3 * c + d) * f ** 3)


def band_texture(size: int = 256, fine: int = 4) -> np.ndarray:
    """The body's glaze: teal, a cream band with a row of diamonds and two thin lines; float [size, size, 3], sRGB, row 0 at v = 0.
    Drawn ``fine`` times larger and averaged."""
    v, u = np.mgrid[0:size * fine, 0:size * fine] / (size * fine)
    teal, cream, rust = np.array([0.07, 0.33, 0.36]), np.array([0.90, 0.85, 0.72]), np.array([0.67, 0.25, 0.13])
    rng = np.random.default_rng(4)
    drift = sum(np.cos(2 * np.pi * (k * u + rng.random()) + 9 * v * rng.random()) / k for k in range(1, 5))
    picture = teal * (1 + 0.10 * drift[..., None])
    inside = np.abs(v - 0.60) < 0.085
    diamond = np.abs((u * 14) % 1 - 0.5) / 0.36 + np.abs(v - 0.60) / 0.060 < 1
    line = np.abs(np.abs(v - 0.60) - 0.104) < 0.006
    picture[inside] = cream
    picture[inside & diamond] = rust
    picture[line] = cream
    return picture.clip(0, 1).reshape(size, fine, size, fine, 3).mean((1, 3))


def build(bpy) -> None:
    """The teapot as objects of the present scene; its front looks along -Y, its spout to the right."""
    def material(name: str, colour, roughness: float, metallic: float, image=None):
        m = bpy.data.materials.new(name)
        m.use_nodes = True
        shader = m.node_tree.nodes["Principled BSDF"]
        shader.inputs["Base Color"].default_value = (*colour, 1)
        shader.inputs["Roughness"].default_value, shader.inputs["Metallic"].default_value = roughness, metallic
        if image is not None:
            node = m.node_tree.nodes.new("ShaderNodeTexImage")
            node.image = image
            m.node_tree.links.new(node.outputs["Color"], shader.inputs["Base Color"])
        return m

    def add(name: str, shape, paint) -> None:
        vertices, faces, uv = shape
        mesh = bpy.data.meshes.new(name)
        mesh.from_pydata(vertices.tolist(), [], faces.tolist())
        layer = mesh.uv_layers.new()
        corners = np.array([loop.vertex_index for loop in mesh.loops])
        layer.data.foreach_set("uv", uv[corners].ravel().astype(np.float32))
        mesh.polygons.foreach_set("use_smooth", [True] * len(mesh.polygons))
        mesh.materials.append(paint)
        bpy.context.scene.collection.objects.link(bpy.data.objects.new(name, mesh))

    texture = band_texture()
    image = bpy.data.images.new("glaze", *texture.shape[1::-1])
    image.pixels.foreach_set(np.concatenate([texture, np.ones_like(texture[..., :1])], -1).ravel().astype(np.float32))
    image.pack()
    glaze, wood = material("glaze", (1, 1, 1), 0.18, 0.0, image), material("wood", (0.23, 0.11, 0.045), 0.55, 0.0)
    brass = material("brass", (0.80, 0.56, 0.24), 0.24, 1.0)

    body = smooth_curve([(0.0, 0.0), (0.26, 0.0), (0.33, 0.03), (0.46, 0.22), (0.45, 0.43), (0.30, 0.60), (0.22, 0.635), (0.215, 0.65)], 34)
    lid = smooth_curve([(0.22, 0.645), (0.235, 0.66), (0.19, 0.70), (0.09, 0.745), (0.045, 0.755)], 14)
    knob = smooth_curve([(0.045, 0.75), (0.035, 0.78), (0.075, 0.825), (0.06, 0.875), (0.0, 0.89)], 14)
    body[0, 0] = knob[-1, 0] = 0.0
    add("body", lathe(np.maximum(body, 0), 48), glaze)
    add("lid", lathe(lid, 40), wood)
    add("knob", lathe(knob, 28), brass)
    along = np.linspace(0, 1, 20)
    spout = smooth_curve([(0.36, 0.18), (0.52, 0.25), (0.62, 0.42), (0.72, 0.60)], 20)
    width = (0.105 * (1 - along) + 0.042 * along)[:, None] * np.array([[0.9, 1.0]])
    add("spout", tube(spout, width, 20), glaze)
    end = spout[-2:] + (spout[-1] - spout[-2]) * np.array([[0.0], [0.6]])
    add("ring", tube(np.linspace(end[0], end[1], 4), np.full((4, 2), 0.052), 20), brass)
    handle = smooth_curve([(-0.36, 0.50), (-0.56, 0.56), (-0.70, 0.44), (-0.66, 0.26), (-0.42, 0.14)], 26)
    bulge = 0.030 + 0.012 * np.sin(np.pi * np.linspace(0, 1, 26))
    add("handle", tube(handle, np.stack([bulge * 1.25, bulge], -1), 14), wood)


def main() -> None:
    import bpy

    sys.path.insert(0, str(ROOT / "tools"))
    from cycles_render import normalise, place_camera, place_light, set_up_cycles

    from near.atomic import write_bytes
    from near.commands.common import orbit
    from near.lighting.samples import sample_environment
    from near.output import display_straight, read_rgba, write_environment, write_png

    import torch

    bpy.ops.wm.read_factory_settings(use_empty=True)
    build(bpy)
    SAMPLES.mkdir(parents=True, exist_ok=True)
    bpy.ops.export_scene.gltf(filepath=str(SAMPLES / "teapot.glb"), export_format="GLB", export_yup=True, export_image_format="AUTO",
                              export_tangents=False, export_animations=False)
    normalise([o for o in bpy.context.scene.objects if o.type == "MESH"], None)
    set_up_cycles(256, 0)
    camera = orbit(CAMERA_DEG, SIZE, SIZE)
    world_from_cv = camera.world_from_cam.double()
    matrix = (world_from_cv @ torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))).tolist()
    with tempfile.TemporaryDirectory() as folder:
        light, picture = Path(folder) / "light.exr", Path(folder) / "photo.exr"
        write_environment(light, sample_environment(LIGHT, 512))
        frame = {"matrix_world": matrix, "K": camera.K.tolist(), "resolution": [SIZE, SIZE], "hdri": str(light),
                 "rotation_z": math.radians(LIGHT_TURN_DEG)}
        place_camera(frame)
        place_light(frame)
        bpy.context.scene.world.node_tree.nodes["Background"].inputs["Strength"].default_value = LIGHT_STRENGTH
        bpy.context.scene.render.filepath = str(picture)
        bpy.ops.render.render(write_still=True)
        write_png(SAMPLES / "teapot.png", display_straight(torch.from_numpy(read_rgba(picture))))
    record = {"photo": "teapot.png", "mesh": "teapot.glb", "camera_deg": CAMERA_DEG, "light": LIGHT, "light_turn_deg": LIGHT_TURN_DEG, "light_strength": LIGHT_STRENGTH,
             
              "made_by": "tools/make_samples.py", "licence": "CC0-1.0"}
    write_bytes(SAMPLES / "teapot.json", (json.dumps(record, indent=1) + "\n").encode())
    for file in sorted(SAMPLES.glob("teapot.*")):
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    import os

    status = 1
    try:
        main()
        status = 0
    finally:
        if status:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)  # finalising the interpreter with Blender in it can hang
