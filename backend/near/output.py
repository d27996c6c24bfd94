"""Frames become files: PNG (AgX, straight alpha), multilayer EXR (linear), MP4 and GIF. All appear whole or not at all."""

from __future__ import annotations

import errno
import io
import itertools
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from near.atomic import atomic_file, atomic_folder, write_bytes
from near.colour import agx_srgb, srgb_encode, to_uint8
from near.errors import NearError

# Channel names of each layer in an EXR file, and whether float32 is needed.
EXR_CHANNELS = {
    "color": (("R", "G", "B", "A"), False), "alpha": (("alpha.V",), False),
    "base_color": (("base_color.R", "base_color.G", "base_color.B"), False),
    "roughness": (("roughness.V",), False), "metallic": (("metallic.V",), False), "shadow": (("shadow.V",), False),
    "normal": (("normal.X", "normal.Y", "normal.Z"), False), "depth": (("depth.Z",), True),
}
HALF_MAX = 65504.0
SUFFIXES = (".png", ".exr", ".mp4", ".gif")


@dataclass(frozen=True)
class OutputPlan:
    """Where the frames of one command go.

    Args:
        path: file or folder. kind: ``png``, ``exr``, ``mp4``, ``gif``. folder: one file a frame inside ``path``.
    """

    path: Path
    kind: str
    folder: bool = False


def plan_output(path: Path | str, frames: int, sequence_format: str = "png") -> OutputPlan:
    """Decide by name and number of frames what is written; nothing is touched.

    Raises:
        NearError: ``output-kind`` for an unknown suffix, ``output-single`` for many frames into one picture.
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    if suffix in (".mp4", ".gif"):
        return OutputPlan(path, suffix[1:])
    if suffix in (".png", ".exr") and not path.is_dir():
        if frames > 1:
            raise NearError("output-single", f"{frames} frames do not fit into the single picture {path.name}.",
                            "Name a folder, or a .mp4 or .gif file, with -o.")
        return OutputPlan(path, suffix[1:])
    if suffix == "" or path.is_dir():
        return OutputPlan(path, sequence_format, folder=True)
    raise NearError("output-kind", f"Files of kind {suffix} cannot be written.",
                    f"End the output's name in {', '.join(SUFFIXES)}, or name a folder for a sequence.")


# -- display -----------------------------------------------------------------------------------------------------------


def display_straight(color: Tensor) -> np.ndarray:
    """Premultiplied linear Rec.709 RGBA [H, W, 4] -> uint8 [H, W, 4], AgX, straight alpha, as Blender writes a PNG."""
    alpha = color[..., 3:].clamp(0, 1)
    # As Blender: any coverage at all is divided by; light without coverage (a glow) is kept as it is.
    straight = torch.where(alpha > 0, color[..., :3] / alpha.clamp_min(1e-30), color[..., :3])
    return _join(to_uint8(agx_srgb(straight.clamp_min(0))), to_uint8(alpha))


def display_over(color: Tensor, background: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """The same over a display-referred background, opaque: uint8 [H, W, 3]."""
    return over(display_straight(color), background)


def over(rgba: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """uint8 straight RGBA over a colour -> uint8 RGB."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
    return np.round(mixed).astype(np.uint8)


def display_layer(name: str, layers: dict[str, Tensor]) -> np.ndarray:
    """Any layer of a frame as uint8 [H, W, 4] with straight alpha.

    Base colour is sRGB-encoded; roughness, metallic, shadow and alpha are shown as they are; normals as n/2 + 1/2; depth
    from white (nearest) to black (farthest of this frame).
    """
    value = layers[name]
    if name == "color":
        return display_straight(value)
    if name == "depth":
        present = torch.isfinite(value)
        near, far = (value[present].min(), value[present].max()) if present.any() else (torch.tensor(0.0), torch.tensor(1.0))
        value = torch.where(present, 1 - (value - near) / (far - near).clamp_min(1e-6), torch.zeros(()))
        alpha = present.float()
    else:
        alpha = _coverage(layers, value)
        if name == "base_color":
            value = srgb_encode(value.clamp(0, 1))
        elif name == "normal":
            value = value * 0.5 + 0.5
        elif name == "alpha":
            alpha = torch.ones_like(value)
    rgb = to_uint8(value.clamp(0, 1))
    return _join(np.repeat(_array(rgb), 3, -1) if value.shape[-1] == 1 else rgb, to_uint8(alpha.clamp(0, 1)))


def _coverage(layers: dict[str, Tensor], value: Tensor) -> Tensor:
    if "color" in layers:
        return layers["color"][..., 3:]
    return layers["alpha"] if "alpha" in layers else torch.ones_like(value[..., :1])


def _join(rgb, alpha) -> np.ndarray:
    return np.concatenate([_array(rgb), _array(alpha)], -1)


def _array(x) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


# -- files -------------------------------------------------------------------------------------------------------------


def png_bytes(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 1|3|4] as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_png(path: Path | str, pixels: np.ndarray) -> None:
    """uint8 [H, W, 1|3|4] to a PNG file, atomically."""
    write_bytes(path, png_bytes(pixels))


def exr_bytes(layers: dict[str, Tensor]) -> bytes:
    """Layers of a frame as one multilayer EXR: half floats (depth: float32), linear Rec.709, colour premultiplied."""
    import OpenEXR

    channels = {}
    for name, value in layers.items():
        names, full = EXR_CHANNELS[name]
        pixels = _array(value).astype(np.float32)
        # Half has no room above 65504; a sun's reflection must not become infinite.
        pixels = pixels if full else np.clip(pixels, -HALF_MAX, HALF_MAX).astype(np.float16)
        channels.update({n: np.ascontiguousarray(pixels[..., i]) for i, n in enumerate(names)})
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage,
              "chromaticities": (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290), "software": "NeAR Relight"}
    buffer = io.BytesIO()
    OpenEXR.File(header, channels).write(buffer)
    return buffer.getvalue()


def write_exr(path: Path | str, layers: dict[str, Tensor]) -> None:
    """Layers of a frame to a multilayer EXR file, atomically."""
    write_bytes(path, exr_bytes(layers))


def write_environment(path: Path | str, light) -> None:
    """The map of an environment (:class:`near.lighting.Environment`, without its rotation and strength) as a half-float EXR."""
    rgb = light.rgb_lin709
    write_exr(path, {"color": torch.cat([rgb, torch.ones_like(rgb[..., :1])], -1)})


def read_exr(path: Path | str) -> dict[str, np.ndarray]:
    """Channels of an EXR file by name, float32 [H, W].

    Raises:
        NearError: ``exr-unreadable``.
    """
    import OpenEXR

    try:
        channels = OpenEXR.File(str(path), separate_channels=True).channels()
        return {name: np.asarray(c.pixels, np.float32) for name, c in channels.items()}
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise NearError("exr-unreadable", f"{Path(path).name} is not an EXR picture that can be read.",
                        "Check that the file is there and complete.") from error


def read_rgba(path: Path | str) -> np.ndarray:
    """Colour of an EXR file as float32 [H, W, 4] (alpha 1 where the file has none)."""
    channels = read_exr(path)
    if not {"R", "G", "B"} <= set(channels):
        raise NearError("exr-unreadable", f"{Path(path).name} has no R, G and B channels.", "Give a picture with colour.")
    alpha = channels.get("A", np.ones_like(channels["R"]))
    return np.stack([channels["R"], channels["G"], channels["B"], alpha], -1)


def write_picture(plan: OutputPlan, layers: dict[str, Tensor]) -> list[Path]:
    """One frame to its file(s); a PNG's further passes lie beside it as ``name.pass.png``. Returns the paths."""
    if plan.kind == "exr":
        write_exr(plan.path, layers)
        return [plan.path]
    pictures = _pictures(plan.path, layers)
    with ExitStack() as stack:  # every file is written before the first takes its name
        for path, pixels in pictures:
            stack.enter_context(atomic_file(path)).write_bytes(png_bytes(pixels))
    return [path for path, _ in pictures]


def _pictures(path: Path, layers: dict[str, Tensor]) -> list[tuple[Path, np.ndarray]]:
    main = "color" if "color" in layers else next(iter(layers))
    return [(path if name == main else path.with_name(f"{path.stem}.{name}{path.suffix}"), display_layer(name, layers)) for name in layers]


def write_sequence(plan: OutputPlan, frames: Iterable[dict[str, Tensor]]) -> list[Path]:
    """Frames as numbered files in a folder, which appears when the last one is done. Returns the paths."""
    names: list[str] = []
    with atomic_folder(plan.path) as part:
        for index, layers in enumerate(frames):
            if plan.kind == "exr":
                files = [(part / f"frame_{index:04d}.exr", exr_bytes(layers))]
            else:
                files = [(p, png_bytes(pixels)) for p, pixels in _pictures(part / f"frame_{index:04d}.png", layers)]
            for path, data in files:
                path.write_bytes(data)
                names.append(path.name)
    return [plan.path / name for name in names]


def write_video(plan: OutputPlan, frames: Iterable[np.ndarray], fps: float) -> list[Path]:
    """uint8 RGB frames [H, W, 3] as MP4 (H.264) or GIF."""
    if plan.kind == "gif":
        write_bytes(plan.path, _gif_bytes(list(frames), fps))
    else:
        with atomic_file(plan.path) as part:
            _write_mp4(part, iter(frames), fps)
    return [plan.path]


def _gif_bytes(frames: list[np.ndarray], fps: float) -> bytes:
    from PIL import Image

    pictures = [Image.fromarray(f) for f in frames]
    # One palette for all frames, taken from a spread of them: palettes per frame flicker.
    spread = pictures[:: max(len(pictures) // 8, 1)]
    strip = Image.new("RGB", (spread[0].width, sum(p.height for p in spread)))
    for i, picture in enumerate(spread):
        strip.paste(picture, (0, i * spread[0].height))
    palette = strip.quantize(255, dither=Image.Dither.NONE)
    coded = [p.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for p in pictures]
    buffer = io.BytesIO()
    # Viewers treat delays under 20 ms as 100 ms.
    coded[0].save(buffer, "GIF", save_all=True, append_images=coded[1:], loop=0, duration=max(round(1000 / fps), 20))
    return buffer.getvalue()


def _write_mp4(path: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    """H.264 through ffmpeg, run by ourselves: its exit status is the only sign of a video that was cut short."""
    import imageio_ffmpeg

    first = next(frames)
    height, width = (n + n % 2 for n in first.shape[:2])  # 4:2:0 colour needs even sides
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24",
               "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-", "-an", "-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p",
               "-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709", "-color_primaries", "bt709",
               "-color_trc", "iec61966-2-1", "-movflags", "+faststart", str(path)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said)
        try:
            for frame in itertools.chain([first], frames):
                padding = ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0))
                process.stdin.write(np.ascontiguousarray(np.pad(frame, padding, mode="edge")).tobytes())
            process.stdin.close()
            status = process.wait()
        except OSError:  # it went before its input ended
            status = process.wait() or 1
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            try:
                process.stdin.close()
            except OSError:
                pass
        said.seek(0)
        message = said.read().decode("utf-8", "replace").strip()
    if status:
        # The video's own name is put in by atomic_file, which turns this into the error to show.
        if "No space left" in message:
            raise OSError(errno.ENOSPC, "No space left on device")
        raise NearError("video-failed", f"The video encoder stopped ({message.splitlines()[-1][:160] if message else f'status {status}'}).",
                        "Write a .gif or a folder of pictures instead; near doctor tests the encoder.")
