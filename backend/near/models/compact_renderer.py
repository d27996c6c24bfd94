"""The compact pack's renderer: the published modules at small size, correcting analytic light.

encoder  surface attributes per voxel -> SLAT (explicit material + learned look under homogeneous light)
IAD      SLAT + geometry -> intrinsic features, once per asset
LAD      intrinsic features + light tokens + camera -> 32 features per voxel
basis    features + each disc's normal -> nine log gains on the analytic terms (zero before training)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from near.colour import LUMINANCE
from near.lighting import Environment, condition, resample_equirect
from near.models.anchors import AnchorCloud
from near.models.basis import NeuralBasis, NeuralBasisConfig
from near.models.encoder import SLatEncoder, SLatEncoderConfig
from near.models.iad import SLatGaussianDecoder, SLatGaussianDecoderConfig
from near.models.lad import SLatGaussianRenderer, SLatGaussianRendererConfig
from near.models.material import MATERIAL, SLAT_CHANNELS, encode_colour, voxel_mean
from near.models.shading import NUM_CORRECTIONS
from near.models.tokenizer import HdriEncoder, HdriEncoderConfig
from near.nn import SparseTensor

GEOMETRY_CHANNELS = 4  # mean normal, mean openness: known from the anchors, given to the decoder beside the SLAT
ENCODER_INPUTS = 17
LIGHT_GRID = (64, 128)


@dataclass(frozen=True)
class CompactRendererConfig:
    """Sizes of the compact renderer; resolution: voxels per side."""

    resolution: int = 32
    width: int = 128
    encoder_blocks: int = 2
    iad_blocks: int = 3
    lad_blocks: int = 3
    heads: int = 4
    window: int = 8
    registers: int = 4
    basis_features: int = 32
    light_tokens: int = 64
    backbone: str = "convnext_atto"


def encoder_inputs(cloud: AnchorCloud, encoded: Tensor, coords: Tensor) -> Tensor:
    """Per-voxel surface attributes [L, ENCODER_INPUTS]: mean and spread of the encoded material [M, 5], mean normal,
    openness, and an analytic guess of the look under homogeneous light."""
    count = len(coords)
    mean = voxel_mean(encoded, cloud.voxel, count)
    spread = (voxel_mean(encoded ** 2, cloud.voxel, count) - mean ** 2).clamp_min(0).sqrt()
    return torch.cat([mean, spread, geometry_features(cloud, count), encode_colour(homogeneous_guess(cloud, encoded, count))], -1)


def geometry_features(cloud: AnchorCloud, count: int) -> Tensor:
    """[L, GEOMETRY_CHANNELS]: mean normal and openness (-1..1) of each voxel's discs."""
    return torch.cat([voxel_mean(cloud.normals, cloud.voxel, count),
                      voxel_mean(cloud.openness[:, None] * 2 - 1, cloud.voxel, count)], -1)


def homogeneous_guess(cloud: AnchorCloud, encoded: Tensor, count: int) -> Tensor:
    """Radiance [L, 3] under a white world: base colour times openness, with half of what is hidden coming back."""
    base = (encoded[:, :3] * 0.5 + 0.5) ** 2.2
    return voxel_mean(base * (0.5 + 0.5 * cloud.openness[:, None]), cloud.voxel, count)


class CompactRendererModel(nn.Module):
    """Encoder, IAD, light tokenizer, LAD and neural basis under one roof (trained jointly)."""

    def __init__(self, config: CompactRendererConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.encoder = SLatEncoder(SLatEncoderConfig(
            resolution=c.resolution, in_channels=ENCODER_INPUTS, model_channels=c.width, latent_channels=3, num_blocks=c.encoder_blocks,
            num_heads=c.heads, window_size=c.window))
        self.iad = SLatGaussianDecoder(SLatGaussianDecoderConfig(
            resolution=c.resolution, model_channels=c.width, latent_channels=SLAT_CHANNELS + GEOMETRY_CHANNELS, cond_channels=c.width,
            num_blocks=c.iad_blocks, num_register_tokens=c.registers, num_heads=c.heads, window_size=c.window))
        self.lad = SLatGaussianRenderer(SLatGaussianRendererConfig(
            resolution=c.resolution, model_channels=c.width, latent_channels=c.width, cond_channels=c.width, num_blocks=c.lad_blocks,
            num_heads=c.heads, geometry="anchored", rgb_per="voxel", rgb_width=c.basis_features, pbr_width=5, view_origin="centred", view_frequencies=4))
        self.hdri_encoder = HdriEncoder(HdriEncoderConfig(
            output_dim=c.width, num_tokens=c.light_tokens, cnn_out=c.width // 2, num_heads=c.heads, num_layers=2, backbone=c.backbone))
        self.neural_basis = NeuralBasis(NeuralBasisConfig(
            input_dim=c.basis_features, output_dim=NUM_CORRECTIONS, hidden_dim=64, num_layers=3, w0=4.0, output="linear", zero_init_last=True))
        # What corrects starts at zero: the gains through the basis' last layer, the material and the look through theirs.
        nn.init.normal_(self.lad.rgb_out_layer.weight, std=c.width ** -0.5)
        for layer in (self.lad.pbr_out_layer[-1], self.encoder.out_layer):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(self, coords: Tensor, inputs: Tensor) -> Tensor:
        """SLAT [L, 8] from :func:`encoder_inputs` [L, 17]; coords [L, 3] or [N, 4]."""
        mean = self.encoder(SparseTensor.create(inputs, coords))
        homogeneous = (inputs[:, -3:] + mean).clamp(-1, 1)
        return torch.cat([inputs[:, MATERIAL], homogeneous], -1)

    def tokens(self, environments: list[Environment]) -> Tensor:
        """Light tokens [B, T, D] of environments given in the asset's frame.

        Each is divided by its mean luminance first: the corrections are gains, so that twice the light gives exactly
        twice the radiance.
        """
        maps = []
        for env in environments:
            luminance = (resample_equirect(env.rgb_lin709, 8, 16) @ LUMINANCE).mean().clamp_min(1e-6)
            maps.append(condition(Environment(env.rgb_lin709 / luminance, env.env_from_world, 1.0), *LIGHT_GRID))
        return self.hdri_encoder(torch.stack(maps))

    def voxel_features(self, slat: Tensor, geometry: Tensor, coords: Tensor):
        """IAD: (h sparse, registers) from SLAT [L, 8] and geometry [L, 4]."""
        return self.iad(SparseTensor.create(torch.cat([slat, geometry], -1), coords.int()))
