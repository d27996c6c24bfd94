"""Files for other programs: the asset itself, splats under the present light, a mesh with PBR textures."""

from __future__ import annotations

from pathlib import Path

import bpy
from bpy.props import EnumProperty, StringProperty
from bpy_extras.io_utils import ExportHelper

from .. import paths, session, transfer, wire
from ..client import Client
from ..errors import NearError
from ..jobs import Job
from ..scene import lighting, objects
from . import common
from .encode import written_glb

FORMATS = [("near", "NeAR Asset (.near)", "The asset as it is"),
           ("ply", "Gaussian Splats (.ply)", "Splats under the scene's present light, for splat viewers"),
           ("glb", "Mesh with PBR Textures (.glb)", "Base colour, roughness and metallic, on the UVs of the mesh that the panel names, or on the asset's own mesh")]


class NEAR_OT_export(ExportHelper, bpy.types.Operator):
    """Write the active asset to a file for other programs"""

    bl_idname = "near.export"
    bl_label = "Export Asset"

    filename_ext = ""
    format: EnumProperty(name="Format", items=FORMATS)
    filter_glob: StringProperty(default="*.near;*.ply;*.glb", options={"HIDDEN"})
    from_button = False

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not objects.is_proxy(context.object):
            cls.poll_message_set("Select a relightable asset")
            return False
        return common.no_job(cls)

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        self.from_button = True
        self.filepath = f"{context.object.name}.{self.format}"
        return super().invoke(context, event)

    def check(self, _context: bpy.types.Context) -> bool:
        wanted = str(Path(self.filepath).with_suffix(f".{self.format}"))
        changed, self.filepath = wanted != self.filepath, wanted
        return changed

    def execute(self, context: bpy.types.Context) -> set[str]:
        return common.guarded(lambda: self._begin(context), self)

    def _begin(self, context: bpy.types.Context) -> set[str]:
        source, target, kind = objects.asset_path(context.object), Path(self.filepath), self.format
        here = session.get()
        light = None
        if kind == "ply":
            here.ensure()
            light = lighting.light_spec(lighting.capture(context.evaluated_depsgraph_get()), here)
            light = _seen_from(light, context.object)
        onto = _mesh_in_asset_space(context, context.object) if kind == "glb" else None

        def work(job: Job, client: Client):
            sha256 = yield from here.putting(client, source, "asset")
            mesh = (yield from here.putting(client, onto, "mesh")) if onto is not None else ""
            if kind != "near":
                made = yield from job.asking(client, wire.Export(id=client.new_id(), asset=sha256, format=kind, light=light, mesh=mesh))
                sha256 = made.result["sha256"]
            data = (yield from transfer.fetching(client, sha256)) if kind != "near" else source.read_bytes()
            paths.write_atomic(target, data)
            return target

        return common.carry_out(self, Job(f"Export {target.name}", work), at_once=not self.from_button)


def _mesh_in_asset_space(context: bpy.types.Context, asset: bpy.types.Object) -> bytes | None:
    """A GLB file of the mesh that gets the textures, as it stands to the asset now; None: the asset's own.

    Raises:
        NearError: `export-no-uvs`, those of `encode.written_glb`.
    """
    obj = asset.near_relight.bake_onto
    if obj is None:
        return None
    graph = context.evaluated_depsgraph_get()
    mesh = bpy.data.meshes.new_from_object(obj.evaluated_get(graph), preserve_all_data_layers=True, depsgraph=graph)
    if not mesh.uv_layers or not mesh.polygons:
        bpy.data.meshes.remove(mesh)
        raise NearError("export-no-uvs", f"The mesh {obj.name} has no UVs to bake onto.", "Unwrap it, or clear Bake Onto to use the asset's own mesh.")
    asset_from_mesh = asset.matrix_world.inverted() @ obj.matrix_world
    mesh.transform(asset_from_mesh)
    if asset_from_mesh.determinant() < 0:
        mesh.flip_normals()
    return written_glb(context, obj, mesh, export_materials="NONE")


def _seen_from(light: wire.LightSpec, obj: bpy.types.Object) -> wire.LightSpec:
    """The light as the asset sees it, turned the other way: splats are written in asset space."""
    import dataclasses

    from mathutils import Matrix

    world_from_asset = obj.matrix_world.to_quaternion().to_matrix()
    env_from_world = Matrix([light.env_from_world[3 * i:3 * i + 3] for i in range(3)])
    turned = env_from_world @ world_from_asset
    return dataclasses.replace(light, env_from_world=tuple(value for row in turned for value in row))


def menu(self: bpy.types.Menu, _context: bpy.types.Context) -> None:
    """In File > Export."""
    self.layout.operator_context = "INVOKE_DEFAULT"
    for kind, text, _ in FORMATS:
        self.layout.operator(NEAR_OT_export.bl_idname, text=f"NeAR: {text}").format = kind


def register() -> None:
    bpy.utils.register_class(NEAR_OT_export)
    bpy.types.TOPBAR_MT_file_export.append(menu)


def unregister() -> None:
    bpy.types.TOPBAR_MT_file_export.remove(menu)
    bpy.utils.unregister_class(NEAR_OT_export)
