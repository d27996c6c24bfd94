"""Published class names -> our modules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from near.errors import NearError
from near.models.basis import NeuralBasis, NeuralBasisConfig
from near.models.flow import SLatFlowConfig, SLatFlowModel
from near.models.iad import SLatGaussianDecoder, SLatGaussianDecoderConfig
from near.models.lad import SLatGaussianRenderer
from near.models.lad_config import SLatGaussianRendererConfig
from near.models.sparse_structure import (SparseStructureDecoder, SparseStructureEncoder, SparseStructureFlowModel, StructureFlowConfig,
                                          StructureVaeConfig)
from near.models.tokenizer import HdriEncoder, HdriEncoderConfig
from near.weights.checkpoint import choose_head_layout

log = logging.getLogger(__name__)

CLASSES: dict[str, tuple[type, type]] = {
    "SLatFlowModel": (SLatFlowConfig, SLatFlowModel),
    "SLatGaussianDecoder": (SLatGaussianDecoderConfig, SLatGaussianDecoder),
    "SLatGaussianRenderer": (SLatGaussianRendererConfig, SLatGaussianRenderer),
    "Hdri_Encoder": (HdriEncoderConfig, HdriEncoder),
    "NeuralBasis": (NeuralBasisConfig, NeuralBasis),
    "SparseStructureFlowModel": (StructureFlowConfig, SparseStructureFlowModel),
    "SparseStructureDecoder": (StructureVaeConfig, SparseStructureDecoder),
    "SparseStructureEncoder": (StructureVaeConfig, SparseStructureEncoder),
}


def build(name: str, args: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """An uninitialised model of a published class; the renderer's column map is decided by its weights.

    Raises: NearError ``checkpoint-class`` for an unknown class; ValueError for arguments that do not fit.
    """
    if name not in CLASSES:
        raise NearError("checkpoint-class", f"The checkpoint holds a model of the class {name!r}, which is not known.",
                        f"Known are {', '.join(CLASSES)}; update near-relight if the checkpoint is newer.")
    config_class, model_class = CLASSES[name]
    variants = {}
    if name == "SLatGaussianRenderer" and "rgb_out_layer.bias" in state:
        layout, reason = choose_head_layout(state, int(args["representation_config"]["num_gaussians"]))
        log.info("renderer: %s column map, because %s", layout, reason)
        variants["head_layout"] = layout
    return model_class(config_class.from_args(args, **variants))
