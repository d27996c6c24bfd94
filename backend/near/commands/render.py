"""``near render``: asset + light + cameras -> picture, passes, sequence or video."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from near.commands import common
from near.errors import NearError

MAX_FRAMES = 10_000


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("render", help="asset + HDRI + camera -> picture, passes, video",
                                   description="Render an asset under an HDRI. PNG, MP4 and GIF are AgX; EXR is linear Rec.709 with all passes.")
    parser.add_argument("asset", type=Path, metavar="A.near")
    parser.add_argument("--hdri", type=Path, required=True, help="equirectangular .exr or .hdr, 2:1")
    parser.add_argument("--repair-hdri", action="store_true", help="replace NaN, infinite and negative values instead of refusing them")
    parser.add_argument("--rotation", type=float, default=0.0, metavar="DEG", help="turn of the light about Z, as the Z rotation of Blender's Mapping node")
    parser.add_argument("--strength", type=float, default=1.0, help="factor on the light")
    parser.add_argument("--camera", metavar="YAW,PITCH,RADIUS,FOV", help=f"{common.CAMERA_HELP} (default %s,%s,%s,%s)" % tuple(f"{v:g}" for v in common.DEFAULT_CAMERA))
    parser.add_argument("--cameras", type=Path, metavar="FILE", help=common.CAMERAS_HELP)
    moves = parser.add_mutually_exclusive_group()
    moves.add_argument("--turntable", type=int, metavar="N", help="N frames once around the object, from the camera's yaw on")
    moves.add_argument("--light-sweep", type=int, metavar="N", help="N frames with the light once around")
    parser.add_argument("--size", metavar="WxH", help="default 512x512, or what the cameras' file says")
    parser.add_argument("--passes", help="comma-separated: color, alpha, base_color, roughness, metallic, shadow, normal, depth; or all "
                        "(default: color; for EXR all)")
    parser.add_argument("--format", choices=("png", "exr"), default="png", help="of the frames in a folder")
    parser.add_argument("--fps", type=float, default=24.0, help="of a video")
    parser.add_argument("--background", default="303236", metavar="RRGGBB", help="behind the object in a video")
    parser.add_argument("--draft", action="store_true", help="faster and coarser, as in a moving viewport")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".png, .exr, .mp4, .gif, or a folder for a sequence")
    common.add_engine_options(parser, connect=True)
    common.add_report_options(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Shot:
    """One frame to render: its camera, and how far the light is turned about Z."""

    camera: object
    light_turn_rad: float


def run(args: argparse.Namespace) -> int:
    from near.atomic import check_writable
    from near.output import plan_output, write_picture, write_sequence, write_video

    shots = plan_shots(args)
    plan = plan_output(args.output, len(shots), args.format)
    passes = choose_passes(args.passes, plan.kind)
    background = parse_colour(args.background)
    check_range("fps", args.fps, 0.1, 240)
    check_range("strength", args.strength, 0, 1e6)
    check_writable(plan.path / "frame" if plan.folder else plan.path)

    from near.commands.inspect import load_any
    from near.lighting import load_environment

    asset = load_any(args.asset)
    check_cameras(asset, shots)
    light = load_environment(args.hdri, allow_repair=args.repair_hdri).scaled(args.strength)
    start = time.perf_counter()
    with common.progress_bar("render", args.quiet or args.json) as bar, common.open_engine(args) as engine:
        frames = render_shots(engine, asset, light, shots, passes, "draft" if args.draft else "full", bar)
        if plan.folder:
            written = write_sequence(plan, (f.layers for f in frames))
        elif plan.kind in ("mp4", "gif"):
            written = write_video(plan, (video_picture(f.layers, background) for f in frames), args.fps)
        else:
            written = write_picture(plan, next(frames).layers)
        bar.update(1.0, "done")
    seconds = time.perf_counter() - start
    result = {"output": str(plan.path), "files": [str(p) for p in written], "frames": len(shots), "passes": list(passes),
              "size": [shots[0].camera.width, shots[0].camera.height], "seconds": round(seconds, 3)}
    common.emit(args, result, [f"{plan.path}: {len(shots)} frame{'s' * (len(shots) > 1)} in {seconds:.1f} s"])
    return 0


def render_shots(engine, asset, light, shots: list[Shot], passes, quality: str, bar) -> Iterator:
    """Frames in order; the light's turn is part of each shot, so a sweep prepares its light once."""
    from near.lighting import Environment, rotation_z
    from near.pipeline.types import PlacedAsset

    placed = [PlacedAsset(asset)]
    for index, shot in enumerate(shots):
        bar.update(index / len(shots), f"frame {index + 1} of {len(shots)}")
        turned = Environment(light.rgb_lin709, rotation_z(shot.light_turn_rad) @ light.env_from_world, light.strength)
        yield engine.render(placed, turned, shot.camera, passes=passes, quality=quality)


def plan_shots(args: argparse.Namespace) -> list[Shot]:
    """Cameras and light turns of all frames, checked before anything is loaded.

    Raises:
        NearError: ``options-conflict``, ``frames-invalid``, and those of sizes and cameras.
    """
    import math

    size = None if args.size is None else common.parse_size(args.size)
    turn = math.radians(args.rotation)
    if not math.isfinite(turn):
        raise NearError("rotation-invalid", "The light's rotation is not a finite number.", "Give it in degrees, for example 90.")
    for name, count in (("turntable", args.turntable), ("light-sweep", args.light_sweep)):
        if count is not None and not 1 <= count <= MAX_FRAMES:
            raise NearError("frames-invalid", f"--{name} {count} is not a number of frames.", f"Use between 1 and {MAX_FRAMES}.")
    if args.cameras is not None:
        if args.camera is not None or args.turntable is not None:
            raise NearError("options-conflict", "--cameras was given together with --camera or --turntable.", "Give one of them.")
        cameras = common.read_cameras(args.cameras, size)
        if args.light_sweep is None:
            return [Shot(c, turn) for c in cameras]
        if len(cameras) > 1:
            raise NearError("options-conflict", f"--light-sweep needs one camera, the file holds {len(cameras)}.", "Keep one camera in the file.")
        first = cameras[0]
    else:
        degrees = common.DEFAULT_CAMERA if args.camera is None else common.parse_camera(args.camera)
        width, height = size or (512, 512)
        if args.turntable is not None:
            yaw, *rest = degrees
            step = 360 / args.turntable
            return [Shot(common.orbit((yaw + i * step, *rest), width, height), turn) for i in range(args.turntable)]
        first = common.orbit(degrees, width, height)
    count = args.light_sweep or 1
    return [Shot(first, turn + 2 * math.pi * i / count) for i in range(count)]


def choose_passes(text: str | None, kind: str) -> tuple[str, ...]:
    """Names of the passes to render; a video shows exactly one.

    Raises:
        NearError: ``pass-unknown``, ``output-single``.
    """
    from near.pipeline.types import PASSES, check_passes

    if text is None:
        return tuple(PASSES) if kind == "exr" else ("color",)
    names = tuple(PASSES) if text.strip() == "all" else check_passes([name.strip() for name in text.split(",")])
    if kind in ("mp4", "gif"):
        if len(names) > 1:
            raise NearError("output-single", f"A video shows one pass, {len(names)} were asked for.", "Choose one, or write EXR frames into a folder.")
        return names if names == ("color",) or names == ("alpha",) else (*names, "alpha")
    return names


def video_picture(layers: dict, background: tuple[int, int, int]):
    """The shown pass over the background: uint8 RGB."""
    from near.output import display_layer, over

    return over(display_layer(next(iter(layers)), layers), background)


def parse_colour(text: str) -> tuple[int, int, int]:
    """``RRGGBB`` -> 0..255 each."""
    try:
        value = bytes.fromhex(text.lstrip("#"))
        if len(value) == 3:
            return value[0], value[1], value[2]
    except ValueError:
        pass
    raise NearError("colour-invalid", f"{text!r} is not a colour.", "Write six hexadecimal digits, for example 303236.")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ``option-range`` unless low <= value <= high."""
    if not low <= value <= high:
        raise NearError("option-range", f"--{name} {value:g} is out of range.", f"Use between {low:g} and {high:g}.")


def check_cameras(asset, shots: list[Shot]) -> None:
    """A camera inside the object would show nothing of use.

    Raises:
        NearError: ``camera-inside``, naming the frame.
    """
    from near.geometry.enclosure import encloses

    grid = asset.coords.long()
    for index, shot in enumerate(shots):
        if encloses(grid, asset.resolution, shot.camera.position):
            where = ", ".join(f"{v:.2f}" for v in shot.camera.position.tolist())
            raise NearError("camera-inside", f"The camera of frame {index} stands inside the object, at ({where}).",
                            "Move it outside: the object fits into a cube of side 1 around the origin.")
