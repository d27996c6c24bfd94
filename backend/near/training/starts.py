"""Models to go on training from weights that a pack or an earlier run left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from near.errors import NearError
from near.models.compact_flows import COMPACT_TARGETS, CompactFlow, CompactFlowConfig
from near.models.compact_renderer import CompactRendererConfig, CompactRendererModel
from near.models.homogenizer import LoraSettings, attach_lora


def _load(model, path: Path):
    try:
        model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    except (OSError, RuntimeError) as error:
        raise NearError("start-unfit", f"{path.name} does not fit the model that is to be trained ({str(error).splitlines()[0]}).",
                        "Start from weights of this version, or from none.") from error
    return model


def renderer_from(path: Path | None, lad_layers: int | None = None) -> CompactRendererModel:
    """A renderer to train; ``lad_layers``: another depth of the decoder than the pack's.

    Raises:
        NearError: ``start-unfit``.
    """
    config = CompactRendererConfig()
    model = CompactRendererModel(config if lad_layers is None else replace(config, lad_blocks=lad_layers))
    return model if path is None else _load(model, path)


def base_flow_from(path: Path | None) -> CompactFlow:
    """A base flow to train. Raises: NearError ``start-unfit``."""
    model = CompactFlow(CompactFlowConfig())
    return model if path is None else _load(model, path)


def homogenizer_from(path: Path | None, base: CompactFlow, rank: int) -> CompactFlow:
    """A homogeniser to train: the base flow with fresh adapters, or a trained one (its adapters folded in) with fresh adapters on
    top, which start by changing nothing.

    Raises:
        NearError: ``start-unfit``.
    """
    lora = LoraSettings(rank=rank, alpha=rank, targets=COMPACT_TARGETS)
    if path is None:
        return CompactFlow.homogenizer_from(base, lora)
    flow = _load(CompactFlow(replace(base.config, with_shaded=True)), path)
    attach_lora(flow.flow, lora)
    for part in (flow.flow.input_blocks, flow.flow.out_blocks, flow.flow.out_layer, flow.flow.t_embedder):
        part.requires_grad_(True)
    return flow
