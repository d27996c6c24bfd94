"""Live views: what changed is asked for, what arrives is drawn; nothing here waits.

While something moves the frame is a small draft, newest wins (`client.viewport`); when all has been still for a moment the
full one follows. The same `LiveView` serves the engine's viewports and the overlay of other engines' (`overlay.py`).
"""

from __future__ import annotations

import time

import bpy
import numpy as np

from . import rendering, session, transfer, wire
from .errors import Cancelled, NearError, as_near_error
from .scene import assetfile, camera, colour, lighting
from .scene.objects import placed_assets

STILL_S = 0.15
TICK_S = 0.05
_views: dict[str, LiveView] = {}
_count = 0


class LiveView:
    """One viewport's picture: `update` with every draw, then `layers` and `texture` are the newest there is."""

    def __init__(self, depth: bool = False) -> None:
        global _count
        _count += 1
        self.name = f"v{_count}"
        self.wants_depth = depth
        self.changed = True                       # assets or light may differ from what is known here
        self.error: NearError | None = None
        self.status = ""
        self.texture = self.depth_texture = None  # GPUTextures of the newest frame
        self.tone_mapped = True                   # whether the newest frame is light; data is shown as it is
        self.camera: camera.ViewCamera | None = None    # that the newest frame was made with
        self._placed: list = []
        self._light: lighting.CapturedLight | None = None
        self._moved_at = 0.0
        self._asked: wire.Scene | None = None     # the full scene that was last asked for, as draft or in full
        self._asked_full = False
        self._cameras: dict[int, camera.ViewCamera] = {}
        self._viewport = None
        _views[self.name] = self

    @property
    def settled(self) -> bool:
        """Whether the newest request is the full one of what is there now, and the light is up to date."""
        return self._asked_full and not self.changed

    def update(self, depsgraph: bpy.types.Depsgraph, region: bpy.types.Region, region_data: bpy.types.RegionView3D) -> None:
        """Asks for what is seen now unless that was asked for, and takes what has arrived. Never raises."""
        here = session.get()
        try:
            here.want()
            client = here.client
            if client is None:
                self.status = "" if here.state == "failed" else "NeAR: waiting for the backend"
                return
            self.status = ""
            if self._viewport is None or self._viewport._client is not client:
                self._viewport, self._asked, self._cameras = client.viewport(self.name), None, {}
            self._ask(here, depsgraph, region, region_data)
            self._take()
            self.error = self._viewport.error
        except Cancelled:
            pass
        except Exception as error:
            self.error = as_near_error(error)
        if self.error is not None and self.error is not here.last_error:
            here.report(self.error)
            self._recover(here)

    def _recover(self, here: session.Session) -> None:
        """After a refusal the same question would get the same answer, except where the backend forgot a file."""
        if self.error.code in rendering.FORGOTTEN:
            here.forget_files()
            self._asked = None

    def _ask(self, here: session.Session, depsgraph: bpy.types.Depsgraph, region, region_data) -> None:
        if self.changed:
            self._placed = placed_assets(depsgraph)
            self._light, self.changed = _newest_light(depsgraph)
        if not self._placed or self._light is None:
            self.texture = self.depth_texture = None
            return
        sent = self._sent(here)
        if sent is None:
            self.status = "NeAR: sending the asset and its light"
            return
        settings = depsgraph.scene.near_render
        full = self._scene(sent, settings, camera.view_camera_spec(region, region_data))
        if full != self._asked:
            self._asked, self._asked_full, self._moved_at = full, False, time.monotonic()
            view = camera.view_camera_spec(region, region_data, settings.draft_scale)
            self._submit(self._scene(sent, settings, view, "draft"), view)
            begin_ticking()
        elif not self._asked_full and time.monotonic() - self._moved_at >= STILL_S:
            self._asked_full = True
            self._submit(full, camera.view_camera_spec(region, region_data))

    def _sent(self, here: session.Session) -> tuple[wire.LightSpec, list[str]] | None:
        """(light, hashes of the assets) once the backend has them all; the timer redraws when they have arrived."""
        light = lighting.light_spec_soon(self._light, here)
        sha256s = [here.soon(f"asset {assetfile.state_of(p.path)}", lambda path=p.path: transfer.reading(path, "asset file", "asset-file-missing"), "asset")
                   for p in self._placed]
        return (light, sha256s) if light is not None and all(sha256s) else None

    def _scene(self, sent: tuple[wire.LightSpec, list[str]], settings, view: camera.ViewCamera, quality: str = "full") -> wire.Scene:
        passes = [settings.shown, *(["alpha"] if settings.shown != "color" else []), *(["depth"] if self.wants_depth and settings.shown != "depth" else [])]
        return rendering.wire_scene(rendering.Shot(tuple(self._placed), view.spec, (), tuple(passes), quality, "f2"), *sent)

    def _submit(self, scene: wire.Scene, view: camera.ViewCamera) -> None:
        seq = self._viewport.submit(scene)
        self._cameras = {k: v for k, v in self._cameras.items() if k > seq - 64}
        self._cameras[seq] = view

    def _take(self) -> None:
        frame = self._viewport.take()
        if frame is None:
            return
        with frame:
            seq, self.tone_mapped = frame.message.seq, next(iter(frame.layers)) == "color"
            pixels = display_pixels({name: frame.array(name) for name in frame.layers})
            depth = frame.array("depth")[::-1].astype(np.float32) if self.wants_depth else None
        self.camera = self._cameras.get(seq, self.camera)
        self.texture = _texture(pixels, "RGBA16F")
        self.depth_texture = _texture(np.where(np.isfinite(depth), depth, np.float32(-1)), "R32F") if depth is not None else None

    def close(self) -> None:
        """Frees the textures and the backend's part."""
        _views.pop(self.name, None)
        self.texture = self.depth_texture = None
        if self._viewport is not None:
            self._viewport.close()
            self._viewport = None


def display_pixels(layers: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [h, w, 4] premultiplied, rows from the bottom: what a viewport shows of a pass. Colour in the working space, to go
    through the display transform; all other passes as display values."""
    name = next(iter(layers))
    value = layers[name][::-1].astype(np.float32)
    if name == "color":
        return colour.from_lin709(value, colour.working_space())
    alpha = layers["alpha"][::-1].astype(np.float32)
    if name == "depth":
        there = np.isfinite(value)
        low, high = (value[there].min(), value[there].max()) if there.any() else (0.0, 1.0)
        value = np.where(there, 1 - 0.9 * (np.where(there, value, low) - low) / max(high - low, 1e-6), 0)
    elif name == "normal":
        value = value * 0.5 + 0.5
    elif name == "base_color":
        value = np.where(value <= 0.0031308, value * 12.92, 1.055 * np.maximum(value, 0.0031308) ** (1 / 2.4) - 0.055)   # sRGB
    rgb = np.repeat(value, 3, -1) if value.shape[-1] == 1 else value
    return np.concatenate([rgb * alpha, alpha], -1)


def _texture(pixels: np.ndarray, kind: str):
    import gpu

    height, width = pixels.shape[:2]
    flat = np.ascontiguousarray(pixels, np.float32).reshape(-1)
    return gpu.types.GPUTexture((width, height), format=kind, data=gpu.types.Buffer("FLOAT", len(flat), flat))


def _newest_light(depsgraph: bpy.types.Depsgraph) -> tuple[lighting.CapturedLight | None, bool]:
    """(light to show, whether a better one is to come)."""
    light, current = lighting.latest(depsgraph)
    if not current:
        begin_ticking()
    return light or lighting.CapturedLight("uniform", "exact", uniform_lin709=(0.5, 0.5, 0.5)), not current


_of_engines: dict[int, LiveView] = {}       # id of a render engine's instance -> its view


def close_view(engine_id: int) -> None:
    """The engine's instance is gone."""
    view = _of_engines.pop(engine_id, None)
    if view is not None:
        view.close()


class ViewportDrawing:
    """The viewport half of the render engine. It draws light; passes that hold data must not go through Blender's display
    transform, to which all that is drawn here is subject, so the overlay's handler draws those (`overlay.wanted`)."""

    def _scene_changed(self, _context: bpy.types.Context, _depsgraph: bpy.types.Depsgraph) -> None:
        view = _of_engines.get(id(self))
        if view is not None:
            view.changed = True

    def _draw_view(self, context: bpy.types.Context, depsgraph: bpy.types.Depsgraph) -> None:
        import gpu
        from gpu_extras.presets import draw_texture_2d

        view, region = _of_engines.get(id(self)), context.region
        if depsgraph.scene.near_render.shown != "color":
            close_view(id(self))
            error = session.get().last_error if session.get().state == "failed" else None
            self.update_stats("NeAR Relight", f"{error.what} {error.remedy}" if error else "")
            return
        if view is None:
            view = _of_engines[id(self)] = LiveView()
        view.update(depsgraph, region, context.region_data)
        error = view.error or (session.get().last_error if session.get().state == "failed" else None)
        self.update_stats("NeAR Relight", f"{error.what} {error.remedy}" if error else view.status or ("" if view.settled else "refining"))
        if view.texture is None:
            return
        # Linear and premultiplied: Blender's viewport applies the display transform to what is drawn here.
        gpu.state.blend_set("ALPHA_PREMULT")
        self.bind_display_space_shader(depsgraph.scene)
        draw_texture_2d(view.texture, (0, 0), region.width, region.height)
        self.unbind_display_space_shader()
        gpu.state.blend_set("NONE")


# ---------------------------------------------------------------- redrawing
def redraw() -> None:
    """Draws all 3D viewports anew."""
    manager = bpy.context.window_manager
    for window in manager.windows if manager is not None else ():
        for area in window.screen.areas:
            if area.type == "VIEW_3D":
                area.tag_redraw()


def mark_changed() -> None:
    """Assets, lights or settings may differ: every view looks again at its next draw."""
    for view in _views.values():
        view.changed = True
    redraw()


def begin_ticking() -> None:
    """Draws again soon: to ask for the full frame, or to see whether a light is baked. Ends by itself."""
    if not bpy.app.background and not bpy.app.timers.is_registered(_tick):
        bpy.app.timers.register(_tick, first_interval=TICK_S)


def _tick() -> float | None:
    try:
        if lighting.poll():
            mark_changed()
    except NearError as error:
        session.get().report(error)
    waiting = lighting.baking() or any(not view._asked_full and view._asked is not None for view in _views.values())
    if any(not view._asked_full for view in _views.values()):
        redraw()
    return TICK_S if waiting else None


def register() -> None:
    session.get().on_change(redraw)


def unregister() -> None:
    if bpy.app.timers.is_registered(_tick):
        bpy.app.timers.unregister(_tick)
    session.get().off_change(redraw)
    _of_engines.clear()
    for view in list(_views.values()):
        view.close()
    lighting.close()
