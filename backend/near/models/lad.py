"""Lighting-aware decoder (LAD), published as `SLatGaussianRenderer` (spec section 5).

A frame runs through stages that depend on different things, so that each is cached by what it depends on:

    intrinsic(h)                     asset            input layer and head input of the IAD's features
    register_kv(registers)           checkpoint       keys and values of the register tokens, every block
    light_kv(tokens)                 light            keys and values of the light tokens, every block
    view_embedding(coords, camera)   asset and view   direction and distance of every voxel
    geometry(...)                    asset and view   everything that decides which voxels are seen
    shade(...)                       all three        blocks and light-dependent heads, on any subset of the voxels

Voxels never attend to each other here, so `shade` on a subset equals the same rows of the full result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from near.models.gaussians import offset_perturbation, place
from near.models.lad_config import ColumnMap, SLatGaussianRendererConfig
from near.nn import (FLOAT32_EPS, KeyValue, RegisterLightBlock, SparseTensor, cast_weights, layer_norm_5, nerf_encoding, per_row,
                     row_slices, weight_dtype)
from near.nn.parallel import by_rows, run_all

CPU_ROWS, CUDA_ROWS = 1024, 65536  # rows that go through the blocks at once: fits a core's cache; bounds memory


@dataclass(frozen=True)
class Intrinsic:
    """What the LAD keeps of an asset: embedded [N, D] = input layer of h, normed [N, latent_channels] = ln5(h)."""

    embedded: Tensor
    normed: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Intrinsic":
        return Intrinsic(self.embedded[rows], self.normed[rows])


@dataclass(frozen=True)
class GeometryHeads:
    """Outputs of the heads that run before any light is known: gs [N, 14 G], pbr [N, 3 G]."""

    gs: Tensor
    pbr: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "GeometryHeads":
        return GeometryHeads(self.gs[rows], self.pbr[rows])


class SLatGaussianRenderer(nn.Module):
    """Intrinsic features, registers, light tokens and a camera -> raw Gaussian attributes (or voxel features)."""

    def __init__(self, config: SLatGaussianRendererConfig) -> None:
        super().__init__()
        self.config = config
        width, cond = config.model_channels, config.cond_channels
        self.input_layer = nn.Linear(config.latent_channels, width)
        self.blocks = nn.ModuleList(RegisterLightBlock(width, cond, config.num_heads, config.mlp_ratio)
                                    for _ in range(config.num_blocks))
        codes = 1 + 2 * config.view_frequencies
        self.ob_views_encoder = nn.Linear(3 * codes, width)
        self.ob_views_norm = nn.RMSNorm(width, eps=FLOAT32_EPS)
        self.ob_dists_encoder = nn.Linear(codes, width)
        self.ob_dists_norm = nn.RMSNorm(width, eps=FLOAT32_EPS)
        if config.geometry == "predicted":
            rep = config.representation
            self.columns = ColumnMap.of(config)
            self.register_buffer("offset_perturbation", offset_perturbation(rep.num_gaussians, rep.voxel_size))
            self.gs_out_layer = head(width, self.columns.head_widths["gs"])
            self.scale_out_layer = nn.Linear(width, self.columns.head_widths["scale"])
        if config.pbr_outputs:
            self.pbr_out_layer = head(config.latent_channels, config.pbr_outputs)
        self.rgb_out_layer = nn.Linear(width, config.rgb_outputs)

    def cast_blocks(self, dtype: torch.dtype, heads: bool = False) -> "SLatGaussianRenderer":
        """Run the blocks' linear layers in ``dtype``, and with ``heads`` the output layers too; the rest stays float32."""
        cast_weights(self.blocks, dtype)
        if heads:
            for name, part in self.named_children():
                if name.endswith("_out_layer"):
                    cast_weights(part, dtype)
        return self

    # -- stages ---------------------------------------------------------------------------------------------------

    def intrinsic(self, h: Tensor) -> Intrinsic:
        """h [N, latent_channels] of the IAD."""
        return Intrinsic(self.input_layer(h), layer_norm_5(h))

    def register_kv(self, registers: Tensor) -> list[KeyValue]:
        """registers [B, R, cond_channels] (B = 1: shared by all objects)."""
        return [block.register_attn.project(registers) for block in self.blocks]

    def light_kv(self, tokens: Tensor) -> list[KeyValue]:
        """tokens [B, T, cond_channels] (B = 1: shared by all objects)."""
        return [block.cross_attn.project(tokens) for block in self.blocks]

    def view_embedding(self, coords: Tensor, cam_from_asset: Tensor) -> Tensor:
        """Direction and distance from the camera to every voxel, embedded.

        Args:
            coords: int [N, 4] rows (batch, x, y, z). cam_from_asset: [B, 4, 4] world -> camera of each object's frame.

        Returns:
            float32 [N, D]. Positions are taken in the frame ``config.view_origin`` says.
        """
        camera = torch.linalg.inv(cam_from_asset.float())[:, :3, 3]
        position = (coords[:, 1:].float() + 0.5) / self.config.resolution
        if self.config.view_origin == "centred":
            position = position - 0.5
        counts = torch.bincount(coords[:, 0], minlength=len(camera)).tolist() if len(camera) > 1 else [len(coords)]
        return by_rows(self._embed_offset, position - per_row(camera, counts))

    def geometry(self, intrinsic: Intrinsic, view: Tensor) -> GeometryHeads:
        """Heads on the intrinsic features and the view embedding (predicted geometry only)."""
        x = intrinsic.normed + view
        return GeometryHeads(by_rows(lambda r: run_head(self.gs_out_layer, r), x), by_rows(lambda r: run_head(self.pbr_out_layer, r), x))

    def geometry_attributes(self, heads: GeometryHeads, coords: Tensor) -> dict[str, Tensor]:
        """Raw attributes that are known before any light, by published name, each [N, G, k] ("_xyz" in the unit cube)."""
        return self._attributes([heads.gs, heads.pbr], self.columns.before_light, coords)

    def materials(self, intrinsic: Intrinsic) -> Tensor:
        """Anchored geometry: pbr head on the intrinsic features alone, [N, pbr_width]; no view, no light."""
        return run_head(self.pbr_out_layer, intrinsic.normed)

    def shade(self, intrinsic: Intrinsic, view: Tensor, registers: Sequence[KeyValue], light: Sequence[KeyValue],
              counts: Sequence[int] | None = None, poll: Callable[[], None] | None = None) -> tuple[Tensor | None, Tensor]:
        """The blocks and the heads behind them, on any rows.

        Args:
            intrinsic, view: rows of `intrinsic` and `view_embedding`.
            registers, light: `register_kv` and `light_kv`.
            counts: rows per object; needed when registers or light differ between objects.
            poll: called between chunks; raises to stop (cancellation).

        Returns:
            scale [n, 3 G] (None for anchored geometry) and rgb [n, rgb_outputs].
        """
        chunk = CPU_ROWS if view.device.type == "cpu" else CUDA_ROWS

        def piece(part: slice, context: Sequence[tuple[KeyValue, KeyValue]]) -> tuple[Tensor | None, Tensor]:
            if poll is not None:
                poll()
            return self._heads(self._blocks(intrinsic.embedded[part] + view[part], context))

        tasks = []
        for b, rows in enumerate(row_slices(counts or (len(view),))):
            own = [(pick(r, b), pick(l, b)) for r, l in zip(registers, light)]
            parts = [slice(start, min(start + chunk, rows.stop)) for start in range(rows.start, rows.stop, chunk)]
            tasks += [lambda part=part, own=own: piece(part, own) for part in parts]
        results = (run_all(tasks) if view.device.type == "cpu" else [task() for task in tasks]) or [self._heads(view)]
        scale = None if self.config.geometry == "anchored" else torch.cat([r[0] for r in results])
        return scale, torch.cat([r[1] for r in results])

    def light_attributes(self, heads: GeometryHeads, scale: Tensor, rgb: Tensor) -> dict[str, Tensor]:
        """Raw attributes that need `shade`, by published name, each [n, G, k]."""
        return self._attributes([heads.gs, heads.pbr, scale, rgb], self.columns.after_light, None)

    # -- everything at once ---------------------------------------------------------------------------------------

    def forward(self, h: SparseTensor, registers: Tensor, tokens: Tensor, cam_from_asset: Tensor) -> dict[str, Tensor]:
        """All stages on all voxels.

        Args:
            h: IAD output; registers [B, R, cond]; tokens [B, T, cond]; cam_from_asset [B, 4, 4].

        Returns:
            Predicted geometry: the 13 raw attributes by published name, each [N, G, k]. Anchored geometry:
            {"rgb": [N, rgb_width]} and, with a pbr head, {"pbr": [N, pbr_width]}.
        """
        intrinsic = self.intrinsic(h.feats)
        view = self.view_embedding(h.coords, cam_from_asset)
        scale, rgb = self.shade(intrinsic, view, self.register_kv(registers), self.light_kv(tokens), h.counts)
        if self.config.geometry == "anchored":
            return {"rgb": rgb} | ({"pbr": self.materials(intrinsic)} if self.config.pbr_outputs else {})
        heads = self.geometry(intrinsic, view)
        return self.geometry_attributes(heads, h.coords) | self.light_attributes(heads, scale, rgb)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _blocks(self, x: Tensor, context: Sequence[tuple[KeyValue, KeyValue]]) -> Tensor:
        stream = x.dtype
        if len(self.blocks):
            x = x.to(weight_dtype(self.blocks))
        for block, (registers, light) in zip(self.blocks, context):
            x = block(x, registers, light, (len(x),))
        return x.to(stream)

    def _heads(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        x = layer_norm_5(x)
        return None if self.config.geometry == "anchored" else run_head(self.scale_out_layer, x), run_head(self.rgb_out_layer, x)

    def _embed_offset(self, offset: Tensor) -> Tensor:
        """Camera to voxel [n, 3] -> [n, D]."""
        distance = offset.norm(dim=-1, keepdim=True)
        freqs = self.config.view_frequencies
        views = self.ob_views_norm(self.ob_views_encoder(nerf_encoding(offset / distance, freqs)))
        return views + self.ob_dists_norm(self.ob_dists_encoder(nerf_encoding(distance, freqs)))

    def _attributes(self, outputs: Sequence[Tensor], names: Sequence[str], coords: Tensor | None) -> dict[str, Tensor]:
        """Read named columns of the concatenated head outputs, times lr."""
        rep, attributes = self.config.representation, {}
        for name in names:
            columns = self.columns.columns[name]
            values = read_columns(outputs, columns.start, columns.stop).unflatten(1, (-1, columns.width))
            if rep.lr[name] != 1:
                values = values * rep.lr[name]
            if name == "_xyz":
                values = place(values, coords[:, 1:], self.config.resolution, rep, self.offset_perturbation)
            attributes[name] = values.expand(-1, rep.num_gaussians, -1)
        return attributes


def head(width: int, outputs: int) -> nn.Sequential:
    """Linear, exact GELU, Linear."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs))


def run_head(layers: nn.Module, x: Tensor) -> Tensor:
    """Output layers in their own type, the result in x's."""
    return layers(x.to(weight_dtype(layers))).to(x.dtype)


def read_columns(outputs: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Columns start..stop of the concatenation of ``outputs`` along the last axis, without building all of it."""
    parts, origin = [], 0
    for part in outputs:
        width = part.shape[-1]
        if start < origin + width and stop > origin:
            parts.append(part[..., max(start - origin, 0) : min(stop - origin, width)])
        origin += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def pick(kv: KeyValue, index: int) -> KeyValue:
    """One object's keys and values; a shared context serves every object."""
    index = index if len(kv.key) > 1 else 0
    return KeyValue(kv.key[index : index + 1], kv.value[index : index + 1])
