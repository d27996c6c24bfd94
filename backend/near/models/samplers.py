"""Rectified-flow samplers: Euler, classifier-free guidance, guidance interval, several photos (spec 11.5).

A sampler sees only tensors and a function ``model(x, t1000, condition)``; what x is (rows of a sparse tensor, a dense
grid) is the caller's business. Time runs from 1 (noise) to 0 (data):
``x_t = (1 - t) x_0 + (s + (1 - s) t) noise``, ``v = (1 - s) noise - x_0``, with s = ``sigma_min``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from near.errors import Cancelled, NearError

Model = Callable[[Tensor, Tensor, Any], Tensor]  # (x [N, ...], t1000 [1] float32, condition) -> prediction like x
Progress = Callable[[str, float, Any], None]

GUIDANCE = ("none", "cfg", "interval")
PREDICTIONS = ("velocity", "sample")
MULTI_IMAGE = ("stochastic", "multidiffusion")
# Published class names (checkpoint key `slat_sampler.name`) and the guidance each stands for.
PUBLISHED_SAMPLERS = {"FlowEulerSampler": "none", "FlowEulerCfgSampler": "cfg",
                      "FlowEulerGuidanceIntervalSampler": "interval"}
MIN_SIGMA = 1e-6  # below this a clean-sample prediction no longer says anything about the velocity


@dataclass(frozen=True)
class SamplerConfig:
    """How one flow is integrated.

    steps: Euler steps. guidance: ``none``, ``cfg`` (always) or ``interval`` (only where lo <= t <= hi).
    cfg_strength w: ``(1 + w) conditional - w unconditional``. rescale_t r: ``t <- r t / (1 + (r - 1) t)``.
    prediction: what the model returns, the ``velocity`` or the clean ``sample``.
    multi_image: ``stochastic`` cycles the photos over the steps, ``multidiffusion`` averages their predictions.
    noise_scale: factor on the initial noise (below 1 trades variety for safety; 0 is deterministic).
    """

    steps: int = 50
    guidance: str = "interval"
    cfg_strength: float = 3.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    rescale_t: float = 1.0
    sigma_min: float = 1e-5
    prediction: str = "velocity"
    multi_image: str = "stochastic"
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps must be between 1 and 1000, not {self.steps}")
        for name, value, allowed in (("guidance", self.guidance, GUIDANCE), ("prediction", self.prediction, PREDICTIONS),
                                     ("multi_image", self.multi_image, MULTI_IMAGE)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {value!r}")
        lo, hi = self.cfg_interval
        if not 0 <= lo <= hi <= 1:
            raise ValueError(f"cfg_interval must satisfy 0 <= lo <= hi <= 1, not {self.cfg_interval}")
        if not self.rescale_t > 0:
            raise ValueError(f"rescale_t must be positive, not {self.rescale_t}")
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min must lie in [0, 1), not {self.sigma_min}")
        if not self.noise_scale >= 0:
            raise ValueError(f"noise_scale must not be negative, not {self.noise_scale}")

    @classmethod
    def from_published(cls, entry: Mapping[str, Any]) -> "SamplerConfig":
        """Read a ``{name, args, params}`` entry of ``pipeline.yaml`` (spec section 1).

        Raises: NearError ``checkpoint-sampler`` for an unknown class or parameter.
        """
        name = entry.get("name")
        if name not in PUBLISHED_SAMPLERS:
            raise NearError("checkpoint-sampler", f"The checkpoint asks for the sampler {name!r}, which is not known.",
                            f"Use a checkpoint whose sampler is one of {', '.join(PUBLISHED_SAMPLERS)}.")
        values = {**(entry.get("args") or {}), **(entry.get("params") or {})}
        values.pop("verbose", None)
        if "cfg_interval" in values:
            values["cfg_interval"] = tuple(values["cfg_interval"])
        try:
            return cls(guidance=PUBLISHED_SAMPLERS[name], **values)
        except (TypeError, ValueError) as error:
            raise NearError("checkpoint-sampler", f"The sampler parameters of the checkpoint do not fit: {error}.",
                            "Compare pipeline.yaml with the published file.") from error


@dataclass(frozen=True)
class SampleResult:
    """samples: x at t = 0. x_t, x_0: the state after, and the clean sample predicted at, each step (if asked for)."""

    samples: Tensor
    x_t: list[Tensor] = field(default_factory=list)
    x_0: list[Tensor] = field(default_factory=list)


def time_sequence(steps: int, rescale_t: float = 1.0) -> np.ndarray:
    """The steps + 1 times from 1 to 0, float64 (spec 11.5)."""
    t = np.linspace(1, 0, steps + 1)
    return rescale_t * t / (1 + (rescale_t - 1) * t)


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise of ``shape``, float32 on the CPU: the same numbers as seeding torch globally and calling randn."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noised(x_0: Tensor, noise: Tensor, t: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """State at time ``t`` (broadcast against ``x_0``), for training."""
    return (1 - t) * x_0 + (sigma_min + (1 - sigma_min) * t) * noise


def velocity_target(x_0: Tensor, noise: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """What a velocity model is trained on: ``(1 - sigma_min) noise - x_0``."""
    return (1 - sigma_min) * noise - x_0


def sample_from_velocity(x_t: Tensor, t: float | Tensor, v: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """Clean sample that ``v`` points to."""
    return (1 - sigma_min) * x_t - (sigma_min + (1 - sigma_min) * t) * v


def velocity_from_sample(x_t: Tensor, t: float, x_0: Tensor, sigma_min: float = 1e-5) -> Tensor:
    """Velocity towards a predicted clean sample: ``((1 - s) x_t - x_0) / (s + (1 - s) t)``.

    At t -> 0 state and sample coincide and the quotient is 0 / 0; the velocity there is taken as zero, because no step
    starts at t = 0.
    """
    sigma = sigma_min + (1 - sigma_min) * t
    if sigma < MIN_SIGMA:
        return torch.zeros_like(x_t)
    return ((1 - sigma_min) * x_t - x_0) / sigma


@torch.no_grad()
def sample(model: Model, noise: Tensor, conditions: Sequence[Any], negative: Any = None, config: SamplerConfig = SamplerConfig(),
           *, progress: Progress | None = None, cancelled: Callable[[], bool] | None = None, stage: str = "sampling",
           keep_trajectory: bool = False) -> SampleResult:
    """Integrate the flow from ``noise`` to a sample.

    Args:
        model: ``(x, t1000, condition) -> prediction``; t1000 is 1000 t as float32 [1] on the device of x.
        noise: standard normal, any shape (see :func:`initial_noise`); ``config.noise_scale`` is applied here.
        conditions: one condition per photo (usually one); a condition may be None for an unconditional model.
        negative: condition of the unconditional branch; only read when guidance is on.
        progress: called after each step with (stage, fraction done, None). cancelled: polled before each evaluation.
    Raises: Cancelled; NearError ``no-condition`` for an empty ``conditions``.
    """
    if len(conditions) == 0:
        raise NearError("no-condition", "The sampler got no photo to start from.", "Give at least one photo.")
    times = time_sequence(config.steps, config.rescale_t)
    result = SampleResult(noise)
    x = noise if config.noise_scale == 1 else noise * config.noise_scale
    for step, (t, t_next) in enumerate(zip(times[:-1].tolist(), times[1:].tolist())):
        chosen = conditions if config.multi_image == "multidiffusion" else [conditions[step % len(conditions)]]
        v = _guided_velocity(model, x, t, chosen, negative, config, cancelled)
        if keep_trajectory:
            result.x_0.append(sample_from_velocity(x, t, v, config.sigma_min))
        x = x - (t - t_next) * v
        if keep_trajectory:
            result.x_t.append(x)
        if progress is not None:
            progress(stage, (step + 1) / config.steps, None)
    return SampleResult(x, result.x_t, result.x_0)


def _guided_velocity(model: Model, x: Tensor, t: float, conditions: Sequence[Any], negative: Any, config: SamplerConfig,
                     cancelled: Callable[[], bool] | None) -> Tensor:
    """Velocity at (x, t): mean over ``conditions``, guided where the config says so."""
    t1000 = torch.tensor([1000 * t], dtype=torch.float32, device=x.device)

    def velocity(condition: Any) -> Tensor:
        if cancelled is not None and cancelled():
            raise Cancelled()
        prediction = model(x, t1000, condition)
        return prediction if config.prediction == "velocity" else velocity_from_sample(x, t, prediction, config.sigma_min)

    conditional = sum(velocity(c) for c in conditions) / len(conditions) if len(conditions) > 1 else velocity(conditions[0])
    lo, hi = config.cfg_interval
    guided = config.guidance == "cfg" or (config.guidance == "interval" and lo <= t <= hi)
    if not guided or config.cfg_strength == 0:
        return conditional
    w = config.cfg_strength
    return (1 + w) * conditional - w * velocity(negative)
