"""Write a complete checkpoint with random weights, laid out as the published one on the hub.

    python tools/make_synthetic_checkpoint.py HUB_DIR [--size tiny|full] [--head-layout overlapped|sequential]

HUB_DIR then serves as a hub: ``near weights pull near dinov2 --from HUB_DIR --accept-licences``. The NeAR repository also
carries TRELLIS's structure models, so that photo -> asset -> frame needs no mesh. Full size takes about 7 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from near.models.conditioner import ImageConditioner
from near.nn.init import random_sane_weights
from near.weights.builders import build
from near.weights.checkpoint import LIVE_COLUMNS
from near.weights.packs import DINOV2, NEAR

MEAN = (-2.1687545776367188, -0.004347046371549368, -0.13352349400520325, -0.08418072760105133, -0.5271206498146057,
        0.7238689064979553, -1.1414450407028198, 1.2039363384246826)
STD = (2.377650737762451, 2.386378288269043, 2.124418020248413, 2.1748552322387695, 2.663944721221924, 2.371192216873169,
       2.6217446327209473, 2.684523105621338)
LR = {n: 0.1 if n == "_rotation" else 1.0 for n in ("_xyz", "_base_color", "_scaling", "_rotation", "_opacity", "_roughness",
                                                   "_metallic", "_pbr1", "_scaling_view", "_rgb", "_shadow", "_hdri1", "_hdri2")}


@dataclass(frozen=True)
class Size:
    """Widths and depths that differ between a tiny and the published checkpoint."""

    resolution: int
    width: int
    heads: int
    blocks: int
    flow_width: int
    flow_heads: int
    flow_blocks: int
    io_width: int
    window: int
    gaussians: int
    tokens: int
    cnn_out: int
    image: dict[str, Any]
    image_width: int
    structure_channels: tuple[int, ...]
    steps: int
    half: bool  # store in half precision


SIZES = {
    "tiny": Size(16, 48, 4, 2, 48, 4, 2, 16, 4, 4, 64, 16,
                 {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 56}, 48, (16, 8, 8), 2, True),
    "full": Size(64, 768, 12, 12, 1024, 16, 24, 128, 8, 32, 4096, 256, {}, 1024, (512, 128, 32), 25, False),
}


def model_entries(size: Size) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Pipeline name -> (path prefix, class, arguments)."""
    attention = {"num_heads": size.heads, "mlp_ratio": 4, "attn_mode": "swin", "window_size": size.window}
    flow = {"in_channels": 8, "out_channels": 8, "model_channels": size.flow_width, "cond_channels": size.image_width,
            "num_blocks": size.flow_blocks, "num_heads": size.flow_heads, "mlp_ratio": 4, "pe_mode": "ape", "qk_rms_norm": True,
            "use_fp16": True}
    representation = {"lr": LR, "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": size.gaussians, "2d_filter_kernel_size": 0.1,
                      "3d_filter_kernel_size": 9e-4, "scaling_bias": 4e-3 * 64 / size.resolution, "opacity_bias": 0.1,
                      "scaling_activation": "softplus"}
    common = {"resolution": size.resolution, "model_channels": size.width, "cond_channels": size.width, **attention}
    return {
        "decoder": ("ckpts/decoder", "ElasticSLatGaussianDecoder",
                    {**common, "latent_channels": 8, "num_blocks": size.blocks, "num_register_tokens": 16, "pe_mode": "ape"}),
        "renderer": ("ckpts/renderer", "ElasticSLatGaussianRenderer",
                     {**common, "latent_channels": size.width, "num_blocks": max(1, size.blocks // 2), "pe_mode": "null",
                      "representation_config": representation}),
        "hdri_encoder": ("ckpts/hdri_encoder", "Hdri_Encoder",
                         {"output_dim": size.width, "num_tokens": size.tokens, "cnn_out_channels": size.cnn_out}),
        "neural_basis": ("ckpts/neural_basis", "NeuralBasis", {"input_dim": 32, "output_dim": 5, "hidden_dim": 64, "num_layers": 3}),
        "slat_flow_model": ("ckpts/slat_flow_img_dit_L_64l8p2_fp16", "ElasticSLatFlowModel",
                            {**flow, "resolution": size.resolution, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [size.io_width]}),
        "sparse_structure_flow_model": ("ckpts/ss_flow_img_dit_L_16l8_fp16", "SparseStructureFlowModel",
                                        {**flow, "resolution": size.resolution // 4, "patch_size": 1}),
        "sparse_structure_decoder": ("ckpts/ss_dec_conv3d_16l8_fp16", "SparseStructureDecoder",
                                     {"out_channels": 1, "latent_channels": 8, "num_res_blocks": 2, "num_res_blocks_middle": 2,
                                      "channels": list(size.structure_channels)}),
    }


def save_state(path: Path, model: nn.Module, half: bool, as_pt: bool) -> None:
    """State dict as ``.safetensors`` or ``.pt``; shared tensors are stored once per name, as published."""
    state = {k: (v.half() if half and v.is_floating_point() else v).clone().contiguous() for k, v in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, f"{path}.pt") if as_pt else save_file(state, f"{path}.safetensors")


def write_near(folder: Path, size: Size, head_layout: str, seed: int) -> None:
    """The NeAR repository."""
    for index, (name, (prefix, cls, args)) in enumerate(model_entries(size).items()):
        model = random_sane_weights(build(cls.removeprefix("Elastic"), args, {}), seed + index)
        if name == "renderer" and head_layout == "overlapped":
            with torch.no_grad():
                model.rgb_out_layer.bias[LIVE_COLUMNS * size.gaussians:] = 0  # as training leaves what is never read
        save_state(folder / prefix, model, size.half, as_pt=name == "slat_flow_model")
        (folder / f"{prefix}.json").write_text(json.dumps({"name": cls, "args": args}, indent=1))
    sampler = {"name": "FlowEulerGuidanceIntervalSampler", "args": {"sigma_min": 1e-5},
               "params": {"steps": size.steps, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0}}
    pipeline = {"name": "NeARImageToRelightable3DPipeline", "args": {
        "models": {name: prefix for name, (prefix, _, _) in model_entries(size).items()}, "slat_sampler": sampler,
        "sparse_structure_sampler": sampler, "slat_normalization": {"mean": list(MEAN), "std": list(STD)},
        "rembg_model": {"name": "BiRefNet", "args": {}}, "image_cond_model": "dinov2_vitl14_reg"}}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))


def write_image_features(folder: Path, size: Size, seed: int) -> None:
    """The DINOv2 repository, in timm's layout."""
    overrides = dict(size.image)
    model = ImageConditioner("vit_large_patch14_reg4_dinov2", overrides.pop("img_size", 518), **overrides)
    save_state(folder / "model", random_sane_weights(model.network, seed), size.half, as_pt=False)
    config = {"architecture": "vit_large_patch14_reg4_dinov2", "num_classes": 0, "model_args": size.image}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_sums(folder: Path) -> None:
    """``SHA256SUMS``, which a local hub may carry."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n" for p in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


def write_hub(hub: Path, size: str = "tiny", head_layout: str = "overlapped", seed: int = 0, sums: bool = False) -> None:
    """Both repositories under ``hub``; ``sums`` adds checksums."""
    write_near(hub / NEAR.repo, SIZES[size], head_layout, seed)
    write_image_features(hub / DINOV2.repo, SIZES[size], seed + 100)
    if sums:
        for part in (NEAR, DINOV2):
            write_sums(hub / part.repo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hub", type=Path, help="folder to write the repositories to")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--head-layout", choices=("overlapped", "sequential"), default="overlapped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sums", action="store_true", help="write SHA256SUMS beside the files")
    args = parser.parse_args()
    write_hub(args.hub, args.size, args.head_layout, args.seed, args.sums)
    total = sum(p.stat().st_size for p in args.hub.rglob("*") if p.is_file())
    print(f"{args.size} checkpoint in {args.hub}: {total / 1e6:.0f} MB, {json.dumps(asdict(SIZES[args.size]))}")


if __name__ == "__main__":
    main()
