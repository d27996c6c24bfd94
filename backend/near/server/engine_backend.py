"""The engine behind the worker's interface: requests by sha256 in, float32 layers out."""

from __future__ import annotations

import hashlib
import importlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from near import wire
from near.assets import Asset, load_asset
from near.assets.format import write_atomic
from near.assets.store import AssetStore
from near.errors import Cancelled, NearError
from near.geometry.cameras import Camera, orbit_camera
from near.geometry.matting import matte, matte_preview
from near.geometry.mesh import PbrMesh, load_mesh
from near.geometry.photo import Photo, load_photo
from near.geometry.silhouette import silhouette_mesh
from near.geometry.sources import GeometryRequest, geometry_source
from near.lighting import Environment, environment_from_array, load_environment, uniform_environment
from near.lighting.samples import sample_environment
from near.output import display_over
from near.pipeline.compact_assets import default_photo_camera
from near.pipeline.engine import Engine
from near.pipeline.types import PlacedAsset
from near.server.backend import BackendSetup, Watch

MOST_ASSETS, MOST_LIGHTS = 32, 8
MAX_VOXELS = 262_144


class EngineBackend:
    """Keeps loaded assets and lights by sha256, so that the engine's own caches see the same objects again."""

    def __init__(self, setup: BackendSetup) -> None:
        self._setup = setup
        self._store = AssetStore(setup.assets)
        self._engine = Engine(pack=setup.pack, device=setup.device)
        self._assets: OrderedDict[str, Asset] = OrderedDict()
        self._lights: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._watch: Watch | None = None
        # Inside a sampler step or a decoder there is nothing that polls, but there are modules: each of them asks.
        torch.nn.modules.module.register_module_forward_pre_hook(self._between_modules)

    def _between_modules(self, module: torch.nn.Module, inputs: Any) -> None:
        if self._watch is not None and self._watch.cancelled():
            raise Cancelled()

    def _watched(self, watch: Watch, work: Callable[[], Any]) -> Any:
        outer, self._watch = self._watch, watch
        try:
            return work()
        finally:
            self._watch = outer

    def info(self) -> dict:
        device = self._engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return {"device": str(device), "device_name": name, "pack": self._setup.pack, "torch": torch.__version__,
                "threads": torch.get_num_threads()}

    # -- frames --------------------------------------------------------------------------------------------------

    def frame(self, scene: wire.Scene, quality: str, watch: Watch) -> dict[str, Any]:
        """Layers [h, w, c] of the scene; with a border, of its part of the frame."""
        camera = camera_of(scene)
        placed = [PlacedAsset(self._asset(p.sha256), torch.tensor(p.world_from_asset).reshape(4, 4)) for p in scene.assets]
        light = self._light(scene.light)
        frame = self._watched(watch, lambda: self._engine.render(placed, light, camera, passes=scene.passes, quality=quality,
                                                                 cancelled=watch.cancelled))
        return frame.layers

    def _asset(self, sha256: str) -> Asset:
        asset = self._assets.get(sha256)
        if asset is None:
            asset = load_asset(self._asset_path(sha256))
            if len(asset.coords) > MAX_VOXELS:
                raise NearError("asset-too-large", f"The asset has {len(asset.coords)} voxels, the limit is {MAX_VOXELS}.",
                                "Create it at a lower resolution.")
            self._assets[sha256] = asset
            while len(self._assets) > MOST_ASSETS:
                self._assets.popitem(last=False)
        self._assets.move_to_end(sha256)
        return asset

    def _asset_path(self, sha256: str) -> Path:
        for path in (self._store.path(sha256), self._setup.uploads / f"{sha256}.near"):
            if path.is_file():
                return path
        raise NearError("asset-not-there", f"The backend does not have the asset {sha256[:12]}.", "Send its file again, or create it again.")

    def _upload(self, sha256: str, what: str) -> Path:
        found = next(iter(self._setup.uploads.glob(f"{sha256}.*")), None)
        if found is None:
            raise NearError("not-uploaded", f"The backend does not have the {what} {sha256[:12]} any more.", "Send it again.")
        return found

    def _light(self, spec: wire.LightSpec) -> Environment:
        key = spec.sha256 or repr(spec.uniform_lin709)
        pixels = self._lights.get(key)
        if pixels is None:
            pixels = self._lights[key] = self._read_light(spec).rgb_lin709
            while len(self._lights) > MOST_LIGHTS:
                self._lights.popitem(last=False)
        self._lights.move_to_end(key)
        return Environment(pixels, torch.tensor(spec.env_from_world).reshape(3, 3), spec.strength)

    def _read_light(self, spec: wire.LightSpec) -> Environment:
        if not spec.sha256:
            return uniform_environment(spec.uniform_lin709)
        path = self._upload(spec.sha256, "HDRI")
        if path.suffix != ".npy":
            return load_environment(path)
        try:
            return environment_from_array(np.load(path, allow_pickle=False))
        except (ValueError, OSError, EOFError) as error:
            raise NearError("light-damaged", f"The light that was sent cannot be read ({error}).", "Send it again.") from None

    # -- assets --------------------------------------------------------------------------------------------------

    def create(self, request: wire.Create, watch: Watch) -> dict:
        mesh = self._upload(request.mesh, "mesh") if request.mesh else None
        camera = camera_from_spec(request.camera) if request.camera is not None else None
        shape = self._upload(request.shape, "photo") if request.shape else None

        def work() -> Asset:
            photo = matte(load_photo(self._upload(request.photo, "photo")))
            watch.progress("cut out", 0.0, matte_preview(photo))
            geometry, seen_by = shaped(photo, camera, mesh, request.generator, None if shape is None else matte(load_photo(shape)))
            asset = self._engine.create(photo, mesh=geometry, camera=seen_by, seed=request.seed, steps=request.steps or None,
                                        exposure_stops=request.exposure_stops, progress=watch.progress, cancelled=watch.cancelled)
            self._show(asset, watch)
            return asset

        return self._keep(self._watched(watch, work))

    def matte(self, request: wire.Matte, watch: Watch) -> dict:
        photo = matte(load_photo(self._upload(request.photo, "photo")))
        watch.progress("cut out", 1.0, matte_preview(photo))
        height, width = photo.alpha.shape
        return {"width": width, "height": height, "share": round(float(photo.alpha.mean()), 4)}

    def encode(self, request: wire.Encode, watch: Watch) -> dict:
        mesh = self._upload(request.mesh, "mesh")

        def work() -> Asset:
            asset = self._engine.encode(mesh, seed=request.seed, progress=watch.progress, cancelled=watch.cancelled)
            self._show(asset, watch)
            return asset

        return self._keep(self._watched(watch, work))

    def _show(self, asset: Asset, watch: Watch) -> None:
        """The last preview: the asset itself, rendered small; left out where a frame takes long."""
        if self._engine.is_compact or self._engine.device.type == "cuda":
            watch.progress("preview", 1.0, thumbnail(self._engine, asset, watch.cancelled))

    def _keep(self, asset: Asset) -> dict:
        sha256 = self._store.put(asset)
        self._assets[sha256] = asset
        return {"sha256": sha256, "size": self._store.path(sha256).stat().st_size, "voxels": len(asset.coords)}

    def export(self, request: wire.Export, watch: Watch) -> dict:
        """near: the asset file itself. Other formats: `near.export.export_asset`, where it is installed."""
        if request.format == "near":
            path = self._asset_path(request.asset)
            return {"sha256": request.asset, "size": path.stat().st_size}
        try:
            writer = importlib.import_module("near.export").export_asset
        except (ImportError, AttributeError):
            raise NearError("export-unsupported", f"This backend cannot export {request.format}.", "Update the backend.") from None
        light = self._light(request.light) if request.light is not None else None
        onto = load_mesh(self._upload(request.mesh, "mesh")) if request.mesh else None
        data = self._watched(watch, lambda: writer(self._asset(request.asset), request.format, light=light, onto=onto,
                                                   engine=self._engine, progress=watch.progress, cancelled=watch.cancelled))
        sha256 = hashlib.sha256(data).hexdigest()
        folder = self._setup.assets.with_name("exports")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{sha256}.{request.format}", data)
        return {"sha256": sha256, "size": len(data)}

    def light(self, request: wire.SetLight, watch: Watch) -> dict:
        """Reads and checks a light ahead of the first frame under it."""
        light = self._light(request.light)
        prepare = getattr(self._engine, "prepare_light", None)
        if prepare is not None:
            prepare(light)
        return {"size": list(light.rgb_lin709.shape[:2])}

    def assets(self, request: wire.Assets, watch: Watch) -> dict:
        if request.action == "load":
            asset = self._asset(request.sha256)
            return {"voxels": len(asset.coords), "meta": {k: v for k, v in asset.meta.items() if isinstance(v, (str, int, float))}}
        if request.action == "unload":
            return {"unloaded": self._assets.pop(request.sha256, None) is not None}
        paths = sorted(self._setup.assets.glob("*/*.near"), key=lambda p: -p.stat().st_mtime)[:500]
        return {"assets": [{"sha256": p.stem, "bytes": p.stat().st_size, "loaded": p.stem in self._assets} for p in paths]}

    def unload(self) -> None:
        self._assets.clear()
        self._lights.clear()
        self._engine.unload()

    def memory(self) -> dict:
        return {**self._engine.memory(), "assets": len(self._assets), "lights": len(self._lights)}


def shaped(photo: Photo, camera: Camera | None, mesh: Path | None, generator: str, shape: Photo | None
           ) -> tuple[Path | PbrMesh | None, Camera | None]:
    """-> (geometry for `Engine.create`, the photo's camera): the mesh, or what a source makes of the photo or of `shape`.

    With `shape` the photo's own outline tells from where it sees an object of that size.
    """
    if shape is None and not generator:
        return mesh, camera
    seen = shape or photo
    height, width = seen.alpha.shape
    request = GeometryRequest(seen, camera if shape is None and camera is not None else default_photo_camera(width, height), mesh)
    geometry, seen_by = geometry_source(generator or ("mesh" if mesh else "silhouette")).build(request)
    if shape is not None and camera is None:
        height, width = photo.alpha.shape
        seen_by = silhouette_mesh(photo, default_photo_camera(width, height))[1]
    return geometry, seen_by if camera is None else camera


def thumbnail(engine: Engine, asset: Asset, cancelled: Callable[[], bool], side: int = 256) -> np.ndarray:
    """uint8 [side, side, 3]: the asset in the sample studio, on grey."""
    camera = orbit_camera(0.5, 0.3, 2.2, 0.6, side, side)
    frame = engine.render([PlacedAsset(asset)], sample_environment("studio", 64), camera, quality="draft", cancelled=cancelled)
    return display_over(frame.layers["color"], (70, 70, 70))


def camera_from_spec(spec: wire.CameraSpec) -> Camera:
    """Numbers -> the renderer's camera (which checks what they mean)."""
    return Camera(torch.tensor(spec.cam_from_world).reshape(4, 4), torch.tensor(spec.K).reshape(3, 3), spec.width, spec.height,
                  spec.near, spec.far, spec.projection)


def camera_of(scene: wire.Scene) -> Camera:
    """The camera of the scene, or of its border's part of the frame."""
    camera = camera_from_spec(scene.camera)
    if not scene.border:
        return camera
    x0, y0, _, _ = scene.border
    K = camera.K.clone()
    K[0, 2] -= x0
    K[1, 2] -= y0
    height, width = scene.size
    return Camera(camera.cam_from_world, K, width, height, camera.near, camera.far, camera.projection)


def make_backend(setup: BackendSetup) -> EngineBackend:
    return EngineBackend(setup)
