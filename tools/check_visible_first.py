"""Visible-first shading against shading everything.

    python tools/check_visible_first.py ASSET [ASSET ...] [--cameras 20] [--size 512] [--dtype auto]

ASSET: a published .npz (rendered by the published models at full size, with random weights) or a .near file of the compact
pack (rendered by it). Prints, per asset, the largest difference after AgX over all cameras, the share of
voxels shaded and the speed-up; exit status 1 if a difference reaches 1e-3.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch

from near.assets import Asset, import_npz, load_asset
from near.colour import agx_srgb
from near.geometry.cameras import orbit_camera, sphere_hammersley
from near.models.compact import CompactModels
from near.pipeline.compact_frame import CompactRenderer
from near.pipeline.published_bench import random_renderer, soft_sky
from near.pipeline.published_frame import PublishedRenderer
from near.pipeline.types import PlacedAsset

LIMIT = 1e-3


def compare(renderer: PublishedRenderer | CompactRenderer, asset: Asset, cameras: int, size: int) -> dict[str, float]:
    """Largest difference after AgX, mean share of voxels shaded, and processor seconds of both ways (medians)."""
    light, placed = soft_sky(), [PlacedAsset(asset)]
    errors, shares, fast, slow = [], [], [], []
    for index in range(cameras):
        yaw, pitch = sphere_hammersley(index, cameras)
        camera = orbit_camera(yaw, pitch, 2.0, math.radians(40), size, size)
        frames = []
        for visible_first, times in ((True, fast), (False, slow)):
            warm = ("depth",) if index or isinstance(renderer, PublishedRenderer) else ("color",)
            renderer.render(placed, light, camera, passes=warm)  # light, asset and geometry are cached for both
            start = time.process_time()
            frames.append(renderer.render(placed, light, camera, passes=("color",), visible_first=visible_first).layers["color"])
            times.append(time.process_time() - start)
            if visible_first:
                shares.append(renderer.stats.shaded / renderer.stats.voxels if isinstance(renderer, PublishedRenderer)
                              else renderer.shaded_share)
        errors.append(max(float((agx_srgb(frames[0][..., :3]) - agx_srgb(frames[1][..., :3])).abs().max()),
                          float((frames[0][..., 3] - frames[1][..., 3]).abs().max())))
        print(f"  camera {index + 1}/{cameras}: shaded {shares[-1]:.1%}, difference {errors[-1]:.1e}", file=sys.stderr, flush=True)
    return {"error": max(errors), "share": statistics.mean(shares), "fast": statistics.median(fast[1:] or fast),
            "slow": statistics.median(slow[1:] or slow)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path, nargs="+", metavar="ASSET")
    parser.add_argument("--cameras", type=int, default=20)
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    renderers, worst = {}, 0.0
    for path in args.assets:
        asset = import_npz(path) if path.suffix == ".npz" else load_asset(path)
        compact = asset.anchors is not None
        if compact not in renderers:
            renderers[compact] = CompactRenderer(CompactModels.load()) if compact else random_renderer(args.device, args.dtype)
        row = compare(renderers[compact], asset, args.cameras, args.size)
        worst = max(worst, row["error"])
        print(f"{path.stem[:12]}: {len(asset)} voxels, {args.cameras} cameras, largest difference after AgX {row['error']:.1e}, "
              f"{row['share']:.1%} of the voxels shaded, {row['slow'] / row['fast']:.2f} times faster "
              f"({row['fast']:.2f} s against {row['slow']:.2f} s of processor time)")
    return int(worst >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
