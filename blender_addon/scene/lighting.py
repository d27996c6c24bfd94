"""What the assets are lit by: the World exactly, a probe of the scene at the assets, or a file; as a map and three numbers.

A light is worked out at once where it can be (an image, a colour), else by a second Blender (`bake.py`). `capture` waits for
that and is for rendering; `latest` never waits and is for viewports: it gives the newest light there is and sees to a better one.
"""

from __future__ import annotations

import _thread
import io
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import bpy
import numpy as np
from mathutils import Euler, Vector

from .. import transfer, wire
from ..errors import Cancelled, NearError
from . import bake, colour, world
from .objects import is_proxy

MOST_MAPS = 8
HALF_MOST = 65504.0
BAND_ROWS = 64             # of a map, at a time
PROBE_REACH = 2.0          # light from nearer than this many asset sizes is not far away


@dataclass(frozen=True, eq=False)
class CapturedLight:
    """Radiance from world direction d = strength * map(env_from_world @ d); conventions of DESIGN section 4.

    rgb_lin709: float32 [H, W, 3], top row +Z; or None and `file` (.exr, .hdr) or, without one, `uniform_lin709`.
    key: names the map: the same key is the same map. how: "exact", "baked", "probe" or "file".
    """
    key: str
    how: str
    rgb_lin709: np.ndarray | None = None
    file: Path | None = None
    uniform_lin709: tuple[float, float, float] = (1.0, 1.0, 1.0)
    env_from_world: tuple[float, ...] = world.EYE3
    strength: float = 1.0


@dataclass(frozen=True)
class Wish:
    """A light that must be baked: `key` names it, the rest is what a `bake.Job` needs."""
    key: str
    probe: bool
    where: tuple[float, float, float]
    rows: int
    samples: int
    env_from_world: tuple[float, ...]
    strength: float


_maps: OrderedDict[str, np.ndarray] = OrderedDict()      # key -> linear Rec.709 map
_sent: dict[str, str] = {}                               # key -> sha256 of the upload
_main_thread = _thread.get_ident()
_bakers = {True: bake.Baker(), False: bake.Baker()}      # Blender's render thread has one of its own
_next: list[tuple[Wish, str, int, float]] = []           # what a viewport wants baked: wish, scene, frame, subframe
_pending: list[Wish] = []                                # what the main thread's baker is at
_shown: dict[str, CapturedLight] = {}                    # scene -> newest light, while a newer one is baked


def _keep(key: str, rgb: np.ndarray) -> np.ndarray:
    _maps[key] = rgb
    _maps.move_to_end(key)
    while len(_maps) > MOST_MAPS:
        _maps.popitem(last=False)
    return rgb


# ---------------------------------------------------------------- what is wanted
def wanted(depsgraph: bpy.types.Depsgraph) -> CapturedLight | Wish:
    """The scene's light if it can be had at once, else what to bake for it.

    Raises:
        NearError: `light-missing`, `light-not-set`.
    """
    scene = depsgraph.scene_eval
    settings = scene.near_light
    if settings.source == "FILE":
        found = _from_file(settings)
    elif settings.source == "PROBE":
        where = probe_point(depsgraph)
        rows = settings.rows // 2
        key = world.digest("probe", [round(v, 5) for v in where], rows, settings.samples, list(_surroundings(depsgraph)))
        found = Wish(key, True, where, rows, settings.samples, world.EYE3, 1.0)
    else:
        found = _of_world(scene.world, settings)
    found = replace(found, strength=found.strength * settings.strength, env_from_world=_turned(found.env_from_world, settings.rotation))
    if isinstance(found, Wish) and found.key in _maps:
        _maps.move_to_end(found.key)
        return _baked(found, _maps[found.key])
    return found


def _of_world(here: bpy.types.World | None, settings: bpy.types.PropertyGroup) -> CapturedLight | Wish:
    simple = world.simple_world(here)
    space = colour.working_space()
    if simple is not None and simple.image is None:
        rgb = colour.to_lin709(np.array(simple.colour, np.float32), space)
        return CapturedLight("uniform", "exact", uniform_lin709=tuple(float(v) for v in rgb), strength=simple.strength)
    if simple is not None:
        key = f"{world.image_key(simple.image)} {space}"
        rgb = _maps.get(key)
        if rgb is None:
            rgb = world.image_rgb(simple.image)
            rgb = None if rgb is None else _keep(key, colour.to_lin709(rgb, space))
        if rgb is not None:
            _maps.move_to_end(key)
            return CapturedLight(key, "exact", rgb, env_from_world=simple.env_from_world, strength=simple.strength)
    key = world.digest("world", here.name, here.node_tree, settings.rows, settings.samples, space)
    return Wish(key, False, (0.0, 0.0, 0.0), settings.rows, settings.samples, world.EYE3, 1.0)


def _from_file(settings: bpy.types.PropertyGroup) -> CapturedLight:
    if not settings.file:
        raise NearError("light-not-set", "No light file is chosen.", "Choose an .exr or .hdr file in the NeAR panel, or take the World's light.")
    path = Path(bpy.path.abspath(settings.file))
    if not path.is_file():
        raise NearError("light-missing", f"The light file {path.name} is not there.", "Find the file, or take the World's light.")
    info = path.stat()
    return CapturedLight(f"file {path} {info.st_mtime_ns} {info.st_size}", "file", file=path)


def _turned(env_from_world: tuple[float, ...], rotation_z_rad: float) -> tuple[float, ...]:
    """The look-up turned as by the Z rotation of a Mapping node in front of it."""
    turn = np.array(env_from_world).reshape(3, 3) @ np.array(Euler((0, 0, rotation_z_rad)).to_matrix())
    return tuple(float(v) for v in turn.ravel())


def probe_point(depsgraph: bpy.types.Depsgraph) -> tuple[float, float, float]:
    """Where the probe stands: between the visible assets, or at the object that the panel names."""
    target = depsgraph.scene_eval.near_light.probe_object
    if target is not None:
        return tuple(target.evaluated_get(depsgraph).matrix_world.translation)
    centres = [i.matrix_world.translation.copy() for i in depsgraph.object_instances if is_proxy(i.object.original)]
    return tuple(sum(centres, Vector()) / len(centres)) if centres else (0.0, 0.0, 0.0)


def _surroundings(depsgraph: bpy.types.Depsgraph):
    """Everything that a probe sees, as far as a digest can follow it (not the shape of deforming meshes: refresh for those)."""
    other = depsgraph.scene.near_light.probe_scene
    if other is not None and other != depsgraph.scene:      # not evaluated here: its own changes show as frames and places
        yield from (other.name, depsgraph.scene_eval.frame_current, *(item for item in other.objects if item.type not in ("CAMERA", "EMPTY")))
    here = depsgraph.scene_eval.world
    yield here.node_tree if here is not None and here.use_nodes else (tuple(here.color) if here is not None else None)
    seen = set()
    for instance in depsgraph.object_instances:
        item = instance.object
        if item.type in ("CAMERA", "EMPTY", "ARMATURE", "SPEAKER") or is_proxy(item.original):
            continue
        yield f"{item.name} {[f'{v:.5g}' for row in instance.matrix_world for v in row]}"
        for data in (item.data, *(slot.material for slot in item.material_slots)):
            if data is None or data.name_full in seen:
                continue
            seen.add(data.name_full)
            if isinstance(data, bpy.types.Mesh):
                yield len(data.vertices)
            else:
                yield data if isinstance(data, bpy.types.Light) else None
                yield getattr(data, "node_tree", None)


def far_field_warning(depsgraph: bpy.types.Depsgraph) -> str:
    """A sentence when something stands so near to an asset that a map cannot stand for it; empty when all is well."""
    where = Vector(probe_point(depsgraph))
    size = max((i.matrix_world.to_scale().x for i in depsgraph.object_instances if is_proxy(i.object.original)), default=1.0)
    far = []
    for instance in depsgraph.object_instances:
        item = instance.object
        if is_proxy(item.original):
            if (instance.matrix_world.translation - where).length > PROBE_REACH * size:
                far.append(item.name)
        elif item.type == "LIGHT" and item.data.type != "SUN" and (instance.matrix_world.translation - where).length < PROBE_REACH * size:
            return f"{item.name} is close to the asset: its light will be as from far away."
    return f"{far[0]} is far from the probe: one map lights all assets." if far else ""


# ---------------------------------------------------------------- getting it
def _begin(baker: bake.Baker, wish: Wish, scene: bpy.types.Scene, frame: int, subframe: float) -> None:
    if wish.probe:
        scene = scene.near_light.probe_scene or scene
    blend, out = baker.paths()
    bpy.data.libraries.write(blend, {scene if wish.probe else scene.world}, path_remap="ABSOLUTE", fake_user=True)
    hidden = tuple(item.name for item in scene.objects if is_proxy(item)) if wish.probe else ()
    baker.begin(bake.Job(out, colour.working_space(), blend, "", scene.name, scene.world.name if scene.world else "", wish.probe, wish.where,
                         hidden, frame, subframe, wish.rows, wish.samples))


def _baked(wish: Wish, rgb: np.ndarray) -> CapturedLight:
    return CapturedLight(wish.key, "probe" if wish.probe else "baked", rgb, env_from_world=wish.env_from_world, strength=wish.strength)


def _clean(pixels: np.ndarray) -> np.ndarray:
    return colour.to_lin709(np.clip(np.nan_to_num(pixels, nan=0.0, posinf=0.0, neginf=0.0), 0, None), colour.working_space())


def map_of(light: CapturedLight, should_stop: Callable[[], bool] = lambda: False) -> np.ndarray | None:
    """The light's map [H, W, 3]; None when it is uniform. A file is read by the second Blender: waits. Raises as `capture`."""
    if light.file is None or light.key in _maps:
        return light.rgb_lin709 if light.file is None else _maps[light.key]
    baker = _bakers[_thread.get_ident() == _main_thread]
    baker.abandon()
    _, out = baker.paths()
    baker.begin(bake.Job(image=str(light.file), out=out, space=colour.working_space()))
    return _keep(light.key, _wait(baker, should_stop))


def map_at_hand(light: CapturedLight) -> np.ndarray | None:
    """As `map_of`, but None for a file that was not read yet. Never waits."""
    return light.rgb_lin709 if light.file is None else _maps.get(light.key)


def shown(scene: bpy.types.Scene) -> CapturedLight | None:
    """The newest light that `latest` gave for a scene."""
    return _shown.get(scene.name)


def _wait(baker: bake.Baker, should_stop: Callable[[], bool]) -> np.ndarray:
    while (pixels := baker.poll()) is None:
        if should_stop():
            baker.abandon()
            raise Cancelled()
        time.sleep(0.02)
    return _clean(pixels)


def capture(depsgraph: bpy.types.Depsgraph, should_stop: Callable[[], bool] = lambda: False) -> CapturedLight:
    """The scene's light; waits while it is baked.

    Raises:
        NearError: `light-bake`, those of `wanted`; `Cancelled`.
    """
    found = wanted(depsgraph)
    if isinstance(found, CapturedLight):
        return found
    baker = _bakers[_thread.get_ident() == _main_thread]
    baker.abandon()
    now = depsgraph.scene_eval
    _begin(baker, found, depsgraph.scene, now.frame_current, now.frame_subframe)
    return _baked(found, _keep(found.key, _wait(baker, should_stop)))


def latest(depsgraph: bpy.types.Depsgraph) -> tuple[CapturedLight | None, bool]:
    """(the newest light there is, whether it is the scene's present one). Never waits; where a bake is needed, `poll` begins it.

    Raises:
        NearError: those of `wanted`.
    """
    name = depsgraph.scene.name
    found = wanted(depsgraph)
    if isinstance(found, CapturedLight):
        _shown[name] = found
        return found, True
    now = depsgraph.scene_eval
    if found not in _pending:
        _next[:] = [(found, name, now.frame_current, now.frame_subframe)]
    return _shown.get(name), False


def poll() -> bool:
    """Begins the newest bake that `latest` asked for, and takes over what is done; -> whether there is news. Outside of drawing:
    a .blend is written. Never waits.

    Raises:
        NearError: `light-bake`.
    """
    baker = _bakers[True]
    if _pending:
        try:
            pixels = baker.poll()
        except NearError:
            _pending.clear()
            raise
        if pixels is None:
            return False
        _keep(_pending.pop().key, _clean(pixels))
        return True
    if _next:
        wish, name, frame, subframe = _next.pop()
        scene = bpy.data.scenes.get(name)
        if scene is not None:
            _begin(baker, wish, scene, frame, subframe)
            _pending[:] = [wish]
    return False


def baking() -> bool:
    """Whether the viewport's light is being baked."""
    return bool(_pending or _next)


def forget() -> None:
    """Bake again what was baked: "Refresh"."""
    _maps.clear()
    _shown.clear()


def close() -> None:
    """Ends the second Blender and drops all maps."""
    for baker in _bakers.values():
        baker.close()
    _pending.clear()
    _next.clear()
    forget()
    _sent.clear()


# ---------------------------------------------------------------- sending it
def light_file(light: CapturedLight) -> transfer.Steps[bytes]:
    """The map as .npy: half floats where they hold it exactly, else float32. In bands: a large map takes a while."""
    rgb = light.rgb_lin709
    bands, exact = [], bool(rgb.max() <= HALF_MOST)
    for top in range(0, len(rgb), BAND_ROWS) if exact else ():
        band = rgb[top:top + BAND_ROWS]
        bands.append(band.astype(np.float16))
        yield
        if not np.array_equal(bands[-1], band):
            exact = False
            break
    if not exact:
        bands = [rgb[top:top + BAND_ROWS] for top in range(0, len(rgb), BAND_ROWS)]
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(bands[0].dtype), "fortran_order": False, "shape": rgb.shape})
    for band in bands:
        file.write(np.ascontiguousarray(band).tobytes())
        yield
    return file.getvalue()


def _reading(light: CapturedLight) -> transfer.Steps[bytes]:
    if light.file is None:
        return (yield from light_file(light))
    return (yield from transfer.reading(light.file, "light file", "light-missing"))


def light_spec(light: CapturedLight, session, should_stop: Callable[[], bool] = lambda: False) -> wire.LightSpec:
    """For a scene on the wire; sends the map unless this backend has it, and waits. Raises as `Session.put_file`."""
    if light.rgb_lin709 is None and light.file is None:
        return _spec(light)
    sha256 = _sent.get(light.key, "")
    if not sha256 or not session.known(sha256):
        source = light.file if light.file is not None else transfer.value_of(light_file(light))
        sha256 = session.put_file(source, "hdri", should_stop)
        _sent[light.key] = sha256
    return _spec(light, sha256)


def light_spec_soon(light: CapturedLight, session) -> wire.LightSpec | None:
    """The same for drawing: None while the map is on its way. Never waits. Raises as `Session.soon`."""
    if light.rgb_lin709 is None and light.file is None:
        return _spec(light)
    sha256 = session.soon(f"light {light.key}", lambda: _reading(light), "hdri")
    return _spec(light, sha256) if sha256 else None


def _spec(light: CapturedLight, sha256: str = "") -> wire.LightSpec:
    numbers = {"env_from_world": light.env_from_world, "strength": light.strength}
    return wire.LightSpec(sha256, **numbers) if sha256 else wire.LightSpec(uniform_lin709=light.uniform_lin709, **numbers)
