"""``near train``: precompute, relit, renderer, flow, pack, calibrate. Several GPUs: ``torchrun --nproc-per-node N -m near train ...``."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Mount the ``train`` command on an argparse sub-parser collection."""
    parser = subparsers.add_parser("train", help="train the compact pack (precompute, relit, renderer, flow, pack, calibrate)")
    stages = parser.add_subparsers(dest="stage", required=True)

    pre = stages.add_parser("precompute", help="objects -> anchors, splat matrices, lifted photos, SLAT targets")
    pre.add_argument("objects", type=Path, nargs="+", help="folders of training objects (.npz), searched through")
    pre.add_argument("--hdris", type=Path, required=True, help="folder of the lights the objects were rendered under")
    pre.add_argument("-o", "--out", type=Path, required=True, help="cache folder; existing entries are kept")
    pre.add_argument("--part", type=int, default=0, help="this process' share of the objects")
    pre.add_argument("--parts", type=int, default=1)
    pre.set_defaults(run=_precompute)

    relit = stages.add_parser("relit", help="precomputed objects -> photos under many lights and in many paints, for the homogeniser's head")
    relit.add_argument("cache", type=Path, help="folder made by precompute")
    relit.add_argument("--hdris", type=Path, required=True)
    relit.add_argument("-o", "--out", type=Path, required=True, help="folder for the photos; existing entries are kept")
    relit.add_argument("--part", type=int, default=0, help="this process' share of the objects")
    relit.add_argument("--parts", type=int, default=1)
    relit.set_defaults(run=_relit)

    for name, text in (("renderer", "encoder, IAD, LAD, light tokenizer and basis, jointly"),
                       ("flow", "the base flow, or with --homogenizer the LoRA homogeniser on top of it")):
        stage = stages.add_parser(name, help=text)
        stage.add_argument("cache", type=Path, help="folder made by precompute")
        stage.add_argument("-o", "--out", type=Path, required=True, help="run folder: state, log, held-out scores")
        stage.add_argument("--steps", type=int, default=20000)
        stage.add_argument("--minutes", type=float, help="stop after this much training time")
        stage.add_argument("--learning-rate", type=float, default=1e-4)
        stage.add_argument("--sheet-every", type=int, default=500, help="steps between held-out evaluations, with a sample sheet each")
        stage.add_argument("--save-every", type=int, default=200, help="steps between saves of the state; the same command goes on from the last")
        stage.add_argument("--seed", type=int, default=0)
        stage.add_argument("--threads", type=int, help="CPU threads")
        stage.add_argument("--from", dest="start", type=Path, metavar="WEIGHTS", help="weights (.safetensors) of a pack or an earlier run to go on from")
        if name == "renderer":
            stage.add_argument("--hdris", type=Path, required=True)
            stage.add_argument("--lad-layers", type=int, metavar="N", help="another depth of the lighting-aware decoder, for near ablation")
        else:
            stage.add_argument("--batch", type=int, default=4)
            stage.add_argument("--homogenizer", type=Path, metavar="BASE_RUN", help="run folder of the trained base flow")
            stage.add_argument("--relit", type=Path, help="folder made by relit: what the homogeniser's per-voxel head learns from first")
            stage.add_argument("--pointwise-minutes", type=float, default=25.0, help="first fit of the homogeniser's per-voxel head (0: leave it as it is)")
            stage.add_argument("--pointwise-steps", type=int, default=100_000, help="or so many steps of each of its members, if that comes first")
            stage.add_argument("--rank", type=int, default=64, help="rank of the homogeniser's adapters")
        stage.set_defaults(run=_renderer if name == "renderer" else _flow)

    pack = stages.add_parser("pack", help="collect trained runs into a weight pack")
    pack.add_argument("--renderer", type=Path, required=True)
    pack.add_argument("--base", type=Path, required=True)
    pack.add_argument("--homogenizer", type=Path, required=True)
    pack.add_argument("-o", "--out", type=Path, required=True)
    pack.set_defaults(run=_pack)

    calibrate = stages.add_parser("calibrate", help="set a pack's brightness by the rendered photos of precomputed objects")
    calibrate.add_argument("cache", type=Path, help="folder made by precompute")
    calibrate.add_argument("--hdris", type=Path, required=True)
    calibrate.add_argument("--pack", type=Path, required=True, help="the pack to calibrate")
    calibrate.add_argument("--photos", type=int, default=3, help="drawn of each object")
    calibrate.add_argument("-o", "--out", type=Path, required=True, help="the calibrated pack")
    calibrate.add_argument("--report", type=Path, help="JSON file for what was measured")
    calibrate.set_defaults(run=_calibrate)
    return parser


def _cached(folder: Path) -> list[Path]:
    from near.errors import NearError

    files = sorted(folder.glob("*.pt"))
    if not files:
        raise NearError("training-cache-empty", f"{folder} holds no precomputed objects.", "Run near train precompute first.")
    return files


def _relit_files(folder: Path | None) -> list[Path]:
    from near.errors import NearError

    files = sorted(folder.glob("*.pt")) if folder else []
    if not files:
        raise NearError("training-relit-missing", "The homogeniser's head needs photos under many lights, and none were given.",
                        "Run near train relit first and name its folder with --relit.")
    return files


def _loop(args: argparse.Namespace):
    import numba
    import torch

    from near.training.loop import LoopConfig

    if args.threads:
        torch.set_num_threads(args.threads)
        numba.set_num_threads(min(args.threads, numba.config.NUMBA_NUM_THREADS))  # both share one OpenMP; the last word counts
    return LoopConfig(steps=args.steps, minutes=args.minutes, learning_rate=args.learning_rate, sheet_every=args.sheet_every,
                      save_every=args.save_every, seed=args.seed)


def _precompute(args: argparse.Namespace) -> int:
    import numba
    import torch
    from tqdm import tqdm

    from near.training.cache import CacheConfig, cache_folder
    from near.training.starter import object_files

    if args.parts > 1:
        torch.set_num_threads(1)
        numba.set_num_threads(1)
    sources = object_files(args.objects)[args.part::args.parts]
    with tqdm(total=len(sources), desc="precompute") as bar:
        cache_folder(sources, args.hdris, args.out, CacheConfig(), progress=lambda *_: bar.update())
    return 0


def _relit(args: argparse.Namespace) -> int:
    import numba
    import torch
    from tqdm import tqdm

    from near.training.relit import relit_folder

    if args.parts > 1:
        torch.set_num_threads(1)
        numba.set_num_threads(1)
    files = _cached(args.cache)
    with tqdm(total=len(files[args.part::args.parts]), desc="relit") as bar:
        relit_folder(files, args.hdris, args.out, args.part, args.parts, progress=bar.update)
    return 0


def _renderer(args: argparse.Namespace) -> int:
    import torch

    from near.training.renderer import RendererData, train_renderer
    from near.training.starts import renderer_from

    config = _loop(args)
    torch.manual_seed(config.seed)
    model = renderer_from(args.start, args.lad_layers)
    data = RendererData(_cached(args.cache), args.hdris, model.config.resolution)
    _finish(train_renderer(model, data, args.out, config), args.out / "renderer.safetensors")
    return 0


def _flow(args: argparse.Namespace) -> int:
    import torch

    from near.training.flow_data import FlowData
    from near.training.flows import residual_statistics, train_flow
    from near.training.pointwise import HEAD_LOOP, RelitData, train_pointwise
    from near.training.starts import base_flow_from, homogenizer_from

    config = _loop(args)
    torch.manual_seed(config.seed)
    if args.homogenizer:
        flow = homogenizer_from(args.start, base_flow_from(args.homogenizer / "flow.safetensors"), args.rank)
    else:
        flow = base_flow_from(args.start)
    data = FlowData(_cached(args.cache), "homogenizer" if args.homogenizer else "base", head=flow.pointwise)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "state.pt").exists():
        if args.start is None:  # what goes on keeps the units that it learned in
            mean, std = residual_statistics(flow, data)
            flow.residual_mean.copy_(mean)
            flow.residual_std.copy_(std)
        if args.homogenizer and args.pointwise_minutes > 0:
            train_pointwise(flow, RelitData(_relit_files(args.relit)), args.out,
                            replace(HEAD_LOOP, steps=args.pointwise_steps, minutes=args.pointwise_minutes, seed=config.seed,
                                    save_every=config.save_every, sheet_every=config.sheet_every))
    if args.homogenizer:  # its head is done
        flow.pointwise.requires_grad_(False)
    trained = train_flow(flow, data, args.out, config, batch=args.batch)
    _finish(trained.merged() if args.homogenizer else trained, args.out / "flow.safetensors")
    return 0


def _finish(model, path: Path) -> None:
    from safetensors.torch import save_model

    from near.training.loop import processes

    if not processes().is_main_process:
        return
    save_model(model, str(path))
    print(f"wrote {path}")


def _pack(args: argparse.Namespace) -> int:
    from near.models.compact import CompactConfig, CompactModels
    from near.training.starts import base_flow_from, renderer_from, stored_homogenizer
    from near.weights.integrity import write_manifest

    renderer, base = renderer_from(args.renderer / "renderer.safetensors"), base_flow_from(args.base / "flow.safetensors")
    theta = stored_homogenizer(args.homogenizer / "flow.safetensors", base.config)
    models = CompactModels(CompactConfig(homogenizer=theta.config), renderer, base, theta)
    models.save(args.out)
    manifest = write_manifest(args.out, "compact", {"config": models.config_dict()})
    total = sum(f["bytes"] for f in manifest["files"].values())
    print(f"wrote {args.out}: {total / 2**20:.1f} MB")
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from tqdm import tqdm

    from near.atomic import check_writable, write_bytes
    from near.models.compact import CompactModels
    from near.training.calibrate import brightness_bias, calibrate
    from near.weights.integrity import write_manifest

    if args.report:
        check_writable(args.report)
    files, models = _cached(args.cache), CompactModels.load(str(args.pack))
    with tqdm(total=len(files), desc="calibrate") as bar:
        bias = brightness_bias(models.homogenizer, files, args.hdris, args.photos, bar.update)
    calibrate(models.homogenizer, bias)
    models.save(args.out)
    write_manifest(args.out, "compact", {"config": models.config_dict()})
    if args.report:
        write_bytes(args.report, (json.dumps(asdict(bias), indent=1) + "\n").encode())
    print(f"{bias.photos} photos: objects are {math.exp(bias.mean):.3f} times as bright as answered (deviation of a photo: "
          f"{math.exp(bias.deviation):.2f} times); wrote {args.out}")
    return 0
