"""The two flows of the compact pack: the published flow architecture, small, with lifted photo features beside the noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from near.colour import agx_inverse
from near.models.conditioning import PatchConditioner
from near.models.flow import SLatFlowConfig, SLatFlowModel
from near.models.homogenizer import LoraSettings, attach_lora, expand_input, merge_lora
from near.models.lifting import LIFT_CHANNELS
from near.models.material import SLAT_CHANNELS, decode_colour, encode_colour, within_white
from near.models.pointwise import PointwiseEnsemble
from near.nn import SparseTensor

LOG_FLOOR = 0.004  # added before logarithms: black stays finite and dark colours do not rule the loss
# Beside the attention projections the paper names: in a small flow the feed-forward and modulation must follow too.
COMPACT_TARGETS = ("to_qkv", "to_q", "to_kv", "to_out", "mlp.0", "mlp.2", "adaLN_modulation.1")


@dataclass(frozen=True)
class CompactFlowConfig:
    """width, blocks, heads of the transformer over the coarse voxels; io_width of the sparse convolutions at full
    resolution; with_shaded: the shaded SLAT joins the noise along the channels (the homogeniser); head_width, head_count: of the
    homogeniser's per-voxel heads."""

    resolution: int = 32
    width: int = 192
    blocks: int = 5
    heads: int = 6
    io_width: int = 48
    with_shaded: bool = False
    head_width: int = 512
    head_count: int = 2

    @property
    def in_channels(self) -> int:
        return SLAT_CHANNELS * (2 if self.with_shaded else 1) + LIFT_CHANNELS


class CompactFlow(nn.Module):
    """A flow over SLAT residuals: it predicts the clean residual to a prior SLAT, in units of ``residual_std``."""

    def __init__(self, config: CompactFlowConfig) -> None:
        super().__init__()
        self.config = config
        self.autocast = True
        self.flow = SLatFlowModel(SLatFlowConfig(
            resolution=config.resolution, in_channels=config.in_channels, model_channels=config.width, cond_channels=config.width,
            out_channels=SLAT_CHANNELS, num_blocks=config.blocks, num_heads=config.heads, mlp_ratio=4, patch_size=2,
            num_io_res_blocks=2, io_block_channels=(config.io_width,), pe_mode="ape", qk_rms_norm=True))
        self.conditioner = PatchConditioner(config.width)
        self.pointwise = PointwiseEnsemble(config.resolution, config.head_width, config.head_count) if config.with_shaded else None
        self.register_buffer("residual_mean", torch.zeros(SLAT_CHANNELS))
        self.register_buffer("residual_std", torch.ones(SLAT_CHANNELS))

    def residual(self, target: Tensor, prior: Tensor) -> Tensor:
        """What the flow models of a SLAT [N, 8] beside its prior [N, 8].

        The base flow: the difference. The homogeniser: log ratios of base colour and homogeneous look to the photo's
        radiance (dividing the light out keeps the photo's hues), and roughness and metallic as they are.
        """
        if not self.config.with_shaded:
            return target - prior
        radiance = agx_inverse(prior[:, :3] * 0.5 + 0.5) + LOG_FLOOR
        log = [((decode_colour(target[:, c]) + LOG_FLOOR) / radiance).log() for c in (slice(0, 3), slice(5, 8))]
        return torch.cat([log[0], target[:, 3:5], log[1]], -1)

    def compose(self, residual: Tensor, prior: Tensor) -> Tensor:
        """Inverse of :meth:`residual`."""
        if not self.config.with_shaded:
            return prior + residual
        radiance = agx_inverse(prior[:, :3].clamp(-1, 1) * 0.5 + 0.5) + LOG_FLOOR
        base, look = (encode_colour(within_white((radiance * residual[:, c].clamp(-5, 5).exp() - LOG_FLOOR).clamp_min(5e-4)))
                      for c in (slice(0, 3), slice(5, 8)))
        return torch.cat([base, residual[:, 3:5], look], -1)

    def normalise(self, residual: Tensor) -> Tensor:
        return (residual - self.residual_mean) / self.residual_std

    def denormalise(self, value: Tensor) -> Tensor:
        return value * self.residual_std + self.residual_mean

    def forward(self, coords: Tensor, noisy: Tensor, t1000: Tensor, lift: Tensor, shaded: Tensor | None, square: Tensor,
                keep: Tensor | None, guess: Tensor | None = None) -> Tensor:
        """Predict the clean residual.

        Args:
            coords: int32 [N, 4] (object, x, y, z); noisy: [N, 8] normalised residual at time t; t1000: [B].
            lift: [N, LIFT_CHANNELS]; shaded: [N, 8] or None; square: [B, 4, S, S]; keep: bool [B], False drops the
                object's image tokens (classifier-free guidance); guess: [N, 8] the per-voxel heads' answer, added.
        Returns: [N, 8].
        """
        tokens = self.conditioner(square)
        if keep is not None:
            tokens = torch.where(keep[:, None, None], tokens, torch.zeros((), dtype=tokens.dtype))
        parts = [noisy, lift] if shaded is None else [noisy, lift, shaded]  # the homogeniser appends columns to the base flow
        x = SparseTensor.create(torch.cat(parts, -1), coords)
        out = self.flow(x, t1000, tokens).feats
        return out if guess is None else out + guess.to(out.dtype)

    @classmethod
    def homogenizer_from(cls, base: "CompactFlow", lora: LoraSettings) -> "CompactFlow":
        """An untrained f_theta: the base flow with the shaded SLAT as further input channels and fresh LoRA adapters.

        Beside the adapters and the input layer, the layers outside the transformer stay trainable: in a small flow they
        carry the output's meaning, which changes from shaded to homogenised.
        """
        theta = cls(replace(base.config, with_shaded=True))
        theta.conditioner.load_state_dict(base.conditioner.state_dict())
        theta.flow = attach_lora(expand_input(base.flow, SLAT_CHANNELS), lora)
        for part in (theta.flow.input_blocks, theta.flow.out_blocks, theta.flow.out_layer, theta.flow.t_embedder):
            part.requires_grad_(True)
        # It adds to the per-voxel head's answer, and starts by adding nothing.
        nn.init.zeros_(theta.flow.out_layer.weight)
        nn.init.zeros_(theta.flow.out_layer.bias)
        return theta

    def merged(self) -> "CompactFlow":
        """Adapters folded into the weights: a plain flow for shipping."""
        merge_lora(self.flow)
        return self
