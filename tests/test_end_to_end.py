"""Photo in, relit pictures out: the real models, through the command line, on the sample that the package ships."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from near.cli import main
from near.demo import shipped_sample
from near.lighting.samples import sample_environment
from near.output import read_exr, read_rgba, write_environment


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the sample's asset, made from its photo, and two lights."""
    from near.weights.packs import compact_dir

    if not (compact_dir() / "manifest.json").is_file():
        pytest.skip("the compact weights are not in this checkout")
    folder, sample = tmp_path_factory.mktemp("chain"), shipped_sample()
    for name in ("studio", "sunset"):
        write_environment(folder / f"{name}.exr", sample_environment(name, 64))
    camera = ",".join(map(str, sample.camera_deg))
    assert main(["create", str(sample.photo), "--mesh", str(sample.mesh), "--camera", camera, "-o", str(folder / "a.near"), "--quiet"]) == 0
    return folder


def rendered(place: Path, light: str, *options: str) -> Path:
    out = place / f"{light}{len(list(place.iterdir()))}.exr"
    assert main(["render", str(place / "a.near"), "--hdri", str(place / f"{light}.exr"), "-o", str(out), "--quiet", *options]) == 0
    return out


def photo_camera() -> str:
    return "--camera=" + ",".join(map(str, shipped_sample().camera_deg))


@pytest.mark.slow
def test_the_asset_stands_where_the_photo_shows_it(place):
    from PIL import Image

    photo = np.asarray(Image.open(shipped_sample().photo).resize((128, 128), Image.Resampling.BOX), np.float32)[..., 3] / 255 > 0.5
    alpha = read_rgba(rendered(place, "studio", photo_camera(), "--size", "128x128", "--passes", "color"))[..., 3] > 0.5
    overlap = {(dy, dx): (photo & moved).sum() / (photo | moved).sum()
               for dy in (-1, 0, 1) for dx in (-1, 0, 1) for moved in (np.roll(alpha, (dy, dx), (0, 1)),)}
    assert max(overlap, key=overlap.get) == (0, 0) and overlap[0, 0] > 0.92


@pytest.mark.slow
def test_light_is_linear_and_matters(place):
    options = (photo_camera(), "--size", "96x96", "--passes", "color")
    once, again = (read_rgba(rendered(place, "studio", *options)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    doubled = read_rgba(rendered(place, "studio", *options, "--strength", "2"))
    seen = once[..., 3] > 0.9
    assert np.abs(doubled[seen][:, :3].mean(0) / once[seen][:, :3].mean(0) - 2).max() < 0.06
    turned = read_rgba(rendered(place, "studio", *options, "--rotation", "120"))
    other = read_rgba(rendered(place, "sunset", *options))
    for changed in (turned, other):
        np.testing.assert_allclose(changed[..., 3], once[..., 3], atol=2e-3)
        assert np.abs(changed[seen][:, :3] - once[seen][:, :3]).mean() > 0.1 * once[seen][:, :3].mean()


@pytest.mark.slow
def test_passes_are_what_they_say(place):
    channels = read_exr(rendered(place, "studio", photo_camera(), "--size", "96x96"))
    seen = channels["A"] > 0.99
    radius = shipped_sample().camera_deg[2]
    assert np.isinf(channels["depth.Z"][channels["A"] == 0]).all() and abs(channels["depth.Z"][seen] - radius).max() < 0.87
    length = np.sqrt(sum(channels[f"normal.{axis}"] ** 2 for axis in "XYZ"))
    assert abs(length[seen] - 1).max() < 0.01
    for name in ("roughness.V", "metallic.V", "shadow.V", "base_color.R", "base_color.G", "base_color.B"):
        assert channels[name][seen].min() >= 0 and channels[name][seen].max() <= 1.01 and channels[name][channels["A"] == 0].max() == 0
    assert channels["metallic.V"][seen].mean() < 0.5


@pytest.mark.slow
def test_encode_keeps_the_mesh_materials(place, capsys):
    sample = shipped_sample()
    assert main(["encode", str(sample.mesh), "-o", str(place / "e.near"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["meta"]["kind"] == "encode" and record["gaussians"] > 10_000
    out = place / "e.exr"
    assert main(["render", str(place / "e.near"), "--hdri", str(place / "studio.exr"), "-o", str(out), photo_camera(), "--size", "96x96", "--quiet"]) == 0
    channels = read_exr(out)
    seen = channels["A"] > 0.99
    knob = seen & (np.arange(96)[:, None] < 33) & (np.abs(np.arange(96) - 47) < 5)  # brass
    body = seen & (np.abs(np.arange(96)[:, None] - 73) < 2) & (np.abs(np.arange(96) - 45) < 10)  # glazed, below the band
    assert channels["metallic.V"][knob].mean() > 0.7 and channels["metallic.V"][body].mean() < 0.15
    assert channels["base_color.G"][body].mean() > 2 * channels["base_color.R"][body].mean()
