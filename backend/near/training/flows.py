"""Trainer of the base flow f_s and of the LoRA homogeniser f_theta (paper section 3.1; spec sections 11 and 15)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from near.models.compact_flows import CompactFlow
from near.training.flow_data import FlowData, FlowItem
from near.training.journal import Sheet
from near.training.loop import LoopConfig, Sampler, processes, run
from near.training.pictures import comparison

MEAN_SHARE = 0.7  # samples trained at t = 1 with the noise left out: the pack's default is one step to the flow's mean
# Loss weights in SLAT space, where colours are perceptual: an error counts as it will be seen.
CHANNEL_WEIGHTS = torch.tensor([2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.5, 0.5])
LOGIT_NORMAL = (1.0, 1.0)  # mean and deviation of logit(t), spec section 15


def collate(items: list[FlowItem], device: torch.device = torch.device("cpu")) -> dict[str, Tensor | None]:
    """Concatenate objects on a device: coords int32 [N, 4] with the object's index first."""
    coords = torch.cat([torch.cat([torch.full((len(i.coords), 1), b), i.coords.int()], 1).int() for b, i in enumerate(items)])
    joined = {k: torch.cat([getattr(i, k) for i in items]) for k in ("lift", "prior", "target", "weight")}
    optional = {k: None if getattr(items[0], k) is None else torch.cat([getattr(i, k) for i in items]) for k in ("condition", "guess")}
    packed = {"coords": coords, **optional, "square": torch.stack([i.square for i in items]), **joined}
    return {k: None if v is None else v.to(device) for k, v in packed.items()}


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
    device = processes().device

    def step(sampler: Sampler) -> tuple[Tensor, dict[str, float]]:
        picks = [data.train[sampler.next()] for _ in range(batch)]
        packed = collate([data.item(o, p, sampler.generator, augment=True) for o, p in picks], device)
        t = torch.sigmoid(torch.randn(batch, device=device) * LOGIT_NORMAL[1] + LOGIT_NORMAL[0])
        mean = torch.rand(batch, device=device) < MEAN_SHARE
        t = torch.where(mean, torch.ones_like(t), t)
        keep = torch.rand(batch, device=device) >= drop_condition
        clean = flow.normalise(flow.residual(packed["target"], packed["prior"]))
        rows = packed["coords"][:, 0].long()
        noise = torch.randn_like(clean) * (~mean)[rows, None]
        t_row = t[rows, None]
        with config.autocast(device, flow.autocast):
            predicted = flow(packed["coords"], (1 - t_row) * clean + t_row * noise, t * 1000, packed["lift"], packed["condition"],
                             packed["square"], keep, packed["guess"])
        slat = flow.compose(flow.denormalise(predicted.float()), packed["prior"])
        error = (slat - packed["target"]) ** 2 * packed["weight"] * CHANNEL_WEIGHTS.to(device)
        return error.mean(), {"mse": float(error.mean().detach())}

    def sheet(model: nn.Module, step_index: int) -> Sheet:
        made = held_out(model, data, device)
        report(f"{out.name} step {step_index}: held-out " + " ".join(f"{k} {v:.4f}" for k, v in made.numbers.items()))
        return made

    return run(flow, step, len(data), out, config, sheet_fn=sheet,
               parameters=[p for p in flow.parameters() if p.requires_grad])


@torch.no_grad()
def held_out(flow: CompactFlow, data: FlowData, device: torch.device, photos: int = 2, rows: int = 8) -> Sheet:
    """Root mean square error of the SLAT on held-out objects, beside the prior's own, by channel group; and pictures of its
    colour (shaded for the base flow, base colour for the homogeniser)."""
    flow.eval()
    groups = {"colour": slice(0, 3), "roughness": slice(3, 4), "metallic": slice(4, 5), "homogeneous": slice(5, 8)}
    found: dict[str, list[float]] = {}
    shown = []
    for obj in data.test:
        for photo in range(0, len(data.objects[obj]["photos"]), max(1, len(data.objects[obj]["photos"]) // photos)):
            packed = collate([data.item(obj, photo)], device)
            zero, t = torch.zeros_like(packed["prior"]), torch.full((1,), 1000.0, device=device)
            out = flow(packed["coords"], zero, t, packed["lift"], packed["condition"], packed["square"], None, packed["guess"])
            slat = flow.compose(flow.denormalise(out.float()), packed["prior"])
            for name, columns in groups.items():
                for tag, value in (("", slat), ("_prior", packed["prior"])):
                    found.setdefault(name + tag, []).append(float((value[:, columns] - packed["target"][:, columns]).square().mean().sqrt()))
            if photo == 0 and len(shown) < rows:
                looks = {"truth": packed["target"], "flow": slat, "prior (photo)": packed["prior"]}
                shown.append((data.objects[obj]["name"], {k: data.picture(obj, photo, v[:, :3]) for k, v in looks.items()}))
    return Sheet({k: sum(v) / len(v) for k, v in found.items()}, comparison(shown, "Held-out photos: colour of the SLAT"))
