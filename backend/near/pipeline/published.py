"""The published NeAR as one object: photo -> asset, asset -> frame, with the weights of an installed checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from near.assets import Asset
from near.errors import NearError
from near.geometry.cameras import Camera
from near.geometry.matting import matte
from near.geometry.mesh import PbrMesh
from near.geometry.photo import Photo
from near.lighting import Environment
from near.models.conditioner import ImageConditioner, load_birefnet, matte_with
from near.models.flow import FlowTransformer
from near.models.homogenizer import Homogenizer, HomogenizerConfig, load_adapter
from near.models.samplers import SamplerConfig
from near.nn.kernels import cpu_has_bfloat16
from near.pipeline.published_assets import CreatorModels, StructureModels, create_asset
from near.pipeline.published_frame import PublishedRenderer
from near.pipeline.published_parts import PublishedModels
from near.pipeline.types import CancelCheck, Frame, PlacedAsset, Progress, no_progress
from near.weights.builders import build
from near.weights.checkpoint import CheckpointSpec, find_model, load_model, read_pipeline
from near.weights.integrity import read_lock
from near.weights.manage import installed, installed_repo
from near.weights.packs import BIREFNET, DINOV2, NEAR, TRELLIS, weights_home

log = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER_FILE = "homogenizer.safetensors"  # beside pipeline.yaml: a second flow makes the checkpoint two-stage


class PublishedPipeline:
    """A checkpoint directory, loaded piece by piece when first needed.

    Args:
        root: folder with ``pipeline.yaml``. device: where everything runs. dtype: ``float32``, ``bfloat16``, ``float16``
            (CUDA only) or ``auto`` of the transformer blocks. conditioning: see :class:`PublishedRenderer`.
        home: folder of the installed parts (image features, geometry); default: the user's.
    """

    def __init__(self, root: Path, *, device: torch.device | str = "cpu", dtype: str = "auto", conditioning: str = "energy",
                 home: Path | None = None) -> None:
        self.device, self.home = torch.device(device), home or weights_home()
        self.dtype = choose_precision(dtype, self.device)
        self.spec: CheckpointSpec = read_pipeline(root)
        self.conditioning = conditioning
        self._renderer: PublishedRenderer | None = None
        self._creator: CreatorModels | None = None

    @classmethod
    def load(cls, pack: str | Path = "official", *, device: torch.device | str = "cpu", dtype: str = "auto",
             home: Path | None = None, **options) -> "PublishedPipeline":
        """Open the ``official`` pack, a hub id ``org/name`` that was pulled, or a checkpoint folder.

        Raises: NearError ``weights-missing``, ``weights-tampered``, ``checkpoint-...``.
        """
        return cls(find_checkpoint(pack, home), device=device, dtype=dtype, home=home, **options)

    # -- loading --------------------------------------------------------------------------------------------------

    @property
    def renderer(self) -> PublishedRenderer:
        """The frame side."""
        if self._renderer is None:
            models = PublishedModels(*(self._model(n) for n in ("decoder", "renderer", "hdri_encoder", "neural_basis")))
            self._renderer = PublishedRenderer(models.to(self.device, self.dtype), self.device, self.conditioning)
            log.info("head layout: %s", models.renderer.config.head_layout)
        return self._renderer

    @property
    def creator(self) -> CreatorModels:
        """The photo side."""
        if self._creator is None:
            base = self._model("slat_flow_model")
            adapter = self.spec.root / ADAPTER_FILE
            theta, config = load_adapter(adapter, base) if adapter.is_file() else (None, HomogenizerConfig("single_stage"))
            for flow in (base, theta):
                if flow is not None:
                    self._place(flow)
            self._creator = CreatorModels(self._conditioner(), Homogenizer(base, theta, config), self.spec.slat_sampler or SamplerConfig(),
                                          self.spec.slat_mean, self.spec.slat_std, self._structure())
        return self._creator

    def _model(self, name: str, spec: CheckpointSpec | None = None) -> torch.nn.Module:
        return load_model(find_model(spec or self.spec, name, lambda repo: installed_repo(repo, home=self.home)), build)

    def _place(self, flow: FlowTransformer) -> FlowTransformer:
        return flow.to(self.device).set_precision(self.dtype).eval().requires_grad_(False)

    def _conditioner(self) -> ImageConditioner:
        name = self.spec.image_cond_model or "dinov2_vitl14_reg"
        beside = self.spec.root / DINOV2.name
        folder = beside if beside.is_dir() else installed(DINOV2.name, home=self.home)
        return ImageConditioner.load(folder, name).to(self.device)

    def _structure(self) -> StructureModels | None:
        """The checkpoint's own structure models, else TRELLIS's if they are installed."""
        spec = self.spec
        if "sparse_structure_flow_model" not in spec.models:
            if TRELLIS.name not in read_lock(self.home):
                return None
            spec = read_pipeline(installed(TRELLIS.name, home=self.home))
        flow, decoder = (self._model(n, spec) for n in ("sparse_structure_flow_model", "sparse_structure_decoder"))
        return StructureModels(self._place(flow), decoder.to(self.device), spec.structure_sampler or SamplerConfig())

    def unload(self) -> None:
        """Give the models' memory back."""
        self._renderer = self._creator = None

    # -- use ------------------------------------------------------------------------------------------------------

    def create(self, photo: Photo | Sequence[Photo], *, mesh: PbrMesh | None = None, seed: int = 42, steps: int | None = None,
               multi_image: str = "stochastic", progress: Progress | None = None, cancelled: CancelCheck | None = None) -> Asset:
        """Asset from one or several photos of an object; its voxels come from the mesh or from the structure model.

        Raises: NearError; ``Cancelled``.
        """
        photos = [photo] if isinstance(photo, Photo) else list(photo)
        if not photos:
            raise NearError("no-condition", "No photo was given.", "Give at least one photo.")
        return create_asset(self.creator, photos, mesh, seed=seed, steps=steps, multi_image=multi_image, progress=progress or no_progress,
                            cancelled=cancelled, meta=self._provenance())

    def matte(self, photo: Photo) -> Photo:
        """The photo with a matte: its own, else BiRefNet's where that part is installed, else the built-in method's."""
        if photo.has_matte:
            return photo
        if BIREFNET.name not in read_lock(self.home):
            return matte(photo)
        network = load_birefnet(installed(BIREFNET.name, home=self.home), self.device)
        return replace(photo, alpha=matte_with(network, photo.srgb))

    def render(self, placed: Sequence[PlacedAsset], light: Environment, camera: Camera, *, passes: Sequence[str] = ("color",),
               quality: str = "full", cancelled: CancelCheck | None = None) -> Frame:
        """One frame, linear; see :meth:`PublishedRenderer.render`."""
        return self.renderer.render(placed, light, camera, passes=passes, quality=quality, cancelled=cancelled)

    def _provenance(self) -> dict:
        entry = next((e for n, e in read_lock(self.home).items() if self.home / n == self.spec.root), None)
        if entry is None:
            return {"pack": self.spec.root.name}
        flow = self.spec.models["slat_flow_model"]
        digests = sorted(r.sha256 for f, r in entry.files.items() if f.startswith(flow))
        return {"pack": "official", "pack_revision": entry.revision, "pack_sha256": digests[0] if digests else None, "licence": entry.licence}


def find_checkpoint(pack: str | Path, home: Path | None = None) -> Path:
    """Folder of a checkpoint named as a pack, a part, a hub id or a path.

    Raises: NearError ``weights-missing``.
    """
    folder = Path(pack)
    if (folder / "pipeline.yaml").is_file():
        return folder
    if str(pack) in ("official", NEAR.name, NEAR.repo):
        return installed(NEAR.name, home=home)
    if str(pack).count("/") == 1 and not folder.exists():
        found = installed_repo(str(pack), home=home)
        if found is not None:
            return found
    raise NearError("weights-missing", f"No checkpoint was found at {str(pack)!r}.",
                    "Give a folder with pipeline.yaml, or run `near weights pull official`.")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Resolve ``auto``: bfloat16 where the device multiplies in it, else float32.

    Raises: NearError ``precision``.
    """
    if name == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    if name not in PRECISIONS or (name == "float16" and device.type == "cpu"):
        raise NearError("precision", f"The precision {name!r} is not available on {device.type}.", f"Choose from {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]


__all__ = ["PublishedPipeline", "choose_precision", "find_checkpoint"]
