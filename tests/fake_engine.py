"""An engine that costs nothing: reads its inputs as the real one does, renders a lit disc. For tests of what lies around it."""

from __future__ import annotations

import torch

from near.assets import Asset
from near.pipeline.types import PASSES, Frame, check_passes

CHANNELS = PASSES


def small_asset(**meta) -> Asset:
    """The shell of a cube of 6^3 voxels in a grid of 16."""
    index = torch.stack(torch.meshgrid(*[torch.arange(5, 11)] * 3, indexing="ij"), -1).reshape(-1, 3)
    shell = index[((index == 5) | (index == 10)).any(-1)]
    return Asset(coords=shell.to(torch.uint8), feats=torch.zeros(len(shell), 8, dtype=torch.float16), resolution=16, meta=meta)


class FakeEngine:
    """Stands in for near.pipeline.engine.Engine; ``calls`` counts, ``fail`` maps a method's name to an error to raise."""

    def __init__(self, pack: str = "compact", device: str = "auto") -> None:
        self.pack, self.device = pack, "cpu"
        self.calls: list[tuple] = []
        self.fail: dict[str, Exception] = {}

    def _called(self, name: str, *details) -> None:
        self.calls.append((name, *details))
        if name in self.fail:
            raise self.fail[name]

    def encode(self, mesh, *, seed=0, progress=None, cancelled=None) -> Asset:
        from near.geometry.mesh import PbrMesh, load_mesh

        self._called("encode", mesh)
        mesh = mesh if isinstance(mesh, PbrMesh) else load_mesh(mesh)
        if progress:
            progress("encode", 0.5, None)
        return small_asset(kind="encode", seed=seed, mesh_sha256=mesh.sha256)

    def create(self, photo, *, mesh=None, camera=None, seed=0, steps=None, exposure_stops=0.0, progress=None, cancelled=None) -> Asset:
        self._called("create", photo, mesh, camera, steps, exposure_stops)
        if progress:
            progress("sample", 0.5, None)
        return small_asset(kind="create", seed=seed)

    def render(self, placed, light, camera, *, passes=("color",), quality="full", cancelled=None) -> Frame:
        passes = check_passes(passes)
        self._called("render", camera, passes, quality, light.env_from_world.clone())
        y, x = torch.meshgrid(torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
        radius = min(camera.width, camera.height) * 0.3
        alpha = (radius + 0.5 - torch.hypot(x - camera.width / 2, y - camera.height / 2)).clamp(0, 1)[..., None]
        value = light.rgb_lin709.mean() * light.strength
        layers = {}
        for name in passes:
            if name == "color":
                layers[name] = torch.cat([(value * alpha).expand(-1, -1, 3), alpha], -1)
            elif name == "depth":
                layers[name] = torch.where(alpha > 0, torch.tensor(2.0), torch.tensor(float("inf")))
            elif name == "alpha":
                layers[name] = alpha
            else:
                layers[name] = (0.5 * (alpha > 0)).expand(-1, -1, CHANNELS[name])
        return Frame(camera, layers)
