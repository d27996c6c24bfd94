"""Sizes and variants of the LAD, and where each Gaussian attribute sits in its head outputs (spec section 5.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from near.models.args import check_width, one_of, pick_args, require, resolve_heads
from near.models.gaussians import RepresentationConfig

# (attribute, numbers per Gaussian) in each head's own table; "_rgb" is config.rgb_width wide.
HEAD_TABLES: dict[str, tuple[tuple[str, int | None], ...]] = {
    "gs": (("_xyz", 3), ("_base_color", 3), ("_scaling", 3), ("_rotation", 4), ("_opacity", 1)),
    "pbr": (("_roughness", 1), ("_metallic", 1), ("_pbr1", 1)),
    "scale": (("_scaling_view", 3),),
    "rgb": (("_rgb", None), ("_shadow", 1), ("_hdri1", 1), ("_hdri2", 1)),
}


@dataclass(frozen=True)
class SLatGaussianRendererConfig:
    """The LAD; the defaults are the published model.

    Attributes:
        resolution: voxels per axis. model_channels: width D of the blocks.
        latent_channels: width of the IAD's features; any when ``geometry`` is "anchored", D when it is "predicted".
        cond_channels: width of registers and light tokens.
        num_blocks, num_heads, mlp_ratio: the transformer.
        representation: how head outputs become Gaussians (predicted geometry).
        head_layout: "overlapped": each head's column table restarts at column 0 of the concatenated outputs, as in the
            released code (spec section 0, trap 1); "sequential": each head is read where it was written.
        view_origin: "unit_cube": voxel positions in [0, 1]^3 beside a camera in the [-0.5, 0.5]^3 frame, as released
            (trap 2); "centred": both in the centred frame.
        view_frequencies: octaves of the direction and distance codes.
        geometry: "predicted": the heads emit Gaussians; "anchored": the Gaussians come with the asset, and only
            ``rgb_out_layer`` (Linear D -> rgb_width, per voxel, depends on light and view) and ``pbr_out_layer``
            (MLP latent_channels -> pbr_width, per voxel, depends on the asset alone) are built.
        rgb_per: "gaussian": the rgb head emits one feature vector per Gaussian; "voxel": one per voxel, shared by its
            Gaussians. Anchored geometry needs "voxel"; "overlapped" needs "gaussian".
        rgb_width: width of one feature vector (the neural basis' input_dim).
        pbr_width: width of the voxel's pbr output with anchored geometry; 0 builds no pbr head.
    """

    resolution: int = 64
    model_channels: int = 768
    latent_channels: int = 768
    cond_channels: int = 768
    num_blocks: int = 6
    num_heads: int = 12
    mlp_ratio: float = 4.0
    representation: RepresentationConfig = field(default_factory=RepresentationConfig)
    head_layout: str = "overlapped"
    view_origin: str = "unit_cube"
    view_frequencies: int = 12
    geometry: str = "predicted"
    rgb_per: str = "gaussian"
    rgb_width: int = 32
    pbr_width: int = 0

    def __post_init__(self) -> None:
        check_width("LAD", self.model_channels, self.num_heads)
        one_of("LAD", "head_layout", self.head_layout, ("overlapped", "sequential"))
        one_of("LAD", "view_origin", self.view_origin, ("unit_cube", "centred"))
        one_of("LAD", "geometry", self.geometry, ("predicted", "anchored"))
        one_of("LAD", "rgb_per", self.rgb_per, ("gaussian", "voxel"))
        if self.geometry == "predicted":
            require("LAD", self.latent_channels == self.model_channels,
                    f"latent_channels {self.latent_channels} differs from model_channels {self.model_channels}")
            require("LAD", self.rgb_per == "gaussian" or self.head_layout == "sequential",
                    'rgb_per "voxel" has no overlapped column map')
        else:
            require("LAD", self.rgb_per == "voxel", 'anchored geometry needs rgb_per "voxel"')

    @property
    def rgb_outputs(self) -> int:
        """Outputs of the rgb head."""
        if self.geometry == "anchored":
            return self.rgb_width
        gaussians = self.representation.num_gaussians
        return 3 * gaussians + self.rgb_width * (gaussians if self.rgb_per == "gaussian" else 1)

    @property
    def pbr_outputs(self) -> int:
        """Outputs of the pbr head."""
        return self.pbr_width if self.geometry == "anchored" else 3 * self.representation.num_gaussians

    @classmethod
    def from_args(cls, args: Mapping[str, Any], **variants: Any) -> "SLatGaussianRendererConfig":
        """From the ``args`` of a published model JSON; ``variants`` are fields the file cannot know (head_layout, ...)."""
        published = ["resolution", "model_channels", "latent_channels", "cond_channels", "num_blocks", "num_heads", "mlp_ratio",
                     "num_head_channels"]
        without_effect = ["representation_config", "attn_mode", "window_size", "num_register_tokens", "pe_mode", "qk_rms_norm"]
        picked = resolve_heads(pick_args("LAD", args, published, without_effect))
        require("LAD", args.get("pe_mode") in (None, "null"), f"pe_mode is {args.get('pe_mode')!r}, only 'null' is supported")
        require("LAD", "representation_config" in args, "the arguments hold no representation_config")
        width = picked.get("model_channels", cls.model_channels)
        for name in ("latent_channels", "cond_channels"):
            picked.setdefault(name, width)
        return cls(**picked, representation=RepresentationConfig.from_args(args["representation_config"]), **variants)


@dataclass(frozen=True)
class Columns:
    """Columns start..stop of the concatenated outputs; ``width`` numbers per Gaussian (or per voxel for "_rgb" per voxel)."""

    start: int
    stop: int
    width: int


@dataclass(frozen=True)
class ColumnMap:
    """Where each attribute is read from the concatenation [gs | pbr | scale | rgb].

    before_light are the attributes that gs and pbr outputs alone decide; after_light are the rest.
    """

    columns: Mapping[str, Columns]
    head_widths: Mapping[str, int]
    before_light: tuple[str, ...]
    after_light: tuple[str, ...]

    @classmethod
    def of(cls, config: SLatGaussianRendererConfig) -> "ColumnMap":
        gaussians = config.representation.num_gaussians
        columns, head_widths, origin = {}, {}, 0
        for name, table in HEAD_TABLES.items():
            start = origin if config.head_layout == "sequential" else 0
            first = start
            for attribute, width in table:
                width = config.rgb_width if width is None else width
                total = width if attribute == "_rgb" and config.rgb_per == "voxel" else width * gaussians
                columns[attribute] = Columns(start, start + total, width)
                start += total
            head_widths[name] = start - first
            origin += head_widths[name]
        known = head_widths["gs"] + head_widths["pbr"]
        return cls(columns, head_widths, tuple(n for n, c in columns.items() if c.stop <= known),
                   tuple(n for n, c in columns.items() if c.stop > known))
