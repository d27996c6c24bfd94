"""Image features (DINOv2 through timm) and the matting hook."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from near.errors import NearError
from near.models.conditioner import ImageConditioner, dinov2_from_hub, load_birefnet, matte_with

TINY_IMAGE = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def hub_state(model: ImageConditioner) -> dict[str, torch.Tensor]:
    """A random DINOv2 state dict with the original repository's names, of the size of ``model``."""
    state = {k: torch.randn_like(v) * 0.2 for k, v in model.network.state_dict().items()}
    width = state["cls_token"].shape[-1]
    registers = state.pop("reg_token")
    position = torch.randn(1, state.pop("pos_embed").shape[1] + 1, width) * 0.2
    return {**state, "register_tokens": registers, "pos_embed": position, "mask_token": torch.zeros(1, width)}


def test_full_size_hub_keys_map_onto_timm_exactly():
    with torch.device("meta"):
        model = ImageConditioner()
        hub = {k: torch.empty(s) for k, s in original_dinov2_shapes(1024, 24, 4, 37 * 37).items()}
        ours = {k: tuple(v.shape) for k, v in dinov2_from_hub(hub).items()}
    assert ours == {k: tuple(v.shape) for k, v in model.network.state_dict().items()}
    assert model.channels == 1024 and model.side == 518


def original_dinov2_shapes(width: int, depth: int, registers: int, patches: int) -> dict[str, tuple[int, ...]]:
    """Parameters of the original repository's vision transformer (patch 14, layer scale, GELU feed-forward)."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, patches + 1, width), "register_tokens": (1, registers, width),
              "mask_token": (1, width), "patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,),
              "norm.weight": (width,), "norm.bias": (width,)}
    for i in range(depth):
        block = {"norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
                 "attn.proj.weight": (width, width), "attn.proj.bias": (width,), "ls1.gamma": (width,), "norm2.weight": (width,),
                 "norm2.bias": (width,), "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
                 "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,), "ls2.gamma": (width,)}
        shapes |= {f"blocks.{i}.{k}": v for k, v in block.items()}
    return shapes


def test_tokens_equal_the_original_network_written_out():
    model = ImageConditioner("dinov2_vitl14_reg", 56, **TINY_IMAGE).eval()
    hub = hub_state(model)
    model.network.load_state_dict(dinov2_from_hub(hub))
    rgb = torch.rand(2, 3, 56, 56)
    tokens = model(rgb)
    assert tokens.shape == (2, 1 + 4 + 16, 24)
    assert torch.allclose(tokens, original_tokens(hub, (rgb - model.mean) / model.std, heads=2, depth=2), atol=1e-4)


def original_tokens(s: dict[str, torch.Tensor], x: torch.Tensor, heads: int, depth: int) -> torch.Tensor:
    """DINOv2 with registers, literally: class token and position first, registers inserted after the class token."""
    norm = lambda v, n: F.layer_norm(v, v.shape[-1:], s[f"{n}.weight"], s[f"{n}.bias"], 1e-6)  # noqa: E731
    patches = F.conv2d(x, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=14).flatten(2).transpose(1, 2)
    h = torch.cat([s["cls_token"].expand(len(x), -1, -1), patches], 1) + s["pos_embed"]
    h = torch.cat([h[:, :1], s["register_tokens"].expand(len(x), -1, -1), h[:, 1:]], 1)
    for i in range(depth):
        p = f"blocks.{i}."
        qkv = F.linear(norm(h, p + "norm1"), s[p + "attn.qkv.weight"], s[p + "attn.qkv.bias"])
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        h = h + s[p + "ls1.gamma"] * F.linear(mixed.transpose(1, 2).flatten(2), s[p + "attn.proj.weight"], s[p + "attn.proj.bias"])
        hidden = F.gelu(F.linear(norm(h, p + "norm2"), s[p + "mlp.fc1.weight"], s[p + "mlp.fc1.bias"]))
        h = h + s[p + "ls2.gamma"] * F.linear(hidden, s[p + "mlp.fc2.weight"], s[p + "mlp.fc2.bias"])
    return F.layer_norm(h, h.shape[-1:], eps=1e-5)


class LastOutput(torch.nn.Module):
    """Stands for BiRefNet: several outputs, the last counts; bright pixels are the object."""

    def forward(self, x):
        assert x.shape == (1, 3, 1024, 1024)
        return [torch.zeros(1, 1, 256, 256), 20 * x.mean(1, keepdim=True)]


def test_matting_runs_a_local_model():
    photo = torch.zeros(60, 80, 3)
    photo[20:40, 20:60] = 1
    alpha = matte_with(LastOutput(), photo)
    assert alpha.shape == (60, 80) and alpha[30, 40] > 0.99 and alpha[5, 5] < 0.01


def test_matting_without_weights_or_package_says_what_to_do(tmp_path: Path, monkeypatch):
    with pytest.raises(NearError) as error:
        load_birefnet(tmp_path)
    assert error.value.code == "weights-missing"
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NearError) as error:
        load_birefnet(tmp_path)
    assert error.value.code == "matting-package" and "pip install" in error.value.remedy
