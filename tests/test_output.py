"""Files: right pixels, whole or absent."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from near.atomic import atomic_file, atomic_folder, check_writable
from near.colour import agx_srgb
from near.errors import NearError
from near.output import (OutputPlan, display_layer, display_over, display_straight, exr_bytes, over, plan_output, read_exr, read_rgba,
                         write_exr, write_picture, write_png, write_sequence, write_video)
from near.pipeline.types import PASSES


def layers(height: int = 6, width: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    out = {name: torch.rand(height, width, channels, generator=generator) for name, channels in PASSES.items()}
    out["alpha"] = out["color"][..., 3:].clone()
    out["color"][..., :3] *= out["alpha"]
    out["depth"][0] = float("inf")
    return out


def test_exr_holds_every_pass(tmp_path):
    made = layers()
    made["color"][0, 0] = torch.tensor([1e6, 0.0, 0.0, 1.0])
    write_exr(tmp_path / "f.exr", made)
    read = read_exr(tmp_path / "f.exr")
    assert set(read) == {"R", "G", "B", "A", "alpha.V", "base_color.R", "base_color.G", "base_color.B", "roughness.V", "metallic.V",
                         "shadow.V", "normal.X", "normal.Y", "normal.Z", "depth.Z"}
    np.testing.assert_allclose(read["G"], made["color"][..., 1], atol=1e-3)
    np.testing.assert_array_equal(read["depth.Z"], made["depth"][..., 0])
    assert read["R"][0, 0] == 65504  # half's largest, not infinity
    assert read_rgba(tmp_path / "f.exr").shape == (6, 9, 4)


def test_png_is_agx_of_straight_colour():
    color = torch.tensor([[[0.09, 0.09, 0.09, 0.5], [0.0, 0.0, 0.0, 0.0], [0.18, 0.18, 0.18, 1.0]]])
    shown = display_straight(color)
    grey = round(float(agx_srgb(torch.full((1, 3), 0.18))[0, 0]) * 255)
    assert shown[0, :, 0].tolist() == [grey, shown[0, 1, 0], grey]
    assert shown[0, :, 3].tolist() == [128, 0, 255]
    assert display_over(color)[0, 1].tolist() == [0, 0, 0]
    assert over(shown, (10, 20, 30))[0, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize("name", PASSES)
def test_every_layer_can_be_shown(name):
    shown = display_layer(name, layers())
    assert shown.dtype == np.uint8 and shown.shape == (6, 9, 4)


def test_depth_is_shown_near_white_far_black():
    depth = torch.tensor([[[1.0], [3.0], [float("inf")]]])
    assert display_layer("depth", {"depth": depth})[0, :, [0, 3]].T.tolist() == [[255, 255], [0, 255], [0, 0]]


def test_plan_by_name(tmp_path):
    assert plan_output(tmp_path / "a.png", 1).kind == "png"
    assert plan_output(tmp_path / "a.EXR", 1).kind == "exr"
    assert plan_output(tmp_path / "a.mp4", 9).kind == "mp4"
    assert plan_output(tmp_path / "folder", 9, "exr") == OutputPlan(tmp_path / "folder", "exr", folder=True)
    for name, frames, code in (("a.jpg", 1, "output-kind"), ("a.png", 2, "output-single")):
        with pytest.raises(NearError) as error:
            plan_output(tmp_path / name, frames)
        assert error.value.code == code


def test_picture_with_passes_is_all_or_none(tmp_path, monkeypatch):
    made = layers()
    written = write_picture(OutputPlan(tmp_path / "a.png", "png"), made)
    assert written[0] == tmp_path / "a.png" and len(written) == len(PASSES) == len(list(tmp_path.iterdir()))
    for path in written:
        path.unlink()
    import near.output

    encode, calls = near.output.png_bytes, []

    def fails_late(pixels):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return encode(pixels)

    monkeypatch.setattr(near.output, "png_bytes", fails_late)
    with pytest.raises(NearError, match="no room"):
        write_picture(OutputPlan(tmp_path / "a.png", "png"), made)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["png", "exr"])
def test_sequence_appears_when_done(tmp_path, kind):
    plan = OutputPlan(tmp_path / "seq", kind, folder=True)

    def frames():
        for _ in range(3):
            assert not plan.path.exists()
            yield {"color": layers()["color"]}

    assert [p.name for p in write_sequence(plan, frames())] == [f"frame_{i:04d}.{kind}" for i in range(3)]
    assert len(list(plan.path.iterdir())) == 3
    (plan.path / "notes.txt").write_text("kept")
    write_sequence(plan, iter([{"color": layers()["color"]}]))
    assert len(list(plan.path.iterdir())) == 4 and (plan.path / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_video_plays_back(tmp_path, suffix):
    import imageio.v3

    frames = [np.full((33, 47, 3), value, np.uint8) for value in (20, 120, 220)]  # odd sides on purpose
    write_video(OutputPlan(tmp_path / f"v.{suffix}", suffix), iter(frames), 10)
    back = imageio.v3.imread(tmp_path / f"v.{suffix}")
    assert len(back) == 3 and back.shape[1] in (33, 34) and back.shape[2] in (47, 48)
    assert [abs(int(b[10, 10, 0]) - v) < 12 for b, v in zip(back, (20, 120, 220))] == [True] * 3
    assert [p.name for p in tmp_path.iterdir()] == [f"v.{suffix}"]


@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_video_that_fails_leaves_nothing(tmp_path, suffix):
    def frames():
        yield np.zeros((16, 16, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(OutputPlan(tmp_path / f"v.{suffix}", suffix), frames(), 10)
    assert list(tmp_path.iterdir()) == []


def test_atomic_file_keeps_the_older_one(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as part:
        part.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with atomic_file(path) as part:
        part.write_bytes(b"new")
    assert path.read_bytes() == b"new"


def test_folders_made_on_the_way_go_with_the_failure(tmp_path):
    for context in (atomic_file, atomic_folder):
        with pytest.raises(RuntimeError), context(tmp_path / "a" / "b" / "c.png"):
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []


def test_writing_where_one_may_not(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NearError) as error:
        check_writable(tmp_path / "file" / "a.png")
    assert error.value.code == "cannot-write"
    with pytest.raises(NearError) as error:
        write_png(tmp_path, np.zeros((2, 2, 3), np.uint8))
    assert error.value.code == "cannot-write"
    check_writable(tmp_path / "new" / "deep" / "a.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_exr_is_a_plain_scanline_file():
    assert exr_bytes({"alpha": torch.ones(2, 2, 1)})[:4] == b"\x76\x2f\x31\x01"


def test_unreadable_exr_is_said(tmp_path):
    (tmp_path / "bad.exr").write_bytes(b"\x76\x2f\x31\x01" + b"\0" * 40)
    for name in ("bad.exr", "absent.exr"):
        with pytest.raises(NearError) as error:
            read_exr(tmp_path / name)
        assert error.value.code == "exr-unreadable"
