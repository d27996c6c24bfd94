"""Models to go on training from weights that a pack or an earlier run left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from near.errors import NearError
from near.models.compact_flows import COMPACT_TARGETS, CompactFlow, CompactFlowConfig
from near.models.compact_renderer import CompactRendererConfig, CompactRendererModel
from near.models.homogenizer import LoraSettings, attach_lora


def load_into(model, path: Path):
    """The model with weights of a file; a tensor that several layers share may be stored under any of their names.

    Raises:
        NearError: ``start-unfit``.
    """
    try:
        stored = load_file(path)
        own = model.state_dict()
        missing, unknown = model.load_state_dict(stored, strict=False)
        there = {own[name].data_ptr() for name in stored if name in own}
        lost = [*unknown, *(name for name in missing if own[name].data_ptr() not in there)]
        if lost:
            raise RuntimeError(f"{len(lost)} tensors differ, {lost[0]} for one")
    except (OSError, RuntimeError) as error:
        raise NearError("start-unfit", f"{path.name} does not fit the model ({str(error).splitlines()[0]}).",
                        "Use weights of this version and of this shape, or none.") from error
    return model


def stored_homogenizer(path: Path, base: CompactFlowConfig) -> CompactFlow:
    """The homogeniser of a file, on a base flow of sizes ``base``; how many per-voxel heads it has, and how wide, the file says.

    Raises:
        NearError: ``start-unfit``.
    """
    try:
        with safe_open(str(path), "pt") as file:
            first = [name for name in file.keys() if name.startswith("pointwise.members.") and name.endswith(".read.0.weight")]
            width = file.get_slice(first[0]).get_shape()[0]
    except (OSError, SafetensorError, IndexError) as error:
        raise NearError("start-unfit", f"{path.name} holds no homogeniser.", "Use weights that near train flow --homogenizer left, or a pack's.") from error
    return load_into(CompactFlow(replace(base, with_shaded=True, head_count=len(first), head_width=width)), path)


def renderer_from(path: Path | None, lad_layers: int | None = None) -> CompactRendererModel:
    """A renderer to train; ``lad_layers``: another depth of the decoder than the pack's.

    Raises:
        NearError: ``start-unfit``.
    """
    config = CompactRendererConfig()
    model = CompactRendererModel(config if lad_layers is None else replace(config, lad_blocks=lad_layers))
    return model if path is None else load_into(model, path)


def base_flow_from(path: Path | None) -> CompactFlow:
    """A base flow to train. Raises: NearError ``start-unfit``."""
    model = CompactFlow(CompactFlowConfig())
    return model if path is None else load_into(model, path)


def homogenizer_from(path: Path | None, base: CompactFlow, rank: int) -> CompactFlow:
    """A homogeniser to train: the base flow with fresh adapters, or a trained one (its adapters folded in) with fresh adapters on
    top, which start by changing nothing.

    Raises:
        NearError: ``start-unfit``.
    """
    lora = LoraSettings(rank=rank, alpha=rank, targets=COMPACT_TARGETS)
    if path is None:
        return CompactFlow.homogenizer_from(base, lora)
    flow = stored_homogenizer(path, base.config)
    attach_lora(flow.flow, lora)
    for part in (flow.flow.input_blocks, flow.flow.out_blocks, flow.flow.out_layer, flow.flow.t_embedder):
        part.requires_grad_(True)
    return flow
