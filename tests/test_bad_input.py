"""What a user can get wrong: each case has its code, its sentence, its remedy, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_engine import FakeEngine, small_asset

from near.assets import save_asset
from near.cli import main
from near.output import write_exr


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with good inputs, entered; only the neural work is fake, every reader and writer is real."""
    monkeypatch.setattr("near.pipeline.engine.Engine", FakeEngine)
    monkeypatch.chdir(tmp_path)
    save_asset("good.near", small_asset())
    write_exr("good.exr", {"color": torch.full((8, 16, 4), 0.5)})
    photo(good_pixels(), "good.png")
    Path("good.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n")
    return tmp_path


def good_pixels() -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    pixels[24:72, 24:72, 3] = 255
    return pixels


def photo(pixels: np.ndarray, name: str) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(name)


def refuses(capsys, code: str, sentence: str, *arguments: str) -> None:
    """The command ends with status 2 and the error's two lines, and no file is new, changed or gone."""
    before = snapshot()
    status = main([str(a) for a in arguments])
    shown = capsys.readouterr()
    assert status == 2, shown.err
    first, second = [line for line in shown.err.strip().splitlines() if not line.startswith(("create", "encode", "render"))][-2:]
    assert first.startswith(f"Error [{code}]: ") and re.search(sentence, first), shown.err
    assert second.startswith("What to do: ") and len(second) > 25 and "Traceback" not in shown.err
    assert snapshot() == before


def snapshot() -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in Path().rglob("*")}


def create(capsys, code, sentence, *arguments) -> None:
    refuses(capsys, code, sentence, "create", *arguments, "-o", "new.near", "--quiet")


def encode(capsys, code, sentence, mesh) -> None:
    refuses(capsys, code, sentence, "encode", mesh, "-o", "new.near", "--quiet")


def render(capsys, code, sentence, *arguments, asset="good.near", hdri="good.exr", output="new.png") -> None:
    refuses(capsys, code, sentence, "render", asset, "--hdri", hdri, "-o", output, "--size", "32x32", "--quiet", *arguments)


# -- photos --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_photo(place, capsys, share):
    data = Path("good.png").read_bytes()
    Path("cut.png").write_bytes(data[:int(len(data) * share)])
    create(capsys, "photo-damaged", "cut.png", "cut.png")


def test_truncated_in_its_header(place, capsys):
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:20])
    create(capsys, "photo-not-an-image", "cut.png", "cut.png")


def test_transparent_photo(place, capsys):
    photo(np.zeros((96, 96, 4), np.uint8), "clear.png")
    create(capsys, "photo-transparent", "fully transparent", "clear.png")


def test_exposure_out_of_range(place, capsys):
    create(capsys, "exposure-invalid", "9 stops", "good.png", "--exposure", "9")


def test_one_pixel_photo(place, capsys):
    photo(np.full((1, 1, 4), 255, np.uint8), "dot.png")
    create(capsys, "photo-too-small", "1 x 1 pixels", "dot.png")


def test_text_as_photo_and_no_photo(place, capsys):
    Path("text.png").write_text("no picture")
    create(capsys, "photo-not-an-image", "text.png", "text.png")
    create(capsys, "photo-missing", "absent.png", "absent.png")


# -- meshes --------------------------------------------------------------------------------------------------------------

def test_empty_mesh(place, capsys):
    Path("empty.obj").write_text("# nothing\n")
    encode(capsys, "mesh-empty", "empty.obj holds no triangles", "empty.obj")
    Path("points.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    encode(capsys, "mesh-empty", "points.obj holds no triangles", "points.obj")
    create(capsys, "mesh-empty", "no triangles", "good.png", "--mesh", "empty.obj")


def test_mesh_of_one_point(place, capsys):
    Path("flat.obj").write_text("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n")
    encode(capsys, "mesh-flat", "no extent", "flat.obj")


def test_mesh_that_is_not_finite(place, capsys):
    Path("nan.obj").write_text("v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n")
    encode(capsys, "mesh-not-finite", "NaN or infinite", "nan.obj")


def test_cut_and_unknown_meshes(place, capsys):
    Path("cut.glb").write_bytes(b"glTF" + struct.pack("<II", 2, 4096) + b"\0" * 40)
    encode(capsys, "mesh-unreadable", "cut.glb", "cut.glb")
    Path("m.fbx").write_bytes(b"Kaydara")
    encode(capsys, "mesh-format", "m.fbx", "m.fbx")
    encode(capsys, "mesh-missing", "absent.obj", "absent.obj")


def test_non_manifold_mesh_is_welcome(place):
    """Three faces on one edge, an open border, a doubled face: artists' meshes are like that."""
    Path("odd.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nv 0 -1 0\nf 1 2 3\nf 1 2 4\nf 1 2 5\nf 1 2 3\n")
    assert main(["encode", "odd.obj", "-o", "odd.near", "--quiet"]) == 0 and Path("odd.near").is_file()


def grid_ply(name: str, side: int) -> None:
    """2 * side^2 triangles in a binary PLY file."""
    y, x = np.mgrid[0:side + 1, 0:side + 1].astype("<f4")
    vertices = np.stack([x, y, np.sin(x / 9) * np.cos(y / 9)], -1).reshape(-1, 3)
    corner = (np.arange(side)[:, None] * (side + 1) + np.arange(side)).ravel()
    triangles = np.concatenate([np.stack([corner, corner + 1, corner + side + 1], -1), np.stack([corner + 1, corner + side + 2, corner + side + 1], -1)])
    faces = np.empty(len(triangles), dtype=[("n", "u1"), ("i", "<i4", 3)])
    faces["n"], faces["i"] = 3, triangles
    header = (f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
              f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n")
    Path(name).write_bytes(header.encode() + np.ascontiguousarray(vertices).tobytes() + faces.tobytes())


@pytest.mark.slow
def test_million_triangles_are_read(place):
    grid_ply("million.ply", 710)
    assert main(["encode", "million.ply", "-o", "million.near", "--quiet"]) == 0


def test_more_triangles_than_stated_are_refused(place, capsys):
    header = ("ply\nformat binary_little_endian 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
              "element face 50000000\nproperty list uchar int vertex_indices\nend_header\n")
    Path("huge.ply").write_bytes(header.encode() + b"\0" * 64)
    encode(capsys, "mesh-too-big", "50,?000,?000", "huge.ply")


# -- lights --------------------------------------------------------------------------------------------------------------

def test_light_with_nan(place, capsys):
    pixels = torch.full((8, 16, 4), 0.5)
    pixels[3, 4, 1] = float("nan")
    write_exr("nan.exr", {"color": pixels})
    render(capsys, "light-not-finite", "1 NaN", hdri="nan.exr")
    assert main(["render", "good.near", "--hdri", "nan.exr", "-o", "new.png", "--size", "32x32", "--repair-hdri", "--quiet"]) == 0


def test_light_that_is_not_two_to_one(place, capsys):
    write_exr("square.exr", {"color": torch.full((16, 16, 4), 0.5)})
    render(capsys, "light-shape", "16 x 16 pixels; an equirectangular map is twice as wide", hdri="square.exr")


def test_light_that_is_cut_or_no_light(place, capsys):
    data = Path("good.exr").read_bytes()
    Path("cut.exr").write_bytes(data[:len(data) // 2])
    render(capsys, "light-unreadable", "cut.exr", hdri="cut.exr")
    render(capsys, "light-format", "good.png", hdri="good.png")
    render(capsys, "light-missing", "absent.exr", hdri="absent.exr")


# -- assets and weights --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_asset_cut(place, capsys, share):
    data = Path("good.near").read_bytes()
    Path("cut.near").write_bytes(data[:int(len(data) * share)])
    render(capsys, "asset-damaged", "cut.near is not a complete asset", asset="cut.near")
    refuses(capsys, "asset-damaged", "cut.near", "inspect", "cut.near")


def test_asset_that_is_none(place, capsys):
    render(capsys, "asset-damaged", "good.png", asset="good.png")
    render(capsys, "asset-missing", "absent.near", asset="absent.near")


def test_weights_with_a_wrong_sha256(place, capsys, monkeypatch):
    from near.weights.integrity import write_manifest

    pack = Path("pack")
    pack.mkdir()
    (pack / "renderer.safetensors").write_bytes(b"\0" * 1000)
    write_manifest(pack, "compact", {"config": {}})
    data = bytearray((pack / "renderer.safetensors").read_bytes())
    data[500] ^= 1
    (pack / "renderer.safetensors").write_bytes(data)
    monkeypatch.undo()  # the real engine refuses before it loads anything
    os.chdir(place)
    refuses(capsys, "weights-tampered", "renderer.safetensors", "encode", "good.obj", "-o", "new.near", "--quiet", "--pack", "pack")


# -- cameras and sizes ---------------------------------------------------------------------------------------------------

def test_camera_inside_the_object(place, capsys):
    render(capsys, "camera-inside", "inside the object", "--camera", "0,0,0.05,40")
    render(capsys, "camera-inside", "frame 0", "--camera", "0,0,0.05,40", "--turntable", "3", output="new.gif")


@pytest.mark.parametrize("size, code", [("0x0", "camera-size"), ("20000x20000", "camera-size"), ("16000x16000", "camera-size"), ("-5x9", "camera-size"),
                                        ("512", "size-invalid"), ("9e9x1", "size-invalid")])
def test_impossible_size(place, capsys, size, code):
    refuses(capsys, code, re.escape(size.replace("x", " x ")) if code == "camera-size" else size, "render", "good.near", "--hdri", "good.exr",
            "-o", "new.png", f"--size={size}")


# -- outputs -------------------------------------------------------------------------------------------------------------

def test_output_into_a_file_or_folder(place, capsys):
    Path("folder.near").mkdir()
    for output in ("good.png/new.png", "/proc/none/new.png" if sys.platform == "linux" else "good.png/x/new.png"):
        render(capsys, "cannot-write", "new.png could not be written", output=output)
    refuses(capsys, "cannot-write", "folder.near", "encode", "good.obj", "-o", "folder.near", "--quiet")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_output_where_one_may_not_write(place, capsys):
    Path("locked").mkdir(mode=0o500)
    render(capsys, "no-permission", "may not be written", output="locked/new.png")


def test_output_on_a_read_only_disc(place, capsys, monkeypatch):
    real = Path.open

    def refuse(path, mode="r", *rest, **options):
        if "w" in mode:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, mode, *rest, **options)

    monkeypatch.setattr("pathlib.Path.open", refuse)
    render(capsys, "no-permission", "may not be written")


class FullDisc:
    """Makes every write of more than a few bytes fail, as a full disc does: the file is there, its content is not."""

    def __init__(self, monkeypatch) -> None:
        real = Path.open

        def opened(path, mode="r", *rest, **options):
            file = real(path, mode, *rest, **options)
            if "w" in mode:
                write = file.write

                def full(data):
                    if len(data) > 16:
                        write(data[:16])
                        file.flush()
                        raise OSError(errno.ENOSPC, "No space left on device")
                    return write(data)

                file = Wrapped(file, full)
            return file

        monkeypatch.setattr("pathlib.Path.open", opened)


class Wrapped:
    def __init__(self, file, write) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


@pytest.mark.parametrize("command", [
    ["encode", "good.obj", "-o", "new.near"], ["create", "good.png", "-o", "new.near"], ["render", "good.near", "--hdri", "good.exr", "-o", "new.png"],
    ["render", "good.near", "--hdri", "good.exr", "-o", "new.exr"], ["render", "good.near", "--hdri", "good.exr", "-o", "frames", "--turntable", "3"],
    ["render", "good.near", "--hdri", "good.exr", "-o", "new.gif", "--turntable", "3"]], ids=lambda c: f"{c[0]}-{c[-1]}")
def test_disc_full(place, capsys, monkeypatch, command):
    FullDisc(monkeypatch)
    size = ["--size", "32x32"] if command[0] == "render" else []
    refuses(capsys, "disk-full", "no room", *command, *size, "--quiet")


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounts a small file system")
def test_disc_really_full(place, capsys):
    disc = place / "disc"
    disc.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disc)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (disc / "fill").write_bytes(b"\0" * shutil.disk_usage(disc).free)
        for output in ("new.exr", "new.mp4", "frames"):
            extra = ["--turntable", "24", "--format", "exr"] if output != "new.exr" else []
            refuses(capsys, "disk-full", "no room", "render", "good.near", "--hdri", "good.exr", "-o", f"disc/{output}", "--size", "256x256", "--quiet", *extra)
    finally:
        subprocess.run(["umount", "-l", str(disc)], check=True)
    shutil.rmtree(disc)
