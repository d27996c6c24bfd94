"""What a full-size published frame costs here: random weights of sane scale, a real or made-up asset (issue: speed)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from near.assets import Asset
from near.colour import agx_srgb
from near.geometry.cameras import orbit_camera
from near.lighting import Environment, environment_from_array
from near.models.basis import NeuralBasis, NeuralBasisConfig
from near.models.iad import SLatGaussianDecoder, SLatGaussianDecoderConfig
from near.models.lad import SLatGaussianRenderer
from near.models.lad_config import SLatGaussianRendererConfig
from near.models.tokenizer import HdriEncoder, HdriEncoderConfig
from near.nn.init import random_sane_weights
from near.pipeline.published import choose_precision
from near.pipeline.published_frame import PublishedRenderer
from near.pipeline.published_parts import PublishedModels
from near.pipeline.types import PlacedAsset

# FLOPs of spec section 13, per voxel where they grow with the voxels (T = 4096 tokens).
LAD_BLOCK_FLOP_PER_VOXEL = (1.39e12 + 1.24e12) / 16384
HEAD_FLOP_PER_VOXEL = (83e9 + 2.5e9) / 16384


@dataclass(frozen=True)
class BenchResult:
    """Medians over frames of a moving camera under one light.

    frame_seconds: wall time of a frame; cpu_seconds: processor time of it, over all threads (what an idle machine needs is
    this over its cores). stages: wall time per stage of the median frame. first: one-time costs (asset, light).
    shaded_share: of the voxels. full_seconds: a frame that shades every voxel. agx_error: largest difference to it.
    floor_flop: floating-point operations of the median frame.
    """

    voxels: int
    size: int
    precision: str
    threads: int
    frame_seconds: float
    cpu_seconds: float
    stages: dict[str, float]
    first: dict[str, float]
    shaded_share: float
    full_seconds: float
    agx_error: float
    floor_flop: float

    @property
    def speed_up(self) -> float:
        """Of visible-first shading over shading everything."""
        return self.full_seconds / self.frame_seconds


def random_renderer(device: torch.device | str = "cpu", dtype: str = "auto", seed: int = 0, **sizes) -> PublishedRenderer:
    """A full-size renderer with random weights; ``sizes`` replaces the configs ``decoder``, ``renderer``, ``encoder``, ``basis``."""
    device = torch.device(device)
    parts = (("decoder", SLatGaussianDecoder, SLatGaussianDecoderConfig), ("renderer", SLatGaussianRenderer, SLatGaussianRendererConfig),
             ("encoder", HdriEncoder, HdriEncoderConfig), ("basis", NeuralBasis, NeuralBasisConfig))
    built = []
    for index, (name, model, config) in enumerate(parts):
        module = model(sizes.get(name) or config())
        built.append(module if name == "basis" else random_sane_weights(module, seed + index))  # the basis' own start is sane
    return PublishedRenderer(PublishedModels(*built).to(device, choose_precision(dtype, device)), device)


def shell_asset(resolution: int = 64, channels: int = 8, voxels: int = 17_500, seed: int = 0) -> Asset:
    """A bumpy sphere's surface with random features: an asset of a given size where no real one is at hand."""
    centre = (torch.arange(resolution) + 0.5) / resolution - 0.5
    grid = torch.stack(torch.meshgrid(centre, centre, centre, indexing="ij"), -1)
    radius = grid.norm(dim=-1) + 0.03 * (12 * grid).sin().prod(-1)
    coords = (radius - 0.4).abs().flatten().argsort()[:voxels].sort().values
    coords = torch.stack([coords // resolution**2, coords // resolution % resolution, coords % resolution], -1)
    feats = torch.randn(len(coords), channels, generator=torch.Generator().manual_seed(seed)) * 2
    return Asset(coords.to(torch.uint8), feats.half(), resolution)


def soft_sky() -> Environment:
    """A gradient with one bright patch."""
    up = torch.linspace(1, -1, 128)[:, None, None].expand(128, 256, 1)
    sky = 0.4 + 0.3 * up * torch.tensor([0.6, 0.8, 1.0])
    sky[20:26, 60:70] += 50
    return environment_from_array(sky.contiguous())


def bench_published(asset: Asset | None = None, *, renderer: PublishedRenderer | None = None, size: int = 512, frames: int = 3,
                    dtype: str = "auto", device: str = "cpu", say: Callable[[str], None] | None = None) -> BenchResult:
    """Time frames of a moving camera under a fixed light, and one frame with every voxel shaded.

    Args: asset: default a made-up one of 17,500 voxels. renderer: default full size, random weights.
    """
    say = say or (lambda text: None)
    renderer = renderer or random_renderer(device, dtype)
    asset = asset or shell_asset(renderer.models.decoder.config.resolution, renderer.models.decoder.config.latent_channels)
    light, placed = soft_sky(), [PlacedAsset(asset)]
    cameras = [orbit_camera(0.3 + 0.35 * i, 0.25, 2.0, 0.7, size, size) for i in range(frames + 1)]
    start = time.perf_counter()
    renderer.render(placed, light, cameras[0])
    first = {"first frame": time.perf_counter() - start, **renderer.stats.seconds}
    say(f"first frame {first['first frame']:.2f} s")
    timed = []
    for camera in cameras[1:]:
        start, cpu = time.perf_counter(), time.process_time()
        frame = renderer.render(placed, light, camera)
        timed.append((time.perf_counter() - start, time.process_time() - cpu, renderer.stats, frame))
        say(f"frame {timed[-1][0]:.2f} s, {renderer.stats.shaded} of {renderer.stats.voxels} voxels shaded")
    wall, cpu, stats, _ = sorted(timed, key=lambda row: row[0])[len(timed) // 2]
    last = timed[-1][3].layers["color"]
    renderer._views.clear()
    start = time.perf_counter()
    full = renderer.render(placed, light, cameras[-1], visible_first=False).layers["color"]
    full_seconds = time.perf_counter() - start
    error = float((agx_srgb(last[..., :3]) - agx_srgb(full[..., :3])).abs().max())
    flop = stats.shaded * LAD_BLOCK_FLOP_PER_VOXEL + stats.voxels * HEAD_FLOP_PER_VOXEL
    return BenchResult(len(asset), size, str(choose_precision(dtype, renderer.device)).removeprefix("torch."), torch.get_num_threads(), wall,
                       cpu, stats.seconds, first, stats.shaded / stats.voxels, full_seconds, error, flop)


def report(result: BenchResult) -> list[str]:
    """The result as text."""
    rate = result.floor_flop / result.frame_seconds / 1e9
    lines = [f"published NeAR, full size, random weights: {result.voxels} voxels, {result.size} x {result.size}, {result.precision}, "
             f"{result.threads} threads",
             f"  frame, camera moving, light fixed  {result.frame_seconds:8.2f} s wall, {result.cpu_seconds:.2f} s of processor time",
             f"  the same with every voxel shaded   {result.full_seconds:8.2f} s   {result.speed_up:.2f} times slower, "
             f"largest difference after AgX {result.agx_error:.1e}",
             f"  voxels shaded                      {result.shaded_share:8.1%}",
             f"  arithmetic of the models           {result.floor_flop / 1e12:8.2f} TFLOP, {rate:.0f} GFLOP/s reached",
             f"  first frame (asset, light, frame)  {result.first['first frame']:8.2f} s"]
    return lines + [f"    {name:<32} {seconds:8.3f} s" for name, seconds in result.stages.items()]
