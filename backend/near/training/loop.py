"""What every trainer shares: schedule, EMA, exact resume, a time budget, several processes.

One process trains alone; under ``torchrun`` or ``accelerate launch`` each process takes its share of the samples and the
gradients are averaged. A step's randomness is a function of seed, step and process alone, so a run that was killed goes on
exactly as one that was not.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from near.errors import NearError
from near.nn.kernels import cpu_has_bfloat16
from near.training.journal import Journal, Sheet


@dataclass(frozen=True)
class LoopConfig:
    """Optimiser and schedule (paper supplement; spec section 15).

    learning_rate peaks after ``warmup`` steps and falls along a cosine to ``final_share`` of itself at ``steps`` or,
    if that comes first, at ``minutes``. ``ema`` is the decay of the averaged weights. ``bf16``: autocast in bfloat16, where the device has it.
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
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0 or self.save_every < 1 or self.sheet_every < 1 or not 0 <= self.ema < 1:
            raise ValueError(f"steps {self.steps}, warmup {self.warmup}, save_every {self.save_every}, sheet_every {self.sheet_every} "
                             f"or ema {self.ema} is out of range")

    def rate(self, step: int, minutes: float) -> float | None:
        """Learning rate of a step that begins after some minutes; None: the budget is spent."""
        share = step / self.steps
        if self.minutes is not None:
            share = max(share, minutes / self.minutes)
        if share >= 1:
            return None
        cosine = self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * share))
        return self.learning_rate * min(1.0, (step + 1) / max(self.warmup, 1)) * cosine

    def autocast(self, device: torch.device, enabled: bool = True) -> torch.autocast:
        """For the models' forward passes. A processor without bfloat16 products would take many times as long by them."""
        able = device.type != "cpu" or cpu_has_bfloat16()
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16 and enabled and able)


class Sampler:
    """Endless shuffled indices whose position can be saved and restored exactly; each of ``world`` processes takes every
    ``world``-th. ``generator`` (CPU) is seeded anew at every step; ``device``: where the model is."""

    def __init__(self, count: int, seed: int, rank: int = 0, world: int = 1, device: torch.device = torch.device("cpu")) -> None:
        self.count, self.seed, self.rank, self.world, self.device, self.position = count, seed, rank, world, device, 0
        self.generator = torch.Generator()
        self._epoch, self._order = -1, torch.empty(0)

    def next(self) -> int:
        epoch, offset = divmod(self.position + self.rank, self.count)
        self.position += self.world
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 100003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return int(self._order[offset])

    def begin(self, step: int) -> None:
        """Seed everything random for a step."""
        seed = ((self.seed * 1_000_003 + step) * 4099 + self.rank) % 2 ** 63
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)


def processes():
    """Accelerate's view of this process: ``device``, ``process_index``, ``num_processes``; joins the others' group if there are any."""
    from datetime import timedelta

    from accelerate import PartialState

    # Long: the first process alone looks at held-out objects and fits the homogeniser's head while the others wait.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))


def average_gradients(trained: list[nn.Parameter], loss: Tensor, world: int) -> Tensor:
    """Mean over the processes of all gradients, in place, and of the loss, returned.

    In one piece by hand: the trainers call parts of their models, which a wrapper around ``forward`` would not see.
    """
    if world == 1:
        return loss.detach()
    from accelerate.utils import reduce

    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = reduce(torch.cat([*(g.reshape(-1).float() for g in pieces), loss.detach().float().reshape(1)]), "mean")
    for p, mean in zip(trained, flat[:-1].split([p.numel() for p in trained])):
        p.grad = mean.view_as(p).to(p.dtype)
    return flat[-1]


def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Exponential moving average of weights; whatever is not a float is copied."""
    with torch.no_grad():
        for mean, value in zip(average.state_dict().values(), model.state_dict().values()):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)


def run(model: nn.Module, step_fn: Callable[[Sampler], tuple[Tensor, dict[str, float]]], count: int, out: Path,
        config: LoopConfig, *, sheet_fn: Callable[[nn.Module, int], Sheet | None] | None = None,
        parameters: Iterable[nn.Parameter] | None = None) -> nn.Module:
    """Train ``model`` until the budget ends and return its averaged copy, on the device it was trained on.

    ``step_fn(sampler)`` draws what it needs and returns the loss and numbers to log; ``sheet_fn(average, step)`` tells how
    the averaged model does. ``out/state.pt`` is written every ``save_every`` steps and read on the next start: weights,
    optimiser, average, sampler position. :mod:`near.training.journal` has the other files.
    """
    state, out = processes(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model.to(state.device)
    if state.num_processes > 1:  # all begin alike
        for value in model.state_dict().values():
            torch.distributed.broadcast(value, 0)
    trained = [p for p in (parameters or model.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    average = copy.deepcopy(model).eval().requires_grad_(False)
    sampler = Sampler(count, config.seed, state.process_index, state.num_processes, state.device)
    step, spent = _restore(out / "state.pt", model, average, optimiser, sampler)
    main = state.is_main_process
    journal = Journal(out, step) if main else None
    started = time.monotonic()
    bar = tqdm(total=config.steps, initial=step, desc=out.name, mininterval=10, dynamic_ncols=True, disable=not main)
    while True:
        seconds = _shared(spent + time.monotonic() - started, state)
        rate = config.rate(step, seconds / 60)
        if rate is None:
            break
        for group in optimiser.param_groups:
            group["lr"] = rate
        model.train()
        sampler.begin(step)
        loss, numbers = step_fn(sampler)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        mean_loss = average_gradients(trained, loss, state.num_processes)
        norm = torch.nn.utils.clip_grad_norm_(trained, config.clip)
        if torch.isfinite(norm):
            optimiser.step()
        step += 1
        update_average(average, model, min(config.ema, (1 + step) / (10 + step)))
        if main:
            journal.log(step, {"minutes": seconds / 60, "lr": rate, "gradient": float(norm), **numbers, "loss": float(mean_loss)})
            bar.set_postfix(loss=f"{float(mean_loss):.4f}", refresh=False)
            bar.update()
            if sheet_fn and step % config.sheet_every == 0 and (sheet := sheet_fn(average, step)):
                journal.held_out(step, sheet)
            if step % config.save_every == 0:
                _save(out / "state.pt", model, average, optimiser, sampler, step, spent + time.monotonic() - started)
    if main:
        _save(out / "state.pt", model, average, optimiser, sampler, step, seconds)
        journal.close()
    bar.close()
    state.wait_for_everyone()
    return average


def _shared(seconds: float, state) -> float:
    """The first process' clock: all must agree on when the time is up."""
    if state.num_processes == 1:
        return seconds
    from accelerate.utils import broadcast

    return float(broadcast(torch.tensor([seconds], dtype=torch.float64, device=state.device)))


def _save(path: Path, model: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer, sampler: Sampler, step: int, spent: float) -> None:
    temporary = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict(),
                "step": step, "spent": spent, "sampler": sampler.position}, temporary)
    os.replace(temporary, path)


def _restore(path: Path, model: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer, sampler: Sampler) -> tuple[int, float]:
    """(step, seconds spent) of a saved run, whose state is loaded; (0, 0) of a new one.

    Raises:
        NearError: ``training-state`` when it is not this run's.
    """
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        sampler.position = state["sampler"]
        return state["step"], state["spent"]
    except Exception as error:  # a file that is not ours may make the reader say anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise NearError("training-state", f"{path} is damaged or belongs to a run with other models ({reason}).",
                        "Give the options that the run was begun with, or choose another folder.") from error
