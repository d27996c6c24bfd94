"""What is to be made: the job, its objects, and the seeds that make each object the same wherever it is rendered."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

OWN, ASSET = "own", "asset"
SUFFIXES = (".glb", ".gltf", ".blend", ".obj", ".fbx", ".ply")
WHITE = "white"  # the homogeneous light's file, beside the others


class JobError(Exception):
    """A job that cannot be started; the text says why and what to do."""


@dataclass(frozen=True)
class JobConfig:
    """All that decides the files' content. Counts are per object: ``cameras``, ``lights`` under each camera, ``photos``, surface
    ``points``; sizes in pixels; ``samples`` per pixel; ``own_lights``: environments made by the engine itself."""

    own: int = 0
    repeats: int = 1
    seed: int = 1
    size: int = 128
    samples: int = 40
    cameras: int = 4
    lights: int = 3
    photos: int = 2
    photo_size: int = 256
    points: int = 20000
    own_lights: int = 48
    shards: int = 8
    shadow: bool = True

    def __post_init__(self) -> None:
        least = {"own": 0, "repeats": 1, "seed": 0, "size": 16, "samples": 1, "cameras": 1, "lights": 1, "photos": 0, "photo_size": 16,
                 "points": 100, "own_lights": 0, "shards": 1}
        for name, low in least.items():
            if not low <= getattr(self, name) <= 10_000_000:
                raise JobError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}.")
        if max(self.size, self.photo_size) > 4096:
            raise JobError("Pictures of more than 4096 pixels are not made.")


@dataclass(frozen=True)
class Item:
    """One object to make. key: its name and the source of its seeds; asset: path relative to the assets' folder."""

    key: str
    kind: str
    asset: str | None = None

    def seed(self, job_seed: int, purpose: str) -> list[int]:
        """For `np.random.default_rng`: one stream for each purpose, the same on every machine."""
        return [job_seed, *np.frombuffer(hashlib.sha256(f"{self.key}/{purpose}".encode()).digest()[:16], "<u4").tolist()]

    def file(self, shards: int) -> str:
        """Path relative to the output folder."""
        return f"objects/{int(hashlib.sha256(self.key.encode()).hexdigest()[:8], 16) % shards:03d}/{self.key}.npz"


def list_items(config: JobConfig, assets: Path | None) -> list[Item]:
    """Own objects, then every asset ``repeats`` times. Keys do not depend on the other objects, so a job can grow.

    Raises:
        JobError: there is nothing to make.
    """
    items = [Item(f"own_{k:06d}", OWN) for k in range(config.own)]
    if assets is not None:
        if not assets.is_dir():
            raise JobError(f"There is no folder {assets}.")
        files = sorted(p.relative_to(assets).as_posix() for p in assets.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise JobError(f"{assets} holds no assets ({', '.join(SUFFIXES)}).")
        for name in files:
            stem = "".join(c if c.isalnum() else "_" for c in Path(name).stem)[:40]
            tag = hashlib.sha256(name.encode()).hexdigest()[:8]
            items += [Item(f"{stem}_{tag}_{k}", ASSET, name) for k in range(config.repeats)]
    if not items:
        raise JobError("There is nothing to make: ask for --own objects, or name a folder of --assets.")
    return items


def claim(out: Path, config: JobConfig, lights: dict[str, str]) -> None:
    """Write ``job.json``, or check that the folder belongs to the same job; a job may grow in own objects, assets, repeats.

    Raises:
        JobError: the folder holds files of another job.
    """
    from near.atomic import write_bytes

    growing = ("own", "repeats")
    mine = {**{k: v for k, v in asdict(config).items() if k not in growing}, "hdris": lights}
    file = out / "job.json"
    if file.is_file():
        theirs = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(k for k in mine if theirs.get(k) != mine[k])
        if differing:
            raise JobError(f"{out} was begun with other settings ({', '.join(differing)}): choose another folder, or the same settings.")
        return
    write_bytes(file, (json.dumps(mine, indent=1) + "\n").encode())
