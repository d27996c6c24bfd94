"""Render a mesh with Cycles (Blender as a Python module): python tools/cycles_render.py JOB.json

The job, made by `near.evaluation.cycles`, is one JSON object:

    mesh        GLB, glTF, OBJ or PLY
    normalise   [4][4] applied to the imported objects, or null: centre the bounding box, longest side 1
    photo       null: the mesh's own materials; or {"image", "matrix_world", "K", "resolution"}: this picture projected from
                that camera as base colour, roughness 0.5, metallic 0, right through the object
    samples     per pixel; threads: 0 for all
    frames      [{"matrix_world", "K", "resolution", "hdri", "rotation_z", "output"}]; output: EXR, half RGBA, premultiplied,
                linear Rec.709; null: only time it

Cameras are Blender camera-to-world matrices with K in pixels. One JSON line per finished frame goes to stdout.
Settings are those of the project's bench, so pictures made here and there can be compared.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import bpy
from mathutils import Matrix, Vector


def import_mesh(path: str) -> list:
    """Import into an empty scene; returns the mesh objects."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    suffix = Path(path).suffix.lower()
    if suffix in (".glb", ".gltf"):
        bpy.ops.import_scene.gltf(filepath=path)
    elif suffix == ".obj":
        bpy.ops.wm.obj_import(filepath=path)
    elif suffix == ".ply":
        bpy.ops.wm.ply_import(filepath=path, forward_axis="Y", up_axis="Z")
    else:
        raise ValueError(f"{suffix} files cannot be imported")
    return [o for o in bpy.context.scene.objects if o.type == "MESH"]


def normalise(meshes: list, matrix: list | None) -> None:
    """Bring the objects into the unit cube."""
    bpy.context.view_layer.update()
    if matrix is None:
        corners = [o.matrix_world @ v.co for o in meshes for v in o.data.vertices]
        low = Vector(min(c[i] for c in corners) for i in range(3))
        high = Vector(max(c[i] for c in corners) for i in range(3))
        scale = 1 / max(high - low)
        transform = Matrix.Scale(scale, 4) @ Matrix.Translation(-(low + high) / 2)
    else:
        transform = Matrix(matrix)
    for item in bpy.context.scene.objects:
        if item.parent is None:
            item.matrix_world = transform @ item.matrix_world
    bpy.context.view_layer.update()


def strip_emission() -> None:
    """Only the environment lights the object, as in the bench."""
    for material in bpy.data.materials:
        for node in material.node_tree.nodes if material.use_nodes else ():
            if node.type == "BSDF_PRINCIPLED":
                for link in list(node.inputs["Emission Color"].links) + list(node.inputs["Emission Strength"].links):
                    material.node_tree.links.remove(link)
                node.inputs["Emission Strength"].default_value = 0.0


def projected_material(photo: dict):
    """A material whose base colour is the photo, seen from its camera."""
    material = bpy.data.materials.new("projected photo")
    material.use_nodes = True
    tree = material.node_tree
    nodes, links = tree.nodes, tree.links
    shader = nodes["Principled BSDF"]
    shader.inputs["Roughness"].default_value, shader.inputs["Metallic"].default_value = 0.5, 0.0
    image = bpy.data.images.load(photo["image"])
    image.colorspace_settings.name, image.alpha_mode = "sRGB", "CHANNEL_PACKED"
    cam_from_world = Matrix.Diagonal((1, -1, -1, 1)) @ Matrix(photo["matrix_world"]).inverted()
    K, (width, height) = photo["K"], photo["resolution"]
    x, y, z = (cam_from_world[i] for i in range(3))
    rows = [K[0][0] / width * x + K[0][2] / width * z, z - (K[1][1] / height * y + K[1][2] / height * z), z]
    position = nodes.new("ShaderNodeNewGeometry").outputs["Position"]

    def maths(operation: str, a, b):
        node = nodes.new("ShaderNodeMath")
        node.operation = operation
        for socket, value in zip(node.inputs, (a, b)):
            if isinstance(value, float):
                socket.default_value = value
            else:
                links.new(value, socket)
        return node.outputs[0]

    def affine(row):
        dot = nodes.new("ShaderNodeVectorMath")
        dot.operation = "DOT_PRODUCT"
        links.new(position, dot.inputs[0])
        dot.inputs[1].default_value = row[:3]
        return maths("ADD", dot.outputs["Value"], float(row[3]))

    u, v, depth = (affine(row) for row in rows)
    combine = nodes.new("ShaderNodeCombineXYZ")
    links.new(maths("DIVIDE", u, depth), combine.inputs["X"])
    links.new(maths("DIVIDE", v, depth), combine.inputs["Y"])
    texture = nodes.new("ShaderNodeTexImage")
    texture.image, texture.extension = image, "EXTEND"
    links.new(combine.outputs[0], texture.inputs["Vector"])
    links.new(texture.outputs["Color"], shader.inputs["Base Color"])
    return material


def set_up_cycles(samples: int, threads: int) -> None:
    """The bench's render settings."""
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    cycles = scene.cycles
    cycles.device, cycles.samples = "CPU", samples
    cycles.use_adaptive_sampling, cycles.adaptive_threshold = True, 0.005
    cycles.use_denoising, cycles.denoiser = True, "OPENIMAGEDENOISE"
    cycles.denoising_input_passes, cycles.denoising_prefilter = "RGB_ALBEDO_NORMAL", "ACCURATE"
    cycles.max_bounces, cycles.diffuse_bounces, cycles.glossy_bounces = 12, 4, 4
    cycles.sample_clamp_indirect = 10.0
    render = scene.render
    render.film_transparent, render.use_persistent_data = True, True
    render.threads_mode, render.threads = ("FIXED", threads) if threads else ("AUTO", 0)
    render.image_settings.file_format, render.image_settings.color_mode = "OPEN_EXR", "RGBA"
    render.image_settings.color_depth, render.image_settings.exr_codec = "16", "ZIP"
    scene.camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.collection.objects.link(scene.camera)
    world = scene.world = bpy.data.worlds.new("light")
    world.use_nodes = True
    nodes, links = world.node_tree.nodes, world.node_tree.links
    mapping, texture = nodes.new("ShaderNodeMapping"), nodes.new("ShaderNodeTexEnvironment")
    mapping.name, texture.name = "turn", "map"
    links.new(nodes.new("ShaderNodeTexCoord").outputs["Generated"], mapping.inputs["Vector"])
    links.new(mapping.outputs["Vector"], texture.inputs["Vector"])
    links.new(texture.outputs["Color"], nodes["Background"].inputs["Color"])


def place_camera(frame: dict) -> None:
    """Blender's lens and shift for K; square pixels."""
    scene, K = bpy.context.scene, frame["K"]
    width, height = frame["resolution"]
    scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = width, height, 100
    data = scene.camera.data
    data.sensor_fit, data.sensor_width = "HORIZONTAL", 36.0
    data.lens = K[0][0] * 36.0 / width
    data.shift_x, data.shift_y = (width / 2 - K[0][2]) / width, (K[1][2] - height / 2) / width
    data.clip_start, data.clip_end = 0.01, 1000.0
    scene.camera.matrix_world = Matrix(frame["matrix_world"])


def place_light(frame: dict) -> None:
    nodes = bpy.context.scene.world.node_tree.nodes
    image = bpy.data.images.load(frame["hdri"], check_existing=True)
    image.colorspace_settings.name = "Linear Rec.709"
    nodes["map"].image = image
    nodes["turn"].inputs["Rotation"].default_value = (0.0, 0.0, frame["rotation_z"])


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    # Blender and Cycles write to stdout at every turn; ours is kept apart for the reports.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    meshes = import_mesh(job["mesh"])
    normalise(meshes, job["normalise"])
    strip_emission()
    if job["photo"]:
        material = projected_material(job["photo"])
        for item in meshes:
            item.data.materials.clear()
            item.data.materials.append(material)
    set_up_cycles(job["samples"], job["threads"])
    for index, frame in enumerate(job["frames"]):
        place_camera(frame)
        place_light(frame)
        bpy.context.scene.render.filepath = frame["output"] or ""
        start = time.perf_counter()
        bpy.ops.render.render(write_still=bool(frame["output"]))
        print(json.dumps({"frame": index, "seconds": time.perf_counter() - start}), file=reports, flush=True)


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except Exception as error:  # the parent shows this line
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        sys.stderr.flush()
        os._exit(status)  # finalising the interpreter with Blender in it can hang
