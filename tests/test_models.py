"""IAD, LAD, encoder, tokenizer, basis: published keys, stages against the whole, variants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from near.errors import NearError
from near.models.basis import NeuralBasis, NeuralBasisConfig
from near.models.encoder import SLatEncoder, SLatEncoderConfig
from near.models.gaussians import (LR_NAMES, RepresentationConfig, activate_opacity, activate_scales, facing_normals, offset_perturbation,
                                   quaternion_axis)
from near.models.iad import SLatGaussianDecoder, SLatGaussianDecoderConfig
from near.models.lad import SLatGaussianRenderer, SLatGaussianRendererConfig
from near.models.lad_config import ColumnMap
from near.models.tokenizer import HdriEncoder, HdriEncoderConfig
from near.nn import SparseTensor, random_sane_weights, row_slices

FULL_SIZE = {
    "iad": lambda args: SLatGaussianDecoder(SLatGaussianDecoderConfig.from_args(args)),
    "lad": lambda args: SLatGaussianRenderer(SLatGaussianRendererConfig.from_args(args)),
    "hdri_encoder_default": lambda args: HdriEncoder(HdriEncoderConfig.from_args(args)),
    "hdri_encoder_cnn128": lambda args: HdriEncoder(HdriEncoderConfig.from_args(args)),
    "neural_basis_32in_5out": lambda args: NeuralBasis(NeuralBasisConfig.from_args(args)),
    "slat_encoder": lambda args: SLatEncoder(SLatEncoderConfig.from_args(args)),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_keys_and_shapes_are_the_published_ones(name, shared_dir):
    spec = json.loads((shared_dir / "spec" / "shapes" / f"{name}.json").read_text())
    with torch.device("meta"):
        model = FULL_SIZE[name](spec["args"])
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == spec["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == spec["num_parameters_unique"]


def blob(counts=(70, 45), resolution=16, seed=0) -> torch.Tensor:
    """Random distinct voxels of several objects, int32 [N, 4]."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for b, n in enumerate(counts):
        cells = torch.randperm(resolution**3, generator=g)[:n]
        xyz = torch.stack([cells // resolution**2, cells // resolution % resolution, cells % resolution], 1)
        rows.append(torch.cat([torch.full((n, 1), b), xyz], 1))
    return torch.cat(rows).int()


def small_lad(**kwargs) -> SLatGaussianRenderer:
    config = dict(resolution=16, model_channels=48, latent_channels=48, cond_channels=40, num_blocks=2, num_heads=4,
                  representation=RepresentationConfig(num_gaussians=4)) | kwargs
    return random_sane_weights(SLatGaussianRenderer(SLatGaussianRendererConfig(**config)))


def cameras(count: int) -> torch.Tensor:
    extrinsics = torch.eye(4).repeat(count, 1, 1)
    extrinsics[:, 2, 3] = 2 + torch.arange(count) * 0.3
    return extrinsics


@pytest.mark.parametrize("head_layout", ["overlapped", "sequential"])
def test_lad_on_a_subset_equals_the_rows_of_the_whole(head_layout):
    torch.manual_seed(0)
    model, coords = small_lad(head_layout=head_layout), blob()
    h = SparseTensor.create(torch.randn(len(coords), 48), coords)
    registers, tokens = torch.randn(2, 5, 40), torch.randn(2, 9, 40)
    with torch.no_grad():
        whole = model(h, registers, tokens, cameras(2))
        rows = torch.arange(0, len(coords), 3)
        intrinsic, view = model.intrinsic(h.feats)[rows], model.view_embedding(h.coords, cameras(2))[rows]
        counts = torch.bincount(h.coords[rows, 0]).tolist()
        heads = model.geometry(intrinsic, view)
        scale, rgb = model.shade(intrinsic, view, model.register_kv(registers), model.light_kv(tokens), counts)
        part = model.geometry_attributes(heads, h.coords[rows]) | model.light_attributes(heads, scale, rgb)
    assert set(part) == set(whole) == set(LR_NAMES)
    for name in whole:
        torch.testing.assert_close(part[name], whole[name][rows], atol=2e-5, rtol=1e-5)


def test_lad_objects_do_not_see_each_others_light():
    torch.manual_seed(0)
    model, coords = small_lad(), blob()
    h = SparseTensor.create(torch.randn(len(coords), 48), coords)
    registers, tokens = torch.randn(2, 5, 40), torch.randn(2, 9, 40)
    with torch.no_grad():
        both = model(h, registers, tokens, cameras(2))
        for b, rows in enumerate(row_slices(h.counts)):
            alone = coords[rows].clone()
            alone[:, 0] = 0
            single = model(SparseTensor.create(h.feats[rows], alone), registers[b : b + 1], tokens[b : b + 1], cameras(2)[b : b + 1])
            for name in both:
                torch.testing.assert_close(both[name][rows], single[name], atol=2e-5, rtol=1e-5)


def test_only_documented_attributes_react_to_light_and_view():
    torch.manual_seed(0)
    model, coords = small_lad(), blob((60,))
    h = SparseTensor.create(torch.randn(len(coords), 48), coords)
    registers, tokens = torch.randn(1, 5, 40), torch.randn(2, 9, 40)
    with torch.no_grad():
        first, second = (model(h, registers, t[None], cameras(1)) for t in tokens)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"_rgb", "_shadow", "_hdri1", "_hdri2"} == set(model.columns.after_light)


def test_column_maps():
    columns = ColumnMap.of(SLatGaussianRendererConfig()).columns
    assert {n: (c.start, c.stop) for n, c in columns.items()} == {
        "_xyz": (0, 96), "_base_color": (96, 192), "_scaling": (192, 288), "_rotation": (288, 416), "_opacity": (416, 448),
        "_roughness": (0, 32), "_metallic": (32, 64), "_pbr1": (64, 96), "_scaling_view": (0, 96),
        "_rgb": (0, 1024), "_shadow": (1024, 1056), "_hdri1": (1056, 1088), "_hdri2": (1088, 1120)}
    sequential = ColumnMap.of(SLatGaussianRendererConfig(head_layout="sequential"))
    assert [sequential.columns[n].start for n in ("_xyz", "_roughness", "_scaling_view", "_rgb")] == [0, 14 * 32, 17 * 32, 20 * 32]
    assert sequential.columns["_hdri2"].stop == 55 * 32
    assert sequential.after_light == ("_scaling_view", "_rgb", "_shadow", "_hdri1", "_hdri2")


def test_anchored_lad_emits_one_vector_per_voxel():
    torch.manual_seed(0)
    model = small_lad(geometry="anchored", rgb_per="voxel", rgb_width=12, pbr_width=5, view_origin="centred", latent_channels=20,
                      view_frequencies=4)
    coords = blob((30,))
    out = model(SparseTensor.create(torch.randn(30, 20), coords), torch.randn(1, 3, 40), torch.randn(1, 4, 40), cameras(1))
    assert out["rgb"].shape == (30, 12) and out["pbr"].shape == (30, 5)
    assert not any(k.startswith(("gs_out", "scale_out", "offset")) for k in model.state_dict())
    out["rgb"].sum().backward()
    assert model.blocks[0].cross_attn.to_kv.weight.grad.abs().sum() > 0


def test_voxel_features_are_shared_by_a_voxels_gaussians():
    model, coords = small_lad(head_layout="sequential", rgb_per="voxel", rgb_width=6), blob((20,))
    with torch.no_grad():
        raw = model(SparseTensor.create(torch.randn(20, 48), coords), torch.randn(1, 3, 40), torch.randn(1, 4, 40), cameras(1))
    assert raw["_rgb"].shape == (20, 4, 6) and torch.equal(raw["_rgb"][:, 0], raw["_rgb"][:, 3])
    assert raw["_shadow"].shape == (20, 4, 1)


def test_shading_no_voxels_gives_no_rows():
    model = small_lad()
    nothing = model.intrinsic(torch.zeros(0, 48))
    scale, rgb = model.shade(nothing, torch.zeros(0, 48), model.register_kv(torch.zeros(1, 2, 40)), model.light_kv(torch.zeros(1, 2, 40)))
    assert scale.shape == (0, 12) and rgb.shape == (0, 140)


@pytest.mark.parametrize("fields", [dict(num_heads=5), dict(head_layout="interleaved"), dict(geometry="anchored"),
                                    dict(latent_channels=8), dict(rgb_per="voxel")])
def test_impossible_lad_configs_are_refused_with_their_values(fields):
    with pytest.raises(NearError) as caught:
        SLatGaussianRendererConfig(**fields)
    assert caught.value.code == "model-config"
    assert str(next(iter(fields.values()))) in str(caught.value)


def test_unknown_arguments_are_reported(caplog):
    config = SLatGaussianDecoderConfig.from_args({"model_channels": 64, "num_head_channels": 16, "colour_of_the_bike_shed": "red"})
    assert config.num_heads == 4 and config.cond_channels == 64
    assert "colour_of_the_bike_shed" in caplog.text


def test_opacity_at_zero_is_what_each_variant_promises():
    zero = torch.zeros(1)
    assert activate_opacity(zero, RepresentationConfig()).item() == pytest.approx(0.1980, abs=1e-4)
    assert activate_opacity(zero, RepresentationConfig(opacity="sigmoid")).item() == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_scale_at_zero_is_the_bias_and_never_below_the_kernel(activation):
    config = RepresentationConfig(scaling_activation=activation, scaling_bias=0.02)
    assert activate_scales(torch.zeros(1), config).item() == pytest.approx((0.02**2 + 9e-4**2) ** 0.5, rel=1e-4)
    assert activate_scales(torch.full((1,), -50.0), config).item() >= 9e-4


def test_offsets_start_on_distinct_points_inside_the_reach():
    start = torch.tanh(offset_perturbation(32, 1.5)) * 1.5
    assert start.abs().max() <= 1.0 + 1e-6 and len(torch.unique(start, dim=0)) == 32


def test_normals_face_the_camera_along_the_thinnest_axis():
    torch.manual_seed(0)
    quats = torch.nn.functional.normalize(torch.randn(200, 4), dim=-1)
    scales, at, camera = torch.rand(200, 3) + 0.1, torch.rand(200, 3) - 0.5, torch.tensor([0.0, -2.0, 0.5])
    normals = facing_normals(scales, quats, at, camera)
    assert (((camera - at) * normals).sum(-1) >= 0).all()
    axis = quaternion_axis(quats, scales.argmin(-1))
    torch.testing.assert_close((normals * axis).sum(-1).abs(), torch.ones(200))


def test_quaternion_axis_matches_rotation_of_unit_vectors():
    from scipy.spatial.transform import Rotation

    torch.manual_seed(1)
    quats = torch.nn.functional.normalize(torch.randn(50, 4), dim=-1)
    matrices = torch.from_numpy(Rotation.from_quat(quats[:, [1, 2, 3, 0]].numpy()).as_matrix()).float()
    for axis in range(3):
        torch.testing.assert_close(quaternion_axis(quats, torch.full((50,), axis)), matrices[:, :, axis], atol=1e-6, rtol=0)


def test_iad_does_not_depend_on_voxel_order():
    torch.manual_seed(0)
    model = random_sane_weights(SLatGaussianDecoder(SLatGaussianDecoderConfig(
        resolution=16, model_channels=48, cond_channels=48, num_blocks=3, num_heads=4, window_size=4, num_register_tokens=3)))
    coords, feats, order = blob((150,)), torch.randn(150, 8), torch.randperm(150)
    with torch.no_grad():
        h, registers = model(SparseTensor.create(feats, coords))
        shuffled, _ = model(SparseTensor.create(feats[order], coords[order]))
    torch.testing.assert_close(h.feats[order], shuffled.feats, atol=1e-5, rtol=1e-5)
    assert registers.shape == (1, 3, 48)


def test_bf16_blocks_stay_close_to_float32():
    torch.manual_seed(0)
    model, coords = small_lad(), blob((80,))
    h = SparseTensor.create(torch.randn(80, 48), coords)
    inputs = (torch.randn(1, 5, 40), torch.randn(1, 9, 40), cameras(1))
    with torch.no_grad():
        exact = model(h, *inputs)
        rough = model.cast_blocks(torch.bfloat16)(h, *inputs)
    assert rough["_rgb"].dtype == torch.float32
    assert torch.equal(exact["_xyz"], rough["_xyz"])  # geometry never runs through the blocks
    assert (exact["_rgb"] - rough["_rgb"]).abs().max() < 0.05


def test_encoder_returns_the_mean():
    torch.manual_seed(0)
    model = random_sane_weights(SLatEncoder(SLatEncoderConfig(resolution=16, in_channels=17, model_channels=32, latent_channels=3,
                                                             num_blocks=2, num_heads=2, window_size=4)))
    x = SparseTensor.create(torch.randn(60, 17), blob((60,)))
    mean, log_variance = model.moments(x)
    assert torch.equal(model(x), mean) and mean.shape == log_variance.shape == (60, 3)


@pytest.mark.parametrize(("backbone", "size"), [("convnext_atto", (64, 128)), ("convnext_tiny", (64, 64))])
def test_tokenizer_grid_and_state_dict_round_trip(backbone, size):
    torch.manual_seed(0)
    config = HdriEncoderConfig(output_dim=32, num_tokens=16, cnn_out=16, num_heads=4, backbone=backbone)
    model, twin = random_sane_weights(HdriEncoder(config)).eval(), HdriEncoder(config).eval()
    state = model.state_dict()
    before = set(state)
    twin.load_state_dict(state)
    assert set(state) == before  # loading must not rewrite the caller's dictionary
    condition = torch.randn(2, 9, *size)
    with torch.no_grad():
        tokens = model(condition)
        assert tokens.shape == (2, 16, 32)
        assert torch.equal(tokens, twin(condition))
    assert twin.transformer_encoder.layers[0] is twin.transformer_encoder.layers[1]


def test_basis_starts_at_no_correction_when_asked():
    basis = NeuralBasis(NeuralBasisConfig(input_dim=12, output_dim=9, w0=4.0, output="linear", zero_init_last=True))
    out = basis(torch.randn(7, 12), torch.randn(7, 3))
    assert out.shape == (7, 9) and not out.any()


def test_published_basis_output_ranges():
    torch.manual_seed(0)
    out = random_sane_weights(NeuralBasis(NeuralBasisConfig()), gain=3.0)(torch.randn(500, 32) * 3, torch.randn(500, 3))
    assert out[:, :3].min() >= -1e-3 and out[:, :3].max() > 1
    assert 0 <= out[:, 3:].min() and out[:, 3:].max() <= 1


@pytest.mark.parametrize("group", ["window_attention", "iad", "lad", "neural_basis", "hdri_encoder", "render", "chain"])
def test_fixtures_are_reproduced(group, shared_dir, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "tools"))
    import parity

    rows = parity.run(shared_dir / "fixtures", [group])
    assert rows and all(r.ok for r in rows), parity.table([r for r in rows if not r.ok])
