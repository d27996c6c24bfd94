"""The compact pack at work: loading, and the few calls the pipeline makes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from near.geometry.cameras import Camera
from near.geometry.photo import Photo
from near.lighting import Environment, PrefilteredLight, prefilter
from near.models.anchors import AnchorCloud
from near.models.compact_flows import CompactFlow, CompactFlowConfig
from near.models.compact_renderer import CompactRendererConfig, CompactRendererModel, geometry_features
from near.models.conditioning import photo_square
from near.models.evidence import VoxelView
from near.models.lad import Intrinsic
from near.models.lifting import LiftedPhoto
from near.models.material import MATERIAL, decode_material, shaded_slat
from near.models.samplers import SamplerConfig, initial_noise, sample
from near.nn import KeyValue, SparseTensor
from near.weights.integrity import manifest_digest, verify_manifest
from near.weights.packs import compact_dir


@dataclass(frozen=True)
class CompactConfig:
    """What the pipeline must know of a pack beside the weights.

    spread: disc radius (standard deviation) over the mean neighbour distance; close_up_scale: further factor on it where
    a disc covers several pixels, so that close-ups show no gaps;
    steps: sampler steps; noise_scale: factor on the initial noise (0: the flow's mean, deterministic).
    """

    resolution: int = 32
    spread: float = 0.44
    close_up_scale: float = 1.47
    steps: int = 1
    noise_scale: float = 0.0
    renderer: CompactRendererConfig = field(default_factory=CompactRendererConfig)
    base_flow: CompactFlowConfig = field(default_factory=CompactFlowConfig)
    homogenizer: CompactFlowConfig = field(default_factory=lambda: CompactFlowConfig(with_shaded=True))

    @classmethod
    def from_dict(cls, values: dict) -> "CompactConfig":
        nested = {"renderer": CompactRendererConfig, "base_flow": CompactFlowConfig, "homogenizer": CompactFlowConfig}
        return cls(**{k: nested[k](**v) if k in nested else v for k, v in values.items()})


@dataclass(frozen=True)
class IntrinsicFeatures:
    """Of one asset: coords int32 [L, 4]; the IAD's features as the LAD keeps them; material [L, 5] encoded."""

    coords: Tensor
    intrinsic: Intrinsic
    registers: list[KeyValue]
    material: Tensor


@dataclass
class PreparedLight:
    """Of one environment map, whatever its rotation: the prefiltered maps, and the tokens' keys and values of the last
    rotations asked for."""

    environment: Environment
    prefiltered: PrefilteredLight
    tokens: dict = field(default_factory=dict)


class CompactModels:
    """The models of one compact pack, in evaluation mode."""

    def __init__(self, config: CompactConfig, renderer: CompactRendererModel, base_flow: CompactFlow, homogenizer: CompactFlow,
                 pack_id: str = "compact", pack_sha256: str = "") -> None:
        self.config, self.pack_id, self.pack_sha256 = config, pack_id, pack_sha256
        self.renderer, self.base_flow, self.homogenizer = (m.eval().requires_grad_(False) for m in (renderer, base_flow, homogenizer))

    @classmethod
    def load(cls, pack: str = "compact") -> "CompactModels":
        """Read and verify a pack: the shipped one, or a folder of the same layout.

        Raises:
            NearError: a file is missing or its sha256 is wrong.
        """
        folder = compact_dir() if pack == "compact" else Path(pack)
        manifest = verify_manifest(folder, "compact")
        config = CompactConfig.from_dict(manifest["meta"]["config"])
        renderer, base = CompactRendererModel(config.renderer), CompactFlow(config.base_flow)
        homogenizer = CompactFlow(config.homogenizer)
        for name, model in (("renderer", renderer), ("base_flow", base), ("homogenizer", homogenizer)):
            model.load_state_dict({k: v.float() for k, v in load_file(folder / f"{name}.safetensors").items()}, strict=True)
        return cls(config, renderer, base, homogenizer, "compact", manifest_digest(folder))

    def save(self, folder: Path) -> None:
        """Write the weights as half-precision safetensors (the manifest is the caller's to write)."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("renderer", "base_flow", "homogenizer"):
            state = getattr(self, name).state_dict()
            save_file({k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()},
                      folder / f"{name}.safetensors")

    # -- asset side ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_slat(self, coords: Tensor, inputs: Tensor) -> Tensor:
        """SLAT [L, 8] from surface attributes (:func:`near.models.compact_renderer.encoder_inputs`)."""
        return self.renderer.encode(coords.int(), inputs)

    def voxel_material(self, coords: Tensor, slat: Tensor) -> Tensor:
        """Encoded material [L, 5] that a SLAT holds."""
        return slat[:, MATERIAL].clamp(-1, 1)

    @torch.inference_mode()
    def sample_shaded(self, coords: Tensor, lifted: LiftedPhoto, photo: Photo, **run) -> Tensor:
        """Base flow f_s: the shaded SLAT [L, 8] of a photo."""
        return self._sample(self.base_flow, coords, lifted, None, shaded_slat(lifted.voxel_colour), photo, "shaded SLAT", **run)

    @torch.inference_mode()
    def sample_homogenised(self, coords: Tensor, lifted: LiftedPhoto, view: VoxelView, shaded: Tensor, photo: Photo, **run) -> Tensor:
        """Homogeniser f_theta: the lighting-homogenised SLAT [L, 8]; ``view``: how the voxels answer light."""
        prior = shaded_slat(lifted.voxel_colour)
        guess = self.homogenizer.pointwise(lifted.features, view)
        return self._sample(self.homogenizer, coords, lifted, shaded, prior, photo, "homogenised SLAT", guess=guess, **run).clamp(-1, 1)

    def _sample(self, flow: CompactFlow, coords: Tensor, lifted: LiftedPhoto, shaded: Tensor | None, prior: Tensor, photo: Photo,
                stage: str, *, seed: int, steps: int | None, progress, cancelled, guess: Tensor | None = None) -> Tensor:
        batched = torch.cat([torch.zeros(len(coords), 1), coords.float()], 1).int()
        square = photo_square(photo.srgb, photo.alpha)[None]
        flow.autocast = False

        def model(x: Tensor, t1000: Tensor, _: object) -> Tensor:
            return flow(batched, x, t1000, lifted.features, shaded, square, None, guess)

        config = SamplerConfig(steps=steps or self.config.steps, guidance="none", prediction="sample",
                               noise_scale=self.config.noise_scale)
        result = sample(model, initial_noise((len(coords), prior.shape[1]), seed), [None], config=config, stage=stage,
                        progress=lambda name, fraction, _: progress(name, fraction), cancelled=cancelled)
        return flow.compose(flow.denormalise(result.samples), prior)

    # -- frame side ----------------------------------------------------------------------------------------------

    def intrinsic(self, coords: Tensor, slat: Tensor, cloud: AnchorCloud) -> IntrinsicFeatures:
        """IAD, once per asset."""
        geometry = geometry_features(cloud, len(coords))
        h, registers = self.renderer.iad(SparseTensor.create(torch.cat([slat, geometry], -1), coords.int()))
        lad = self.renderer.lad
        return IntrinsicFeatures(h.coords, lad.intrinsic(h.feats), lad.register_kv(registers), self.voxel_material(coords, slat))

    def anchor_material(self, features: IntrinsicFeatures, cloud: AnchorCloud) -> Tensor:
        """Linear base colour, roughness, metallic of every disc [M, 5]: its voxel's material, the decoder's correction
        of it, and the disc's own detail."""
        voxel = features.material + self.renderer.lad.materials(features.intrinsic)
        return decode_material(voxel[cloud.voxel] + cloud.detail)

    def prepare_light(self, environment: Environment) -> PreparedLight:
        """Prefilter an environment map, once per map."""
        return PreparedLight(environment, prefilter(environment))

    def light_tokens(self, light: PreparedLight, env_from_asset: Environment) -> list[KeyValue]:
        """Keys and values of the light's tokens, seen in the asset's frame."""
        key = tuple(round(v, 6) for v in env_from_asset.env_from_world.flatten().tolist())
        if key not in light.tokens:
            while len(light.tokens) >= 8:
                light.tokens.pop(next(iter(light.tokens)))
            light.tokens[key] = self.renderer.lad.light_kv(self.renderer.tokens([env_from_asset]))
        return light.tokens[key]

    def corrections(self, features: IntrinsicFeatures, tokens: list[KeyValue], camera: Camera, voxel: Tensor, normals: Tensor) -> Tensor:
        """Log gains [m, 9] for discs in ``voxel`` [m] with ``normals`` [m, 3]; the LAD runs only on the voxels named
        (visible-first shading)."""
        rows, inverse = torch.unique(voxel, return_inverse=True)
        lad = self.renderer.lad
        view = lad.view_embedding(features.coords[rows], camera.cam_from_world[None])
        _, rgb = lad.shade(features.intrinsic[rows], view, features.registers, tokens)
        return self.renderer.neural_basis(rgb[inverse], normals)

    def config_dict(self) -> dict:
        return asdict(self.config)
