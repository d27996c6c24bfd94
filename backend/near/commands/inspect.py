"""``near inspect``: what an asset file holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from near.commands import common


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("inspect", help="what an asset file holds", description="Show what an asset file (or a published .npz) holds.")
    parser.add_argument("asset", type=Path, metavar="A.near")
    parser.add_argument("--save", type=Path, metavar="B.near", help="write it again as a .near file (converts a published .npz)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=run)


def load_any(path: Path):
    """An asset of either kind of file: ``.near``, or a published ``.npz``."""
    from near.assets import load_asset

    if path.suffix.lower() == ".npz":
        from near.assets import import_npz

        return import_npz(path)
    return load_asset(path)


def run(args: argparse.Namespace) -> int:
    from near.commands.create import check_asset_name

    asset = load_any(args.asset)
    record = summary(args.asset, asset)
    if args.save is not None:
        from near.assets import encode_asset
        from near.atomic import write_bytes

        check_asset_name(args.save)
        write_bytes(args.save, encode_asset(asset))
        record["saved"] = str(args.save)
    common.emit(args, record, list(_lines(record)))
    return 0


def summary(path: Path, asset) -> dict:
    """Plain facts about an asset."""
    low, high = asset.coords.amin(0).tolist(), asset.coords.amax(0).tolist()
    tensors = {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in asset.tensors().items()}
    feats = asset.feats.float()
    return {"file": str(path), "bytes": path.stat().st_size, "resolution": asset.resolution, "voxels": len(asset),
            "voxel_range": [low, high], "gaussians": None if asset.anchors is None else len(asset.anchors),
            "features": {"channels": feats.shape[1], "mean": round(float(feats.mean()), 4), "std": round(float(feats.std()), 4)},
            "proxy": None if asset.proxy_faces is None else {"vertices": len(asset.proxy_vertices), "triangles": len(asset.proxy_faces)},
            "tensors": tensors, "meta": dict(asset.meta)}


def _lines(record: dict):
    yield f"{record['file']}  ({record['bytes'] / 1e6:.2f} MB)"
    low, high = record["voxel_range"]
    yield f"  grid        {record['resolution']}^3, {record['voxels']} voxels, from {low} to {high}"
    features = record["features"]
    yield f"  features    {features['channels']} channels, mean {features['mean']}, standard deviation {features['std']}"
    if record["gaussians"] is not None:
        yield f"  gaussians   {record['gaussians']}"
    if record["proxy"]:
        yield f"  proxy mesh  {record['proxy']['vertices']} vertices, {record['proxy']['triangles']} triangles"
    for key, value in sorted(record["meta"].items()):
        text = str(value)
        yield f"  {key:<14}{text if len(text) <= 100 else text[:97] + '...'}"
    if "saved" in record:
        yield f"Saved as {record['saved']}."
