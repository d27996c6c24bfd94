"""Two-stage lighting homogeniser: a shaded SLAT from the photo, then the lighting-homogenised one (DESIGN section 2).

``f_s`` is the base flow. ``f_theta`` is the same flow with more input channels, the noise followed by the shaded SLAT
Z_s (and, if wanted, a base-colour SLAT), whose attention projections carry LoRA adapters. The published checkpoint has
one flow for both steps: mode ``single_stage``.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from near.errors import NearError
from near.models.flow import SLatFlowModel
from near.models.samplers import Progress, SamplerConfig, initial_noise, sample
from near.nn import SparseTensor
from near.nn.timm_import import import_peft

MODES = ("two_stage", "single_stage")
ATTENTION_PROJECTIONS = ("to_qkv", "to_q", "to_kv", "to_out")
ADAPTER_FORMAT = 1


@dataclass(frozen=True)
class LoraSettings:
    """rank r and alpha: the update is scaled by alpha / sqrt(r) (rsLoRA). The paper: rank 512; its alpha is not published."""

    rank: int = 512
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ATTENTION_PROJECTIONS

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA needs rank >= 1, alpha > 0, 0 <= dropout < 1, not {self.rank}, {self.alpha}, {self.dropout}")
        if not self.targets:
            raise ValueError("LoRA needs at least one target")


@dataclass(frozen=True)
class HomogenizerConfig:
    """mode: ``two_stage`` or ``single_stage``. slat_channels: of Z_s. base_colour: a base-colour SLAT is concatenated
    as well ("LH + Base Color"). lora: adapters of f_theta, or None to train it in full."""

    mode: str = "two_stage"
    slat_channels: int = 8
    base_colour: bool = False
    lora: LoraSettings | None = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, not {self.mode!r}")
        if self.slat_channels < 1:
            raise ValueError(f"slat_channels must be positive, not {self.slat_channels}")

    @property
    def extra_channels(self) -> int:
        return 0 if self.mode == "single_stage" else self.slat_channels * (2 if self.base_colour else 1)


def expand_input(model: SLatFlowModel, extra_channels: int) -> SLatFlowModel:
    """A copy with ``extra_channels`` more input channels, whose columns are zero: at first it computes what ``model`` does."""
    config = replace(model.config, in_channels=model.config.in_channels + extra_channels)
    expanded = copy.deepcopy(model)
    old = model.input_layer
    layer = nn.Linear(config.in_channels, old.out_features, dtype=old.weight.dtype, device=old.weight.device)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, : old.in_features] = old.weight
        layer.bias.copy_(old.bias)
    expanded.input_layer, expanded.config = layer, config
    return expanded


def attach_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Put adapters on the target projections, in place; only they (and the input layer) stay trainable.

    A fresh adapter changes nothing: its second factor is zero.
    """
    peft = import_peft()
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, use_rslora=True,
                             target_modules=list(settings.targets))
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("input_layer."))
    return model


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Adapted layers by module name."""
    import_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold the adapters into the weights, in place: the result is a plain flow with the published keys."""
    for name, layer in lora_layers(model).items():
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return model


def save_adapter(path: Path, model: nn.Module, settings: LoraSettings, config: HomogenizerConfig) -> None:
    """Write adapters and input layer to one safetensors file, atomically."""
    peft = import_peft()
    tensors = {f"adapter.{k}": v.detach().cpu().contiguous() for k, v in peft.get_peft_model_state_dict(model).items()}
    tensors |= {f"input_layer.{k}": v.detach().cpu().contiguous() for k, v in model.input_layer.state_dict().items()}
    header = {"format": ADAPTER_FORMAT, "lora": asdict(settings), "mode": config.mode, "slat_channels": config.slat_channels,
              "base_colour": config.base_colour}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save_file(tensors, str(temporary), metadata={"near_homogenizer": json.dumps(header)})
    os.replace(temporary, path)


def load_adapter(path: Path, base: SLatFlowModel, *, merge: bool = True) -> tuple[SLatFlowModel, HomogenizerConfig]:
    """f_theta from a base flow and an adapter file.

    Args: merge: fold the adapters in (for inference); False leaves them trainable.
    Raises: NearError ``adapter-unreadable`` or ``adapter-mismatch``.
    """
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {})["near_homogenizer"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        settings = LoraSettings(**header["lora"])
        config = HomogenizerConfig(header["mode"], header["slat_channels"], header["base_colour"], settings)
    except Exception as error:
        raise NearError("adapter-unreadable", f"{Path(path).name} is not a homogeniser adapter ({type(error).__name__}).",
                        "Save it again with save_adapter, or fetch the file anew.") from error
    model = attach_lora(expand_input(base, config.extra_channels), settings)
    expected = {f"adapter.{k}": v.shape for k, v in import_peft().get_peft_model_state_dict(model).items()}
    expected |= {f"input_layer.{k}": v.shape for k, v in model.input_layer.state_dict().items()}
    wrong = sorted(k for k in expected.keys() | tensors.keys() if k not in expected or k not in tensors or expected[k] != tensors[k].shape)
    if wrong:
        raise NearError("adapter-mismatch", f"{Path(path).name} was made for another flow: {wrong[0]} does not fit ({len(wrong)} in all).",
                        "Use it with the base flow it was trained on.")
    import_peft().set_peft_model_state_dict(model, {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")})
    model.input_layer.load_state_dict({k.removeprefix("input_layer."): v for k, v in tensors.items() if k.startswith("input_layer.")})
    return (merge_lora(model) if merge else model), config


def make_theta(base: SLatFlowModel, config: HomogenizerConfig) -> SLatFlowModel:
    """An untrained f_theta: the base flow, widened, with fresh adapters."""
    model = expand_input(base, config.extra_channels)
    return attach_lora(model, config.lora) if config.lora else model


class Homogenizer(nn.Module):
    """Both flows and the way from a photo's condition to the normalised LH-SLAT.

    Args: base: f_s (or, in ``single_stage``, the only flow). theta: f_theta, None in ``single_stage``.
    """

    def __init__(self, base: SLatFlowModel, theta: SLatFlowModel | None, config: HomogenizerConfig) -> None:
        super().__init__()
        if (theta is None) != (config.mode == "single_stage"):
            raise ValueError(f"mode {config.mode!r} {'has no' if theta is not None else 'needs a'} second flow")
        if theta is not None and theta.config.in_channels != theta.config.out_channels + config.extra_channels:
            raise ValueError(f"f_theta takes {theta.config.in_channels} channels, not {theta.config.out_channels} + {config.extra_channels}")
        self.base, self.theta, self.config = base, theta, config

    @torch.no_grad()
    def sample(self, voxels: SparseTensor, conditions: Sequence[Tensor], config: SamplerConfig, *, seed: int = 0,
               noise: Tensor | None = None, base_colour: Tensor | None = None, progress: Progress | None = None,
               cancelled: Callable[[], bool] | None = None) -> tuple[Tensor, Tensor | None]:
        """Sample the SLAT of each object.

        Args:
            voxels: whose coordinates are used. conditions: image tokens per photo. noise: [N, C] for the first flow
                instead of the seed's. base_colour: [N, C] normalised SLAT, if the config asks for it.
        Returns: (LH-SLAT [N, C], shaded SLAT or None), both normalised.
        """
        if self.theta is None:
            return self._run(self.base, voxels, conditions, config, seed, noise, None, "slat", progress, cancelled), None
        shaded = self._run(self.base, voxels, conditions, config, seed, noise, None, "shaded slat", progress, cancelled)
        extra = shaded
        if self.config.base_colour:
            if base_colour is None:
                raise NearError("base-colour-missing", "This homogeniser needs a base-colour SLAT.", "Give one, or use another adapter.")
            extra = torch.cat([shaded, base_colour.to(shaded)], -1)
        slat = self._run(self.theta, voxels, conditions, config, seed + 1, None, extra, "homogenised slat", progress, cancelled)
        return slat, shaded

    @staticmethod
    def _run(flow: SLatFlowModel, voxels: SparseTensor, conditions: Sequence[Tensor], config: SamplerConfig, seed: int,
             noise: Tensor | None, extra: Tensor | None, stage: str, progress: Progress | None,
             cancelled: Callable[[], bool] | None) -> Tensor:
        device = flow.input_layer.weight.device
        if noise is None:
            noise = initial_noise((len(voxels), flow.config.out_channels), seed)
        contexts = [flow.context(condition.to(device)) for condition in conditions]
        return sample(flow.on_voxels(voxels, extra), noise.to(device), contexts, flow.context(None), config,
                      progress=progress, cancelled=cancelled, stage=stage).samples
