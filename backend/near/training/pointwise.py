"""First stage of the homogeniser's training: its per-voxel head, on a bank of voxels drawn from every photo."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from tqdm import tqdm

from near.models.compact_flows import CompactFlow
from near.models.pointwise import global_features, local_features
from near.training.flow_data import FlowData, FlowItem
from near.training.flows import CHANNEL_WEIGHTS

VOXELS_PER_PHOTO = 96
PERMUTATIONS = tuple(itertools.permutations(range(3)))[1:]
BATCH = 4096


def permute_colours(item: FlowItem, order: tuple[int, int, int]) -> FlowItem:
    """The same object in another light's and paint's hues: swapping colour channels of light, photo and material alike is
    physically exact and keeps a few hundred paints from being known by heart."""
    lift, swap = item.lift.clone(), list(order)
    for start in (0, 3, 20):
        lift[:, start:start + 3] = lift[:, [start + c for c in swap]]

    def slat(values: torch.Tensor) -> torch.Tensor:
        return values[:, swap + [3, 4] + [5 + c for c in swap]]

    return replace(item, lift=lift, prior=slat(item.prior), target=slat(item.target))


def voxel_bank(flow: CompactFlow, data: FlowData, items: list[tuple[int, int]], seed: int,
               permute: bool = False) -> dict[str, torch.Tensor]:
    """Features, priors, targets and weights of random voxels of the given photos, half precision."""
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, list[torch.Tensor]] = {"features": [], "prior": [], "target": [], "weight": []}
    for obj, photo in tqdm(items, desc="voxel bank", mininterval=5):
        item = data.item(obj, photo, generator, augment=True, with_square=False)
        if permute:
            item = permute_colours(item, PERMUTATIONS[int(torch.randint(len(PERMUTATIONS), (), generator=generator))])
        rows = torch.randint(len(item.coords), (VOXELS_PER_PHOTO,), generator=generator)
        features = torch.cat([local_features(item.lift, item.prior)[rows],
                              global_features(item.lift, item.prior).expand(VOXELS_PER_PHOTO, -1)], -1)
        for name, value in (("features", features), ("prior", item.prior[rows]), ("target", item.target[rows]), ("weight", item.weight[rows])):
            columns[name].append(value.half())
    return {name: torch.cat(values) for name, values in columns.items()}


def train_pointwise(flow: CompactFlow, data: FlowData, *, minutes: float, learning_rate: float = 2e-3, seed: int = 0,
                    report: Callable[[str], None] = print) -> None:
    """Fit ``flow.pointwise`` in place; the average with the least loss on the held-out objects is kept."""
    banks = [voxel_bank(flow, data, data.train, seed + k, permute=k > 0) for k in (0, 1, 2)]
    bank = {name: torch.cat([b[name] for b in banks]) for name in banks[0]}
    del banks
    test = voxel_bank(flow, data, [(o, p) for o in data.test for p in range(len(data.objects[o]["photos"]))], seed + 1)
    head = flow.pointwise
    features = bank["features"].float()
    head.mean.copy_(features.mean(0))
    head.std.copy_(features.std(0).clamp_min(1e-3))
    del features
    optimiser = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=3e-2)
    average = torch.optim.swa_utils.AveragedModel(head, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))

    def loss_of(module, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        slat = flow.compose(flow.denormalise(module.from_features(rows["features"])), rows["prior"])
        return ((slat - rows["target"]) ** 2 * rows["weight"] * CHANNEL_WEIGHTS).mean()

    started, step, best, kept = time.monotonic(), 0, float("inf"), None
    while (share := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 200) * (1 - 0.98 * share)
        head.train()
        rows = torch.randint(len(bank["features"]), (BATCH,))
        loss = loss_of(head, {k: v[rows].float() for k, v in bank.items()})
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(head)
        step += 1
        if step % 250 == 0:
            average.eval()
            with torch.no_grad():
                held = float(loss_of(average.module, {k: v.float() for k, v in test.items()}))
            if held < best:  # a few hundred objects are soon known by heart: keep what serves unseen ones
                best, kept = held, {k: v.clone() for k, v in average.module.state_dict().items()}
            report(f"pointwise step {step}: training {float(loss.detach()):.4f}, held-out {held:.4f}")
    head.load_state_dict(kept or average.module.state_dict())
