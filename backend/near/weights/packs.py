"""What can be downloaded, from where, and under which licence.

A *part* is one repository on the Hugging Face hub (or the files of it that are needed); a *pack* is a set of parts that
together make the product run. Revisions and checksums stand here where they are publicly known. Where they are not,
the first ``near weights pull`` writes them to the lock file and every later one must match it (trust on first use).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from near.errors import NearError


@dataclass(frozen=True)
class Licence:
    """name: short identifier. url: full text. note: one sentence the user must have read. excluded: regions in which
    the licence grants nothing."""

    name: str
    url: str
    note: str
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """One downloadable repository.

    repo: ``org/name`` on the hub. files: glob patterns of what is needed. size_mb: rough download size, for the table.
    revision: pinned commit, or None (the lock file pins the one first seen). sha256: checksums known in advance.
    default: pulled with its pack; parts under a restrictive licence must be named.
    """

    name: str
    repo: str
    purpose: str
    licence: Licence
    files: tuple[str, ...]
    size_mb: int
    revision: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    default: bool = True


@dataclass(frozen=True)
class Pack:
    """A named set of parts; ``shipped`` packs travel inside the package."""

    name: str
    purpose: str
    parts: tuple[Part, ...] = ()
    shipped: bool = False


APACHE2 = Licence("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", "Free for any use, with attribution.")
MIT_TRELLIS = Licence("MIT", "https://huggingface.co/microsoft/TRELLIS-image-large", "Free for any use, with attribution.")
MIT_BIREFNET = Licence("MIT", "https://huggingface.co/ZhengPeng7/BiRefNet",
                       "Free for any use, with attribution. Its Python files, which come with the weights, are run.")
HUNYUAN = Licence("Tencent Hunyuan Community", "https://huggingface.co/tencent/Hunyuan3D-2.1/blob/main/LICENSE",
                  "This licence does not apply in the European Union, the United Kingdom and South Korea: there you may not use "
                  "these weights. Elsewhere it sets an acceptable-use policy and a limit on monthly users.",
                  excluded=("European Union", "United Kingdom", "South Korea"))

NEAR = Part("near", "luh0502/NeAR", "the published NeAR models: decoder, renderer, light encoder, basis, flow", APACHE2,
            ("pipeline.yaml", "*.json", "*.safetensors", "*.pt", "LICENSE*", "README.md"), 3300)
DINOV2 = Part("dinov2", "timm/vit_large_patch14_reg4_dinov2.lvd142m", "image features that condition the flow", APACHE2,
              ("config.json", "model.safetensors", "README.md"), 1220,
              revision="757db394c14a33b44296267d6dac0982d6c63a61")
TRELLIS = Part("trellis-geometry", "microsoft/TRELLIS-image-large", "photo to voxels without a mesh", MIT_TRELLIS,
               ("pipeline.json", "ckpts/ss_flow_img_dit_L_16l8_fp16.*", "ckpts/ss_dec_conv3d_16l8_fp16.*", "README.md"), 1280,
               revision="25e0d31ffbebe4b5a97464dd851910efc3002d96",
               sha256={"ckpts/ss_flow_img_dit_L_16l8_fp16.safetensors":
                       "96dc6bfd4136fd950af564dd16b4ae533c9ba6af8f26c670646b2a9f2789b1db",
                       "ckpts/ss_dec_conv3d_16l8_fp16.safetensors":
                       "1c76d4a40519aa2d711cc263a8404105231ac26db31d946bed48b84fee79009a"})
BIREFNET = Part("birefnet", "ZhengPeng7/BiRefNet", "cuts the object out of a photo that has no alpha", MIT_BIREFNET,
                ("config.json", "*.py", "model.safetensors", "README.md"), 890)
HUNYUAN3D = Part("hunyuan3d", "tencent/Hunyuan3D-2.1", "photo to mesh, the paper's choice; needs Tencent's own package to run", HUNYUAN,
                 ("hunyuan3d-dit-v2-1/*", "hunyuan3d-vae-v2-1/*", "LICENSE", "Notice.txt", "README.md"), 7400, default=False)

COMPACT_PACK = Pack("compact", "small models trained by this project, any CPU or GPU", shipped=True)
OFFICIAL_PACK = Pack("official", "the published NeAR checkpoint and its companions, for a CUDA GPU",
                     (NEAR, DINOV2, TRELLIS, BIREFNET, HUNYUAN3D))
PACKS = {pack.name: pack for pack in (COMPACT_PACK, OFFICIAL_PACK)}
PARTS = {part.name: part for pack in PACKS.values() for part in pack.parts}


def select_parts(names: list[str], parts: dict[str, Part] | None = None) -> list[Part]:
    """Parts meant by pack or part names; a pack stands for its default parts.

    Raises: NearError ``unknown-weights``.
    """
    parts = PARTS if parts is None else parts
    chosen: dict[str, Part] = {}
    for name in names:
        if name in parts:
            chosen[name] = parts[name]
        elif name in PACKS:
            chosen.update({p.name: p for p in PACKS[name].parts if p.default})
        else:
            raise NearError("unknown-weights", f"There are no weights called {name!r}.",
                            f"Choose from: {', '.join([*PACKS, *parts])}.")
    return list(chosen.values())


def weights_home() -> Path:
    """Folder of the downloaded parts: ``$NEAR_HOME/weights``, else the platform's cache folder."""
    if home := os.environ.get("NEAR_HOME"):
        return Path(home).expanduser() / "weights"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "near-relight" / "weights"


def compact_dir() -> Path:
    """Folder of the shipped pack (package data)."""
    return Path(__file__).parent / "compact"
