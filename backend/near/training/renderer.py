"""Joint trainer of encoder, IAD, LAD, light tokenizer and basis (paper section 3.2; spec section 15)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from near.assets import Anchors
from near.models.anchors import decode_anchors
from near.models.compact_renderer import CompactRendererModel, encoder_inputs, geometry_features
from near.models.material import HOMOGENEOUS, MATERIAL, decode_material
from near.models.shading import light_surface, shade_terms
from near.training.cache import LightLibrary, unpack_matrix
from near.training.losses import image_loss
from near.training.loop import LoopConfig, Sampler, run

SLAT_NOISE = 0.12  # SLATs that the flows make are imperfect; the pbr head learns to repair them
GAIN_DECAY = 0.02  # pull of the log gains towards none


class SparseSplat(torch.autograd.Function):
    """``W @ colours`` with a constant sparse W [P, M] (scipy CSR)."""

    @staticmethod
    def forward(ctx, colours: Tensor, matrix) -> Tensor:
        ctx.matrix = matrix
        return torch.from_numpy(matrix @ colours.detach().numpy())

    @staticmethod
    def backward(ctx, grad: Tensor):
        return torch.from_numpy(ctx.matrix.T @ np.ascontiguousarray(grad.numpy())), None


class RendererData:
    """Cached objects, the last few kept decoded."""

    def __init__(self, files: list[Path], hdri_folder: Path, resolution: int, held_out: int = 8, keep: int = 400) -> None:
        self.files, self.lights, self.resolution, self.keep = files, LightLibrary(hdri_folder), resolution, keep
        step = max(1, len(files) // max(held_out, 1))
        self.test = list(range(0, len(files), step))[:held_out]
        self.train = [i for i in range(len(files)) if i not in self.test]
        self._cache: OrderedDict[int, dict] = OrderedDict()

    def load(self, index: int) -> dict:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        raw = torch.load(self.files[index], weights_only=True)
        anchors = Anchors(**raw["anchors"])
        cloud = decode_anchors(raw["coords"], anchors, self.resolution)
        encoded = raw["material"].float()
        item = {
            "coords": raw["coords"].int(), "cloud": cloud, "surface": cloud.surface(decode_material(encoded)),
            "inputs": encoder_inputs(cloud, encoded, raw["coords"]), "geometry": geometry_features(cloud, len(raw["coords"])),
            "slat": raw["slat"].float(), "known": raw["slat_known"].float(), "lit": raw["lit"], "alpha": raw["alpha"],
            "cam_from_world": raw["cam_from_world"], "lights": raw["lights"],
            "matrices": [unpack_matrix(m) for m in raw["matrices"]]}
        self._cache[index] = item
        while len(self._cache) > self.keep:
            self._cache.popitem(last=False)
        return item


def render_view(model: CompactRendererModel, data: RendererData, item: dict, h, registers, view: int, light_index: int,
                corrected: bool = True) -> tuple[Tensor, Tensor]:
    """Predicted image [H, W, 3] (premultiplied, linear) and the log gains [M, 9]."""
    cloud, surface = item["cloud"], item["surface"]
    env, light = data.lights.get(*item["lights"][view][light_index])
    cam = item["cam_from_world"][view]
    position = -cam[:3, :3].T @ cam[:3, 3]
    with torch.no_grad():
        incident = light_surface(surface, light, env)
        terms = shade_terms(surface, incident, light, env, F.normalize(position - cloud.points, dim=-1))
    gains = None
    if corrected:
        lad = model.lad
        intrinsic = lad.intrinsic(h.feats)
        embedding = lad.view_embedding(h.coords, cam[None])
        _, rgb = lad.shade(intrinsic, embedding, lad.register_kv(registers), lad.light_kv(model.tokens([env])))
        gains = model.neural_basis(rgb[cloud.voxel].float(), surface.normals)
    matrix = item["matrices"][view]
    side = int(matrix.shape[0] ** 0.5)
    return SparseSplat.apply(terms.combine(gains), matrix).view(side, side, 3), gains


def train_renderer(model: CompactRendererModel, data: RendererData, out: Path, config: LoopConfig, *, lights_per_step: int = 2,
                   report: Callable[[str], None] = print) -> nn.Module:
    """Train jointly; returns the averaged model. Held-out mask PSNR (with and without the decoder) goes to the log."""
    generator = torch.Generator().manual_seed(config.seed + 5)

    def step(sampler: Sampler) -> tuple[Tensor, dict[str, float]]:
        item = data.load(data.train[sampler.next()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            slat = model.encode(item["coords"], item["inputs"]).float()
            homogeneous = ((slat[:, HOMOGENEOUS] - item["slat"][:, HOMOGENEOUS]).abs().mean(-1) * item["known"]).mean()
            noise = torch.randn(slat.shape) * SLAT_NOISE * torch.rand(1)
            h, registers = model.voxel_features((slat + noise).clamp(-1, 1), item["geometry"], item["coords"])
            repaired = (slat + noise)[:, MATERIAL] + model.lad.materials(model.lad.intrinsic(h.feats)).float()
            pbr = (repaired - item["slat"][:, MATERIAL]).abs().mean()
            total = 0.3 * pbr + 0.3 * homogeneous
            view = int(torch.randint(len(item["lights"]), (), generator=generator))
            chosen = torch.randperm(len(item["lights"][view]), generator=generator)[:lights_per_step].tolist()
            numbers: dict[str, float] = {"pbr": float(pbr.detach()), "homogeneous": float(homogeneous.detach())}
            for k in chosen:
                image, gains = render_view(model, data, item, h, registers, view, k)
                loss, values = image_loss(image, item["lit"][view, k].float(), item["alpha"][view].float())
                total = total + (loss + GAIN_DECAY * gains.square().mean()) / len(chosen)
                numbers |= values
        return total, numbers

    def sheet(average: CompactRendererModel, step_index: int) -> None:
        values = held_out_psnr(average, data)
        report(f"{out.name} step {step_index}: held-out mask PSNR {values['corrected']:.2f} (analytic {values['analytic']:.2f})")
        with (out / "held_out.jsonl").open("a") as f:
            f.write('{"step": %d, "corrected": %.3f, "analytic": %.3f}\n' % (step_index, values["corrected"], values["analytic"]))

    return run(model, step, len(data.train), out, config, sheet_fn=sheet)


@torch.no_grad()
def held_out_psnr(model: CompactRendererModel, data: RendererData) -> dict[str, float]:
    """Mean mask PSNR after AgX on the held-out objects, with and without the decoder's corrections."""
    model.eval()
    scores: dict[str, list[float]] = {"corrected": [], "analytic": []}
    for index in data.test:
        item = data.load(index)
        slat = model.encode(item["coords"], item["inputs"])
        h, registers = model.voxel_features(slat, item["geometry"], item["coords"])
        for view, lights in enumerate(item["lights"]):
            for name in scores:
                image, _ = render_view(model, data, item, h, registers, view, view % len(lights), corrected=name == "corrected")
                _, values = image_loss(image, item["lit"][view, view % len(lights)].float(), item["alpha"][view].float())
                scores[name].append(values["psnr_mask"])
    return {k: float(np.mean(v)) for k, v in scores.items()}
