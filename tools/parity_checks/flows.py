"""SLAT flow and samplers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from parity_checks import Row, compare, load_group, same, under
from torch import Tensor

from near.models.flow import SLatFlowConfig, SLatFlowModel
from near.models.samplers import SamplerConfig, initial_noise, sample, time_sequence
from near.nn import SparseTensor, downsample

TOL = 1e-4
TOL_TIME = 1e-12  # the time sequence is float64 arithmetic


def load_flow(tensors: dict[str, Tensor], settings: dict) -> SLatFlowModel:
    """The fixture's flow with its weights, strict keys."""
    model = SLatFlowModel(SLatFlowConfig.from_args(settings["args"])).eval()
    model.load_state_dict(under(tensors, "weights"))
    return model


@torch.no_grad()
def check_flow(folder: Path) -> list[Row]:
    tensors, settings = load_group(folder, "flow")
    model = load_flow(tensors, settings)
    rows = []
    if "t_embedding/values" in tensors:
        rows.append(compare("flow", "t_embedding/out", model.t_embedder(tensors["t_embedding/values"]), tensors["t_embedding/out"], TOL))
    for name in sorted({m[1] for k in tensors if (m := re.fullmatch(r"in(\d+)/feats", k))}):
        x = SparseTensor.create(tensors[f"in{name}/feats"], tensors[f"in{name}/coords"])
        condition = tensors["in/cond"][: x.num_objects]
        if name == "1" and "downsample/feats" in tensors:
            rows += _downsampled(x, tensors)
        taps = []
        for key in sorted(k for k in tensors if k.startswith(f"out{name}/") and not k.endswith("_values")):
            t = tensors.get(f"{key}_values")
            t = torch.tensor([float(key.rpartition("/t")[2])]) if t is None else t
            with _Taps(model) as seen:
                out = model(x, t, condition).feats
            rows.append(compare("flow", key, out, tensors[key], TOL))
            taps.append((key, seen))
        rows += _compare_taps(taps, tensors, f"tap{name}/")
    return rows


def _downsampled(x: SparseTensor, tensors: dict[str, Tensor]) -> list[Row]:
    coarse = downsample(x)
    rows = [same("flow", "downsample/coords", torch.equal(coarse.coords, tensors["downsample/coords"]))]
    if len(coarse) == len(tensors["downsample/feats"]):
        rows.append(compare("flow", "downsample/feats", coarse.feats, tensors["downsample/feats"], TOL))
    return rows


class _Taps:
    """Record intermediate results of the calls inside the ``with`` block."""

    def __init__(self, model: SLatFlowModel) -> None:
        self.model, self.seen = model, {}

    def __enter__(self) -> dict[str, Tensor]:
        def keep_output(module, args, out) -> None:
            self.seen["input_block0"] = out.feats

        def keep_input(module, args) -> None:
            self.seen["after_pos"] = args[0]

        self.handles = [self.model.input_blocks[0].register_forward_hook(keep_output),
                        self.model.blocks[0].register_forward_pre_hook(keep_input)]
        return self.seen

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()


def _compare_taps(calls: list[tuple[str, dict[str, Tensor]]], tensors: dict[str, Tensor], prefix: str) -> list[Row]:
    """The fixture does not say at which t it tapped: the call that fits best is the one."""
    rows = []
    for tap in ("input_block0", "after_pos"):
        if f"{prefix}{tap}" in tensors and calls:
            fits = [compare("flow", f"{prefix}{tap}", seen[tap], tensors[f"{prefix}{tap}"], TOL, note=f"at {key}") for key, seen in calls]
            rows.append(min(fits, key=lambda row: row.max_abs))
    return rows


@torch.no_grad()
def check_sampler(folder: Path) -> list[Row]:
    tensors, settings = load_group(folder, "sampler")
    model = load_flow(*load_group(folder, "flow"))
    voxels = SparseTensor.create(tensors["in/noise"], tensors["in/coords"])
    function, conditions, negative = model.on_voxels(voxels), [tensors["in/cond"]], tensors["in/neg_cond"]

    def run(guidance: str, noise: Tensor, entry: dict) -> object:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        return sample(function, noise, conditions, negative, SamplerConfig(guidance=guidance, **values), keep_trajectory=True)

    rows = []
    for name, guidance in (("interval", "interval"), ("cfg", "cfg"), ("plain", "none")):
        entry = settings.get(name)
        if entry is None:
            continue
        if (times := settings.get(f"{name}_t_seq")) is not None:
            ours = torch.tensor(time_sequence(entry["steps"], entry.get("rescale_t", 1.0)))
            rows.append(compare("sampler", f"{name}_t_seq", ours, torch.tensor(times, dtype=torch.float64), TOL_TIME))
        result = run(guidance, tensors["in/noise"], entry)
        rows.append(compare("sampler", f"{name}/samples", result.samples, tensors[f"{name}/samples"], TOL))
        for key, states in (("pred_x_t", result.x_t), ("pred_x_0", result.x_0)):
            if f"{name}/{key}" in tensors:
                rows.append(compare("sampler", f"{name}/{key}", torch.stack(states), tensors[f"{name}/{key}"], TOL))
    rows += _pipeline(tensors, settings, run)
    return rows


def _pipeline(tensors: dict[str, Tensor], settings: dict, run: Callable) -> list[Row]:
    """Seeded noise and de-normalisation, as the published pipeline draws and applies them."""
    rows = []
    mean, std = (torch.tensor(settings["normalization"][k]) for k in ("mean", "std"))
    for seed in sorted({m[1] for k in tensors if (m := re.fullmatch(r"pipeline_seed(\d+)/noise", k))}):
        expected = tensors[f"pipeline_seed{seed}/noise"]
        noise = initial_noise(expected.shape, int(seed))
        rows.append(same("sampler", f"pipeline_seed{seed}/noise", torch.equal(noise, expected)))
        feats = run("interval", noise, settings["interval"]).samples * std + mean
        rows.append(compare("sampler", f"pipeline_seed{seed}/slat_feats", feats, tensors[f"pipeline_seed{seed}/slat_feats"], TOL))
    return rows
