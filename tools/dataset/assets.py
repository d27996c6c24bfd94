"""User assets: import, realise, bring into the unit cube, and check that what they are made of can be described."""

from __future__ import annotations

import contextlib
from pathlib import Path

import bpy
import numpy as np
from mathutils import Matrix

SUFFIXES = (".glb", ".gltf", ".blend", ".obj", ".fbx", ".ply")
MAX_TRIANGLES, MAX_OBJECTS = 1_000_000, 400
SURFACE_TYPES = ("MESH", "CURVE", "SURFACE", "META", "FONT")
# Parts of the Principled shader that base colour, roughness and metallic do not describe.
SEE_THROUGH, SWITCHED_OFF = ("Transmission Weight",), ("Subsurface Weight", "Emission Strength", "Sheen Weight", "Coat Weight")


class AssetError(Exception):
    """An asset that cannot serve; the text says why."""


def import_asset(path: Path) -> None:
    """Open the file in an empty Blender and leave its visible surfaces as plain mesh objects.

    Raises:
        AssetError: it cannot be read, is empty or too large.
    """
    bpy.ops.wm.read_factory_settings(use_empty=True)
    text = str(path)
    suffix = path.suffix.lower()
    try:
        if suffix in (".glb", ".gltf"):
            bpy.ops.import_scene.gltf(filepath=text)
        elif suffix == ".blend":
            _append_scene(text)
        elif suffix == ".obj":
            bpy.ops.wm.obj_import(filepath=text)
        elif suffix == ".fbx":
            bpy.ops.import_scene.fbx(filepath=text)
        elif suffix == ".ply":
            bpy.ops.wm.ply_import(filepath=text, forward_axis="Y", up_axis="Z")
        else:
            raise AssetError(f"files of kind {suffix} are not imported")
    except RuntimeError as error:
        raise AssetError(f"the file cannot be imported: {str(error).strip().splitlines()[-1][:200]}") from error
    realise()


def _append_scene(path: str) -> None:
    """The first scene's objects, in a scene of our own settings; no code in the file is run."""
    with bpy.data.libraries.load(path) as (found, wanted):
        wanted.scenes = list(found.scenes)[:1]
    if not wanted.scenes:
        raise AssetError("the file holds no scene")
    theirs, ours = wanted.scenes[0].collection, bpy.context.scene.collection
    for item in theirs.objects:
        ours.objects.link(item)
    for child in theirs.children:
        ours.children.link(child)
    bpy.data.scenes.remove(wanted.scenes[0])


def realise() -> None:
    """Replace everything by mesh objects: modifiers, instances, curves and collections become what they look like."""
    scene = bpy.context.scene
    bpy.context.view_layer.update()
    graph = bpy.context.evaluated_depsgraph_get()
    made, triangles = [], 0
    for instance in graph.object_instances:
        item = instance.object
        if item.type not in SURFACE_TYPES or item.hide_render:
            continue
        with contextlib.suppress(RuntimeError):  # objects without a surface
            mesh = bpy.data.meshes.new_from_object(item, preserve_all_data_layers=True, depsgraph=graph)
            for index, slot in enumerate(item.material_slots):
                if slot.link == "OBJECT" and index < len(mesh.materials):
                    mesh.materials[index] = slot.material.original if slot.material else None
            made.append((mesh, instance.matrix_world.copy()))
            triangles += sum(len(p.vertices) - 2 for p in mesh.polygons)
        if triangles > MAX_TRIANGLES or len(made) > MAX_OBJECTS:
            raise AssetError(f"it is too complex: more than {MAX_TRIANGLES:,} triangles or {MAX_OBJECTS} objects")
    for item in list(bpy.data.objects):
        bpy.data.objects.remove(item)
    for mesh, matrix in made:
        if len(mesh.polygons):
            item = bpy.data.objects.new("asset", mesh)
            item.matrix_world = matrix
            scene.collection.objects.link(item)
    if not scene.objects:
        raise AssetError("it holds no surfaces")


def normalise() -> np.ndarray:
    """Centre the bounding box, make its longest side 1; returns the vertices [V, 3] in asset space."""
    bpy.context.view_layer.update()
    items = [o for o in bpy.context.scene.objects if o.type == "MESH"]
    points = [world_vertices(o) for o in items]
    low, high = np.min([p.min(0) for p in points], 0), np.max([p.max(0) for p in points], 0)
    side = float((high - low).max())
    if not (np.isfinite(side) and side > 0):
        raise AssetError("it has no extent")
    transform = Matrix.Scale(1 / side, 4) @ Matrix.Translation((-(low + high) / 2).tolist())
    for item in items:
        item.matrix_world = transform @ item.matrix_world
    bpy.context.view_layer.update()
    return (np.concatenate(points) - (low + high) / 2) / side


def world_vertices(item) -> np.ndarray:
    """[V, 3] float64."""
    local = np.empty(len(item.data.vertices) * 3, np.float32)
    item.data.vertices.foreach_get("co", local)
    matrix = np.array(item.matrix_world)
    return local.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]


# -- materials ---------------------------------------------------------------------------------------------------------


def prepare_materials() -> list:
    """Give bare faces a grey material and check the others; returns the materials in use.

    Raises:
        AssetError: a material that the three maps cannot describe.
    """
    used = []
    for item in bpy.context.scene.objects:
        mesh = item.data
        if not mesh.materials:
            mesh.materials.append(None)
        for index, material in enumerate(mesh.materials):
            if material is None:
                mesh.materials[index] = material = _grey()
            if material not in used:
                used.append(material)
    for material in used:
        if not material.use_nodes:
            _nodes_from_settings(material)
        _check(material, principled(material))
    return used


def _grey():
    material = bpy.data.materials.get("near grey") or bpy.data.materials.new("near grey")
    material.use_nodes = True
    return material


def _nodes_from_settings(material) -> None:
    colour, rough, metal = tuple(material.diffuse_color), material.roughness, material.metallic
    material.use_nodes = True
    shader = principled(material)
    shader.inputs["Base Color"].default_value = colour
    shader.inputs["Roughness"].default_value, shader.inputs["Metallic"].default_value = rough, metal


def output_node(material):
    """The material output that Cycles renders."""
    node = material.node_tree.get_output_node("CYCLES")
    if node is None:
        raise AssetError(f"material {material.name!r} has no output")
    return node


def principled(material):
    """The shader at the output. A plain diffuse or glossy shader is replaced by its Principled twin."""
    output = output_node(material)
    links = output.inputs["Surface"].links
    node = links[0].from_node if links else None
    if node is not None and node.type in ("BSDF_DIFFUSE", "BSDF_GLOSSY"):
        tree = material.node_tree
        shader = tree.nodes.new("ShaderNodeBsdfPrincipled")
        for source, target in (("Color", "Base Color"), ("Normal", "Normal"), *((("Roughness", "Roughness"),) if node.type == "BSDF_GLOSSY" else ())):
            if node.inputs[source].is_linked:
                tree.links.new(node.inputs[source].links[0].from_socket, shader.inputs[target])
            elif source != "Normal":
                shader.inputs[target].default_value = node.inputs[source].default_value
        shader.inputs["Metallic"].default_value = float(node.type == "BSDF_GLOSSY")
        if node.type == "BSDF_DIFFUSE":
            shader.inputs["Roughness"].default_value = 1.0
        tree.links.new(shader.outputs[0], output.inputs["Surface"])
        return shader
    if node is None or node.type != "BSDF_PRINCIPLED":
        raise AssetError(f"material {material.name!r} is not a Principled shader ({node.type.lower() if node else 'nothing'})")
    return node


def _check(material, shader) -> None:
    for name in SEE_THROUGH:
        slot = shader.inputs[name]
        if slot.is_linked or slot.default_value > 0.05:
            raise AssetError(f"material {material.name!r} lets light through ({name})")
    if not shader.inputs["Alpha"].is_linked and shader.inputs["Alpha"].default_value < 0.9:
        raise AssetError(f"material {material.name!r} lets light through (Alpha)")
    for name in SWITCHED_OFF:
        slot = shader.inputs[name]
        for link in list(slot.links):
            material.node_tree.links.remove(link)
        slot.default_value = 0.0
    for node in material.node_tree.nodes:
        if node.type == "TEX_IMAGE" and node.image is not None and any(o.is_linked for o in node.outputs):
            if node.image.size[0] == 0:
                raise AssetError(f"material {material.name!r} lacks its picture {Path(node.image.filepath).name or node.image.name!r}")
