"""Joint trainer of encoder, IAD, LAD, light tokenizer and basis (paper section 3.2; spec section 15)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from near.assets import Anchors
from near.colour import agx_srgb
from near.lighting import Environment, PrefilteredLight
from near.models.anchors import decode_anchors
from near.models.compact_renderer import CompactRendererModel, encoder_inputs, geometry_features
from near.models.exchange import build_exchange
from near.models.material import HOMOGENEOUS, MATERIAL, decode_material
from near.models.shading import light_surface, shade_terms
from near.training.cache import unpack_matrix
from near.training.flow_data import held_out_rows
from near.training.journal import Sheet
from near.training.lights import LightLibrary
from near.training.losses import image_loss, perceptual_loss
from near.training.loop import LoopConfig, Sampler, processes, run
from near.training.pictures import comparison
from near.training.rasterised import rasterised, rasteriser

SLAT_NOISE = 0.12  # SLATs that the flows make are imperfect; the pbr head learns to repair them
GAIN_DECAY = 0.02  # pull of the log gains towards none
SENDERS = 256      # of an object's exchange: hundreds of objects are kept


class SparseSplat(torch.autograd.Function):
    """``W @ colours`` with a constant sparse W [P, M] (scipy CSR). The anchors' geometry does not learn, so their splatting
    is prepared once and needs no rasteriser in training."""

    @staticmethod
    def forward(ctx, colours: Tensor, matrix) -> Tensor:
        ctx.matrix = matrix
        return _product(matrix, colours.detach())

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _product(ctx.matrix.T, grad), None


def _product(matrix, dense: Tensor) -> Tensor:
    """A scipy sparse matrix times [N, 3]."""
    return on_device(matrix, dense) if dense.is_cuda else torch.from_numpy(matrix @ np.ascontiguousarray(dense.numpy()))


def on_device(matrix, dense: Tensor) -> Tensor:
    """The same on the tensor's device."""
    coo = matrix.tocoo()
    rows_columns, values = (torch.from_numpy(a).to(dense.device) for a in (np.stack([coo.row, coo.col]), coo.data))
    return torch.sparse_coo_tensor(rows_columns, values, matrix.shape, check_invariants=False) @ dense


class RendererData:
    """Cached objects, the last few kept decoded on ``device``; ``rasteriser``: a backend of :func:`near.splatting.splat`, or None
    for the prepared matrices."""

    def __init__(self, files: list[Path], hdri_folder: Path, resolution: int, held_out: int = 8, keep: int = 400) -> None:
        self.files, self.lights, self.resolution, self.keep = files, LightLibrary(hdri_folder), resolution, keep
        self.test = held_out_rows(len(files), held_out)
        self.train = [i for i in range(len(files)) if i not in self.test]
        self.device, self.rasteriser = torch.device("cpu"), None
        self._cache: OrderedDict[int, dict] = OrderedDict()
        self._placed: dict[str, PrefilteredLight] = {}

    def load(self, index: int) -> dict:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        raw = torch.load(self.files[index], weights_only=True)
        anchors = Anchors(**raw["anchors"])
        cloud = decode_anchors(raw["coords"], anchors, self.resolution)
        encoded = raw["material"].float()
        item = {
            "name": raw["name"], "coords": raw["coords"].int(), "cloud": cloud, "surface": cloud.surface(decode_material(encoded)),
            "exchange": build_exchange(cloud, self.resolution, SENDERS),
            "inputs": encoder_inputs(cloud, encoded, raw["coords"]), "geometry": geometry_features(cloud, len(raw["coords"])),
            "slat": raw["slat"].float(), "known": raw["slat_known"].float(), "lit": raw["lit"], "alpha": raw["alpha"],
            "cam_from_world": raw["cam_from_world"], "K": raw["K"]}
        item = {k: _placed(v, self.device) for k, v in item.items()}
        item |= {"lights": raw["lights"], "matrices": [unpack_matrix(m) for m in raw["matrices"]]}
        self._cache[index] = item
        while len(self._cache) > self.keep:
            self._cache.popitem(last=False)
        return item

    def light(self, name: str, rotation_z_rad: float, strength: float) -> tuple[Environment, PrefilteredLight]:
        """A light for shading on ``device``; its map stays where it was read."""
        env, light = self.lights.get(name, rotation_z_rad, strength)
        if name not in self._placed:
            self._placed[name] = light.to(self.device)
        return Environment(env.rgb_lin709, env.env_from_world.to(self.device), strength), self._placed[name]


def _placed(value, device: torch.device):
    """A tensor, or a dataclass of tensors, on a device."""
    if is_dataclass(value):
        return replace(value, **{f.name: getattr(value, f.name).to(device) for f in fields(value)})
    return value.to(device) if isinstance(value, Tensor) else value


def render_view(model: CompactRendererModel, data: RendererData, item: dict, h, registers, view: int, light_index: int,
                corrected: bool = True) -> tuple[Tensor, Tensor]:
    """Predicted image [H, W, 3] (premultiplied, linear) and the log gains [M, 9]."""
    cloud, surface = item["cloud"], item["surface"]
    env, light = data.light(*item["lights"][view][light_index])
    cam = item["cam_from_world"][view]
    position = -cam[:3, :3].T @ cam[:3, 3]
    with torch.no_grad():
        incident = light_surface(surface, light, env, item["exchange"])
        terms = shade_terms(surface, incident, light, env, F.normalize(position - cloud.points, dim=-1))
    gains = None
    if corrected:
        lad = model.lad
        intrinsic = lad.intrinsic(h.feats)
        embedding = lad.view_embedding(h.coords, cam[None])
        tokens = model.tokens([data.lights.get(*item["lights"][view][light_index])[0]])
        _, rgb = lad.shade(intrinsic, embedding, lad.register_kv(registers), lad.light_kv(tokens))
        gains = model.neural_basis(rgb[cloud.voxel].float(), surface.normals)
    matrix, colours = item["matrices"][view], terms.combine(gains)
    side = int(matrix.shape[0] ** 0.5)
    with torch.autocast(data.device.type, enabled=False):  # splatting is done in single precision
        if data.rasteriser:
            return rasterised(cloud, cam, item["K"], (side, side), colours.float(), data.rasteriser), gains
        return SparseSplat.apply(colours.float(), matrix).view(side, side, 3), gains


def train_renderer(model: CompactRendererModel, data: RendererData, out: Path, config: LoopConfig, *, lights_per_step: int = 2,
                   report: Callable[[str], None] = print) -> nn.Module:
    """Train jointly; returns the averaged model. Held-out mask PSNR (with and without the decoder) goes to the journal."""
    data.device = processes().device
    data.rasteriser = rasteriser(data.device)
    report(f"{out.name} on {data.device}, splatting by {data.rasteriser or 'prepared matrices'}; perceptual loss: {perceptual_loss()[0]}")
    # Light is conditioned where it was read, on the CPU.
    model.hdri_encoder.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(data.device),))

    def step(sampler: Sampler) -> tuple[Tensor, dict[str, float]]:
        item, generator = data.load(data.train[sampler.next()]), sampler.generator
        with config.autocast(data.device):
            slat = model.encode(item["coords"], item["inputs"]).float()
            homogeneous = ((slat[:, HOMOGENEOUS] - item["slat"][:, HOMOGENEOUS]).abs().mean(-1) * item["known"]).mean()
            noise = torch.randn_like(slat) * SLAT_NOISE * float(torch.rand((), generator=generator))
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

    def sheet(average: CompactRendererModel, step_index: int) -> Sheet:
        made = held_out(average, data)
        report(f"{out.name} step {step_index}: held-out mask PSNR {made.numbers['corrected']:.2f} (analytic {made.numbers['analytic']:.2f})")
        return made

    return run(model, step, len(data.train), out, config, sheet_fn=sheet)


@torch.no_grad()
def held_out(model: CompactRendererModel, data: RendererData) -> Sheet:
    """Mean mask PSNR after AgX on the held-out objects, with and without the decoder's corrections, and a picture of each."""
    model.eval()
    scores: dict[str, list[float]] = {"corrected": [], "analytic": []}
    rows = []
    for index in data.test:
        item = data.load(index)
        slat = model.encode(item["coords"], item["inputs"])
        h, registers = model.voxel_features(slat, item["geometry"], item["coords"])
        for view, lights in enumerate(item["lights"]):
            target, pictures = item["lit"][view, view % len(lights)].float(), {}
            for name in scores:
                image, _ = render_view(model, data, item, h, registers, view, view % len(lights), corrected=name == "corrected")
                _, values = image_loss(image, target, item["alpha"][view].float())
                scores[name].append(values["psnr_mask"])
                pictures[name] = agx_srgb(image.clamp_min(0))
            if view == 0:
                rows.append((item["name"], {"Cycles": agx_srgb(target), **pictures}))
    return Sheet({k: float(np.mean(v)) for k, v in scores.items()}, comparison(rows, "Held-out objects"))
