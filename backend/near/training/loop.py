"""What every trainer shares: schedule, EMA, exact resume, a time budget, a log."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class LoopConfig:
    """Optimiser and schedule (paper supplement; spec section 15).

    learning_rate peaks after ``warmup`` steps and falls along a cosine to ``final_share`` of itself at ``steps`` or,
    if that comes first, at ``minutes``. ``ema`` is the decay of the averaged weights.
    """

    steps: int = 20000
    minutes: float | None = None
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup: int = 100
    final_share: float = 0.02
    clip: float = 1.0
    ema: float = 0.999
    save_every: int = 200
    sheet_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0 or not 0 <= self.ema < 1:
            raise ValueError(f"steps {self.steps}, warmup {self.warmup} or ema {self.ema} is out of range")


class Sampler:
    """Endless shuffled indices whose position can be saved and restored exactly."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.position = count, seed, 0

    def next(self) -> int:
        epoch, offset = divmod(self.position, self.count)
        self.position += 1
        generator = torch.Generator().manual_seed(self.seed * 100003 + epoch)
        return int(torch.randperm(self.count, generator=generator)[offset])


def run(model: nn.Module, step_fn: Callable[[Sampler], tuple[Tensor, dict[str, float]]], count: int, out: Path,
        config: LoopConfig, *, sheet_fn: Callable[[nn.Module, int], None] | None = None,
        parameters: Iterable[nn.Parameter] | None = None) -> nn.Module:
    """Train ``model`` until the budget ends and return its averaged copy.

    ``step_fn(sampler)`` draws what it needs and returns the loss and numbers to log. ``out/state.pt`` is written every
    ``save_every`` steps and read on the next start: weights, optimiser, average, generators and sampler position.
    """
    out.mkdir(parents=True, exist_ok=True)
    trained = [p for p in (parameters or model.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    average = copy.deepcopy(model).eval().requires_grad_(False)
    sampler, step, spent = Sampler(count, config.seed), 0, 0.0
    torch.manual_seed(config.seed)
    state_path = out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
        step, spent, sampler.position = state["step"], state["spent"], state["sampler"]

    def save() -> None:
        temporary = state_path.with_suffix(".part")
        torch.save({"model": model.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict(),
                    "rng": torch.get_rng_state(), "step": step, "spent": spent, "sampler": sampler.position}, temporary)
        os.replace(temporary, state_path)

    started = time.monotonic()
    running: dict[str, float] = {}
    log = (out / "log.jsonl").open("a", buffering=1)
    bar = tqdm(total=config.steps, initial=step, desc=out.name, mininterval=10, dynamic_ncols=True)
    while step < config.steps:
        elapsed = spent + (time.monotonic() - started)
        share = step / config.steps
        if config.minutes is not None:
            share = max(share, elapsed / (60 * config.minutes))
            if share >= 1:
                break
        rate = min(1.0, (step + 1) / max(config.warmup, 1)) * (
            config.final_share + (1 - config.final_share) * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * rate
        model.train()
        loss, numbers = step_fn(sampler)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.clip)
        if torch.isfinite(norm):
            optimiser.step()
        step += 1
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, value in zip(average.state_dict().values(), model.state_dict().values()):
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - decay)
                else:
                    mean.copy_(value)
        for key, value in {"loss": float(loss.detach()), **numbers}.items():
            running[key] = value if key not in running else 0.98 * running[key] + 0.02 * value
        bar.update()
        if step % 20 == 0:
            bar.set_postfix({k: f"{v:.4f}" for k, v in running.items()}, refresh=False)
            log.write(json.dumps({"step": step, "minutes": round(elapsed / 60, 2), "lr": config.learning_rate * rate, **running}) + "\n")
        if step % config.save_every == 0:
            spent, started = elapsed, time.monotonic()
            save()
        if sheet_fn and step % config.sheet_every == 0:
            sheet_fn(average, step)
    spent += time.monotonic() - started
    save()
    bar.close()
    log.close()
    return average
