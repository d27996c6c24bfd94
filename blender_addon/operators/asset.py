"""What can be done with an asset that stands in the scene, and the repairs that errors offer."""

from __future__ import annotations

from pathlib import Path

import bpy
from bpy.props import StringProperty
from bpy_extras.io_utils import ImportHelper

from .. import paths, session
from ..errors import NearError
from ..scene import assetfile, objects, place
from . import common


def _selected(context: bpy.types.Context) -> list[bpy.types.Object]:
    return [obj for obj in context.selected_objects if objects.is_proxy(obj)] or ([context.object] if objects.is_proxy(context.object) else [])


class OnAsset:
    """Mixin: needs a selected asset."""

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not _selected(context):
            cls.poll_message_set("Select a relightable asset")
            return False
        return True


class NEAR_OT_asset_add(ImportHelper, bpy.types.Operator):
    """Add an asset file (.near) to the scene, at the 3D cursor"""

    bl_idname = "near.asset_add"
    bl_label = "Add Asset File"
    bl_options = {"REGISTER", "UNDO"}

    filename_ext = ".near"
    filter_glob: StringProperty(default="*.near", options={"HIDDEN"})

    def execute(self, context: bpy.types.Context) -> set[str]:
        return common.guarded(lambda: self._add(context), self)

    def _add(self, context: bpy.types.Context) -> set[str]:
        source = Path(self.filepath)
        assetfile.read_record(source)                # says what is wrong with it before anything is copied
        sha256 = assetfile.sha256_of(source)
        target = (paths.beside_blend() or paths.asset_store()) / f"{sha256}.near"
        if not target.is_file():
            paths.write_atomic(target, source.read_bytes())
        place.add_proxy(context.scene, target, sha256, source.stem)
        return {"FINISHED"}


class NEAR_OT_asset_relink(ImportHelper, bpy.types.Operator):
    """Find the lost asset file of the selected asset, or of all that are lost"""

    bl_idname = "near.asset_relink"
    bl_label = "Find Asset File"
    bl_options = {"REGISTER", "UNDO"}

    filename_ext = ".near"
    filter_glob: StringProperty(default="*.near", options={"HIDDEN"})

    def execute(self, context: bpy.types.Context) -> set[str]:
        return common.guarded(lambda: self._relink(context), self)

    def _relink(self, context: bpy.types.Context) -> set[str]:
        chosen = Path(self.filepath)
        folder = chosen if chosen.is_dir() else chosen.parent
        lost = [obj for obj in bpy.data.objects if objects.is_proxy(obj) and not any(p.is_file() for p in objects.candidate_paths(obj))]
        found = 0
        for obj in lost:
            for path in ([chosen] if chosen.is_file() else []) + [folder / f"{obj.near_relight.sha256}.near"]:
                if path.is_file() and assetfile.sha256_of(path) == obj.near_relight.sha256:
                    obj.near_relight.asset_path, obj.near_relight.origin = place.blend_path(path), str(path.parent)
                    found += 1
                    break
        if not found and chosen.is_file():
            self._replace(context, chosen)
        elif not found:
            raise NearError("asset-file-missing", f"None of the {len(lost)} lost asset files is in {folder.name}.", "Look in another folder.")
        session.get().clear_error()
        return {"FINISHED"}

    def _replace(self, context: bpy.types.Context, path: Path) -> None:
        """Another asset than before: only at the user's word, for what is selected."""
        assetfile.read_record(path)
        sha256, chosen = assetfile.sha256_of(path), _selected(context)
        if not chosen:
            raise NearError("asset-changed", f"{path.name} is not the file of any lost asset.", "Select the asset that it should replace, or choose another file.")
        for obj in chosen:
            obj.near_relight.sha256, obj.near_relight.asset_path = sha256, place.blend_path(path)
            obj.near_relight.origin, obj.near_relight.packed = str(path.parent), None
            old, obj.data = obj.data, place.mesh_of(obj.name, *assetfile.read_proxy(path))
            if old.users == 0:
                bpy.data.meshes.remove(old)


class NEAR_OT_asset_pack(OnAsset, bpy.types.Operator):
    """Put the asset's file into the .blend"""

    bl_idname = "near.asset_pack"
    bl_label = "Pack"
    bl_options = {"REGISTER", "UNDO"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        return common.guarded(lambda: ([objects.pack(obj) for obj in _selected(context)], {"FINISHED"})[1], self)


class NEAR_OT_asset_unpack(OnAsset, bpy.types.Operator):
    """Take the asset's file out of the .blend again, beside it"""

    bl_idname = "near.asset_unpack"
    bl_label = "Unpack"
    bl_options = {"REGISTER", "UNDO"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        return common.guarded(lambda: self._unpack(context), self)

    def _unpack(self, context: bpy.types.Context) -> set[str]:
        for obj in _selected(context):
            path = objects.unpack(obj)
            folder = paths.beside_blend()
            if folder is not None and not (folder / path.name).is_file():
                paths.write_atomic(folder / path.name, path.read_bytes())
                path = folder / path.name
            obj.near_relight.asset_path, obj.near_relight.origin = place.blend_path(path), str(path.parent)
        return {"FINISHED"}


class NEAR_OT_asset_mark(OnAsset, bpy.types.Operator):
    """Show the object in the asset browser, with its file packed so that it can be used in other .blend files"""

    bl_idname = "near.asset_mark"
    bl_label = "Mark as Asset"
    bl_options = {"REGISTER", "UNDO"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        return common.guarded(lambda: self._mark(context), self)

    def _mark(self, context: bpy.types.Context) -> set[str]:
        for obj in _selected(context):
            objects.pack(obj)
            obj.asset_mark()
            obj.asset_data.tags.new("relightable", skip_if_exists=True)
            if not any(obj.preview_ensure().image_size):
                obj.asset_generate_preview()
        return {"FINISHED"}


class NEAR_OT_make_scale_uniform(bpy.types.Operator):
    """Give assets the same scale on all axes (the mean of the three)"""

    bl_idname = "near.make_scale_uniform"
    bl_label = "Make Scale Uniform"
    bl_options = {"REGISTER", "UNDO"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        changed = 0
        for obj in objects.proxies(context.scene):
            try:
                objects.check_transform(obj.matrix_world, obj.name)
            except NearError:
                location, rotation, scale = obj.matrix_world.decompose()
                mean = abs(scale.x * scale.y * scale.z) ** (1 / 3) or 1.0
                obj.matrix_world = obj.matrix_world.LocRotScale(location, rotation, (mean,) * 3)
                changed += 1
        session.get().clear_error()
        self.report({"INFO"}, f"{changed} assets were given an even scale")
        return {"FINISHED"}


class NEAR_OT_make_camera_perspective(bpy.types.Operator):
    """Make the scene's camera a perspective one"""

    bl_idname = "near.make_camera_perspective"
    bl_label = "Make Camera Perspective"
    bl_options = {"REGISTER", "UNDO"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        camera = context.scene.camera
        if camera is None or camera.type != "CAMERA":
            self.report({"ERROR"}, "The scene has no camera")
            return {"CANCELLED"}
        camera.data.type = "PERSP"
        session.get().clear_error()
        return {"FINISHED"}


register, unregister = bpy.utils.register_classes_factory((
    NEAR_OT_asset_add, NEAR_OT_asset_relink, NEAR_OT_asset_pack, NEAR_OT_asset_unpack, NEAR_OT_asset_mark, NEAR_OT_make_scale_uniform,
    NEAR_OT_make_camera_perspective))
