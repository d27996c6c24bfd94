"""Read a published checkpoint directory (spec section 1).

``pipeline.yaml`` names the models, each a ``<prefix>.json`` (class and arguments) with ``<prefix>.safetensors`` or
``<prefix>.pt``. Hyper-parameters come from those files, keys are strict, and what does not fit is reported by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from near.errors import NearError
from near.models.samplers import SamplerConfig
from near.weights.integrity import safe_relative

REQUIRED_MODELS = ("decoder", "renderer", "hdri_encoder", "neural_basis", "slat_flow_model")
FOREIGN_PARTS = 3  # "org/repo/prefix": a model that lives in another repository
SHOWN = 5  # names per kind in a report
LIVE_COLUMNS = 15  # of rgb_out_layer's 35 G columns the overlapped map reads the first 15 G (spec section 5.5)


@dataclass(frozen=True)
class CheckpointSpec:
    """Contents of ``pipeline.yaml`` (or a TRELLIS ``pipeline.json``).

    models: name -> path prefix. slat_sampler, structure_sampler: settings, None where the file has none.
    slat_mean, slat_std: [C] normalisation of the SLAT.
    """

    root: Path
    models: dict[str, str]
    slat_sampler: SamplerConfig | None
    structure_sampler: SamplerConfig | None
    slat_mean: Tensor
    slat_std: Tensor
    image_cond_model: str


def read_pipeline(root: Path) -> CheckpointSpec:
    """Parse the pipeline file of a checkpoint directory.

    Raises: NearError ``checkpoint-missing`` or ``checkpoint-pipeline``.
    """
    root = Path(root)
    path = next((root / n for n in ("pipeline.yaml", "pipeline.json") if (root / n).is_file()), None)
    if path is None:
        raise NearError("checkpoint-missing", f"{root} holds no pipeline.yaml, so it is not a checkpoint.",
                        "Give the folder of a published checkpoint, or run `near weights pull official`.")
    try:
        args = yaml.safe_load(path.read_text(encoding="utf-8"))["args"]
        models = {str(k): str(v) for k, v in args["models"].items()}
        norm = args.get("slat_normalization") or {"mean": [], "std": []}
        samplers = [SamplerConfig.from_published(args[k]) if args.get(k) else None for k in ("slat_sampler", "sparse_structure_sampler")]
        mean, std = torch.tensor(norm["mean"], dtype=torch.float32), torch.tensor(norm["std"], dtype=torch.float32)
        name = str(args.get("image_cond_model") or "")
    except NearError:
        raise
    except Exception as error:
        raise NearError("checkpoint-pipeline", f"{path.name} does not describe a pipeline ({type(error).__name__}: {error}).",
                        "Pull the checkpoint again, or compare the file with the published one.") from error
    if mean.shape != std.shape or bool((std <= 0).any()):
        raise NearError("checkpoint-pipeline", f"{path.name}: slat_normalization needs as many means as positive deviations.",
                        "Compare the file with the published one.")
    return CheckpointSpec(root, models, samplers[0], samplers[1], mean, std, name)


def foreign_prefixes(root: Path) -> Iterator[tuple[str, str]]:
    """(repository, prefix) of the required models that live elsewhere."""
    spec = read_pipeline(root)
    for name in REQUIRED_MODELS:
        prefix = spec.models.get(name)
        if prefix and not _local(root, prefix) and len(prefix.split("/")) >= FOREIGN_PARTS:
            org, repo, *rest = prefix.split("/")
            yield f"{org}/{repo}", "/".join(rest)


def _local(root: Path, prefix: str) -> bool:
    return (root / safe_relative(f"{prefix}.json")).is_file()


def find_model(spec: CheckpointSpec, name: str, find_repo: Callable[[str], Path | None] | None = None) -> Path:
    """Path of a model's files without suffix.

    Args: find_repo: ``org/name`` -> local folder, for prefixes that point into another repository.
    Raises: NearError ``checkpoint-model``.
    """
    prefix = spec.models.get(name)
    if prefix is None:
        raise NearError("checkpoint-model", f"The checkpoint names no {name}.", f"It must list {', '.join(REQUIRED_MODELS)}.")
    if _local(spec.root, prefix):
        return spec.root / prefix
    parts = prefix.split("/")
    if len(parts) >= FOREIGN_PARTS and find_repo is not None:
        folder = find_repo("/".join(parts[:2]))
        if folder is not None and (folder / safe_relative("/".join(parts[2:]) + ".json")).is_file():
            return folder / "/".join(parts[2:])
    raise NearError("checkpoint-model", f"The checkpoint's {name} ({prefix}.json) is not there.",
                    "Run `near weights pull official` again; it also fetches models from other repositories.")


def read_model_json(path: Path) -> tuple[str, dict[str, Any]]:
    """(class name without the ``Elastic`` prefix, constructor arguments) of ``<path>.json``."""
    file = path.with_name(path.name + ".json")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return str(data["name"]).removeprefix("Elastic"), dict(data["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NearError("checkpoint-model", f"{file.name} does not describe a model ({type(error).__name__}).",
                        "Verify the checkpoint with `near weights verify`.") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a ``.safetensors``, ``.pt`` or ``.pth`` file; the last two without running any code.

    Raises: NearError ``weights-unreadable``.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        state = _torch_load(path)
    except Exception as error:
        raise NearError("weights-unreadable", f"{path.name} cannot be read ({type(error).__name__}).",
                        "It is cut short or not a weights file: pull it again.") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise NearError("weights-unreadable", f"{path.name} holds something else than a table of tensors.", "Pull it again.")
    return dict(state)


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # torch's old file format cannot be mapped


def model_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Weights beside ``<path>.json`` and their file name: ``.safetensors`` first, else ``.pt``."""
    for suffix in (".safetensors", ".pt"):
        file = path.with_name(path.name + suffix)
        if file.is_file():
            return read_weights(file), file.name
    raise NearError("weights-missing", f"{path.name}.safetensors (or .pt) is missing.", "Pull the checkpoint again.")


def check_keys(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Raises: NearError ``weights-keys`` with a report: how many and which names are missing, unexpected or misshapen."""
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    missing = [k for k in expected if k not in state]
    unexpected = [k for k in state if k not in expected]
    shapes = [f"{k} is {list(state[k].shape)}, expected {list(expected[k])}" for k in expected
              if k in state and tuple(state[k].shape) != expected[k]]
    lines = [f"{label} ({len(names)}): {'; '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''}"
             for label, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes)) if names]
    if lines:
        raise NearError("weights-keys", f"{what} does not fit {type(model).__name__}. {' | '.join(lines)}.",
                        "Check that the JSON beside it belongs to it, and that the checkpoint is a published one.")


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put checked weights into a model, in float32; a model built on the meta device takes the tensors themselves."""
    on_meta = any(p.is_meta for p in model.parameters())
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=True, assign=on_meta)


def choose_head_layout(state: Mapping[str, Tensor], num_gaussians: int) -> tuple[str, str]:
    """The column map a renderer checkpoint was trained with, and why (spec section 5.5).

    Under the overlapped map the columns from 15 G on are never read: their biases start at zero and stay there.
    """
    dead = state["rgb_out_layer.bias"][LIVE_COLUMNS * num_gaussians:]
    trained = int((dead != 0).sum())
    if trained == 0:
        return "overlapped", f"all {len(dead)} biases of rgb_out_layer that the overlapped map never reads are zero"
    return "sequential", f"{trained} of {len(dead)} biases of rgb_out_layer that the overlapped map never reads were trained"


def load_model(path: Path, build: Callable[[str, dict[str, Any], Mapping[str, Tensor]], nn.Module]) -> nn.Module:
    """A model from ``<path>.json`` and its weights, strict.

    Args: build: (class name, args, state) -> model; :func:`near.weights.builders.build` for the published classes.
    """
    name, args = read_model_json(path)
    state, file = model_weights(path)
    try:
        with torch.device("meta"):  # nothing is initialised that is overwritten anyway
            model = build(name, args, state)
        if not set(dict(model.named_buffers())) <= set(model.state_dict()):
            model = build(name, args, state)  # a buffer that no checkpoint holds must be computed
    except NearError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise NearError("checkpoint-args", f"{path.name}.json does not fit {name}: {error}.",
                        "Compare the file with the published one.") from error
    check_keys(model, state, file)
    load_into(model, state)
    return model.eval().requires_grad_(False)
