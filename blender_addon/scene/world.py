"""Reads worlds: those that are an image with a rotation exactly, and of all others a digest that says when they changed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import bpy
import numpy as np
from mathutils import Euler, Matrix

EYE3 = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
MOST_COLUMNS = 8192          # wider maps are averaged down: lighting has no use for them, and uploads have a limit


@dataclass(frozen=True)
class SimpleWorld:
    """A world that needs no bake: `image` (None: `colour` in the working space) turned by `env_from_world`, times `strength`."""
    image: bpy.types.Image | None
    colour: tuple[float, float, float]
    env_from_world: tuple[float, ...]
    strength: float


BLACK = SimpleWorld(None, (0.0, 0.0, 0.0), EYE3, 0.0)


def simple_world(world: bpy.types.World | None) -> SimpleWorld | None:
    """The world as plain numbers, where its nodes are no more than Background, Environment Texture and Mapping; else None."""
    if world is None:
        return BLACK
    if not world.use_nodes or world.node_tree is None:
        return SimpleWorld(None, tuple(world.color), EYE3, 1.0)
    output = world.node_tree.get_output_node("CYCLES")
    surface = _source(output.inputs["Surface"]) if output is not None else None
    if output is None or surface is None:
        return BLACK
    if output.inputs["Volume"].is_linked or surface.mute or surface.bl_idname != "ShaderNodeBackground":
        return None
    colour, strength = surface.inputs["Color"], surface.inputs["Strength"]
    if strength.is_linked or strength.default_value < 0:
        return None
    if not colour.is_linked:
        return SimpleWorld(None, tuple(max(v, 0.0) for v in colour.default_value[:3]), EYE3, strength.default_value)
    texture = _source(colour)
    turn = _texture_turn(texture) if texture is not None else None
    if turn is None or not _plain_image(texture.image):
        return None
    return SimpleWorld(texture.image, (1.0, 1.0, 1.0), turn, strength.default_value)


def _source(socket: bpy.types.NodeSocket) -> bpy.types.Node | None:
    """The node that feeds a socket through reroutes; None without one."""
    while socket.is_linked:
        link = socket.links[0]
        if link.is_muted or not link.is_valid:
            return None
        if link.from_node.bl_idname != "NodeReroute":
            return link.from_node
        socket = link.from_node.inputs[0]
    return None


def _texture_turn(node: bpy.types.Node) -> tuple[float, ...] | None:
    """env_from_world of an environment texture that is looked up at a turned direction; None for anything else."""
    if node.bl_idname != "ShaderNodeTexEnvironment" or node.mute or node.image is None or node.projection != "EQUIRECTANGULAR":
        return None
    if not (_neutral(node.texture_mapping) and _neutral(node.color_mapping)):
        return None
    if not node.inputs["Vector"].is_linked:
        return EYE3
    source = _source(node.inputs["Vector"])
    if source is None:
        return None
    if source.bl_idname == "ShaderNodeMapping":
        turn = _mapping_turn(source)
        if turn is None or source.mute:
            return None
        vector = source.inputs["Vector"]
        source = _source(vector)
        # An unlinked Vector is a constant, not a direction.
        return turn if _is_direction(source, vector) else None
    return EYE3 if _is_direction(source, node.inputs["Vector"]) else None


def _is_direction(node: bpy.types.Node | None, socket: bpy.types.NodeSocket) -> bool:
    if node is None or node.bl_idname != "ShaderNodeTexCoord" or node.mute or node.object is not None:
        return False
    while socket.links[0].from_node.bl_idname == "NodeReroute":
        socket = socket.links[0].from_node.inputs[0]
    return socket.links[0].from_socket.identifier in ("Generated", "Object")


def _mapping_turn(node: bpy.types.Node) -> tuple[float, ...] | None:
    """R for POINT, VECTOR and NORMAL, its transpose for TEXTURE; None when more than a rotation happens."""
    if any(node.inputs[name].is_linked for name in ("Location", "Rotation", "Scale") if name in node.inputs):
        return None
    if node.vector_type in ("POINT", "TEXTURE") and any(abs(v) > 1e-7 for v in node.inputs["Location"].default_value):
        return None
    scale = tuple(node.inputs["Scale"].default_value)
    if scale[0] <= 0 or any(abs(v - scale[0]) > 1e-7 * scale[0] for v in scale):     # one factor for all does not turn a direction
        return None
    turn: Matrix = Euler(tuple(node.inputs["Rotation"].default_value), "XYZ").to_matrix()
    if node.vector_type == "TEXTURE":
        turn.transpose()
    return tuple(float(v) for row in turn for v in row)


def _neutral(settings: bpy.types.bpy_struct) -> bool:
    """Whether a texture's old-style mapping or colour settings are as they are by default."""
    if settings.bl_rna.identifier == "ColorMapping":
        return (settings.brightness, settings.contrast, settings.saturation) == (1.0, 1.0, 1.0) and settings.blend_factor == 0.0 \
            and not settings.use_color_ramp
    return not any(settings.translation) and not any(settings.rotation) and tuple(settings.scale) == (1.0, 1.0, 1.0) \
        and (settings.mapping_x, settings.mapping_y, settings.mapping_z) == ("X", "Y", "Z") and settings.mapping == "FLAT"


def _plain_image(image: bpy.types.Image) -> bool:
    """Whether the image's own pixels are the light: one 2:1 picture of floats, without transparency."""
    image = image.original
    width, height = image.size
    return image.source in ("FILE", "GENERATED") and image.is_float and height >= 2 and abs(width - 2 * height) <= 1 and image.channels in (3, 4)


def image_key(image: bpy.types.Image) -> str:
    """Changes when the image's pixels may have changed."""
    image = image.original
    path = bpy.path.abspath(image.filepath, library=image.library)
    try:
        info = os.stat(path)
        stamp = f"{info.st_mtime_ns} {info.st_size}"
    except OSError:
        stamp = "-"
    content = ""
    if image.source == "GENERATED" or image.is_dirty:       # painted: there is no file to ask
        content = hashlib.sha256(_flat(image)).hexdigest()
    return f"{image.session_uid} {path} {stamp} {tuple(image.size)} {image.colorspace_settings.name} {image.alpha_mode} {content}"


def _flat(image: bpy.types.Image) -> np.ndarray:
    flat = np.empty(len(image.pixels), np.float32)
    image.pixels.foreach_get(flat)
    return flat


def image_rgb(image: bpy.types.Image) -> np.ndarray | None:
    """float32 [H, W, 3] of the working space, top row first; what is no light (NaN, negative) is black. None when it has
    transparent texels (Cycles must say what those mean) or its pixels cannot be had."""
    image = image.original
    width, height = image.size
    flat = _flat(image)
    if not len(flat):
        return None
    pixels = flat.reshape(height, width, -1)[::-1]
    if pixels.shape[2] == 4 and pixels[..., 3].min() < 1:
        return None
    rgb = np.clip(np.nan_to_num(pixels[..., :3], nan=0.0, posinf=3e38, neginf=0.0), 0, None)
    while rgb.shape[1] > MOST_COLUMNS and rgb.shape[0] % 2 == 0 and rgb.shape[1] % 2 == 0:
        rgb = rgb.reshape(rgb.shape[0] // 2, 2, rgb.shape[1] // 2, 2, 3).mean((1, 3))
    return np.ascontiguousarray(rgb, np.float32)


# ---------------------------------------------------------------- digests
_SKIP = {"rna_type", "location", "location_absolute", "width", "height", "width_hidden", "dimensions", "select", "show_options",
         "show_preview", "show_texture", "hide", "label", "color", "use_custom_color", "parent", "warning_propagation", "name_full",
         "is_active_output", "internal_links", "links", "description", "show_expanded", "hide_value", "link_limit", "is_linked", "session_uid",
         "interface", "active", "draw_color", "animation_data", "is_embedded_data", "preview", "users", "tag", "type_info", "display_shape", "node"}
_SKIP_OF_STRUCTS = _SKIP - {"color", "location"}
_DEEPEST = 8


def digest(*things: object) -> str:
    """sha256 of RNA data as far as it decides what is rendered: nodes, values, ramps, images, objects that nodes refer to."""
    found: list[str] = []
    for thing in things:
        _walk(thing, found, 0, set())
    return hashlib.sha256("\n".join(found).encode("utf-8", "replace")).hexdigest()


def _walk(thing: object, found: list[str], depth: int, seen: set[int]) -> None:
    if thing is None or isinstance(thing, (bool, int, str)):
        found.append(repr(thing))
    elif isinstance(thing, float):
        found.append(f"{thing:.7g}")
    elif isinstance(thing, bpy.types.Image):
        found.append(image_key(thing))
    elif isinstance(thing, bpy.types.Object):
        found.append(f"{thing.name} {[f'{v:.6g}' for row in thing.matrix_world for v in row]}")
    elif isinstance(thing, bpy.types.NodeTree):
        if thing.as_pointer() not in seen and depth < _DEEPEST:
            seen.add(thing.as_pointer())
            for node in thing.nodes:
                _walk_struct(node, found, depth + 1, seen, _SKIP)
            found += [f"{k.from_node.name}.{k.from_socket.identifier}>{k.to_node.name}.{k.to_socket.identifier} {k.is_muted}" for k in thing.links]
    elif isinstance(thing, bpy.types.bpy_struct):
        _walk_struct(thing, found, depth + 1, seen, _SKIP if isinstance(thing, bpy.types.NodeSocket) else _SKIP_OF_STRUCTS)
    elif hasattr(thing, "__iter__"):
        for item in thing:
            _walk(item, found, depth, seen)
    else:
        found.append(repr(thing))


def _walk_struct(thing: bpy.types.bpy_struct, found: list[str], depth: int, seen: set[int], skip: set[str]) -> None:
    if depth > _DEEPEST:
        return
    found.append(type(thing).__name__)
    for prop in thing.bl_rna.properties:
        name = prop.identifier
        if name in skip or name.startswith("bl_") or (prop.is_readonly and prop.type not in ("POINTER", "COLLECTION")):
            continue
        value = getattr(thing, name)
        if isinstance(value, bpy.types.ID) and not isinstance(value, (bpy.types.Image, bpy.types.Object, bpy.types.NodeTree)):
            found.append(value.name_full)
        elif prop.type != "COLLECTION" or name in ("inputs", "elements", "points", "curves", "layers", "slots"):
            found.append(name)
            _walk(value, found, depth, seen)
