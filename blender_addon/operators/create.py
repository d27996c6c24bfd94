"""Photo to asset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bpy
from bpy.props import CollectionProperty, StringProperty
from bpy_extras.io_utils import ImportHelper
from mathutils import Matrix

from .. import pictures, session, transfer, wire
from ..client import Client
from ..errors import NearError
from ..jobs import Job
from ..scene import assetfile, place
from . import common

IMAGES = "*.png;*.jpg;*.jpeg;*.tif;*.tiff;*.bmp;*.webp;*.avif;*.exr"


class Landing:
    """Where a job's asset goes: plain data, since scenes and objects may be gone when it ends."""

    def __init__(self, scene: bpy.types.Scene, name: str, world_from_asset: Matrix | None = None, photo: str = "", hide: str = "",
                 source: str = "") -> None:
        self.scene, self.name, self.photo, self.hide, self.source = scene.name, name, photo, hide, source
        self.world_from_asset = world_from_asset

    def putting(self, job: Job, path: Path, sha256: str) -> transfer.Steps[str]:
        """Adds the object, with the last preview as its picture, as one undo step; gives way after each heavy part. -> its name."""
        vertices, faces = assetfile.read_proxy(path)
        yield
        mesh = place.mesh_of(self.name, vertices, faces)
        yield
        scene = bpy.data.scenes.get(self.scene) or bpy.context.scene
        obj = place.add_proxy(scene, path, sha256, self.name, self.world_from_asset, self.photo, mesh=mesh)
        hidden = bpy.data.objects.get(self.hide) if self.hide else None
        obj.near_relight.bake_onto = bpy.data.objects.get(self.source) if self.source else None
        if hidden is not None:
            hidden.hide_render = True
            hidden.hide_set(True)
        if job.preview is not None:
            place.set_preview(obj, pictures.pixels_of(job.preview))
        name = obj.name                             # no reference is kept: the user may undo before the next step
        yield
        place.push_undo(job.title)
        return name


def asset_job(title: str, request: Any, landing: Landing) -> Job:
    """A job that lets the backend make an asset and puts it into the scene. `request(job, client)`: a generator of the wire's request."""

    def work(job: Job, client: Client) -> transfer.Steps[str]:
        job.stage = "sending"
        message = yield from request(job, client)
        made = yield from job.asking(client, message)
        job.stage = "receiving"
        sha256 = made.result["sha256"]
        data = yield from transfer.fetching(client, sha256)
        if (yield from transfer.hashing(data)) != sha256:
            raise NearError("asset-damaged", "The asset was damaged on its way.", "Try again.")
        path = yield from place.storing(data, sha256)
        session.get().mark_known(client, sha256)
        job.stage = "placing"
        return (yield from landing.putting(job, path, sha256))

    return Job(title, work)


def checked_photo(text: str) -> Path:
    """The photo's path.

    Raises:
        NearError: `photo-not-set`, `photo-missing`.
    """
    if not text:
        raise NearError("photo-not-set", "No photo is chosen.", "Choose a picture of one object.")
    path = Path(bpy.path.abspath(text))
    if not path.is_file():
        raise NearError("photo-missing", f"The photo {path.name} is not there.", "Choose another photo.")
    return path


class NEAR_OT_create(common.AtOnce, bpy.types.Operator):
    """Make a relightable asset from the photo"""

    bl_idname = "near.create"
    bl_label = "Create Asset"

    @classmethod
    def poll(cls, _context: bpy.types.Context) -> bool:
        return common.no_job(cls)

    def execute(self, context: bpy.types.Context) -> set[str]:
        return common.guarded(lambda: self._begin(context), self)

    def _begin(self, context: bpy.types.Context) -> set[str]:
        settings = context.scene.near_relight
        photos = [settings.photo, *(entry.path for entry in settings.more_photos)]
        finished = {"FINISHED"}
        for index, text in enumerate(photos):
            finished = common.carry_out(self, create_job(context, text, index), self.at_once)
            if "CANCELLED" in finished:
                break
        return finished


def create_job(context: bpy.types.Context, photo_text: str, index: int = 0) -> Job:
    """The job for one photo, with the panel's settings as they are now. `index`: places several beside each other.

    Raises:
        NearError: a setting cannot be used.
    """
    settings, scene = context.scene.near_relight, context.scene
    photo = checked_photo(photo_text)
    shape = checked_photo(settings.shape_photo) if settings.use_shape_photo and settings.geometry != "MESH" else None
    generator = settings.generator.strip() if settings.geometry == "GENERATOR" else ""
    if settings.geometry == "GENERATOR" and not generator:
        raise NearError("generator-not-set", "No shape generator is named.", "Name one that is installed in the backend, or choose another geometry.")
    mesh_data, world_from_asset, hide, source = None, None, "", ""
    if settings.geometry == "MESH":
        if settings.mesh is None or settings.mesh.type != "MESH":
            raise NearError("mesh-not-set", "No mesh object is chosen.", "Choose the mesh that gives the shape.")
        mesh, world_from_asset = place.evaluated_mesh(settings.mesh, context.evaluated_depsgraph_get())
        mesh_data = place.ply_bytes(*place.mesh_arrays(mesh))
        bpy.data.meshes.remove(mesh)
        source, hide = settings.mesh.name, settings.mesh.name if settings.hide_mesh else ""
    elif index:
        world_from_asset = Matrix.Translation(scene.cursor.location) @ Matrix.Translation((1.2 * index, 0, 0.5))
    seed, exposure_stops = settings.seed, settings.exposure

    def request(job: Job, client: Client):
        here = session.get()
        photo_sha = yield from here.putting(client, photo, "photo")
        shape_sha = (yield from here.putting(client, shape, "photo")) if shape is not None else ""
        mesh_sha = (yield from here.putting(client, mesh_data, "mesh")) if mesh_data is not None else ""
        return wire.Create(id=client.new_id(), photo=photo_sha, mesh=mesh_sha, shape=shape_sha, generator=generator, seed=seed,
                           exposure_stops=exposure_stops)

    return asset_job(f"Create {photo.stem}", request, Landing(scene, photo.stem, world_from_asset, str(photo), hide, source))


class NEAR_OT_photo_pick(ImportHelper, bpy.types.Operator):
    """Choose the photo; several at once make one asset each"""

    bl_idname = "near.photo_pick"
    bl_label = "Choose Photo"

    filter_glob: StringProperty(default=IMAGES, options={"HIDDEN"})
    files: CollectionProperty(type=bpy.types.OperatorFileListElement, options={"HIDDEN", "SKIP_SAVE"})
    directory: StringProperty(subtype="DIR_PATH", options={"HIDDEN", "SKIP_SAVE"})

    def execute(self, context: bpy.types.Context) -> set[str]:
        settings = context.scene.near_relight
        names = [entry.name for entry in self.files if entry.name]
        found = [str(Path(self.directory) / name) for name in names] if names and self.directory else [self.filepath]
        settings.photo = found[0]
        settings.more_photos.clear()
        for path in found[1:]:
            settings.more_photos.add().path = path
        pictures.drop("mask")
        session.get().clear_error()
        return {"FINISHED"}


class NEAR_OT_photos_clear(bpy.types.Operator):
    """Keep the first photo only"""

    bl_idname = "near.photos_clear"
    bl_label = "Keep the First Photo Only"

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.scene.near_relight.more_photos.clear()
        return {"FINISHED"}


class NEAR_OT_photo_mask(common.AtOnce, bpy.types.Operator):
    """Show what would be cut out of the photo"""

    bl_idname = "near.photo_mask"
    bl_label = "Show Mask"

    @classmethod
    def poll(cls, _context: bpy.types.Context) -> bool:
        return common.no_job(cls)

    def execute(self, context: bpy.types.Context) -> set[str]:
        return common.guarded(lambda: self._begin(context), self)

    def _begin(self, context: bpy.types.Context) -> set[str]:
        photo = checked_photo(context.scene.near_relight.photo)

        def work(job: Job, client: Client):
            sha256 = yield from session.get().putting(client, photo, "photo")
            told = yield from job.asking(client, wire.Matte(id=client.new_id(), photo=sha256))
            if job.preview is not None:
                pictures.show("mask", pictures.pixels_of(job.preview))
            return told.result

        return common.carry_out(self, Job("Mask", work), self.at_once)


class NEAR_OT_cancel(bpy.types.Operator):
    """Cancel the running job, in the backend too"""

    bl_idname = "near.cancel"
    bl_label = "Cancel"

    def execute(self, _context: bpy.types.Context) -> set[str]:
        here = session.get()
        for job in list(here.jobs):
            job.cancel()
        here.jobs.clear()
        here.notify()
        return {"FINISHED"}


register, unregister = bpy.utils.register_classes_factory((
    NEAR_OT_create, NEAR_OT_photo_pick, NEAR_OT_photos_clear, NEAR_OT_photo_mask, NEAR_OT_cancel))
