"""Mesh with its materials to asset."""

from __future__ import annotations

import tempfile
from pathlib import Path

import addon_utils
import bpy
from mathutils import Matrix

from .. import session, wire
from ..client import Client
from ..errors import NearError
from ..jobs import Job
from ..scene import objects, place
from . import common
from .create import Landing, asset_job


class NEAR_OT_encode(common.AtOnce, bpy.types.Operator):
    """Make a relightable asset from the active mesh object and its PBR materials; the asset takes the object's place"""

    bl_idname = "near.encode"
    bl_label = "Asset from This Mesh"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        obj = context.object
        if obj is None or obj.type != "MESH" or objects.is_proxy(obj):
            cls.poll_message_set("Select a mesh object that is not an asset")
            return False
        if obj.mode != "OBJECT":
            cls.poll_message_set("Leave edit mode first")
            return False
        return common.no_job(cls)

    def execute(self, context: bpy.types.Context) -> set[str]:
        return common.guarded(lambda: self._begin(context), self)

    def _begin(self, context: bpy.types.Context) -> set[str]:
        obj, settings = context.object, context.scene.near_relight
        data, world_from_asset = glb_of(context, obj)
        seed = settings.seed

        def request(job: Job, client: Client):
            sha256 = yield from session.get().putting(client, data, "mesh")
            return wire.Encode(id=client.new_id(), mesh=sha256, seed=seed)

        landing = Landing(context.scene, f"{obj.name} relightable", world_from_asset, hide=obj.name if settings.hide_mesh else "", source=obj.name)
        return common.carry_out(self, asset_job(f"Encode {obj.name}", request, landing), self.at_once)


def glb_of(context: bpy.types.Context, obj: bpy.types.Object) -> tuple[bytes, Matrix]:
    """-> (GLB file of the object with modifiers, scale and materials, world_from_asset of an asset made from it).

    Raises:
        NearError: `gltf-missing`, `mesh-export`, and those of `place.evaluated_mesh`.
    """
    mesh, world_from_asset = place.evaluated_mesh(obj, context.evaluated_depsgraph_get())
    return written_glb(context, obj, mesh), world_from_asset


def written_glb(context: bpy.types.Context, obj: bpy.types.Object, mesh: bpy.types.Mesh, **options) -> bytes:
    """A GLB file of `mesh` with the object's materials; removes the mesh. `options`: further ones of Blender's exporter.

    Raises:
        NearError: `gltf-missing`, `mesh-export`.
    """
    if not addon_utils.check("io_scene_gltf2")[1]:
        addon_utils.enable("io_scene_gltf2")
    if not addon_utils.check("io_scene_gltf2")[1]:
        bpy.data.meshes.remove(mesh)
        raise NearError("gltf-missing", "Blender's glTF add-on, which carries materials over, is not there.", "Enable it in the preferences.")
    scene = bpy.data.scenes.new("near export")
    copy = bpy.data.objects.new("near export", mesh)
    for slot, theirs in zip(copy.material_slots, obj.material_slots):   # a material may hang on the object instead of the mesh
        if theirs.link == "OBJECT":
            slot.link, slot.material = "OBJECT", theirs.material
    scene.collection.objects.link(copy)
    try:
        with tempfile.TemporaryDirectory(dir=bpy.app.tempdir) as folder:
            path = Path(folder) / "mesh.glb"
            with context.temp_override(scene=scene, view_layer=scene.view_layers[0]):
                bpy.ops.export_scene.gltf(filepath=str(path), export_format="GLB", use_active_scene=True, export_animations=False,
                                          export_yup=True, export_tangents=False, **options)
            return path.read_bytes()
    except (RuntimeError, OSError) as error:
        raise NearError("mesh-export", f"The object {obj.name} could not be exported ({error}).", "Check its mesh and materials.") from None
    finally:
        bpy.data.scenes.remove(scene)
        bpy.data.objects.remove(copy)
        bpy.data.meshes.remove(mesh)


register, unregister = bpy.utils.register_classes_factory((NEAR_OT_encode,))
