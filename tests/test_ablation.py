"""Ablations: what each input leaves of an asset, and decoders of fewer layers."""

from __future__ import annotations

import json

import pytest
import torch
from test_relit import cached_ball

from near.assets import Anchors
from near.errors import NearError
from near.evaluation import ablation
from near.models.anchors import decode_anchors
from near.models.compact import CompactModels
from near.models.compact_renderer import homogeneous_guess
from near.models.material import decode_colour, encode_colour


@pytest.fixture(scope="module")
def cloud():
    raw = cached_ball()
    return decode_anchors(raw["coords"], Anchors(**raw["anchors"]), 16), len(raw["coords"])


def test_inputs_leave_what_they_say(cloud):
    cloud, count = cloud
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(count, 3, generator=generator) * 0.6 + 0.2
    material = torch.cat([encode_colour(base), torch.rand(count, 2, generator=generator) * 2 - 1], -1)
    look = encode_colour(homogeneous_guess(cloud, material[cloud.voxel], count))
    slat, shaded = torch.cat([material, look], -1), torch.rand(count, 8, generator=generator)
    assert ablation.input_slat("lh_base_colour", slat, shaded, cloud) is slat
    assert ablation.input_slat("shaded", slat, shaded, cloud) is shaded
    plain = ablation.input_slat("base_colour", slat, shaded, cloud)
    assert torch.equal(plain[:, :3], slat[:, :3]) and torch.equal(plain[:, 3:5].unique(dim=0), torch.tensor([ablation.PLAIN]))
    assert torch.allclose(plain[:, 5:], look, atol=1e-5)
    # The look of a consistent asset implies its base colour.
    lh = ablation.input_slat("lh", slat, shaded, cloud)
    assert torch.equal(lh[:, 3:], slat[:, 3:]) and float((decode_colour(lh[:, :3]) - base).abs().max()) < 0.01
    with pytest.raises(ValueError, match="must be one of"):
        ablation.input_slat("all", slat, shaded, cloud)


def test_fewer_layers(tmp_path):
    models = CompactModels.load()
    own = models.config.renderer.lad_blocks
    for layers in (0, 1):
        less = ablation.truncated(models, layers)
        assert len(less.renderer.lad.blocks) == less.config.renderer.lad_blocks == layers
        assert torch.equal(less.renderer.lad.input_layer.weight, models.renderer.lad.input_layer.weight)
    assert len(models.renderer.lad.blocks) == own
    with pytest.raises(NearError) as error:
        ablation.truncated(models, own + 1, tmp_path)
    assert error.value.code == "lad-layers" and f"--lad-layers {own + 1}" in error.value.remedy
    # One that was trained at a depth is taken as it is.
    from safetensors.torch import save_model

    deep = ablation.truncated(models, 1).renderer
    with torch.no_grad():
        deep.lad.input_layer.bias.add_(1)
    (tmp_path / "lad1").mkdir()
    save_model(deep, str(tmp_path / "lad1" / "renderer.safetensors"))
    found = ablation.truncated(models, 1, tmp_path).renderer.lad.input_layer.bias
    assert torch.allclose(found, models.renderer.lad.input_layer.bias + 1)
    (tmp_path / "lad0").mkdir()
    (tmp_path / "lad1" / "renderer.safetensors").rename(tmp_path / "lad0" / "renderer.safetensors")
    with pytest.raises(NearError) as error:
        ablation.truncated(models, 0, tmp_path)
    assert error.value.code == "start-unfit"


def test_what_cannot_be_asked_for(tmp_path, capsys):
    from near.cli import main

    (tmp_path / "index.json").write_text(json.dumps({"split": "none", "models": []}))
    for options, code in ((["--inputs", "everything"], "input-unknown"), (["--lad-layers", "deep"], "lad-layers"), (["--frames", "0"], "option-range")):
        assert main(["ablation", str(tmp_path), "--out", str(tmp_path / "out"), "--inputs", "none", "--quiet", *options]) == 2
        assert f"[{code}]" in capsys.readouterr().err
