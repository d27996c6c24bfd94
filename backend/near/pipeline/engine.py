"""The one entry point to the neural stack: create, encode, render, with either weight pack."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from near.assets import Asset
from near.errors import NearError
from near.geometry.cameras import Camera
from near.geometry.matting import matte
from near.geometry.mesh import PbrMesh, load_mesh
from near.geometry.photo import Photo, exposed, load_photo
from near.lighting import Environment
from near.pipeline.types import CancelCheck, Frame, PlacedAsset, Progress, check_passes, no_progress


def choose_device(device: str) -> torch.device:
    """Resolve ``auto``.

    Raises:
        NearError: ``device-missing`` when CUDA is asked for and not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise NearError("device-missing", "CUDA was asked for, but torch sees no CUDA device.",
                        "Use --device cpu, or install a CUDA build of torch and a driver (near doctor tells).")
    return torch.device(device)


class Engine:
    """Loads the models of a pack when first needed and keeps what frames share.

    Args:
        pack: ``compact`` (shipped), or the name or folder of an installed official checkpoint.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    def __init__(self, pack: str = "compact", device: str = "auto") -> None:
        self.pack, self.device = pack, choose_device(device)
        self._models = None
        self._renderer = None
        self._published = None

    # -- loading -------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, models, like: "Engine") -> "Engine":
        """An engine around compact models that are loaded already, on the device of another engine."""
        from near.pipeline.compact_frame import CompactRenderer

        engine = cls(like.pack, str(like.device))
        engine._models, engine._renderer = models, CompactRenderer(models)
        return engine

    def compact_models(self):
        """The compact pack's models, loaded."""
        return self._compact()

    def _compact(self):
        if self._models is None:
            from near.models.compact import CompactModels
            from near.pipeline.compact_frame import CompactRenderer

            self._models = CompactModels.load(self.pack)
            self._renderer = CompactRenderer(self._models)
        return self._models

    def compact_renderer(self):
        """The compact pack's renderer, loaded."""
        self._compact()
        return self._renderer

    def _official(self):
        if self._published is None:
            from near.pipeline.published import PublishedPipeline

            self._published = PublishedPipeline.load(self.pack, device=self.device)
        return self._published

    @property
    def is_compact(self) -> bool:
        """Whether the pack is the shipped kind (anchored discs) rather than a published checkpoint."""
        return self.pack == "compact" or (Path(self.pack) / "manifest.json").is_file()

    def unload(self) -> None:
        """Give the models' memory back; the next call loads them again."""
        self._models = self._renderer = self._published = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def memory(self) -> dict:
        """Bytes in use: resident memory of the process and, with CUDA, what torch has reserved."""
        resident = 0
        try:
            import psutil

            resident = psutil.Process(os.getpid()).memory_info().rss
        except ImportError:
            pass
        cuda = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
        return {"resident_bytes": resident, "cuda_reserved_bytes": cuda, "loaded": bool(self._models or self._published)}

    # -- assets --------------------------------------------------------------------------------------------------

    def encode(self, mesh: Path | PbrMesh, *, seed: int = 0, progress: Progress | None = None,
               cancelled: CancelCheck | None = None) -> Asset:
        """Asset from a mesh and its PBR materials.

        Raises:
            NearError: the mesh cannot be read, is empty or too large; ``Cancelled``.
        """
        from near.pipeline.compact_assets import encode_mesh

        if not self.is_compact:
            raise NearError("encode-unsupported", "The published checkpoint has no mesh encoder.",
                            "Use --pack compact for encode, or create the asset from a photo.")
        mesh = mesh if isinstance(mesh, PbrMesh) else load_mesh(Path(mesh))
        return encode_mesh(self._compact(), mesh, seed=seed, progress=progress or no_progress, cancelled=cancelled)

    def create(self, photo: Path | Photo, *, mesh: Path | PbrMesh | None = None, camera: Camera | None = None, seed: int = 0,
               steps: int | None = None, exposure_stops: float = 0.0, progress: Progress | None = None,
               cancelled: CancelCheck | None = None) -> Asset:
        """Asset from a photo, with a mesh as its geometry or with the inflated silhouette.

        Args:
            camera: the photo's camera in asset space, of the photo's size; default: in front, level, 40 degrees.
            steps: sampler steps; default: the pack's.
            exposure_stops: the photo is read as if exposed longer by so much: the asset of a dark photo comes out dark otherwise.
        Raises:
            NearError: the photo or mesh cannot be used; ``Cancelled``.
        """
        progress = progress or no_progress
        photo = photo if isinstance(photo, Photo) else load_photo(Path(photo))
        photo = exposed(matte(photo), exposure_stops)
        mesh = mesh if mesh is None or isinstance(mesh, PbrMesh) else load_mesh(Path(mesh))
        if camera is not None and (camera.width, camera.height) != photo.alpha.shape[::-1]:
            camera = camera.resized(photo.alpha.shape[1], photo.alpha.shape[0])
        if self.is_compact:
            from near.pipeline.compact_assets import create_asset

            asset = create_asset(self._compact(), photo, mesh, camera, seed=seed, steps=steps, progress=progress, cancelled=cancelled)
        else:
            asset = self._official().create(photo, mesh=mesh, seed=seed, steps=steps, progress=progress, cancelled=cancelled)
        return replace(asset, meta={**asset.meta, "exposure_stops": exposure_stops}) if exposure_stops else asset

    # -- frames --------------------------------------------------------------------------------------------------

    def render(self, placed: Sequence[PlacedAsset], light: Environment, camera: Camera, *, passes: Sequence[str] = ("color",),
               quality: str = "full", cancelled: CancelCheck | None = None) -> Frame:
        """One frame of the placed assets; see :class:`near.pipeline.types.Frame`.

        Args:
            quality: ``full``, or ``draft`` (no decoder, no supersampling: for a moving viewport).
        """
        passes = check_passes(passes)
        if quality not in ("full", "draft"):
            raise NearError("quality-unknown", f"There is no quality named {quality!r}.", "Choose full or draft.")
        if not placed:
            raise NearError("nothing-to-render", "No asset was given to render.", "Name at least one asset.")
        anchored = [p.asset.anchors is not None for p in placed]
        if all(anchored):
            self._compact()
            with torch.inference_mode():
                return self._renderer.render(placed, light, camera, passes=passes, quality=quality, cancelled=cancelled)
        if any(anchored):
            raise NearError("packs-mixed", "Compact and published assets cannot share a frame.",
                            "Render them in two frames and join those by depth.")
        return self._official().render(placed, light, camera, passes=passes, quality=quality, cancelled=cancelled)
