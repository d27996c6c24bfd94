"""Surface samples that know their material, whatever shader nodes it is made of.

A little triangle is put at every sample, with the surface's own coordinates, and baked to one texel: Cycles evaluates the
nodes there, with textures averaged over the triangle.
"""

from __future__ import annotations

from dataclasses import dataclass

import bpy
import numpy as np

from dataset.assets import AssetError, output_node, principled

BAKE_SAMPLES = 4
SPREAD = 0.35  # of the mean distance of samples: half the size of a triangle
HALF_SEEN = 0.05  # share of the surface that may be neither solid nor cut away
CORNERS = np.array([[0.1, 0.1], [0.9, 0.1], [0.5, 0.9]])  # of a texel, its middle inside


@dataclass(frozen=True)
class Samples:
    """points, normals (smooth, no normal map), base_lin709 [N, 3]; roughness, metallic [N]; area of the whole surface."""

    points: np.ndarray
    normals: np.ndarray
    base_lin709: np.ndarray
    roughness: np.ndarray
    metallic: np.ndarray
    area: float


def sample_materials(rng: np.random.Generator, count: int, materials: list) -> Samples:
    """``count`` samples, uniform in area, of all mesh objects in the scene; parts cut away by alpha are left out.

    Raises:
        AssetError: there is no area, or alpha hides all of it.
    """
    items = [o for o in bpy.context.scene.objects if o.type == "MESH"]
    surfaces = [_triangles(o) for o in items]
    areas = [np.linalg.norm(np.cross(w[:, 1] - w[:, 0], w[:, 2] - w[:, 0]), axis=-1) / 2 for w, _, _ in surfaces]
    area = float(sum(a.sum() for a in areas))
    if not area > 1e-10:
        raise AssetError("its surface has no area")
    cut = any(principled(m).inputs["Alpha"].is_linked for m in materials)
    drawn = int(count * 1.5) if cut else count
    face, weights = _draw(rng, np.concatenate(areas), drawn)
    side = int(np.ceil(np.sqrt(drawn)))
    half = SPREAD * np.sqrt(area / drawn)
    clouds, points, normals, first, done = [], [], [], 0, 0
    for item, (world, loops, normal), own in zip(items, surfaces, areas):
        mine = (face >= first) & (face < first + len(own))
        f, w = face[mine] - first, weights[mine]
        first += len(own)
        if not len(f):
            continue
        points.append(np.einsum("nk,nkc->nc", w, world[f]))
        n = np.einsum("nk,nkc->nc", w, normal[f])
        normals.append(n / np.maximum(np.linalg.norm(n, axis=-1, keepdims=True), 1e-9))
        size = half / np.sqrt(np.maximum(2 * own[f], 1e-12))
        clouds.append(_cloud(item, loops[f], w, size, done, side))
        done += len(f)
    base, rest = _bake(clouds, materials, side, done)
    p, n = np.concatenate(points), np.concatenate(normals)
    if ((rest[:, 2] > 0.1) & (rest[:, 2] < 0.9)).mean() > HALF_SEEN:
        raise AssetError("parts of it let light through (alpha)")
    kept = np.nonzero(rest[:, 2] > 0.5)[0]
    if not len(kept):
        raise AssetError("alpha makes all of it invisible")
    if len(kept) > count:
        kept = np.sort(rng.permutation(kept)[:count])
    return Samples(p[kept], n[kept], base[kept].clip(0, 1), rest[kept, 0].clip(0, 1), rest[kept, 1].clip(0, 1), area)


def _triangles(item) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of an object: corners in the world [T, 3, 3], loop indices [T, 3], corner normals in the world [T, 3, 3]."""
    mesh = item.data
    mesh.calc_loop_triangles()
    loops, vertices = (np.empty(len(mesh.loop_triangles) * 3, np.int32) for _ in range(2))
    mesh.loop_triangles.foreach_get("loops", loops)
    mesh.loop_triangles.foreach_get("vertices", vertices)
    local, normal = np.empty(len(mesh.vertices) * 3, np.float32), np.empty(len(mesh.loops) * 3, np.float32)
    mesh.vertices.foreach_get("co", local)
    mesh.corner_normals.foreach_get("vector", normal)
    matrix = np.array(item.matrix_world)
    world = local.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]
    turned = normal.reshape(-1, 3) @ np.linalg.inv(matrix[:3, :3])
    loops = loops.reshape(-1, 3)
    return world[vertices.reshape(-1, 3)], loops, turned[loops] / np.maximum(np.linalg.norm(turned[loops], axis=-1, keepdims=True), 1e-9)


def _draw(rng: np.random.Generator, areas: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Stratified along the running area: rising triangle indices [count] and barycentric weights [count, 3]."""
    running = np.cumsum(areas)
    face = np.searchsorted(running, (np.arange(count) + rng.random(count)) * (running[-1] / count), side="right").clip(0, len(areas) - 1)
    root, v = np.sqrt(rng.random(count)), rng.random(count)
    return face, np.stack([1 - root, root * (1 - v), root * v], -1)


def _cloud(item, loops: np.ndarray, weights: np.ndarray, size: np.ndarray, first: int, side: int):
    """An object of one little triangle per sample, with the source's UVs, colours, materials and coordinates."""
    source, count = item.data, len(loops)
    # Three barycentric points around each sample that average to it.
    offsets = np.array([[-1, 0.5, 0.5], [0.5, -1, 0.5], [0.5, 0.5, -1]]) * (2 / 3)
    corner = weights[:, None] + offsets[None] * np.minimum(size, 0.5)[:, None, None]

    def spread(values: np.ndarray) -> np.ndarray:  # per loop [L, K] -> per new corner [3 * count, K]
        return np.einsum("nck,nkv->ncv", corner, values[loops]).reshape(-1, values.shape[1]).astype(np.float32)

    vertex_of_loop = np.empty(len(source.loops), np.int32)
    source.loops.foreach_get("vertex_index", vertex_of_loop)
    local = np.empty(len(source.vertices) * 3, np.float32)
    source.vertices.foreach_get("co", local)
    mesh = bpy.data.meshes.new("samples")
    mesh.vertices.add(3 * count)
    mesh.vertices.foreach_set("co", spread(local.reshape(-1, 3)[vertex_of_loop]).ravel())
    mesh.loops.add(3 * count)
    mesh.loops.foreach_set("vertex_index", np.arange(3 * count, dtype=np.int32))
    mesh.polygons.add(count)
    mesh.polygons.foreach_set("loop_start", np.arange(0, 3 * count, 3, dtype=np.int32))
    slots = np.zeros(len(source.loops), np.int32)
    for_polygon = np.empty(len(source.polygons), np.int32)
    source.polygons.foreach_get("material_index", for_polygon)
    totals = np.empty(len(source.polygons), np.int32)
    source.polygons.foreach_get("loop_total", totals)
    slots[:] = np.repeat(for_polygon, totals)
    mesh.polygons.foreach_set("material_index", slots[loops[:, 0]])
    for material in source.materials:
        mesh.materials.append(material)
    _copy_layers(source, mesh, spread, vertex_of_loop)
    target = mesh.uv_layers.new(name="near samples")
    texel = np.stack(np.divmod(np.arange(first, first + count), side)[::-1], -1)
    target.data.foreach_set("uv", ((texel[:, None] + CORNERS[None]) / side).astype(np.float32).ravel())
    mesh.update(calc_edges=True)
    mesh.uv_layers.active = mesh.uv_layers["near samples"]
    mesh.use_auto_texspace = False
    mesh.texspace_location, mesh.texspace_size = source.texspace_location, source.texspace_size
    cloud = bpy.data.objects.new("samples", mesh)
    cloud.matrix_world = item.matrix_world
    bpy.context.scene.collection.objects.link(cloud)
    return cloud


def _copy_layers(source, mesh, spread, vertex_of_loop: np.ndarray) -> None:
    rendered = next((layer.name for layer in source.uv_layers if layer.active_render), None)
    for layer in list(source.uv_layers)[:6]:  # a mesh holds 8
        uv = np.empty(len(source.loops) * 2, np.float32)
        layer.data.foreach_get("uv", uv)
        mesh.uv_layers.new(name=layer.name).data.foreach_set("uv", spread(uv.reshape(-1, 2)).ravel())
    if rendered and rendered in mesh.uv_layers:
        mesh.uv_layers[rendered].active_render = True
    for attribute in source.color_attributes:
        per_vertex = attribute.domain == "POINT"
        values = np.empty((len(source.vertices) if per_vertex else len(source.loops)) * 4, np.float32)
        attribute.data.foreach_get("color", values)
        values = values.reshape(-1, 4)
        copy = mesh.color_attributes.new(attribute.name, "FLOAT_COLOR", "CORNER")
        copy.data.foreach_set("color", spread(values[vertex_of_loop] if per_vertex else values).ravel())
    if source.color_attributes and source.color_attributes.render_color_index >= 0:
        mesh.color_attributes.render_color_index = source.color_attributes.render_color_index


def _bake(clouds: list, materials: list, side: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Base colour [N, 3], and (roughness, metallic, alpha) [N, 3] of the clouds' triangles; the clouds are removed."""
    scene, image = bpy.context.scene, bpy.data.images.new("near samples", side, side, alpha=False, float_buffer=True)
    image.colorspace_settings.name = "Non-Color"
    restore = [_BakeNodes(m, image) for m in materials]
    for item in scene.objects:
        item.select_set(False)
    for cloud in clouds:
        cloud.select_set(True)
    bpy.context.view_layer.objects.active = clouds[0]
    samples, denoise, scene.cycles.samples, scene.cycles.use_denoising = scene.cycles.samples, scene.cycles.use_denoising, BAKE_SAMPLES, False
    results = []
    for name in ("base", "rest"):
        for nodes in restore:
            nodes.show(name)
        bpy.ops.object.bake(type="EMIT", margin=0, use_clear=False, target="IMAGE_TEXTURES", save_mode="INTERNAL")
        pixels = np.empty(side * side * 4, np.float32)
        image.pixels.foreach_get(pixels)
        results.append(pixels.reshape(-1, 4)[:count, :3].copy())
    for nodes in restore:
        nodes.remove()
    for cloud in clouds:
        bpy.data.meshes.remove(cloud.data)
    bpy.data.images.remove(image)
    scene.cycles.samples, scene.cycles.use_denoising = samples, denoise
    return results[0], results[1]


class _BakeNodes:
    """The nodes that show a material's inputs as light, and the way back."""

    def __init__(self, material, image) -> None:
        self.tree, self.output, self.shader = material.node_tree, output_node(material), principled(material)
        nodes = self.tree.nodes
        self.active = nodes.active
        self.target, self.emission, self.join = (nodes.new(k) for k in ("ShaderNodeTexImage", "ShaderNodeEmission", "ShaderNodeCombineXYZ"))
        self.target.image, nodes.active = image, self.target
        for slot, name in zip(self.join.inputs, ("Roughness", "Metallic", "Alpha")):
            self._feed(name, slot)
        self.tree.links.new(self.emission.outputs[0], self.output.inputs["Surface"])

    def _feed(self, name: str, slot) -> None:
        source = self.shader.inputs[name]
        if source.is_linked:
            self.tree.links.new(source.links[0].from_socket, slot)
        else:
            slot.default_value = source.default_value

    def show(self, what: str) -> None:
        slot = self.emission.inputs["Color"]
        for link in list(slot.links):
            self.tree.links.remove(link)
        if what == "base":
            self._feed("Base Color", slot)
        else:
            self.tree.links.new(self.join.outputs[0], slot)

    def remove(self) -> None:
        self.tree.links.new(self.shader.outputs[0], self.output.inputs["Surface"])
        for node in (self.target, self.emission, self.join):
            self.tree.nodes.remove(node)
        self.tree.nodes.active = self.active
