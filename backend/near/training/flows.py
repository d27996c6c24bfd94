"""Trainer of the base flow f_s and of the LoRA homogeniser f_theta (paper section 3.1; spec sections 11 and 15)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from near.models.compact_flows import CompactFlow
from near.training.flow_data import FlowData, FlowItem
from near.training.loop import LoopConfig, Sampler, run

MEAN_SHARE = 0.7  # samples trained at t = 1 with the noise left out: the pack's default is one step to the flow's mean
# Loss weights in SLAT space, where colours are perceptual: an error counts as it will be seen.
CHANNEL_WEIGHTS = torch.tensor([2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.5, 0.5])
LOGIT_NORMAL = (1.0, 1.0)  # mean and deviation of logit(t), spec section 15


def collate(items: list[FlowItem]) -> dict[str, Tensor]:
    """Concatenate objects: coords int32 [N, 4] with the object's index first."""
    coords = torch.cat([torch.cat([torch.full((len(i.coords), 1), b), i.coords.int()], 1).int() for b, i in enumerate(items)])
    joined = {k: torch.cat([getattr(i, k) for i in items]) for k in ("lift", "prior", "target", "weight")}
    condition = None if items[0].condition is None else torch.cat([i.condition for i in items])
    return {"coords": coords, "condition": condition, "square": torch.stack([i.square for i in items]), **joined}


def residual_statistics(flow: CompactFlow, data: FlowData, count: int = 200) -> tuple[Tensor, Tensor]:
    """Per-channel mean and deviation of the residual over some photos: what the flow's unit Gaussian stands for."""
    picks = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[:count].tolist()
    residual = torch.cat([flow.residual(i.target, i.prior) for i in (data.item(*data.train[k]) for k in picks)])
    return residual.mean(0), residual.std(0).clamp_min(0.05)


def train_flow(flow: CompactFlow, data: FlowData, out: Path, config: LoopConfig, *, batch: int = 4, drop_condition: float = 0.1,
               report: Callable[[str], None] = print) -> nn.Module:
    """Conditional flow matching with clean-sample prediction in the flow's residual space.

    Returns the averaged model; the held-out error of single-step samples is written to ``out/held_out.jsonl``.
    """
    generator = torch.Generator().manual_seed(config.seed + 17)

    def step(sampler: Sampler) -> tuple[Tensor, dict[str, float]]:
        picks = [data.train[sampler.next()] for _ in range(batch)]
        packed = collate([data.item(o, p, generator, augment=True) for o, p in picks])
        t = torch.sigmoid(torch.randn(batch) * LOGIT_NORMAL[1] + LOGIT_NORMAL[0])
        mean = torch.rand(batch) < MEAN_SHARE
        t = torch.where(mean, torch.ones(batch), t)
        keep = torch.rand(batch) >= drop_condition
        clean = flow.normalise(flow.residual(packed["target"], packed["prior"]))
        rows = packed["coords"][:, 0].long()
        noise = torch.randn_like(clean) * (~mean)[rows, None]
        t_row = t[rows, None]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=flow.autocast):
            predicted = flow(packed["coords"], (1 - t_row) * clean + t_row * noise, t * 1000, packed["lift"], packed["condition"],
                             packed["square"], keep)
        slat = flow.compose(flow.denormalise(predicted.float()), packed["prior"])
        error = (slat - packed["target"]) ** 2 * packed["weight"] * CHANNEL_WEIGHTS
        return error.mean(), {"mse": float(error.mean().detach())}

    def sheet(model: nn.Module, step_index: int) -> None:
        errors = held_out_errors(model, data)
        line = " ".join(f"{k} {v:.4f}" for k, v in errors.items())
        report(f"{out.name} step {step_index}: held-out {line}")
        with (out / "held_out.jsonl").open("a") as f:
            f.write('{"step": %d, %s}\n' % (step_index, ", ".join(f'"{k}": {v:.5f}' for k, v in errors.items())))

    return run(flow, step, len(data), out, config, sheet_fn=sheet,
               parameters=[p for p in flow.parameters() if p.requires_grad])


@torch.no_grad()
def held_out_errors(flow: CompactFlow, data: FlowData, photos: int = 2) -> dict[str, float]:
    """Root mean square error of the SLAT on held-out objects, beside the prior's own, by channel group."""
    flow.eval()
    groups = {"colour": slice(0, 3), "roughness": slice(3, 4), "metallic": slice(4, 5), "homogeneous": slice(5, 8)}
    total: dict[str, float] = {}
    for obj in data.test:
        for photo in range(0, len(data.objects[obj]["photos"]), max(1, len(data.objects[obj]["photos"]) // photos)):
            packed = collate([data.item(obj, photo)])
            zero = torch.zeros_like(packed["prior"])
            out = flow(packed["coords"], zero, torch.full((1,), 1000.0), packed["lift"], packed["condition"], packed["square"], None)
            slat = flow.compose(flow.denormalise(out.float()), packed["prior"])
            for name, columns in groups.items():
                for tag, value in (("", slat), ("_prior", packed["prior"])):
                    rms = float((value[:, columns] - packed["target"][:, columns]).square().mean().sqrt())
                    total.setdefault(name + tag, 0.0)
                    total[name + tag] += rms
                    total["_n" + name + tag] = total.get("_n" + name + tag, 0) + 1
    return {k: v / total["_n" + k] for k, v in total.items() if not k.startswith("_n")}
