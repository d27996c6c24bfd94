"""Photos of a folder as relit assets, one row each: python tools/photo_sheet.py PHOTOS -o sheet.png [--size 256] [--pack compact]

A row shows the photo, the asset under light that is the same from everywhere (what was painted and what was light), under the
project's four own lights, and from a quarter of the way around. Geometry is the photo's inflated outline.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

BACKGROUND = (48, 50, 54)
WHITE_STRENGTH = 0.8
SIDE_DEG = 40.0
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def photo_camera(asset, size: int):
    """The camera of the photo that an asset was made from, ``size`` pixels on its longer side."""
    from near.geometry.cameras import Camera

    record = asset.meta["photo_camera"]
    camera = Camera(K=torch.tensor(record["K"]), cam_from_world=torch.tensor(record["cam_from_asset"]), width=record["width"],
                    height=record["height"], projection=record["projection"])
    scale = size / max(camera.width, camera.height)
    return camera.resized(round(camera.width * scale), round(camera.height * scale))


def turned(camera, angle_rad: float):
    """The camera, carried around the asset's vertical axis."""
    c, s = math.cos(angle_rad), math.sin(angle_rad)
    around = torch.tensor([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float32)
    return replace(camera, cam_from_world=camera.cam_from_world @ around)


def photo_row(engine, path: Path, lights: dict, size: int) -> tuple[list[np.ndarray], dict]:
    """Pictures of one photo, and what the asset's base colour and look measure."""
    from near.geometry.matting import matte
    from near.geometry.photo import load_photo
    from near.lighting import uniform_environment
    from near.output import display_straight
    from near.pipeline.types import PlacedAsset

    photo = matte(load_photo(path))
    asset = engine.create(photo)
    camera = photo_camera(asset, size)

    def lit(light, seen_by=camera) -> np.ndarray:
        return display_straight(engine.render([PlacedAsset(asset)], light, seen_by).layers["color"])

    picture = np.concatenate([np.asarray(photo.srgb, np.float32), np.asarray(photo.alpha, np.float32)[..., None]], -1)
    cells = [np.round(picture * 255).astype(np.uint8), lit(uniform_environment(WHITE_STRENGTH)), *(lit(light) for light in lights.values())]
    return [*cells, lit(next(iter(lights.values())), turned(camera, math.radians(SIDE_DEG)))], {"photo": path.name, "voxels": len(asset)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of pictures with alpha, or on plain backgrounds")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256, help="pixels of a cell")
    parser.add_argument("--pack", default="compact")
    args = parser.parse_args(argv)
    from near.lighting import samples
    from near.output import write_png
    from near.pipeline.engine import Engine
    from near.sheets import contact_sheet

    paths = sorted(p for p in args.photos.iterdir() if p.suffix.lower() in SUFFIXES)
    if not paths:
        print(f"{args.photos} holds no pictures.", file=sys.stderr)
        return 2
    lights = {name: samples.sample_environment(name, 256) for name in list(samples.SAMPLES)[:4]}
    engine, rows = Engine(args.pack), []
    for path in paths:
        cells, facts = photo_row(engine, path, lights, args.size)
        rows.append(cells)
        print(json.dumps(facts), flush=True)
    heads = ["photo", "the same light from everywhere", *(name.replace("-", " ") for name in lights), f"turned by {SIDE_DEG:.0f} degrees"]
    sheet = contact_sheet(rows, row_titles=[p.stem.removeprefix("typical_").replace("_", " ") for p in paths], column_titles=heads,
                          cell=(args.size, args.size), background=BACKGROUND)
    write_png(args.out, sheet)
    print(f"Sheet: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
