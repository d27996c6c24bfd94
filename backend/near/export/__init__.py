"""Assets for other programs: splats under a light (PLY), a mesh with PBR textures (GLB)."""

from __future__ import annotations

import torch

from near.assets import Asset
from near.errors import NearError
from near.geometry.mesh import PbrMesh
from near.lighting import Environment, uniform_environment
from near.pipeline.types import CancelCheck, Progress, no_progress


def export_asset(asset: Asset, format: str, *, light: Environment | None = None, engine, progress: Progress = no_progress,
                 cancelled: CancelCheck | None = None, onto: PbrMesh | None = None) -> bytes:
    """The file's bytes, asset space (Z-up, as Blender imports both).

    Args:
        light: for ply, in asset space; none: white light.
        onto: for glb, the mesh (in a file of asset space) that gets the textures on its own UVs; none: the asset's proxy.
    Raises:
        NearError: `export-unsupported` (a published asset or an unknown format), `export-no-uvs`, `export-uvs-outside`, `Cancelled`.
    """
    if asset.anchors is None:
        raise NearError("export-unsupported", "Assets of a published checkpoint change with the view and cannot be exported as fixed splats or textures.",
                        "Render them instead, or make the asset with the compact pack.")
    with torch.inference_mode():
        if format == "ply":
            from near.export.splats import splats_ply

            return splats_ply(asset, light or uniform_environment((1.0, 1.0, 1.0)), engine, progress, cancelled)
        if format == "glb":
            from near.export.textured import textured_glb

            return textured_glb(asset, engine, progress, cancelled, onto=onto)
    raise NearError("export-unsupported", f"There is no export format named {format!r}.", "Choose near, ply or glb.")
