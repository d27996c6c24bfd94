"""``near create``: photo -> asset."""

from __future__ import annotations

import argparse
from pathlib import Path

from near.commands import common


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("create", help="photo -> relightable asset", description="Make a relightable asset from a photo.")
    parser.add_argument("photo", type=Path, help="picture of one object; its alpha cuts it out, else it is cut out automatically")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="A.near")
    parser.add_argument("--mesh", type=Path, help="GLB, glTF, OBJ or PLY to use as geometry; without it the outline is inflated")
    parser.add_argument("--camera", metavar="YAW,PITCH,RADIUS,FOV", help=f"the photo's camera; {common.CAMERA_HELP}")
    parser.add_argument("--cameras", type=Path, metavar="FILE", help=f"the photo's camera as the first of a {common.CAMERAS_HELP}")
    parser.add_argument("--mask", type=Path, metavar="MASK.png", help="also save a preview of what was cut out")
    parser.add_argument("--exposure", type=float, default=0.0, metavar="STOPS",
                        help="read the photo as if exposed longer by so many stops: for one taken in the dark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="sampler steps (default: the pack's)")
    common.add_engine_options(parser, connect=True)
    common.add_report_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from near.atomic import check_writable, write_bytes
    from near.errors import NearError

    if args.camera and args.cameras:
        raise NearError("options-conflict", "--camera and --cameras were both given.", "Give one of them.")
    if args.steps is not None and not 1 <= args.steps <= 1000:
        raise NearError("steps-invalid", f"{args.steps} sampler steps were asked for.", "Use between 1 and 1000.")
    check_asset_name(args.output)
    check_writable(args.output)

    from near.assets import encode_asset
    from near.geometry.matting import matte
    from near.geometry.mesh import load_mesh
    from near.geometry.photo import check_stops, load_photo

    check_stops(args.exposure)
    with common.progress_bar("create", args.quiet or args.json) as bar:
        bar.update(0.0, "read photo")
        photo = matte(load_photo(args.photo))
        height, width = photo.alpha.shape
        camera = None
        if args.camera:
            camera = common.orbit(common.parse_camera(args.camera), width, height)
        elif args.cameras:
            camera = common.read_cameras(args.cameras, (width, height))[0]
        mesh = None if args.mesh is None else load_mesh(args.mesh)
        if args.mask is not None:
            from near.output import write_png

            write_png(args.mask, mask_preview(photo))
        if args.connect is not None:  # what was read here was read to find mistakes early; the backend gets the files
            photo, mesh = args.photo, args.mesh
        with common.open_engine(args) as engine:
            asset = engine.create(photo, mesh=mesh, camera=camera, seed=args.seed, steps=args.steps, exposure_stops=args.exposure,
                                  progress=bar)
        write_bytes(args.output, encode_asset(asset))
        bar.update(1.0, "done")
    common.emit(args, describe(args.output, asset), [f"{args.output}: {len(asset)} voxels, {args.output.stat().st_size / 1e6:.1f} MB"])
    return 0


def check_asset_name(path: Path) -> None:
    """Refuse names that would not be found again as assets."""
    from near.errors import NearError

    if path.suffix.lower() != ".near":
        raise NearError("output-kind", f"{path.name} does not end in .near.", "Give the asset a name that ends in .near.")


def describe(path: Path, asset) -> dict:
    """What ``--json`` says of an asset that was written."""
    return {"asset": str(path), "bytes": path.stat().st_size, "voxels": len(asset), "resolution": asset.resolution,
            "gaussians": None if asset.anchors is None else len(asset.anchors), "meta": dict(asset.meta)}


def mask_preview(photo):
    """The photo with what was not cut out tinted red: uint8 [H, W, 3]."""
    import numpy as np

    rgb, alpha = (np.asarray(x, np.float32) for x in (photo.srgb, photo.alpha))
    tint = 0.35 * rgb + 0.65 * np.array([0.85, 0.1, 0.1], np.float32)
    return np.round((rgb * alpha[..., None] + tint * (1 - alpha[..., None])) * 255).astype(np.uint8)
