"""Attention, IAD, LAD, neural basis and light tokenizer."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from parity_checks import Row, compare, load_group, same, under

from near.colour import agx_srgb
from near.geometry.cameras import Camera
from near.models.basis import NeuralBasisConfig, NeuralBasis
from near.models.gaussians import GaussianGeometry, activate_scales
from near.models.iad import SLatGaussianDecoderConfig, SLatGaussianDecoder
from near.models.lad import SLatGaussianRenderer
from near.models.lad_config import SLatGaussianRendererConfig
from near.models.passes import base_input, reduce_supersampled, render_passes, view_input
from near.models.tokenizer import HdriEncoder, HdriEncoderConfig
from near.nn import SelfAttention, SparseTensor, row_slices

TOL_IAD = 5e-5
TOL_LAD = 2e-3
TOL_BASIS = 5e-5
TOL_ENCODER = 2e-4
TOL_RASTER, OUTLIERS = 2e-3, 0.005


def canonical(labels) -> list[int]:
    """Labels renamed by first appearance, so that equal partitions are equal lists."""
    names: dict[int, int] = {}
    return [names.setdefault(int(v), len(names)) for v in labels]


@torch.no_grad()
def check_window_attention(folder: Path) -> list[Row]:
    group = "window_attention"
    tensors, settings = load_group(folder, group)
    x = SparseTensor.create(tensors["in/feats"], tensors["in/coords"])
    rows = []
    for key in sorted(tensors):
        if m := re.fullmatch(r"partition/shift(\d+)/window_id_per_voxel", key):
            groups = x.windows(settings["window"], int(m[1]))
            labels = torch.empty(len(x), dtype=torch.int64)
            labels[groups.order] = torch.arange(len(groups.lengths)).repeat_interleave(torch.tensor(groups.lengths))
            rows.append(same(group, f"partition/shift{m[1]}", canonical(labels) == canonical(tensors[key])))
        if m := re.fullmatch(r"out/rms(\d)_shift(\d+)", key):
            rms = m[1] == "1"
            attention = SelfAttention(settings["channels"], settings["heads"], qk_rms_norm=rms)
            attention.load_state_dict(under(tensors, "weights_rms" if rms else "weights"))
            rows.append(compare(group, key, attention(x.feats, x.windows(settings["window"], int(m[2]))), tensors[key], TOL_IAD))
    return rows


def numbered(tensors, pattern: str) -> list[str]:
    """The numbers that ``pattern``'s group matches in the tensor names, sorted."""
    return sorted({m[1] for k in tensors if (m := re.match(pattern, k))}, key=int)


@torch.no_grad()
def check_iad(folder: Path) -> list[Row]:
    group = "iad"
    tensors, settings = load_group(folder, group)
    model = SLatGaussianDecoder(SLatGaussianDecoderConfig.from_args(settings["args"]))
    model.load_state_dict(under(tensors, "weights"))
    rows = []
    for n in numbered(tensors, r"in(\d+)/coords"):
        slat = SparseTensor.create(tensors[f"in{n}/feats"], tensors[f"in{n}/coords"])
        h, registers = model(slat)
        ours = {f"out{n}/h": h.feats, f"out{n}/reg": registers, f"tap{n}/after_input_and_pos": model.embed(slat)}
        if len(model.blocks):
            ours[f"tap{n}/after_block0"] = model.blocks[0](model.embed(slat), model.register_kv()[0], model.groups(slat, 0))
        rows += [compare(group, k, v, tensors[k], TOL_IAD) for k, v in ours.items() if k in tensors]
    return rows


def lad_taps(model: SLatGaussianRenderer, h: SparseTensor, registers, tokens, extrinsics) -> dict:
    """Intermediate results by their fixture names."""
    intrinsic, view = model.intrinsic(h.feats), model.view_embedding(h.coords, extrinsics)
    heads = model.geometry(intrinsic, view)
    scale, rgb = model.shade(intrinsic, view, model.register_kv(registers), model.light_kv(tokens), h.counts)
    x = intrinsic.embedded + view
    taps = {"gs_in": intrinsic.normed + view, "h_gs": heads.gs, "h_pbr": heads.pbr, "h_scale": scale, "h_rgb": rgb, "blk0_in": x,
            "h_out": torch.cat([heads.gs, heads.pbr, scale, rgb], -1)}
    if len(model.blocks):
        taps["blk0_out"] = model.blocks[0](x, registers, tokens, h.counts)
    return {f"tap/{k}": v for k, v in taps.items()}


@torch.no_grad()
def check_lad(folder: Path) -> list[Row]:
    group = "lad"
    tensors, settings = load_group(folder, group)
    model = SLatGaussianRenderer(SLatGaussianRendererConfig.from_args(settings["args"]))
    model.load_state_dict(under(tensors, "weights"))
    h = SparseTensor.create(tensors["in/h"], tensors["in/coords"])
    inputs = (tensors["in/reg"], tensors["in/hdri_tokens"], tensors["in/extrinsics"])
    rows = [compare(group, k, v, tensors[k], TOL_LAD) for k, v in lad_taps(model, h, *inputs).items() if k in tensors]
    raw = model(h, *inputs)
    for b, own in enumerate(row_slices(h.counts)):
        mine = {k: v[own] for k, v in raw.items()}
        for name, value in mine.items():
            expected = tensors[f"raw{b}/{name}"]
            rows.append(compare(group, f"raw{b}/{name}", value.flatten(0, 1).reshape(expected.shape), expected, TOL_LAD))
        camera = torch.linalg.inv(tensors["in/extrinsics"][b])[:3, 3]
        for name, value in activated(mine, model.config, camera).items():
            if (key := f"act{b}/get_{name}") in tensors:
                rows.append(compare(group, key, value.reshape(tensors[key].shape), tensors[key], TOL_LAD))
    return rows


def activated(raw: dict, config: SLatGaussianRendererConfig, camera_position) -> dict:
    """Activated attributes of one object, by the published property names."""
    rep = config.representation
    g = GaussianGeometry.from_raw(raw, rep)
    scales_view = activate_scales(raw["_scaling_view"].flatten(0, 1), rep)
    light = {n: torch.sigmoid(raw["_" + n].flatten(0, 1)) for n in ("shadow", "hdri1", "hdri2")}
    return light | {"xyz": g.means, "rotation": g.quats, "opacity": g.opacities, "scaling": g.scales, "base_color": raw["_base_color"],
            "roughness": g.roughness, "metallic": g.metallic, "pbr1": g.pbr1, "scaling_view": scales_view, "rgb": raw["_rgb"],
            "normal": g.normals(g.scales, camera_position, config.view_origin),
            "normal_view": g.normals(scales_view, camera_position, config.view_origin)}


@torch.no_grad()
def check_neural_basis(folder: Path) -> list[Row]:
    group = "neural_basis"
    tensors, settings = load_group(folder, group)
    model = NeuralBasis(NeuralBasisConfig.from_args(settings["args"]))
    model.load_state_dict(under(tensors, "weights"))
    return [compare(group, "out", model(tensors["in/features"], tensors.get("in/normals")), tensors["out"], TOL_BASIS)]


def regenerated_weights(folder: Path, settings: dict) -> dict:
    """The encoder's weights, made by the fixture folder's own generator from seed and key."""
    spec = importlib.util.spec_from_file_location("weightgen", folder / "weightgen.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)

    def make(key: str, shape):
        return torch.from_numpy(generator.det_weight(key, shape, settings["seed"]))

    shared = re.compile(r"transformer_encoder\.layers\.\d+\.")
    weights = {k: make(shared.sub("transformer_encoder.layers.0.", k), s) for k, s in settings["state_dict_shapes"].items()}
    if (bands := "dir_encoder.freq_bands") in weights:
        weights[bands] = 2.0 ** torch.arange(len(weights[bands])) * torch.pi
    return weights


@torch.no_grad()
def check_hdri_encoder(folder: Path) -> list[Row]:
    group = "hdri_encoder"
    tensors, settings = load_group(folder, group)
    model = HdriEncoder(HdriEncoderConfig.from_args(settings["args"])).eval()
    model.load_state_dict(regenerated_weights(folder, settings))
    condition = tensors["in"]
    features = model.backbone(condition[:, :6])
    maps = model.fuse(features, condition[:, 6:9])
    ours = {"freq_bands": model.dir_encoder.freq_bands, "tap/stage4": features[2], "tap/stage2_mean_c": features[0].mean(1),
            "tap/fusion_c3": maps[0], "tap/fusion_c4": maps[1], "tap/fusion_c5": maps[2], "tap/projection_conv": model.project(maps),
            "out": model(condition)}
    return [compare(group, k, v, tensors[k], TOL_ENCODER) for k, v in ours.items() if k in tensors]


def raster_camera(render: dict, index: str, settings: dict) -> Camera:
    """Camera of one rendered object, from the arguments its rasteriser got."""
    size = int(render[f"out{index}/alpha"].shape[-1])
    return Camera(render[f"raster{index}/base/viewmats"][0].double(), render[f"raster{index}/base/Ks"][0], size,
                  int(render[f"out{index}/alpha"].shape[-2]), near=settings["near"], far=settings["far"])


def render_model(folder: Path) -> tuple[SLatGaussianRendererConfig, NeuralBasis, dict]:
    """Configuration, basis and attributes that the render fixtures start from."""
    lad, lad_settings = load_group(folder, "lad")
    weights, basis_settings = load_group(folder, "neural_basis")
    basis = NeuralBasis(NeuralBasisConfig.from_args(basis_settings["args"]))
    basis.load_state_dict(under(weights, "weights"))
    return SLatGaussianRendererConfig.from_args(lad_settings["args"]), basis, lad


def raw_of(lad: dict, index: str, gaussians: int) -> dict:
    """Stored attributes of one object, back to [n, G, k]."""
    return {k: v.flatten(1).unflatten(0, (-1, gaussians)) for k, v in under(lad, f"raw{index}").items()}


@torch.no_grad()
def check_render(folder: Path) -> list[Row]:
    group = "render"
    tensors, settings = load_group(folder, group)
    config, basis, lad = render_model(folder)
    rows = []
    for i in numbered(tensors, r"out(\d+)/"):
        raw, camera = raw_of(lad, i, config.representation.num_gaussians), raster_camera(tensors, i, settings)
        for name, given in (("base", base_input(raw, config, camera)), ("view", view_input(raw, config, basis, camera))):
            g = given.gaussians
            ours = {"means": g.means, "quats": g.quats, "scales": g.scales, "opacities": g.opacities, "colors": given.channels}
            keys = {k: f"raster{i}/{name}/{k}" for k in ours}
            rows += [compare(group, keys[k], ours[k], tensors[keys[k]], TOL_LAD) for k in ours if keys[k] in tensors]
        frame = render_passes(raw, config, basis, camera)
        for name, expected in under(tensors, f"out{i}").items():
            rows.append(compare(group, f"out{i}/{name}", frame[name], expected, TOL_RASTER, OUTLIERS, channel_axis=0))
        rows += final_frames(tensors, i, frame)
    for factor in numbered(tensors, r"ssaa(\d+)/"):
        smooth = under(tensors, f"ssaa{factor}")
        raw, camera = raw_of(lad, "0", config.representation.num_gaussians), raster_camera(tensors, "0", settings)
        camera = camera.scaled(smooth["alpha"].shape[-1] / camera.width)  # this one is never reduced: it has the rendered size
        ours = reduce_supersampled(render_passes(raw, config, basis, camera), int(factor))
        rows += [compare(group, f"ssaa{factor}/{k}", ours[k].reshape(v.shape), v, TOL_RASTER, OUTLIERS) for k, v in smooth.items()]
    return rows


def final_frames(tensors: dict, index: str, passes: dict) -> list[Row]:
    """Display values, and the viewer's 8-bit frame over a grey background (bg<value> in the name)."""
    rows, shown = [], agx_srgb(passes["color"].permute(1, 2, 0))
    alpha = passes["alpha_view"].permute(1, 2, 0)
    for name, expected in under(tensors, f"final{index}").items():
        if name == "agx_color":
            rows.append(compare("render", f"final{index}/{name}", shown, expected, TOL_RASTER, OUTLIERS, channel_axis=-1))
        elif m := re.fullmatch(r"viewer_frame_uint8_bg([\d.]+)", name):
            frame = ((shown * alpha + (1 - alpha) * float(m[1])) * 255).to(torch.uint8)
            rows.append(compare("render", f"final{index}/{name}", frame, expected, 1.0, OUTLIERS, "8-bit steps", channel_axis=-1))
    return rows


@torch.no_grad()
def check_chain(folder: Path) -> list[Row]:
    group = "chain"
    tensors, _ = load_group(folder, group)
    config, basis, lad = render_model(folder)
    limits = load_group(folder, "render")[1]
    weights, settings = load_group(folder, "iad")
    decoder = SLatGaussianDecoder(SLatGaussianDecoderConfig.from_args(settings["args"]))
    decoder.load_state_dict(under(weights, "weights"))
    renderer = SLatGaussianRenderer(config)
    renderer.load_state_dict(under(lad, "weights"))
    encoder_in, encoder_settings = load_group(folder, "hdri_encoder")
    encoder = HdriEncoder(HdriEncoderConfig.from_args(encoder_settings["args"])).eval()
    encoder.load_state_dict(regenerated_weights(folder, encoder_settings))
    tokens = encoder(encoder_in["in"][:1])
    h, registers = decoder(SparseTensor.create(tensors["slat_feats"], tensors["coords"]))
    views, size = load_group(folder, "camera")[0], tensors["alpha_view"].shape
    intrinsics = views["intrinsics"][0] * torch.tensor([size[-1], size[-2], 1.0])[:, None]  # normalised in the file
    camera = Camera(views["extrinsics"][0].double(), intrinsics, size[-1], size[-2], near=limits["near"], far=limits["far"])
    raw = renderer(h, registers, tokens, camera.cam_from_world.float()[None])
    frame = render_passes(raw, config, basis, camera)
    rows = [compare(group, "hdri_tokens", tokens, tensors["hdri_tokens"], TOL_ENCODER)]
    return rows + [compare(group, k, frame[k], v, TOL_RASTER, OUTLIERS, channel_axis=0) for k, v in tensors.items() if k in frame]
