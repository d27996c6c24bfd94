"""Samplers, flows, sparse structure, homogeniser."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from near.errors import Cancelled, NearError
from near.models.flow import SLatFlowConfig, SLatFlowModel
from near.models.homogenizer import (Homogenizer, HomogenizerConfig, LoraSettings, attach_lora, expand_input, load_adapter, lora_layers,
                                     make_theta, save_adapter)
from near.models.samplers import (SamplerConfig, initial_noise, noised, sample, sample_from_velocity, time_sequence, velocity_from_sample,
                                  velocity_target)
from near.models.sparse_structure import (SparseStructureDecoder, SparseStructureEncoder, SparseStructureFlowModel, StructureFlowConfig,
                                          StructureVaeConfig, occupied_voxels, patchify, photo_to_voxels, unpatchify)
from near.nn import SparseTensor
from near.nn.init import random_sane_weights

SMALL = SLatFlowConfig(resolution=16, model_channels=48, cond_channels=24, num_blocks=2, num_heads=4, io_block_channels=(16,))


@pytest.fixture(scope="module")
def flow() -> SLatFlowModel:
    return random_sane_weights(SLatFlowModel(SMALL)).eval()


def voxels(count: int = 90, channels: int = 8, objects: int = 1, seed: int = 0) -> SparseTensor:
    generator = torch.Generator().manual_seed(seed)
    coords = torch.cat([F.pad(torch.unique(torch.randint(0, 16, (count, 3), generator=generator), dim=0), (1, 0), value=b)
                        for b in range(objects)])
    return SparseTensor.create(torch.randn(len(coords), channels, generator=generator), coords.int())


# -- samplers ---------------------------------------------------------------------------------------------------------

@given(t=st.floats(1e-4, 1), s=st.sampled_from([0.0, 1e-5, 0.1]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_velocity_and_sample_are_two_views_of_one_prediction(t, s, seed):
    x_0, noise = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed)).double()
    x_t = noised(x_0, noise, torch.tensor(t).double(), s)
    v = velocity_target(x_0, noise, s)
    t64 = float(torch.tensor(t).double())
    assert torch.allclose(sample_from_velocity(x_t, t64, v, s), x_0, atol=1e-9)
    assert torch.allclose(velocity_from_sample(x_t, t64, x_0, s), v, atol=1e-6)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_a_perfect_model_reaches_the_data_whatever_it_predicts(prediction):
    x_0, noise = torch.randn(2, 5, 3)
    s = 0.0

    def model(x, t1000, condition):
        assert t1000.dtype == torch.float32 and t1000.shape == (1,)
        return velocity_target(x_0, noise, s) if prediction == "velocity" else x_0

    config = SamplerConfig(steps=7, guidance="none", sigma_min=s, rescale_t=3.0, prediction=prediction)
    assert torch.allclose(sample(model, noise, [None], config=config).samples, x_0, atol=1e-5)


def test_a_clean_sample_prediction_is_safe_at_time_zero():
    x = torch.randn(4, 3)
    assert torch.equal(velocity_from_sample(x, 0.0, torch.randn(4, 3), 0.0), torch.zeros(4, 3))


def test_guidance_runs_only_inside_its_interval():
    calls = []

    def model(x, t1000, condition):
        calls.append((round(float(t1000), 3), condition))
        return torch.zeros_like(x)

    sample(model, torch.zeros(1, 1), ["photo"], "nothing", SamplerConfig(steps=4, cfg_interval=(0.5, 1.0)))
    assert [t for t, c in calls if c == "photo"] == [1000, 750, 500, 250]
    assert [t for t, c in calls if c == "nothing"] == [1000, 750, 500]  # both ends belong to the interval


def test_guidance_weights():
    config = SamplerConfig(steps=1, guidance="cfg", cfg_strength=2.0)
    out = sample(lambda x, t, c: torch.full_like(x, c), torch.zeros(1), [1.0], 0.5, config).samples
    assert float(out) == pytest.approx(-(3 * 1.0 - 2 * 0.5))


def test_several_photos_cycle_or_average():
    seen = []

    def model(x, t1000, condition):
        seen.append(condition)
        return torch.full_like(x, condition)

    base = SamplerConfig(steps=4, guidance="none")
    sample(model, torch.zeros(1), [1.0, 3.0, 5.0], config=base)
    assert seen == [1.0, 3.0, 5.0, 1.0]
    averaged = sample(model, torch.zeros(1), [1.0, 3.0], config=SamplerConfig(steps=4, guidance="none", multi_image="multidiffusion"))
    assert float(averaged.samples) == pytest.approx(-2.0)


def test_progress_is_told_and_cancel_is_heard_at_each_evaluation():
    told = []
    config = SamplerConfig(steps=5, guidance="none")
    sample(lambda x, t, c: x, torch.zeros(1), [None], config=config, progress=lambda *a: told.append(a), stage="s")
    assert told == [("s", (i + 1) / 5, None) for i in range(5)]
    polls = []
    with pytest.raises(Cancelled):
        sample(lambda x, t, c: x, torch.zeros(1), [None], config=config, cancelled=lambda: polls.append(1) or len(polls) > 2)
    assert len(polls) == 3


def test_noise_scale_zero_is_deterministic_and_noise_equals_global_seeding():
    x = sample(lambda x, t, c: torch.zeros_like(x), initial_noise((3, 2), 1), [None], config=SamplerConfig(steps=2, guidance="none", noise_scale=0))
    assert torch.equal(x.samples, torch.zeros(3, 2))
    torch.manual_seed(42)
    assert torch.equal(initial_noise((50, 8), 42), torch.randn(50, 8))


@pytest.mark.parametrize("values", [{"steps": 0}, {"guidance": "some"}, {"cfg_interval": (0.6, 0.5)}, {"rescale_t": 0}, {"noise_scale": -1},
                                    {"prediction": "noise"}, {"sigma_min": 1}])
def test_sampler_settings_are_checked(values):
    with pytest.raises(ValueError, match=str(next(iter(values)))):
        SamplerConfig(**values)


def test_published_sampler_entries():
    entry = {"name": "FlowEulerGuidanceIntervalSampler", "args": {"sigma_min": 1e-5},
             "params": {"steps": 12, "cfg_strength": 7.5, "cfg_interval": [0.1, 0.9], "rescale_t": 3.0}}
    config = SamplerConfig.from_published(entry)
    assert (config.steps, config.cfg_interval, config.guidance) == (12, (0.1, 0.9), "interval")
    for bad in ({"name": "Other"}, {**entry, "params": {"step": 1}}):
        with pytest.raises(NearError) as error:
            SamplerConfig.from_published(bad)
        assert error.value.code == "checkpoint-sampler"


@given(st.integers(1, 60), st.floats(0.3, 5))
@settings(max_examples=20, deadline=None)
def test_times_fall_from_one_to_zero(steps, rescale):
    t = time_sequence(steps, rescale)
    assert t[0] == pytest.approx(1, abs=1e-12) and t[-1] == 0 and (np.diff(t) < 0).all()


# -- flows ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, config, model", [
    ("slat_flow_L", SLatFlowConfig, SLatFlowModel), ("ss_flow_L", StructureFlowConfig, SparseStructureFlowModel),
    ("ss_decoder", StructureVaeConfig, SparseStructureDecoder), ("ss_encoder", StructureVaeConfig, SparseStructureEncoder)])
def test_full_size_keys_and_shapes_equal_the_published_ones(shared_dir, name, config, model):
    entry = json.loads((shared_dir / "spec" / "shapes" / f"{name}.json").read_text())
    expected = {k: tuple(v) for k, v in next(v for v in entry.values() if isinstance(v, dict) and len(v) > 20).items()}
    with torch.device("meta"):
        ours = {k: tuple(v.shape) for k, v in model(config.from_args(entry["args"])).state_dict().items()}
    assert ours == expected


@pytest.mark.parametrize("group", ["flow", "sampler"])
def test_fixtures(shared_dir, repository, group):
    sys.path.insert(0, str(repository / "tools"))
    from parity_checks import flows

    rows = getattr(flows, f"check_{group}")(shared_dir / "fixtures")
    assert rows and all(row.ok for row in rows), [row for row in rows if not row.ok]


def test_no_condition_equals_zero_tokens(flow):
    x, t = voxels(), torch.tensor([300.0])
    zeros = flow(x, t, torch.zeros(1, 9, 24)).feats
    assert torch.allclose(flow(x, t, None).feats, zeros, atol=1e-5)
    assert torch.allclose(flow(x, t, flow.context(torch.zeros(1, 2, 24))).feats, zeros, atol=1e-5)


def test_objects_in_a_batch_do_not_see_each_other(flow):
    both = voxels(objects=2)
    t, condition = torch.tensor([100.0, 900.0]), torch.randn(2, 5, 24)
    together = flow(both, t, condition).feats
    for b, rows in enumerate(both.slices()):
        alone = SparseTensor.create(both.feats[rows], both.coords[rows, 1:])
        assert torch.allclose(flow(alone, t[b : b + 1], condition[b : b + 1]).feats, together[rows], atol=1e-5)


def test_other_input_than_output_channels_and_no_convolutions():
    config = SLatFlowConfig(resolution=32, in_channels=13, out_channels=8, model_channels=24, cond_channels=6, num_blocks=1, num_heads=2,
                            patch_size=1, io_block_channels=(), qk_rms_norm=False)
    model = random_sane_weights(SLatFlowModel(config))
    out = model(voxels(channels=13), torch.tensor([5.0]), torch.randn(1, 3, 6))
    assert out.feats.shape == (len(out), 8) and torch.isfinite(out.feats).all()


def test_a_fresh_flow_predicts_zero():
    out = SLatFlowModel(SMALL)(voxels(), torch.tensor([500.0]), torch.randn(1, 3, 24))
    assert torch.equal(out.feats, torch.zeros_like(out.feats))


def test_half_precision_blocks_stay_close(flow):
    x, t, condition = voxels(), torch.tensor([500.0]), torch.randn(1, 7, 24)
    exact = flow(x, t, condition).feats
    half = copy.deepcopy(flow).set_precision(torch.bfloat16)
    with torch.no_grad():
        error = (half(x, t, condition).feats - exact).abs().max() / exact.abs().max()
    assert half.precision == torch.bfloat16 and half.out_layer.weight.dtype == torch.float32
    assert float(error) < 0.05


@pytest.mark.parametrize("values", [{"pe_mode": "rope"}, {"patch_size": 4}, {"num_heads": 5}, {"in_channels": 0}, {"share_mod": True}])
def test_flow_settings_are_checked(values):
    with pytest.raises(ValueError):
        SLatFlowConfig(**values)
    with pytest.raises(ValueError, match="surprise"):
        SLatFlowConfig.from_args({"surprise": 1})


# -- sparse structure -------------------------------------------------------------------------------------------------

@given(st.sampled_from([1, 2, 4]), st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_patches_go_back_where_they_came_from(size, channels):
    x = torch.randn(2, channels, 4, 4, 4)
    assert torch.equal(unpatchify(patchify(x, size), size), x)


def test_photo_to_voxels_and_the_encoder_fits_the_decoder():
    flow = random_sane_weights(SparseStructureFlowModel(StructureFlowConfig(resolution=4, model_channels=24, cond_channels=6, num_blocks=1, num_heads=2)))
    vae = StructureVaeConfig(channels=(16, 8, 8))
    decoder = random_sane_weights(SparseStructureDecoder(vae))
    photo, config = torch.randn(1, 5, 6), SamplerConfig(steps=2)
    coords = photo_to_voxels(flow, decoder, [photo], config, seed=3)
    assert coords.dtype == torch.uint8 and coords.shape[1] == 3 and int(coords.max()) < 16
    assert torch.equal(coords, photo_to_voxels(flow, decoder, [photo], config, seed=3))
    order = coords.long() @ torch.tensor([256, 16, 1])
    assert bool((order.diff() > 0).all())
    encoder = random_sane_weights(SparseStructureEncoder(StructureVaeConfig(channels=(8, 8, 16))))
    mean, log_variance = encoder(torch.zeros(1, 1, 16, 16, 16))
    assert mean.shape == log_variance.shape == (1, 8, 4, 4, 4)


def test_an_empty_structure_is_refused():
    with pytest.raises(NearError) as error:
        occupied_voxels(-torch.ones(1, 1, 4, 4, 4))
    assert error.value.code == "empty-structure"


# -- homogeniser ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base_colour", [False, True])
def test_a_fresh_homogeniser_computes_what_the_base_flow_does(flow, base_colour):
    config = HomogenizerConfig(base_colour=base_colour, lora=LoraSettings(rank=4))
    theta = make_theta(flow, config)
    x, t, condition = voxels(), torch.tensor([400.0]), torch.randn(1, 5, 24)
    wide = x.replace(torch.cat([x.feats, torch.randn(len(x), config.extra_channels)], -1))
    assert theta.config.in_channels == 8 * (3 if base_colour else 2)
    assert torch.allclose(theta(wide, t, condition).feats, flow(x, t, condition).feats, atol=1e-6)
    assert len(lora_layers(theta)) == 5 * SMALL.num_blocks
    trainable = [n for n, p in theta.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in n or n.startswith("input_layer.") for n in trainable)


def test_adapters_are_saved_loaded_and_merged(flow, tmp_path):
    config = HomogenizerConfig(lora=LoraSettings(rank=4))
    theta = make_theta(flow, config)
    for i, (name, parameter) in enumerate((n, p) for n, p in theta.named_parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    x, t, condition = voxels(channels=16), torch.tensor([400.0]), torch.randn(1, 5, 24)
    expected = theta(x, t, condition).feats
    save_adapter(tmp_path / "a.safetensors", theta, config.lora, config)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    merged, read = load_adapter(tmp_path / "a.safetensors", flow)
    assert read == config and not lora_layers(merged)
    assert merged.state_dict().keys() == flow.state_dict().keys()  # published keys again
    assert torch.allclose(merged(x, t, condition).feats, expected, atol=1e-5)
    unmerged, _ = load_adapter(tmp_path / "a.safetensors", flow, merge=False)
    assert lora_layers(unmerged) and torch.allclose(unmerged(x, t, condition).feats, expected, atol=1e-5)


def test_adapters_of_another_flow_or_a_cut_file_are_refused(flow, tmp_path):
    config = HomogenizerConfig(lora=LoraSettings(rank=4))
    save_adapter(tmp_path / "a.safetensors", make_theta(flow, config), config.lora, config)
    other = SLatFlowModel(SLatFlowConfig(**{**SMALL.__dict__, "num_blocks": 1}))
    with pytest.raises(NearError) as error:
        load_adapter(tmp_path / "a.safetensors", other)
    assert error.value.code == "adapter-mismatch"
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:100])
    with pytest.raises(NearError) as error:
        load_adapter(tmp_path / "b.safetensors", flow)
    assert error.value.code == "adapter-unreadable"


def test_full_size_lora_is_rank_512_rslora_on_the_attention_projections(shared_dir):
    entry = json.loads((shared_dir / "spec" / "shapes" / "slat_flow_L.json").read_text())
    with torch.device("meta"):
        base = SLatFlowModel(SLatFlowConfig.from_args({**entry["args"], "num_blocks": 1}))
        model = attach_lora(expand_input(base, 8), LoraSettings())
    layer = lora_layers(model)["blocks.0.self_attn.to_qkv"]
    assert layer.lora_A["default"].weight.shape == (512, 1024) and layer.lora_B["default"].weight.shape == (3072, 512)
    assert layer.scaling["default"] == pytest.approx(16 / 512 ** 0.5)
    assert {n.rpartition(".")[2] for n in lora_layers(model)} == {"to_qkv", "to_q", "to_kv", "to_out"}


def test_both_modes_sample(flow):
    x, conditions, config = voxels(), [torch.randn(1, 5, 24)], SamplerConfig(steps=2)
    slat, shaded = Homogenizer(flow, None, HomogenizerConfig("single_stage")).sample(x, conditions, config, seed=5)
    assert shaded is None and slat.shape == (len(x), 8)
    two = HomogenizerConfig("two_stage", lora=None)
    slat2, shaded2 = Homogenizer(flow, make_theta(flow, two), two).sample(x, conditions, config, seed=5)
    assert torch.equal(shaded2, slat) and slat2.shape == slat.shape
    with pytest.raises(ValueError, match="second flow"):
        Homogenizer(flow, None, two)
