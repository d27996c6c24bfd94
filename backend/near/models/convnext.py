"""timm's ConvNeXt as four stages under the published parameter names.

NeAR's checkpoints name torchvision's modules (`stage2.1.0.block.3.weight`); timm computes the same function under other
names. Each block translates its own entries when a state dict is saved or loaded.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from near.nn.timm_import import import_timm

# timm's name -> published name, inside one block
BLOCK_NAMES = {"conv_dw.weight": "block.0.weight", "conv_dw.bias": "block.0.bias", "norm.weight": "block.2.weight",
               "norm.bias": "block.2.bias", "mlp.fc1.weight": "block.3.weight", "mlp.fc1.bias": "block.3.bias",
               "mlp.fc2.weight": "block.5.weight", "mlp.fc2.bias": "block.5.bias", "gamma": "layer_scale"}


class Stage(nn.Sequential):
    """[stem or downsampling, blocks], with the number of channels it puts out."""

    def __init__(self, entry: nn.Module, blocks: nn.Sequential, channels: int) -> None:
        super().__init__(entry, blocks)
        self.channels = channels


def build_stages(name: str, in_channels: int) -> list[Stage]:
    """The four stages (strides 4, 8, 16, 32) of a timm ConvNeXt with random weights; nothing is downloaded.

    Args: name: a timm model name such as "convnext_tiny".
    """
    net = import_timm().create_model(name, pretrained=False, in_chans=in_channels, num_classes=0)
    stages = []
    for i, part in enumerate(net.stages):
        for block in part.blocks:
            _publish_names(block)
        stages.append(Stage(net.stem if i == 0 else part.downsample, part.blocks, net.feature_info[i]["num_chs"]))
    return stages


def _publish_names(block: nn.Module) -> None:
    block.register_state_dict_post_hook(_to_published)
    block.register_load_state_dict_pre_hook(_to_timm)


def _to_published(block: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    _rename(state, {prefix + a: prefix + b for a, b in BLOCK_NAMES.items()}, lambda v: v[:, None, None])


def _to_timm(block: nn.Module, state: dict, prefix: str, *unused) -> None:
    _rename(state, {prefix + b: prefix + a for a, b in BLOCK_NAMES.items()}, lambda v: v[:, 0, 0])


def _rename(state: dict, names: dict[str, str], reshape_scale: Callable[[Tensor], Tensor]) -> None:
    """Rename in place; the layer scale is [C] in timm and [C, 1, 1] as published."""
    for old, new in names.items():
        if old in state:
            value = state.pop(old)
            is_scale = old.endswith(("gamma", "layer_scale"))
            state[new] = reshape_scale(value) if is_scale else value
