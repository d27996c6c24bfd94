"""One final frame: from a depsgraph to arrays; waits for light and backend, and brings a backend that was lost back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import bpy
import numpy as np

from . import session, wire
from .errors import Cancelled, NearError
from .scene import background, camera, colour, lighting
from .scene.objects import PlacedAsset, placed_assets

BLENDER_FAR = 1e10          # Blender's depth of nothing; ours is +inf
FRAME_TIMEOUT_S = 24 * 3600.0
TRIES = 4
RESTARTABLE = {"backend-gone", "backend-silent", "connection-closed", "token-refused", "not-greeted", "worker-crashed", "frame-lost"}
FORGOTTEN = {"asset-not-there", "not-uploaded"}

# Our layer -> Blender's pass: name, channels, type.
PASSES = {
    "depth": ("Depth", "Z", "VALUE"), "normal": ("Normal", "XYZ", "VECTOR"), "base_color": ("NeAR BaseColor", "RGB", "COLOR"),
    "roughness": ("NeAR Roughness", "X", "VALUE"), "metallic": ("NeAR Metallic", "X", "VALUE"), "shadow": ("NeAR Shadow", "X", "VALUE"),
}


@dataclass(frozen=True)
class Shot:
    """A frame as plain data, but for its light: `border` as in `wire.Scene`."""
    placed: tuple[PlacedAsset, ...]
    camera: wire.CameraSpec
    border: tuple[int, ...] = ()
    passes: tuple[str, ...] = ("color",)
    quality: str = "full"
    precision: str = "f4"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what comes back."""
        if self.border:
            return self.border[3] - self.border[1], self.border[2] - self.border[0]
        return self.camera.height, self.camera.width


def wanted_passes(view_layer: bpy.types.ViewLayer) -> tuple[str, ...]:
    """Our names of the passes that a view layer asks for beside colour."""
    ours = view_layer.near_passes
    on = {"depth": view_layer.use_pass_z, "normal": view_layer.use_pass_normal, "base_color": ours.use_base_color,
          "roughness": ours.use_roughness, "metallic": ours.use_metallic, "shadow": ours.use_shadow}
    return tuple(name for name in PASSES if on[name])


def shot_of(depsgraph: bpy.types.Depsgraph, width: int, height: int, world_from_camera=None) -> Shot:
    """What a final render of the depsgraph's view layer shows.

    Raises:
        NearError: of the camera, the border, or an asset.
    """
    scene = depsgraph.scene_eval
    spec = camera.camera_spec(scene.camera, scene, depsgraph, width=width, height=height, world_from_camera=world_from_camera)
    return Shot(tuple(placed_assets(depsgraph)), spec, camera.border_pixels(scene.render, width, height),
                ("color", *wanted_passes(depsgraph.view_layer_eval)))


def wire_scene(shot: Shot, light: wire.LightSpec, sha256s: list[str]) -> wire.Scene:
    """The shot as a message."""
    assets = tuple(wire.PlacedSpec(sha, tuple(v for row in p.world_from_asset for v in row)) for sha, p in zip(sha256s, shot.placed))
    return wire.Scene(assets, light, shot.camera, shot.passes, shot.quality, shot.border, shot.precision)


def render_shot(shot: Shot, light: lighting.CapturedLight, should_stop: Callable[[], bool] = lambda: False) -> dict[str, np.ndarray]:
    """float32 [h, w, c] layers of the shot, rows from the top; linear Rec.709, colour premultiplied, depth +inf where nothing is.

    Raises:
        NearError: no backend, or what it answered; `Cancelled`.
    """
    if not shot.placed:
        empty = {name: np.zeros((*shot.size, wire.PASS_CHANNELS[name]), np.float32) for name in shot.passes}
        if "depth" in empty:
            empty["depth"][:] = np.inf
        return empty
    for tries_left in reversed(range(TRIES)):
        try:
            return _ask(shot, light, should_stop)
        except NearError as error:
            if error.code == "cancelled" or should_stop():
                raise Cancelled() from None
            if not tries_left or error.code not in RESTARTABLE | FORGOTTEN:
                raise
            session.get().log(f"[{error.code}] {error.what} The frame is tried again.")
            if error.code in FORGOTTEN:
                session.get().forget_files()
    raise AssertionError("not reached")


def _ask(shot: Shot, light: lighting.CapturedLight, should_stop: Callable[[], bool]) -> dict[str, np.ndarray]:
    here = session.get()
    here.ensure(should_stop=should_stop)
    sha256s = [here.put_asset(p.path, should_stop) for p in shot.placed]
    spec = lighting.light_spec(light, here, should_stop)
    client = here.ensure(should_stop=should_stop)
    request = wire.BatchFrame(id=client.new_id(), scene=wire_scene(shot, spec, sha256s))
    with client.call(request, timeout_s=FRAME_TIMEOUT_S, stop=should_stop).frame as frame:
        return {name: frame.array(name).astype(np.float32) for name in shot.passes}


def finish(layers: dict[str, np.ndarray], shot: Shot, light: lighting.CapturedLight, film_transparent: bool) -> dict[str, np.ndarray]:
    """The layers as Blender wants them, by the names of its passes: working space, opaque film if asked, its depth of nothing."""
    space = colour.working_space()
    color = layers["color"]
    if not film_transparent:
        spec = wire.LightSpec(uniform_lin709=light.uniform_lin709, env_from_world=light.env_from_world, strength=light.strength)
        behind = background.background(lighting.map_of(light), spec, shot.camera, shot.border)
        color = np.concatenate([color[..., :3] + (1 - color[..., 3:]) * behind, np.ones_like(color[..., 3:])], -1)
    found = {"Combined": colour.from_lin709(color, space)}
    for name in shot.passes[1:]:
        value = layers[name]
        if name == "depth":
            value = np.where(np.isfinite(value), value, np.float32(BLENDER_FAR))
        elif name == "base_color":
            value = colour.from_lin709(value, space)
        found[PASSES[name][0]] = value
    return found

