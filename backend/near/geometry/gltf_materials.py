"""Materials and textures of a glTF document."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from near.errors import NearError
from near.geometry.mesh import BLEND, MASK, OPAQUE, Material
from near.geometry.textures import WRAP_CLAMP, WRAP_MIRROR, WRAP_REPEAT, Texture, TextureSlot, decode_texture

if TYPE_CHECKING:
    from near.geometry.gltf import GltfDocument

_WRAPS = {33071: WRAP_CLAMP, 33648: WRAP_MIRROR, 10497: WRAP_REPEAT}


def read_materials(document: GltfDocument, used: list[int]) -> tuple[Material, ...]:
    """Materials by index (-1: glTF's default), decoding only the images they use, each once."""
    images: dict = {}
    return tuple(_material(document, index, images) for index in used)


def _material(document: GltfDocument, index: int, images: dict) -> Material:
    if index == -1:
        return Material(metallic=1.0)
    data = document.json["materials"][index]
    pbr = data.get("pbrMetallicRoughness", {})
    extensions = data.get("extensions", {})
    if "KHR_materials_pbrSpecularGlossiness" in extensions and "pbrMetallicRoughness" not in data:
        return _glossiness_material(document, data, extensions["KHR_materials_pbrSpecularGlossiness"], images)
    rough = _slot(document, pbr.get("metallicRoughnessTexture"), images)
    return Material(
        base_factor=tuple(map(float, pbr.get("baseColorFactor", (1, 1, 1, 1)))),
        base_map=_slot(document, pbr.get("baseColorTexture"), images),
        roughness=float(pbr.get("roughnessFactor", 1.0)), roughness_map=rough and (rough, 1),
        metallic=float(pbr.get("metallicFactor", 1.0)), metallic_map=rough and (rough, 2),
        **_common(document, data, images))


def _glossiness_material(document: GltfDocument, data: dict, gloss: dict, images: dict) -> Material:
    """The archived specular-glossiness model, as a dielectric."""
    slot = _slot(document, gloss.get("specularGlossinessTexture"), images)
    has_alpha = slot is not None and slot.texture.pixels.shape[2] == 4
    return Material(base_factor=tuple(map(float, gloss.get("diffuseFactor", (1, 1, 1, 1)))),
                    base_map=_slot(document, gloss.get("diffuseTexture"), images),
                    roughness=1 - float(gloss.get("glossinessFactor", 1.0)), glossiness_map=(slot, 3) if has_alpha else None,
                    **_common(document, data, images))


def _common(document: GltfDocument, data: dict, images: dict) -> dict:
    normal = data.get("normalTexture")
    mode = {"OPAQUE": OPAQUE, "MASK": MASK, "BLEND": BLEND}.get(data.get("alphaMode", "OPAQUE"), OPAQUE)
    return dict(name=str(data.get("name", "")), normal_map=_slot(document, normal, images),
                normal_scale=float((normal or {}).get("scale", 1.0)), alpha_mode=mode,
                alpha_cutoff=float(data.get("alphaCutoff", 0.5)), double_sided=bool(data.get("doubleSided", False)))


def _slot(document: GltfDocument, info: dict | None, images: dict) -> TextureSlot | None:
    if info is None:
        return None
    texture = document.json["textures"][info["index"]]
    source = texture.get("source")
    for extension in ("EXT_texture_webp", "EXT_texture_avif"):
        source = texture.get("extensions", {}).get(extension, {}).get("source", source) if source is None else source
    if source is None:
        raise NearError("texture-format", f"{document.path.name} has textures in a format this program does not read.",
                        "Export it with PNG or JPEG textures.")
    sampler = document.json["samplers"][texture["sampler"]] if "sampler" in texture else {}
    wrap = (_WRAPS.get(sampler.get("wrapS"), WRAP_REPEAT), _WRAPS.get(sampler.get("wrapT"), WRAP_REPEAT))
    if source not in images:
        name = document.json["images"][source].get("name") or f"{source} of {document.path.name}"
        images[source] = decode_texture(document.image_bytes(source), str(name))
    # One texture object per (image, wrap), so that its mip levels are built once.
    texture = images.setdefault((source, wrap), Texture(images[source], wrap))
    transform = info.get("extensions", {}).get("KHR_texture_transform", {})
    return TextureSlot(texture, transform.get("texCoord", info.get("texCoord", 0)), _uv_transform(transform))


def _uv_transform(transform: dict) -> np.ndarray:
    """KHR_texture_transform: translation * rotation * scale, [2, 3]."""
    (ou, ov), (su, sv), r = transform.get("offset", (0, 0)), transform.get("scale", (1, 1)), transform.get("rotation", 0.0)
    return np.array([[np.cos(r) * su, np.sin(r) * sv, ou], [-np.sin(r) * su, np.cos(r) * sv, ov]])
