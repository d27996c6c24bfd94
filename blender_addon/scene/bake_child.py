"""Runs in a Blender of its own: renders what lights an object as an equirectangular map, with Cycles.

    blender -b --factory-startup --python bake_child.py        or, with Blender as a module,        python bake_child.py

Reads jobs (one JSON object a line, see `bake.Job`) from standard input until it closes, and answers each with a file: `out`,
float32 [H, W, 3] as .npy, top row +Z, in the job's working space, or `out`.err with a sentence. It imports nothing of the add-on.
"""

import json
import math
import os
import sys
import tempfile

import bpy
import numpy as np

TEXEL_SHARE = 1.0      # lamps smaller than this many texels are widened to it: the same energy, without noise


def set_up_camera(scene, where, rows):
    """A panoramic camera at `where` that reproduces a world image 1:1."""
    data = bpy.data.cameras.new("near bake")
    data.type = "PANO"
    owner = data if hasattr(data, "panorama_type") else data.cycles       # before Blender 4.3 or so
    owner.panorama_type = "EQUIRECTANGULAR"
    data.clip_start, data.clip_end = 1e-3, 1e5
    camera = bpy.data.objects.new("near bake", data)
    camera.rotation_euler = (math.pi / 2, 0, -math.pi / 2)
    camera.location = where
    scene.collection.objects.link(camera)
    scene.camera = camera
    render = scene.render
    render.resolution_x, render.resolution_y, render.resolution_percentage = 2 * rows, rows, 100
    render.pixel_aspect_x = render.pixel_aspect_y = 1.0
    render.use_border = render.use_motion_blur = render.use_compositing = render.use_sequencer = False


def set_up_cycles(scene, samples):
    scene.render.engine = "CYCLES"
    cycles = scene.cycles
    cycles.device, cycles.samples, cycles.use_adaptive_sampling = "CPU", samples, False
    cycles.use_denoising = False       # it would smooth lamps away
    cycles.pixel_filter_type, cycles.film_exposure = "BOX", 1.0
    cycles.sample_clamp_direct, cycles.sample_clamp_indirect = 0.0, 10.0
    scene.render.film_transparent = False
    settings = scene.render.image_settings
    if hasattr(settings, "media_type"):
        settings.media_type = "IMAGE"
    settings.file_format, settings.color_mode, settings.color_depth = "OPEN_EXR", "RGB", "32"


def show_world_as_light(world):
    """What lights a surface, not what a camera sees: "Is Camera Ray" tricks are for the background of a picture."""
    if world is None:
        return
    world.cycles_visibility.camera = True
    trees, seen = [world.node_tree] if world.use_nodes and world.node_tree else [], set()
    while trees:
        tree = trees.pop()
        if tree in seen:
            continue
        seen.add(tree)
        for node in list(tree.nodes):
            if getattr(node, "node_tree", None) is not None:
                trees.append(node.node_tree)
            if node.bl_idname == "ShaderNodeLightPath":
                for socket in node.outputs:
                    value = tree.nodes.new("ShaderNodeValue")
                    value.outputs[0].default_value = 1.0 if socket.name == "Is Diffuse Ray" else 0.0
                    for link in list(socket.links):
                        tree.links.new(value.outputs[0], link.to_socket)


def show_lamps(scene, where, rows):
    """Lamps are part of the map: seen by the camera, and at least as large as a texel."""
    angle = TEXEL_SHARE * math.pi / rows
    graph = bpy.context.evaluated_depsgraph_get()
    for item in list(scene.objects):
        if item.type != "LIGHT":
            continue
        item.visible_camera = True
        if item.data.type == "SUN":
            item.data.angle = max(item.data.angle, 2 * angle)
        elif item.data.type in ("POINT", "SPOT"):
            distance = math.dist(item.evaluated_get(graph).matrix_world.translation, where)
            item.data.shadow_soft_size = max(item.data.shadow_soft_size, distance * math.tan(angle))


def hide(scene, names):
    for name in names:
        item = scene.objects.get(name)
        if item is not None:
            for kind in ("camera", "diffuse", "glossy", "transmission", "volume_scatter", "shadow"):
                setattr(item, f"visible_{kind}", False)


def pixels_of(image):
    """float32 [H, W, 3], top row first."""
    width, height = image.size
    flat = np.empty(width * height * image.channels, np.float32)
    image.pixels.foreach_get(flat)
    return np.ascontiguousarray(flat.reshape(height, width, -1)[::-1, :, :3])


def display_table(device, view, look, exposure, gamma, size, log2_low, log2_range):
    """float32 [blue, green, red, 3]: the display values of scene-linear colours, whose axes are log2(x + 2^low) over `log2_range`."""
    n = size
    axis = np.exp2(np.arange(n) / (n - 1) * log2_range + log2_low) - 2.0 ** log2_low
    colours = np.ones((n, n, n, 4), np.float32)
    colours[..., 2], colours[..., 1], colours[..., 0] = np.meshgrid(axis, axis, axis, indexing="ij")
    image = bpy.data.images.new("near table", n, n * n, float_buffer=True)
    scene = bpy.data.scenes.new("near table")
    made = None
    try:
        image.pixels.foreach_set(colours.ravel())
        scene.display_settings.display_device = device
        for name, value in (("view_transform", view), ("look", look), ("exposure", exposure), ("gamma", gamma)):
            setattr(scene.view_settings, name, value)
        output = scene.render.image_settings
        if hasattr(output, "media_type"):
            output.media_type = "IMAGE"
        output.file_format, output.color_mode, output.color_depth, output.compression = "PNG", "RGB", "16", 0
        scene.render.dither_intensity = 0.0
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "table.png")
            image.save_render(path, scene=scene)
            made = bpy.data.images.load(path)
            made.colorspace_settings.is_data = True
            flat = np.empty(n * n * n * made.channels, np.float32)
            made.pixels.foreach_get(flat)
    finally:
        bpy.data.scenes.remove(scene)
        for item in (image, made):
            if item is not None:
                bpy.data.images.remove(item)
    return np.ascontiguousarray(flat.reshape(n, n, n, -1)[..., :3])


def bake(job):
    """One job -> float32 [H, W, 3]; of a table [n, n, n, 3]."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    space = job["space"]
    known = getattr(getattr(bpy.data, "colorspace", None), "working_space", space)
    if known != space:
        bpy.ops.wm.set_working_color_space(working_space=space, convert_colors=False)
    if job["view"]:
        return display_table(*job["view"], *job["table"])
    if job["image"]:
        return pixels_of(bpy.data.images.load(job["image"]))
    with bpy.data.libraries.load(job["blend"]) as (source, target):
        if job["probe"]:
            target.scenes = [job["scene"]]
        else:
            target.worlds = [job["world"]]
    if job["probe"]:
        scene = target.scenes[0]
        bpy.context.window.scene = scene       # or nothing would evaluate where its objects are
    else:
        scene = bpy.context.scene
        scene.world = target.worlds[0]
    set_up_camera(scene, job["where"], job["rows"])
    set_up_cycles(scene, job["samples"])
    show_world_as_light(scene.world)
    scene.frame_set(job["frame"], subframe=job["subframe"])
    if job["probe"]:
        hide(scene, job["hidden"])
        bpy.context.view_layer.update()
        show_lamps(scene, job["where"], job["rows"])
    with tempfile.TemporaryDirectory() as folder:
        scene.render.filepath = os.path.join(folder, "map.exr")
        bpy.ops.render.render(write_still=True, scene=scene.name)
        image = bpy.data.images.load(scene.render.filepath)
        # The file holds the working space's numbers; read as data they stay what they are.
        image.colorspace_settings.is_data = True
        return pixels_of(image)


def main():
    # Blender and Cycles talk on standard output; nobody listens there.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        job = json.loads(line)
        out = job["out"]
        try:
            pixels = bake(job)
            with open(out + ".part", "wb") as file:
                np.save(file, pixels, allow_pickle=False)
            os.replace(out + ".part", out)
        except Exception as error:  # the parent shows this sentence
            with open(out + ".err.part", "w", encoding="utf-8") as file:
                file.write(f"{type(error).__name__}: {error}"[:500])
            os.replace(out + ".err.part", out + ".err")


if __name__ == "__main__":
    try:
        main()
    finally:
        os._exit(0)     # finalising the interpreter with Blender in it can hang
