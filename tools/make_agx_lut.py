"""Measure AgX tables from Blender's OpenColorIO configuration and write `backend/near/colour/data/agx_srgb.npz`.

Usage: python tools/make_agx_lut.py [--config DIR_OR_CONFIG.ocio] [--out FILE] [--inverse 49]
Without --config the configuration of the installed bpy module is used.

The forward table is sampled, by running the transform, at the nodes of the transform's own lattice: matrix, log2
and node count are read from the processor, so interpolation adds no error. The inverse table is solved numerically.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import PyOpenColorIO as ocio

ROOT = Path(__file__).resolve().parents[1]
EXPONENT = 2.4  # the table holds values before this power; then the sRGB curve follows
INVERSE_LOG2 = (-10.0, 3.585)  # range of the inverse: 2^-10 .. 12


def find_config(given: str | None) -> Path:
    """The config file named by the user, or that of the installed bpy module."""
    if given:
        path = Path(given)
    else:
        import bpy

        path = Path(bpy.utils.system_resource("DATAFILES", path="colormanagement"))
    path = path / "config.ocio" if path.is_dir() else path
    if not path.is_file():
        sys.exit(f"There is no OpenColorIO configuration at {path}. Name one with --config.")
    return path


def agx_processor(config: Path):
    """OCIO processor from linear Rec.709 to the sRGB display's AgX view."""
    view = ocio.DisplayViewTransform(src="Linear Rec.709", display="sRGB", view="AgX", looksBypass=True)
    return ocio.Config.CreateFromFile(str(config)).getProcessor(view)


def shaper(processor) -> tuple[np.ndarray, float, float, int]:
    """(3x3 matrix before the logarithm, log2 scale, log2 offset, lattice size) of the processor."""
    matrix, scale, offset, logged = np.eye(3), 1.0, 0.0, False
    for step in processor.createGroupTransform():
        if isinstance(step, ocio.MatrixTransform):
            m = np.array(step.getMatrix()).reshape(4, 4)[:3, :3]
            if logged:
                scale, offset = m[0, 0], step.getOffset()[0]
            else:
                matrix = m @ matrix
        elif isinstance(step, ocio.LogTransform):
            assert step.getBase() == 2, f"expected a base-2 logarithm, got {step.getBase()}"
            logged = True
        elif isinstance(step, ocio.Lut3DTransform):
            assert logged, "expected a logarithm before the 3-D table"
            return matrix, scale, offset, step.getGridSize()
        else:
            sys.exit(f"This AgX has a step this tool does not know: {step!r}")
    sys.exit("This AgX has no 3-D table.")


def apply(cpu, rgb: np.ndarray) -> np.ndarray:
    out = np.ascontiguousarray(rgb, np.float32).copy()
    cpu.applyRGB(out)
    return out


def forward_table(processor) -> dict[str, np.ndarray]:
    matrix, scale, offset, size = shaper(processor)
    cpu = processor.getOptimizedCPUProcessor(ocio.OPTIMIZATION_LOSSLESS)
    node = np.arange(size) / (size - 1)
    codes = np.stack(np.meshgrid(node, node, node, indexing="ij"), -1).reshape(-1, 3)
    linear = np.exp2((codes - offset) / scale) @ np.linalg.inv(matrix).T
    display = np.clip(apply(cpu, linear), 0, None).astype(np.float64)
    decoded = np.where(display <= 0.04045, display / 12.92, ((display + 0.055) / 1.055) ** 2.4)
    table = decoded ** (1 / EXPONENT)
    assert table.max() <= 1 + 1e-5, f"table value {table.max()} above 1"
    lut = np.round(np.clip(table, 0, 1) * 65535).astype(np.uint16).reshape(size, size, size, 3)
    return {"working_from_lin709": matrix, "log2_scale": np.float64(scale), "log2_offset": np.float64(offset),
            "exponent": np.float64(EXPONENT), "lut": lut}


def test_colours(seed: int = 0, count: int = 400_000) -> np.ndarray:
    """Dense, saturated, negative, dark and very bright colours, [N, 3] float32."""
    rng = np.random.default_rng(seed)
    level = np.exp2(rng.uniform(-13, 6, (count, 1)))
    mixed = level * rng.dirichlet([0.35] * 3, count) * 3
    independent = np.exp2(rng.uniform(-13, 6, (count, 3)))
    uniform = rng.uniform(-0.5, 2, (count, 3))
    bright = np.exp2(rng.uniform(6, 14, (count // 8, 3)))
    return np.concatenate([mixed, independent, uniform, bright]).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="folder or config.ocio; default: the bpy module's")
    parser.add_argument("--out", type=Path, default=ROOT / "backend/near/colour/data/agx_srgb.npz")
    parser.add_argument("--inverse", type=int, default=49, help="nodes per side of the inverse table")
    args = parser.parse_args()
    config = find_config(args.config)
    processor = agx_processor(config)
    data = forward_table(processor)
    placeholder = {"inverse": np.zeros((2, 2, 2, 3), np.uint16), "inverse_range": np.array(INVERSE_LOG2)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(args.out, data | placeholder)

    sys.path.insert(0, str(ROOT / "backend"))
    from near.colour import agx

    agx.DATA = args.out
    from near.colour.fit_inverse import fit_inverse

    inverse = fit_inverse(args.inverse, *INVERSE_LOG2)
    low, high = INVERSE_LOG2
    data["inverse"] = np.round((inverse - low) / (high - low) * 65535).astype(np.uint16)
    data["inverse_range"] = np.array(INVERSE_LOG2)
    write(args.out, data)
    agx.tables.cache_clear()
    report(processor, agx, config, args.out)


def write(path: Path, data: dict[str, np.ndarray]) -> None:
    """Never leave half a file."""
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, **data)
    os.replace(part, path)


def report(processor, agx, config: Path, out: Path) -> None:
    """Print the errors and write them beside the table, with where it comes from."""
    x = test_colours()
    ours = agx.agx_srgb(x)
    facts = {"transform": "linear Rec.709 -> AgX, sRGB display, no look", "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest(),
             "config_description": ocio.Config.CreateFromFile(str(config)).getDescription(), "opencolorio": ocio.GetVersion(),
             "made_by": "tools/make_agx_lut.py", "colours_tested": len(x)}
    for name, cpu in (("default", processor.getDefaultCPUProcessor()),
                      ("lossless", processor.getOptimizedCPUProcessor(ocio.OPTIMIZATION_LOSSLESS))):
        error = np.abs(np.clip(apply(cpu, x), 0, 1) - ours) * 255
        facts[f"forward_{name}_max_255"], facts[f"forward_{name}_mean_255"] = float(error.max()), float(error.mean())
    rng = np.random.default_rng(1)
    photo = agx.agx_srgb((np.exp2(rng.uniform(-9, 3, (200_000, 1))) * rng.uniform(0.15, 1, (200_000, 3))).astype(np.float32))
    error = np.abs(agx.agx_srgb(agx.agx_inverse(photo)) - photo) * 255
    facts |= {"inverse_round_trip_mean_255": float(error.mean()), "inverse_round_trip_q999_255": float(np.quantile(error, 0.999)),
              "inverse_round_trip_max_255": float(error.max()), "bytes": out.stat().st_size}
    text = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in facts.items()}, indent=1)
    out.with_suffix(".json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # bpy may hang at interpreter exit
