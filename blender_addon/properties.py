"""Data in the .blend: what an object knows of its asset, and the settings of the Create panel."""

from __future__ import annotations

import bpy
from bpy.props import BoolProperty, CollectionProperty, EnumProperty, FloatProperty, IntProperty, PointerProperty, StringProperty

from .wire import MAX_STOPS

GEOMETRIES = [
    ("PHOTO", "From the Photo", "Inflate the outline of the photo; plausible from the photo's side"),
    ("MESH", "Mesh Object", "Use a mesh of the scene as it is; the asset takes its place, size and turn"),
    ("GENERATOR", "Generator", "Use a shape generator that is installed in the backend"),
]

# Blender 4.5 warns of "//" in a path unless the property says that it understands it; before, it knows no such option.
_RELATIVE = {"PATH_SUPPORTS_BLEND_RELATIVE"} if bpy.app.version >= (4, 5, 0) else set()


def is_plain_mesh(_settings, obj: bpy.types.Object) -> bool:
    return obj.type == "MESH" and not obj.near_relight.is_proxy


class NEAR_PG_object(bpy.types.PropertyGroup):
    """On every object; says which asset a proxy stands for."""

    is_proxy: BoolProperty(name="Relightable Asset", description="This object stands for a relightable asset", options=set())
    asset_path: StringProperty(name="Asset File", description="The asset's file", subtype="FILE_PATH", options=_RELATIVE)
    sha256: StringProperty(name="Asset", description="Hash that names the asset's content", options=set())
    origin: StringProperty(name="Origin", description="Folder the asset's file was in when the .blend was saved", options=set())
    photo: StringProperty(name="Photo", description="The photo that the asset was made from", subtype="FILE_PATH", options=_RELATIVE)
    packed: PointerProperty(name="Packed", description="Copy of the asset's file inside the .blend", type=bpy.types.Text)
    bake_onto: PointerProperty(name="Bake Onto", description="Mesh that gets the textures of a GLB on its own UVs; empty: the asset's own mesh",
                               type=bpy.types.Object, poll=is_plain_mesh)


class NEAR_PG_photo(bpy.types.PropertyGroup):
    """One further photo of the same object."""

    path: StringProperty(name="Photo", subtype="FILE_PATH", options=_RELATIVE)


class NEAR_PG_scene(bpy.types.PropertyGroup):
    """Settings of the Create panel."""

    photo: StringProperty(name="Photo", description="Picture of one object; its alpha cuts it out, else it is cut out automatically",
                          subtype="FILE_PATH", options=_RELATIVE)
    more_photos: CollectionProperty(name="More Photos", type=NEAR_PG_photo)
    geometry: EnumProperty(name="Geometry", description="Where the asset's shape comes from", items=GEOMETRIES, default="PHOTO", options=set())
    mesh: PointerProperty(name="Mesh", description="Mesh that gives the shape", type=bpy.types.Object, poll=is_plain_mesh)
    generator: StringProperty(name="Generator", description="Name of a shape generator of the backend", options=set())
    use_shape_photo: BoolProperty(name="Style Transfer", description="Shape from another photo, look from the photo above", options=set())
    shape_photo: StringProperty(name="Shape Photo", description="Photo that gives the shape", subtype="FILE_PATH", options=_RELATIVE)
    exposure: FloatProperty(name="Exposure", description="Stops by which the photo is read as if exposed longer: raise it where a photo taken "
                            "in the dark made a dark asset", default=0.0, min=-MAX_STOPS, max=MAX_STOPS, soft_min=-3.0, soft_max=3.0, options=set())
    seed: IntProperty(name="Seed", description="What the model guesses differs with it", min=0, max=2**31 - 1, options=set())
    hide_mesh: BoolProperty(name="Hide the Mesh", description="Hide the mesh that gave the shape, so that it is not seen twice",
                            default=True, options=set())


_classes = (NEAR_PG_object, NEAR_PG_photo, NEAR_PG_scene)


def register() -> None:
    for cls in _classes:
        bpy.utils.register_class(cls)
    bpy.types.Object.near_relight = PointerProperty(type=NEAR_PG_object)
    bpy.types.Scene.near_relight = PointerProperty(type=NEAR_PG_scene)


def unregister() -> None:
    del bpy.types.Scene.near_relight
    del bpy.types.Object.near_relight
    for cls in reversed(_classes):
        bpy.utils.unregister_class(cls)
