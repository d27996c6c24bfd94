"""First stage of the homogeniser's training: its per-voxel head, on photos of cached objects under many lights.

The loss is the product's own question: shaded under lights the photo never saw, after AgX, how far is the answer from the
truth? It is asked per picture and in decibels, so that a dark object counts like a bright one. Beside it the SLAT's own
distance keeps what no light shows from drifting.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor

from near.atomic import atomic_file
from near.colour import agx_srgb
from near.errors import NearError
from near.models.compact_flows import CompactFlow
from near.models.material import MATERIAL, decode_material, shaded_slat
from near.models.pointwise import PointwisePrior, seen_otherwise
from near.models.shading import albedo_split, scattered_again, tinted_albedo
from near.training.flow_data import held_out_rows
from near.training.flows import CHANNEL_WEIGHTS
from near.training.journal import Sheet
from near.training.loop import LoopConfig, Sampler, processes, run
from near.training.relit import ROUGHNESS_KNOTS, hidden_radiance

OBJECTS = 16               # of a step
RENDERED_SHARE = 0.4       # of the photos are path-traced, the others shaded analytically
RELIT_WEIGHT = 1.0         # of the log error: torn between two answers, the likelier one shows better than their mean
ERROR_FLOOR = 3e-4         # 35 dB: better than that need not be
SAME_VIEW_SHARE = 0.5
HEAD_LOOP = LoopConfig(steps=100_000, minutes=25.0, learning_rate=1e-3, weight_decay=2e-2, warmup=200, ema=0.998, sheet_every=500)


def shade_voxels(material: Tensor, condition: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Radiance [n, 3] of voxels with linear material [n, 5] under a prepared light; the twin of
    :func:`near.models.shading.shade_terms` with the light's part computed beforehand. Differentiable."""
    base, rough, metal = material[:, :3], material[:, 3], material[:, 4:5]
    knots = torch.tensor(ROUGHNESS_KNOTS).to(rough)
    r = rough.clamp(knots[0], knots[-1])
    at = (torch.searchsorted(knots, r.detach().contiguous()).clamp(1, len(knots) - 1) - 1)
    blend = ((r - knots[at]) / (knots[at + 1] - knots[at]))[:, None]
    rows = torch.arange(len(at), device=at.device)
    white, grazing = (torch.lerp(condition[k][rows, at], condition[k][rows, at + 1], blend) for k in ("white", "grazing"))
    seen = torch.lerp(condition["open_to"][rows, at, None], condition["open_to"][rows, at + 1, None], blend)
    f0, diffuse, lobe = albedo_split(base, rough, metal, condition["n_dot_v"])
    return (diffuse * condition["irradiance"] / torch.pi + (f0 * white + (1 - f0) * grazing) * scattered_again(f0, sum(lobe))
            + hidden * (diffuse * (1 - condition["openness"][:, None]) + tinted_albedo(f0, *lobe) * (1 - seen)))


class RelitData:
    """Relit caches in memory; ``held_out`` rendered objects, and all that share their shape, are kept apart.

    Raises:
        NearError: ``training-data-old`` when an earlier version made a cache; ``training-data-few``.
    """

    def __init__(self, files: list[Path], held_out: int = 24) -> None:
        self.objects = [torch.load(p, weights_only=True, mmap=True) for p in files]
        for item, path in zip(self.objects, files):
            if not all("features" in p for p in item["photos"]):
                raise NearError("training-data-old", f"{path} was made by an earlier version.", "Remove its folder and run near train relit again.")
            item["rendered"] = [k for k, p in enumerate(item["photos"]) if "light" in p]
            item["hidden"] = hidden_radiance(item["conditions"], decode_material(item["targets"].float()[..., MATERIAL]))
        rendered = [o for o, item in enumerate(self.objects) if item["rendered"]]
        self.test = [rendered[k] for k in held_out_rows(len(rendered), held_out)]
        known = {self.objects[o]["name"] for o in self.test}
        self.train = [o for o, item in enumerate(self.objects) if item["name"] not in known]

    def sample(self, obj: int, generator: torch.Generator, rendered: bool) -> dict[str, Tensor]:
        """One photo of an object: features, prior, target [V, .] of some voxels, and two lights to be judged under."""
        data = self.objects[obj]
        pool = data["rendered"] if rendered and data["rendered"] else range(len(data["photos"]) - len(data["rendered"]))
        index = pool[int(torch.randint(len(pool), (), generator=generator))]
        photo = data["photos"][index]
        rows, features = photo["rows"], photo["features"].float()
        same = [k for k, c in enumerate(data["conditions"]) if c["view"] == photo["view"]]
        conditions = []
        for _ in range(2):
            options = same if torch.rand((), generator=generator) < SAME_VIEW_SHARE else range(len(data["conditions"]))
            k = options[int(torch.randint(len(options), (), generator=generator))]
            chosen = {name: v[rows].float() for name, v in data["conditions"][k].items() if name != "view"}
            conditions.append(chosen | {"hidden": data["hidden"][photo["dressing"], k][None].expand(len(rows), 3)})
        return {"features": features, "prior": shaded_slat(features[:, :3] * 0.5 + 0.5), "target": data["targets"][photo["dressing"]][rows].float(),
                "conditions": conditions}


def varied(sample: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The sample with its horizontal axes permuted: few objects, so none may be known by heart."""
    swap, *flips = (torch.rand(3, generator=generator) < 0.5).tolist()
    return sample | {"features": seen_otherwise(sample["features"], swap, tuple(flips))}


def head_loss(flow: CompactFlow, head, batch: list[dict], judged: dict,
              autocast: AbstractContextManager = nullcontext()) -> tuple[Tensor, dict[str, float]]:
    """Loss of a batch; ``judged`` holds the truth's shade, which depends on the batch alone; ``autocast``: for the head."""
    features, prior, target = (torch.cat([b[k] for b in batch]) for k in ("features", "prior", "target"))
    with autocast:
        answer = head.from_features(features, [len(b["features"]) for b in batch])
    slat = flow.compose(flow.denormalise(answer.float()), prior)
    distance = ((slat - target) ** 2 * CHANNEL_WEIGHTS.to(slat)).mean()
    shown = agx_srgb(torch.cat([shade_voxels(decode_material(slat[:, MATERIAL]), c, c["hidden"]) for c in judged["conditions"]]))
    pictures = [len(b["features"]) for b in batch] * len(judged["conditions"])
    wrong = (((shown - judged["shown"]) ** 2).mean(-1) * judged["weight"]).split(pictures)
    error = torch.stack([e.sum() / w.sum().clamp_min(1) for e, w in zip(wrong, judged["weight"].split(pictures))])
    relit_db = float(-10 * error.detach().clamp_min(1e-6).log10().mean())
    return distance + RELIT_WEIGHT * (error + ERROR_FLOOR).log().mean(), {"slat": float(distance.detach()), "relit_db": relit_db}


def judge(batch: list[dict]) -> dict:
    """The batch's lights side by side, and how the true material looks under them."""
    target = decode_material(torch.cat([b["target"] for b in batch])[:, MATERIAL])
    conditions = [{k: torch.cat([b["conditions"][i][k] for b in batch]) for k in batch[0]["conditions"][0]} for i in range(2)]
    with torch.no_grad():
        shown = agx_srgb(torch.cat([shade_voxels(target, c, c["hidden"]) for c in conditions]))
    return {"conditions": conditions, "shown": shown, "weight": torch.cat([c["weight"] for c in conditions])}


def train_pointwise(flow: CompactFlow, data: RelitData, out: Path, config: LoopConfig, *, report: Callable[[str], None] = print) -> None:
    """Fit ``flow.pointwise`` in place, its members one after the other, each in a run folder ``out/head_<k>`` from its own seed and for
    its share of the minutes. Of every member the average that relights the held-out objects best is kept."""
    members = flow.pointwise.members
    minutes = None if config.minutes is None else config.minutes / len(members)
    for k, head in enumerate(members):
        _train_member(flow, head, data, out / f"head_{k}", replace(config, minutes=minutes, seed=config.seed + k), report)


def _train_member(flow: CompactFlow, head: PointwisePrior, data: RelitData, out: Path, config: LoopConfig,
                  report: Callable[[str], None]) -> None:
    device, best = processes().device, out / "best.safetensors"
    start = torch.Generator().manual_seed(config.seed)

    def draw(objects: list[int], generator: torch.Generator, rendered: float, vary: bool = False) -> list[dict]:
        samples = [data.sample(o, generator, float(torch.rand((), generator=generator)) < rendered) for o in objects]
        return to_device([varied(s, generator) for s in samples] if vary else samples, device)

    if not (head.std != 1).any():
        sample = torch.cat([b["features"] for b in draw((data.train * 2)[:240], start, RENDERED_SHARE)])
        head.mean.copy_(sample.mean(0))
        head.std.copy_(sample.std(0).clamp_min(1e-3))
    flow.to(device)
    test = [draw(data.test, start, 1.0) for _ in range(4)]
    judged = [judge(batch) for batch in test]

    def step(sampler: Sampler) -> tuple[Tensor, dict[str, float]]:
        objects = [data.train[sampler.next()] for _ in range(OBJECTS)]
        batch = draw(objects, sampler.generator, RENDERED_SHARE, vary=True)
        return head_loss(flow, head, batch, judge(batch), config.autocast(device))

    @torch.no_grad()
    def look(average: PointwisePrior, when: str) -> Sheet:
        """A few hundred objects are soon known by heart: keep what serves unseen ones, the start included."""
        average.eval()
        scores = [head_loss(flow, average, b, j) for b, j in zip(test, judged)]
        numbers = {k: sum(s[1][k] for s in scores) / len(scores) for k in scores[0][1]}
        numbers["loss"] = sum(float(s[0]) for s in scores) / len(scores)
        report(f"{out.name} {when}: held-out " + " ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        if numbers["loss"] < _score(best):
            with atomic_file(best) as part:  # a run that goes on reads it
                save_model(average, str(part), metadata={"loss": repr(numbers["loss"])})
        return Sheet(numbers)

    if processes().is_main_process and not best.exists():
        look(head, "at the start")
    average = run(head, step, len(data.train), out, config, sheet_fn=lambda model, index: look(model, f"step {index}"))
    if processes().is_main_process:
        look(average, "at the end")
    processes().wait_for_everyone()
    load_model(head, str(best))


def _score(path: Path) -> float:
    """Held-out loss of a saved head; infinite where there is none."""
    if not path.exists():
        return float("inf")
    with safe_open(str(path), "pt") as file:
        return float(file.metadata()["loss"])


def to_device(value, device: torch.device):
    """Tensors in lists and dictionaries, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return [to_device(v, device) for v in value]
