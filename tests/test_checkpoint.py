"""Reading a published checkpoint: models, reports, column map, pipeline file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from near.errors import NearError
from near.weights import manage
from near.weights.builders import build
from near.weights.checkpoint import check_keys, choose_head_layout, find_model, foreign_prefixes, load_model, read_pipeline, read_weights
from near.weights.packs import Licence, Part

BASIS = {"name": "NeuralBasis", "args": {"input_dim": 32, "output_dim": 5, "hidden_dim": 8, "num_layers": 3}}


def code(call) -> str:
    with pytest.raises(NearError) as error:
        call()
    assert error.value.what and error.value.remedy
    return error.value.code


@pytest.fixture
def basis(tmp_path):
    """A model JSON with its weights; returns the path without suffix."""
    (tmp_path / "basis.json").write_text(json.dumps(BASIS))
    save_file(build("NeuralBasis", BASIS["args"], {}).state_dict(), str(tmp_path / "basis.safetensors"))
    return tmp_path / "basis"


def test_a_model_is_built_from_its_files(basis):
    model = load_model(basis, build)
    assert model.config.hidden_dim == 8 and not any(p.requires_grad or p.is_meta for p in model.parameters())
    state = load_file(f"{basis}.safetensors")
    torch.save({k: v.half() for k, v in state.items()}, f"{basis}.pt")
    Path(f"{basis}.safetensors").unlink()
    from_pt = load_model(basis, build)
    assert all(p.dtype == torch.float32 for p in from_pt.parameters())
    assert torch.allclose(from_pt(torch.ones(1, 32), torch.ones(1, 3)), model(torch.ones(1, 32), torch.ones(1, 3)), atol=2e-2)


def test_what_does_not_fit_is_named(basis):
    state = load_file(f"{basis}.safetensors")
    state["mlp.0.weight"] = torch.zeros(3, 3)
    state["extra"] = state.pop("mlp.4.bias")
    save_file(state, f"{basis}.safetensors")
    with pytest.raises(NearError) as error:
        load_model(basis, build)
    assert error.value.code == "weights-keys"
    for part in ("missing (1): mlp.4.bias", "unexpected (1): extra", "mlp.0.weight is [3, 3], expected [8, 71]", "basis.safetensors"):
        assert part in error.value.what


def test_a_long_report_is_cut():
    model = build("NeuralBasis", {**BASIS["args"], "num_layers": 6}, {})
    with pytest.raises(NearError) as error:
        check_keys(model, {}, "x.safetensors")
    assert "missing (12)" in error.value.what and "..." in error.value.what


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Evil()}, tmp_path / "bad.pt")
    assert code(lambda: read_weights(tmp_path / "bad.pt")) == "weights-unreadable"
    torch.save([1, 2], tmp_path / "list.pt")
    assert code(lambda: read_weights(tmp_path / "list.pt")) == "weights-unreadable"
    assert not (tmp_path / "ran").exists()


def test_old_pt_files_are_read(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pt")["a"], torch.ones(3))


def test_cut_and_missing_files(basis):
    file = Path(f"{basis}.safetensors")
    file.write_bytes(file.read_bytes()[:200])
    assert code(lambda: load_model(basis, build)) == "weights-unreadable"
    file.unlink()
    assert code(lambda: load_model(basis, build)) == "weights-missing"
    Path(f"{basis}.json").write_text(json.dumps({"name": "Unheard", "args": {}}))
    save_file({"a": torch.zeros(1)}, str(file))
    assert code(lambda: load_model(basis, build)) == "checkpoint-class"


@pytest.mark.parametrize("trained, layout", [(0, "overlapped"), (3, "sequential")])
def test_the_column_map_is_read_off_the_biases(trained, layout):
    bias = torch.zeros(35 * 4)
    bias[:60] = torch.randn(60)
    bias[60 : 60 + trained] = 0.1
    chosen, reason = choose_head_layout({"rgb_out_layer.bias": bias}, 4)
    assert chosen == layout and "of rgb_out_layer" in reason and "80" in reason


def write_pipeline(folder: Path, **models: str) -> Path:
    args = {"models": models, "slat_sampler": {"name": "FlowEulerSampler", "args": {}, "params": {"steps": 3}},
            "slat_normalization": {"mean": [0.0], "std": [1.0]}, "image_cond_model": "dinov2_vitl14_reg"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"args": args}))
    return folder


def test_pipeline_file(tmp_path):
    spec = read_pipeline(write_pipeline(tmp_path, decoder="ckpts/d"))
    assert spec.slat_sampler.steps == 3 and spec.slat_sampler.guidance == "none" and spec.structure_sampler is None
    assert code(lambda: find_model(spec, "renderer")) == code(lambda: find_model(spec, "decoder")) == "checkpoint-model"
    assert code(lambda: read_pipeline(tmp_path / "none")) == "checkpoint-missing"
    for text in ("{", "args: 3", "args: {models: {}, slat_normalization: {mean: [0], std: [0]}}"):
        (tmp_path / "pipeline.yaml").write_text(text)
        assert code(lambda: read_pipeline(tmp_path)) == "checkpoint-pipeline"


def test_models_of_another_repository_are_pulled_and_found(tmp_path):
    """Spec section 1: a prefix that is no local file is tried as ``org/repo/prefix``."""
    write_pipeline(tmp_path / "hub" / "org" / "thing", decoder="other/repo/ckpts/d")
    (tmp_path / "hub" / "other" / "repo" / "ckpts").mkdir(parents=True)
    (tmp_path / "hub" / "other" / "repo" / "ckpts" / "d.json").write_text("{}")
    part = Part("thing", "org/thing", "", Licence("Test", "", ""), ("pipeline.yaml",), 1)
    asked = []
    folders = manage.pull(["thing"], accept=lambda p: asked.append(p.repo) or True, location=str(tmp_path / "hub"), home=tmp_path / "home",
                          say=lambda s: None, parts={"thing": part})
    assert asked == ["org/thing", "other/repo"] and len(folders) == 2
    assert list(foreign_prefixes(folders[0])) == [("other/repo", "ckpts/d")]
    find = lambda repo: manage.installed_repo(repo, home=tmp_path / "home")  # noqa: E731
    assert find_model(read_pipeline(folders[0]), "decoder", find) == folders[1] / "ckpts" / "d"
