"""The job's lights as files beside its objects: the user's HDRIs, the engine's own environments, and white."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from dataset.environments import make_environment
from dataset.job import WHITE, JobConfig, JobError

HEIGHT = 256  # of the user's HDRIs; energy is kept


def prepare_lights(folder: Path, config: JobConfig, hdris: Path | None) -> dict[str, str]:
    """Write what is missing of the lights into ``folder``; returns sha256 by name.

    Raises:
        JobError: no light at all, two of one name. NearError: an HDRI that cannot be read.
    """
    import torch

    from near.lighting import load_environment
    from near.lighting.equirect import resample_equirect
    from near.output import write_environment
    from near.lighting.environment import environment_from_array

    wanted: dict[str, object] = {WHITE: lambda: np.ones((16, 32, 3), np.float32)}
    for k in range(config.own_lights):
        wanted[f"own_{k:04d}"] = lambda k=k: make_environment(config.seed * 100_003 + k)[0]
    if hdris is not None and not hdris.is_dir():
        raise JobError(f"There is no folder {hdris}.")
    for path in sorted(p for p in hdris.iterdir() if p.suffix.lower() in (".exr", ".hdr")) if hdris else []:
        if path.stem in wanted:
            raise JobError(f"Two lights are called {path.stem}: rename {path}.")
        wanted[path.stem] = lambda path=path: _reduced(load_environment(path, allow_repair=True).rgb_lin709, resample_equirect)
    if len(wanted) == 1:
        raise JobError("There is no light: ask for --own-lights, or name a folder of --hdris.")
    found = {}
    for name, make in wanted.items():
        file = folder / f"{name}.exr"
        if not file.is_file():
            write_environment(file, environment_from_array(torch.as_tensor(make())))
        found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _reduced(rgb, resample):
    return resample(rgb, HEIGHT, 2 * HEIGHT) if rgb.shape[0] > HEIGHT else rgb
