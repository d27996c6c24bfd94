"""What an asset holds, as plain data."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from torch import Tensor

from near.assets.format import FORMAT, VERSION, encode_asset
from near.assets.types import Asset


def inspect_asset(asset: Asset) -> dict[str, Any]:
    """Sizes, ranges and the record of an asset; JSON data for ``near inspect``."""
    data = encode_asset(asset)
    cells = np.asarray(asset.coords).astype(int)
    low, high = cells.min(0) / asset.resolution - 0.5, (cells.max(0) + 1) / asset.resolution - 0.5
    return {
        "format": FORMAT, "version": VERSION, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
        "resolution": asset.resolution, "voxels": len(asset), "bounds": [low.tolist(), high.tolist()],
        "feats": _channels(asset.feats), "color_feats": _channels(asset.color_feats), "brm_feats": _channels(asset.brm_feats),
        "anchors": _anchors(asset), "proxy": _proxy(asset), "meta": dict(asset.meta),
    }


def _channels(values: Tensor | None) -> dict[str, Any] | None:
    if values is None:
        return None
    v = values.float()
    return {"channels": v.shape[1], "mean": _rounded(v.mean(0)), "std": _rounded(v.std(0, correction=0)), "min": _rounded(v.amin(0)),
            "max": _rounded(v.amax(0))} if v.shape[1] else {"channels": 0}


def _rounded(values: Tensor) -> list[float]:
    return [round(x, 4) for x in values.tolist()]


def _anchors(asset: Asset) -> dict[str, Any] | None:
    if asset.anchors is None:
        return None
    a = asset.anchors
    radii = a.radii.float()
    return {"count": len(a), "per_voxel_mean": round(len(a) / len(asset), 2), "per_voxel_max": int(a.counts.max()),
            "visibility_coefficients": a.visibility.shape[1],
            "radius_median": round(float(radii.median()), 6) if len(a) else None}


def _proxy(asset: Asset) -> dict[str, int] | None:
    if asset.proxy_vertices is None:
        return None
    return {"vertices": len(asset.proxy_vertices), "faces": len(asset.proxy_faces)}
