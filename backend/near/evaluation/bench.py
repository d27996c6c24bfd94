"""A bench folder as data: models, photos, targets (format: the README beside the bench's ``index.json`` conventions)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from near.errors import NearError

if TYPE_CHECKING:
    from near.geometry.cameras import Camera
    from near.lighting import Environment

TASKS = ("forward", "reconstruction", "relighting", "novel_view")
PHOTO_TASKS = ("reconstruction", "relighting", "novel_view")


@dataclass(frozen=True)
class View:
    """A camera as the index states it: Blender camera-to-world [4][4], K [3][3] pixels, (width, height)."""

    matrix_world: tuple[tuple[float, ...], ...]
    K: tuple[tuple[float, ...], ...]
    resolution: tuple[int, int]

    @classmethod
    def from_json(cls, entry: dict) -> View:
        rows = lambda m: tuple(tuple(float(v) for v in row) for row in m)  # noqa: E731
        return cls(rows(entry["matrix_world"]), rows(entry["K"]), (int(entry["resolution"][0]), int(entry["resolution"][1])))

    def camera(self) -> Camera:
        import torch

        from near.geometry.cameras import camera_from_blender

        return camera_from_blender(torch.tensor(self.matrix_world, dtype=torch.float64), torch.tensor(self.K, dtype=torch.float64),
                                   *self.resolution)


@lru_cache(maxsize=16)  # targets share lights
def _load_light(path: Path) -> Environment:
    from near.lighting import load_environment

    return load_environment(path)


@dataclass(frozen=True)
class Light:
    """HDRI path relative to the bench, and its turn: radiance from world direction d is map(Rz(rotation_z_rad) d)."""

    hdri: str
    rotation_z_rad: float

    @property
    def name(self) -> str:
        return Path(self.hdri).stem

    def environment(self, root: Path) -> Environment:
        from near.lighting import Environment, rotation_z

        light = _load_light(root / self.hdri)
        return Environment(light.rgb_lin709, rotation_z(self.rotation_z_rad), light.strength)


@dataclass(frozen=True)
class Target:
    """One picture to predict. ``image``: path relative to the bench, also of the prediction below its task's folder."""

    model: str
    image: str
    view: View
    light: Light
    label: str


@dataclass(frozen=True)
class BenchModel:
    """One object: mesh and photo (paths relative to the bench), the photo's view, and its targets by task.

    normalise: [4][4] from the mesh's world as Blender imports it to bench space.
    """

    name: str
    mesh: str
    photo: str
    photo_view: View
    photo_light: Light
    normalise: tuple[tuple[float, ...], ...]
    targets: dict[str, tuple[Target, ...]]


@dataclass(frozen=True)
class Bench:
    root: Path
    split: str
    models: tuple[BenchModel, ...]


def load_bench(root: Path | str, models: list[str] | None = None) -> Bench:
    """Read ``index.json``; every file that the tasks will need is looked for now, not after an hour.

    Raises:
        NearError: ``bench-missing``, ``bench-invalid``, ``bench-incomplete``, ``model-unknown``.
    """
    root = Path(root)
    try:
        index = json.loads((root / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NearError("bench-missing", f"{root} holds no readable index.json.", "Name the folder of a bench.") from error
    try:
        found = tuple(_model(entry) for entry in index["models"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise NearError("bench-invalid", f"The bench's index.json lacks something ({type(error).__name__}: {error}).",
                        "Use a bench of the format that this version reads.") from error
    if models:
        unknown = sorted(set(models) - {m.name for m in found})
        if unknown:
            raise NearError("model-unknown", f"The bench has no model {', '.join(unknown)}.", f"Choose from {', '.join(m.name for m in found)}.")
        found = tuple(m for m in found if m.name in models)
    for model in found:
        files = {model.mesh, model.photo, *(t.image for ts in model.targets.values() for t in ts), *(t.light.hdri for ts in model.targets.values() for t in ts)}
        missing = sorted(f for f in files if not (root / f).is_file())
        if missing:
            raise NearError("bench-incomplete", f"{len(missing)} files of {model.name} are missing, the first is {missing[0]}.", "Copy the bench again.")
    return Bench(root, str(index.get("split", root.name)), found)


def _model(entry: dict) -> BenchModel:
    name, photo = entry["model"], entry["photo"]

    def target(view: View, light: dict, where: str) -> Target:
        lit = Light(light["hdri"], float(light["rotation_z"]))
        return Target(name, light["image"], view, lit, f"{where}, {lit.name}")

    views = []
    for view in entry["views"]:
        seen = View.from_json(view["camera"])
        views += [target(seen, light, f"camera {view['camera_id']}") for light in view["lights"]]
    photo_view = View.from_json(entry["photo_view"]["camera"])
    at_photo = [(light["kind"], target(photo_view, light, "photo")) for light in entry["photo_view"]["lights"]]
    targets = {"forward": tuple(views), "novel_view": tuple(views),
               "reconstruction": tuple(t for kind, t in at_photo if kind == "own"),
               "relighting": tuple(t for kind, t in at_photo if kind == "new")}
    normalise = tuple(tuple(map(float, row)) for row in entry["info"]["normalise_matrix"])
    return BenchModel(name, entry["model_file"], photo["image"], View.from_json(photo["camera"]),
                      Light(photo["hdri"], float(photo["rotation_z"])), normalise, targets)
