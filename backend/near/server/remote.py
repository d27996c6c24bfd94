"""The engine's methods, carried out by a backend: what `near render --connect` uses in the engine's place."""

from __future__ import annotations

import io
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from near import wire
from near.assets import Asset, decode_asset, encode_asset
from near.client import Client
from near.errors import Cancelled, NearError
from near.geometry.cameras import Camera
from near.lighting import Environment
from near.pipeline.types import CancelCheck, Frame, PlacedAsset, Progress, check_passes


class RemoteEngine:
    """`encode`, `create`, `render` as `near.pipeline.engine.Engine`, with float32 frames: the very same numbers.

    Args:
        where: empty for this user's backend, its name, or the path of a connection or key file.
    Raises:
        NearError: no backend, refused, another version.
    """

    def __init__(self, where: str = "", deadline_s: float = 7200.0) -> None:
        self._client = Client.connect(where, name="near", timeout_s=15)
        self._deadline_s = deadline_s
        self._sent: dict[int, tuple[weakref.ref, str]] = {}

    @property
    def info(self) -> dict:
        return self._client.info

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode(self, mesh: Path, *, seed: int = 0, progress: Progress | None = None, cancelled: CancelCheck | None = None) -> Asset:
        """As `Engine.encode`; the mesh is a file."""
        request = wire.Encode(id=self._client.new_id(), mesh=self._upload(mesh, "mesh"), seed=seed)
        return self._job(request, progress, cancelled)

    def create(self, photo: Path, *, mesh: Path | None = None, camera: Camera | None = None, seed: int = 0, steps: int | None = None,
               exposure_stops: float = 0.0, progress: Progress | None = None, cancelled: CancelCheck | None = None) -> Asset:
        """As `Engine.create`; photo and mesh are files."""
        request = wire.Create(id=self._client.new_id(), photo=self._upload(photo, "photo"),
                              mesh=self._upload(mesh, "mesh") if mesh is not None else "",
                              camera=spec_of_camera(camera) if camera is not None else None, seed=seed, steps=steps or 0,
                              exposure_stops=exposure_stops)
        return self._job(request, progress, cancelled)

    def render(self, placed: Sequence[PlacedAsset], light: Environment, camera: Camera, *, passes: Sequence[str] = ("color",),
               quality: str = "full", cancelled: CancelCheck | None = None) -> Frame:
        """As `Engine.render`."""
        scene = wire.Scene(
            assets=tuple(wire.PlacedSpec(self._asset(p.asset), _numbers(p.world_from_asset)) for p in placed),
            light=wire.LightSpec(self._light(light), env_from_world=_numbers(light.env_from_world), strength=light.strength),
            camera=spec_of_camera(camera), passes=check_passes(passes), quality=quality, precision="f4")
        reply = self._call(wire.BatchFrame(id=self._client.new_id(), scene=scene), None, cancelled)
        with reply.frame as frame:
            layers = {name: torch.from_numpy(frame.array(name).copy()) for name in frame.layers}
        return Frame(camera, layers)

    def unload(self) -> None:
        """Gives the backend's memory back."""
        self._client.call(wire.Release(id=self._client.new_id(), what="models"))

    def memory(self) -> dict:
        return self._client.status()["memory"]

    def _job(self, request: wire.Message, progress: Progress | None, cancelled: CancelCheck | None) -> Asset:
        result = self._call(request, progress, cancelled).result
        return decode_asset(self._client.fetch(result["sha256"]), "the asset from the backend")

    def _call(self, request: wire.Message, progress: Progress | None, cancelled: CancelCheck | None):
        def report(news: wire.Progress, preview: wire.Buffer | None) -> None:
            image = None if preview is None else np.frombuffer(preview.data, np.uint8).reshape(preview.shape)
            progress(news.stage, news.fraction, image)

        try:
            return self._client.call(request, timeout_s=self._deadline_s, on_progress=report if progress else None, stop=cancelled)
        except NearError as error:
            if error.code == "cancelled":
                raise Cancelled() from None
            raise

    def _upload(self, path: Path, kind: str) -> str:
        try:
            return self._client.upload(Path(path).read_bytes(), kind)
        except OSError as error:
            raise NearError("cannot-read", f"{Path(path).name} cannot be read ({error.strerror}).", "Check its path.") from None

    def _once(self, thing: object, make) -> str:
        """sha256 of an upload made from `thing`, sent the first time only."""
        known = self._sent.get(id(thing))
        if known is None or known[0]() is not thing:
            known = self._sent[id(thing)] = (weakref.ref(thing), make())
        return known[1]

    def _asset(self, asset: Asset) -> str:
        return self._once(asset, lambda: self._client.upload(encode_asset(asset), "asset"))

    def _light(self, light: Environment) -> str:
        def send() -> str:
            file = io.BytesIO()
            np.save(file, light.rgb_lin709.detach().cpu().numpy().astype(np.float32), allow_pickle=False)
            return self._client.upload(file.getvalue(), "hdri")

        return self._once(light.rgb_lin709, send)


def spec_of_camera(camera: Camera) -> wire.CameraSpec:
    """The camera as plain numbers."""
    return wire.CameraSpec(_numbers(camera.cam_from_world), _numbers(camera.K), camera.width, camera.height, camera.near,
                           camera.far, camera.projection)


def _numbers(matrix: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(v) for v in matrix.reshape(-1).tolist())


__all__ = ["RemoteEngine", "spec_of_camera"]
