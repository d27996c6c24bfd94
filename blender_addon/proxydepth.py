"""How far the proxies' own surfaces are, per pixel of a viewport: the overlay must not be hidden by the objects it stands for.

A proxy lies within a few millimetres of its asset's picture, sometimes before it, sometimes behind it, and the viewport has drawn
it already. Its distance is drawn once more, into a texture of our own, so that the overlay can step just before it; whatever
else is nearer than the proxy still hides the overlay.
"""

from __future__ import annotations

import bpy
import numpy as np

from .scene import place
from .scene.objects import is_proxy

NOTHING = -1e30                     # view-space z where there is no proxy
_MOST_MESHES = 32

_shader = None
_batches: dict[tuple, object] = {}  # what a mesh looks like -> its GPUBatch


def seen(depsgraph: bpy.types.Depsgraph) -> list[tuple[tuple, object]]:
    """[(key of the mesh, world_from_object)] of all visible proxies; their meshes are on the GPU afterwards. In a draw handler."""
    found = []
    for instance in depsgraph.object_instances:
        item = instance.object
        if item.type != "MESH" or not (instance.show_self or instance.is_instance) or not is_proxy(item.original):
            continue
        key = (item.original.name_full, item.data.name_full, len(item.data.vertices), len(item.data.polygons))
        if key not in _batches:
            _batches[key] = _batch(item.data)
            while len(_batches) > _MOST_MESHES:
                del _batches[next(iter(_batches))]
        found.append((key, instance.matrix_world.copy()))
    return found


def forget(name_full: str) -> None:
    """The object's mesh has changed its shape."""
    for key in [key for key in _batches if name_full in key[:2]]:
        del _batches[key]


def clear() -> None:
    """Frees what is on the GPU."""
    global _shader
    _batches.clear()
    _shader = None


class ProxyDepth:
    """One viewport's texture `texture`: R32F, view-space z (negative before the eye) of the nearest proxy, `NOTHING` elsewhere."""

    def __init__(self) -> None:
        self.texture = self._depth = self._frame = None

    def draw(self, proxies: list[tuple[tuple, object]], width: int, height: int, view_from_world, clip_from_view) -> None:
        """Draws it anew for a region of that many pixels."""
        import gpu

        if self.texture is None or (self.texture.width, self.texture.height) != (width, height):
            self.texture = gpu.types.GPUTexture((width, height), format="R32F")
            self._depth = gpu.types.GPUTexture((width, height), format="DEPTH_COMPONENT32F")
            self._frame = gpu.types.GPUFrameBuffer(depth_slot=self._depth, color_slots=self.texture)
        shader = _the_shader()
        with self._frame.bind():
            self._frame.clear(color=(NOTHING, 0, 0, 0), depth=1.0)
            gpu.state.blend_set("NONE")
            gpu.state.depth_test_set("LESS_EQUAL")
            gpu.state.depth_mask_set(True)
            shader.bind()
            for key, world_from_object in proxies:
                batch = _batches.get(key)
                if batch is None:
                    continue
                view_from_object = view_from_world @ world_from_object
                shader.uniform_float("clip_from_object", clip_from_view @ view_from_object)
                shader.uniform_float("view_z", tuple(view_from_object[2]))
                batch.draw(shader)
            gpu.state.depth_mask_set(False)
            gpu.state.depth_test_set("NONE")


def _batch(mesh: bpy.types.Mesh):
    import gpu
    from gpu_extras.batch import batch_for_shader

    vertices, faces = place.mesh_arrays(mesh)
    if not len(faces):
        vertices, faces = np.zeros((3, 3), np.float32), np.array([[0, 1, 2]], np.int32)
    return batch_for_shader(_the_shader(), "TRIS", {"position": vertices}, indices=faces)


def _the_shader():
    global _shader
    if _shader is None:
        import gpu

        info = gpu.types.GPUShaderCreateInfo()
        info.push_constant("MAT4", "clip_from_object")
        info.push_constant("VEC4", "view_z")
        info.vertex_in(0, "VEC3", "position")
        between = gpu.types.GPUStageInterfaceInfo("near_proxy")
        between.smooth("FLOAT", "z")
        info.vertex_out(between)
        info.fragment_out(0, "VEC4", "distance_out")
        info.vertex_source("void main() { z = dot(view_z, vec4(position, 1.0)); gl_Position = clip_from_object * vec4(position, 1.0); }")
        info.fragment_source("void main() { distance_out = vec4(z, 0.0, 0.0, 1.0); }")
        _shader = gpu.shader.create_from_info(info)
    return _shader
