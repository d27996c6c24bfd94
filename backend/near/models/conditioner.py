"""Image features for the published flows, and the matting hook (spec section 9).

DINOv2 ViT-L/14 with registers runs through timm; checkpoints in timm's layout and in the original hub's are both read.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from near.errors import NearError
from near.nn import layer_norm_5
from near.nn.timm_import import import_timm

IMAGE_SIDE = 518
MATTE_SIDE = 1024
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Names used by published pipelines (torch hub) and timm's for the same network.
HUB_TO_TIMM = {"dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2", "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2",
               "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2"}


def dinov2_from_hub(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a DINOv2-with-registers state dict of the original repository to timm's.

    The original adds a position to the class token at run time and none to the registers; timm stores the class token
    with it already added. The mask token is only for training.
    """
    if "register_tokens" not in state:
        return dict(state)
    position = state["pos_embed"]
    renamed = {k: v for k, v in state.items() if k not in ("mask_token", "register_tokens", "cls_token", "pos_embed")}
    return {**renamed, "cls_token": state["cls_token"] + position[:, :1], "reg_token": state["register_tokens"],
            "pos_embed": position[:, 1:]}


class ImageConditioner(nn.Module):
    """Photo -> condition tokens: the last block's tokens before the final norm, then ln5.

    Args: name: hub or timm name. overrides: constructor arguments that differ from the named network (small ones for tests).
    """

    def __init__(self, name: str = "dinov2_vitl14_reg", side: int = IMAGE_SIDE, **overrides) -> None:
        super().__init__()
        self.side = side
        self.network = import_timm().create_model(HUB_TO_TIMM.get(name, name), pretrained=False, img_size=side, num_classes=0, **overrides)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    @property
    def channels(self) -> int:
        return self.network.embed_dim

    @torch.no_grad()
    def forward(self, rgb: Tensor) -> Tensor:
        """rgb [B, 3, side, side] in 0..1, composited on black -> tokens [B, 1 + registers + patches, channels]."""
        net = self.network
        x = net.patch_embed(((rgb - self.mean) / self.std).to(net.cls_token.dtype))
        x = net.norm_pre(net.patch_drop(net._pos_embed(x)))
        for block in net.blocks:
            x = block(x)
        return layer_norm_5(x.float())

    @classmethod
    def load(cls, folder: Path, name: str = "dinov2_vitl14_reg") -> "ImageConditioner":
        """From a folder with ``config.json`` (timm's, optional) and ``model.safetensors`` or a hub ``.pth`` file.

        Raises: NearError ``weights-missing`` or ``weights-keys``.
        """
        from near.weights.checkpoint import check_keys, load_into, read_weights

        folder, overrides, side = Path(folder), {}, IMAGE_SIDE
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            name = config.get("architecture", name)
            overrides = dict(config.get("model_args") or {})
            side = overrides.pop("img_size", (config.get("pretrained_cfg") or {}).get("input_size", (3, IMAGE_SIDE))[-1])
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.pth")) or sorted(folder.glob("*.pt"))
        if not files:
            raise NearError("weights-missing", f"No image features are stored in {folder.name}.", "Run `near weights pull dinov2`.")
        state = dinov2_from_hub(read_weights(files[0]))
        model = cls(name, side, **overrides)
        check_keys(model.network, state, files[0].name)
        load_into(model.network, state)
        return model.eval()


def square_to_tensor(rgba: Tensor) -> Tensor:
    """A preprocessed square [S, S, 4] in 0..1 -> rgb [1, 3, S, S] composited on black."""
    return (rgba[..., :3] * rgba[..., 3:]).permute(2, 0, 1)[None]


def resize_square(rgb: Tensor, side: int) -> Tensor:
    """Resize [B, 3, S, S] to another side where the network's is not the published 518."""
    if rgb.shape[-1] == side:
        return rgb
    return F.interpolate(rgb, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


@torch.no_grad()
def matte_with(model: nn.Module, srgb: Tensor) -> Tensor:
    """Alpha [H, W] of a photo [H, W, 3] in 0..1 from a BiRefNet-like network: 1024^2, ImageNet norm, sigmoid of the last output."""
    parameter = next(model.parameters(), torch.zeros(()))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = F.interpolate(srgb.permute(2, 0, 1)[None], (MATTE_SIDE, MATTE_SIDE), mode="bilinear", antialias=True)
    out = model(((x - mean) / std).to(parameter.device, parameter.dtype))
    out = out[-1] if isinstance(out, Sequence) and not isinstance(out, Tensor) else out
    alpha = out.float().sigmoid().cpu()
    return F.interpolate(alpha, srgb.shape[:2], mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


def load_birefnet(folder: Path, device: torch.device | str = "cpu") -> nn.Module:
    """The matting network of a pulled ``birefnet`` part; its own Python files define it and are run.

    Raises: NearError ``matting-package`` when transformers or what BiRefNet's code imports is not installed,
        ``weights-missing`` when the files are not there.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise NearError("weights-missing", "The matting model is not installed.", "Run `near weights pull birefnet`.")
    missing = [name for name in ("transformers", "einops", "kornia") if importlib.util.find_spec(name) is None]
    if missing:
        raise NearError("matting-package", f"The matting model needs {', '.join(missing)}, not installed here.",
                        f"Run `pip install {' '.join(missing)}`, or give a photo with an alpha channel.")
    from near.nn.timm_import import repair_torchvision

    repair_torchvision()
    from transformers import AutoModelForImageSegmentation

    # Only ever a verified local folder: nothing is fetched, and the code that runs is the code that was pinned.
    try:
        model = AutoModelForImageSegmentation.from_pretrained(str(folder), trust_remote_code=True, local_files_only=True)
    except Exception as error:
        raise NearError("matting-model", f"The matting model does not load: {type(error).__name__}: {error}.",
                        "Run `near weights verify birefnet`, or give a photo with an alpha channel.") from error
    return model.to(device).eval()
