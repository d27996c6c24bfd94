"""Photos, mattes, silhouettes, geometry sources."""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from mesh_files import quad, rasterise
from PIL import Image

from near.errors import NearError
from near.geometry.cameras import Camera, orbit_camera
from near.geometry.matting import matte, matte_preview
from near.geometry.mesh import RawMesh, to_asset_space
from near.geometry.photo import MAX_SIDE, Photo, exposed, load_photo, square_crop
from near.geometry.silhouette import SilhouetteSettings, silhouette_mesh
from near.geometry.sources import GeometryRequest, geometry_source, register_source, source_names, unregister_source
from near.wire import MAX_STOPS


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def code_of(action, *args) -> str:
    with pytest.raises(NearError) as info:
        action(*args)
    assert info.value.what and info.value.remedy
    return info.value.code


def gradient(width: int = 64, height: int = 48) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, 0 * x + 90], -1).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- loading


def test_kinds_of_images():
    rgb = gradient()
    plain = load_photo(encoded(Image.fromarray(rgb)))
    assert plain.srgb.shape == (48, 64, 3) and not plain.has_matte and len(plain.sha256) == 64
    assert torch.allclose(plain.srgb, torch.from_numpy(rgb) / 255)
    grey = rgb[..., 0]
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    palette = Image.fromarray(rgb).quantize(64)
    for data, reference, tolerance in (
            (encoded(Image.fromarray(grey)), grey[..., None].repeat(3, 2), 0.5), (encoded(wide), grey[..., None].repeat(3, 2), 1.0),
            (encoded(palette), np.asarray(palette.convert("RGB")), 0.5), (encoded(Image.fromarray(rgb).convert("CMYK"), "TIFF"), rgb, 3.0),
            (encoded(Image.fromarray(rgb), "WEBP", lossless=True), rgb, 0.5), (encoded(Image.fromarray(rgb), "JPEG", quality=97), rgb, 12.0)):
        photo = load_photo(data)
        assert np.abs(photo.srgb.numpy() * 255 - reference).max() <= tolerance and bool((photo.alpha == 1).all())


def png_file(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """A PNG written by hand; ``rows`` are not compressed yet and may be fewer than the header says."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_png():
    rgb = gradient()
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in rgb)
    assert np.abs(load_photo(png_file(64, 48, 16, 2, rows)).srgb.numpy() * 255 - rgb).max() <= 1


def test_orientation_alpha_and_size():
    image = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the right when shown
    turned = load_photo(encoded(image, "JPEG", exif=exif, quality=97))
    assert turned.srgb.shape == (64, 48, 3)
    assert np.abs(turned.srgb.numpy() * 255 - np.rot90(gradient(), -1)).max() < 14
    rgba = np.concatenate([gradient(), np.full((48, 64, 1), 255, np.uint8)], -1)
    rgba[10:20, 10:20, 3] = 128
    photo = load_photo(encoded(Image.fromarray(rgba)))
    assert photo.has_matte and float(photo.alpha.min()) == pytest.approx(128 / 255)
    big = load_photo(encoded(Image.new("RGB", (5000, 2500), "red"), "JPEG"))
    assert max(big.alpha.shape) == MAX_SIDE and big.alpha.shape[0] == MAX_SIDE // 2


@settings(max_examples=30, deadline=None)
@given(st.floats(-2, 2), st.floats(0.15, 0.75))
def test_an_exposure_brightens_and_is_undone(stops, value):
    photo = Photo(srgb=torch.tensor([value, value * 0.8, value * 0.6]).expand(32, 32, 3), alpha=torch.ones(32, 32), sha256="x")
    other = exposed(photo, stops)
    assert other.sha256 == "x" and torch.equal(other.alpha, photo.alpha)
    assert (other.srgb - photo.srgb).mean() * math.copysign(1, stops) > min(0.02 * abs(stops), 0.01) - 5e-3
    if abs(stops) <= 1:  # nothing is burnt out or drowned
        assert (exposed(other, -stops).srgb - photo.srgb).abs().max() < 0.02


def test_an_exposure_beyond_reason_is_refused():
    photo = Photo(srgb=torch.full((32, 32, 3), 0.5), alpha=torch.ones(32, 32))
    assert exposed(photo, 0.0) is photo
    assert {code_of(exposed, photo, stops) for stops in (MAX_STOPS + 1, -MAX_STOPS - 1, math.nan)} == {"exposure-invalid"}


def test_refused_photos(tmp_path):
    good = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)))
    assert code_of(load_photo, good[: len(good) // 2]) == "photo-damaged"
    assert code_of(load_photo, b"hello") == "photo-not-an-image"
    assert code_of(load_photo, b"") == "photo-not-an-image"
    assert code_of(load_photo, encoded(Image.new("RGB", (1, 1)))) == "photo-too-small"
    assert code_of(load_photo, encoded(Image.new("RGBA", (64, 64), (9, 9, 9, 0)))) == "photo-transparent"
    assert code_of(load_photo, png_file(40_000, 20_000, 8, 2, b"")) == "photo-too-big"
    assert code_of(load_photo, tmp_path / "none.png") == "photo-missing"
    assert code_of(load_photo, tmp_path) == "cannot-read"
    (tmp_path / "text.png").write_text("not a picture")
    assert code_of(load_photo, str(tmp_path / "text.png")) == "photo-not-an-image"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF"]), st.data())
def test_damaged_photos_never_crash(kind, data):
    content = bytearray(encoded(Image.fromarray(gradient()), kind))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        load_photo(bytes(content[:data.draw(st.integers(0, len(content)))]))
    except NearError:
        pass


def test_square_crop_frames_the_object():
    alpha = torch.zeros(100, 160)
    alpha[40:60, 100:150] = 1
    square = square_crop(Photo(torch.full((100, 160, 3), 0.5), alpha), 60)
    inside = square[..., 3] > 0.5
    assert square.shape == (60, 60, 4)
    assert int(inside.any(0).sum()) in range(50, 54) and int(inside.any(1).sum()) in range(20, 23)
    assert code_of(square_crop, Photo(torch.zeros(50, 50, 3), torch.zeros(50, 50)), 60) == "photo-no-object"


# ----------------------------------------------------------------------------------------------------------- mattes


def on_background(photo: Photo, background: torch.Tensor) -> Photo:
    alpha = photo.alpha[..., None]
    return Photo((photo.srgb * alpha + background * (1 - alpha)).clamp(0, 1), torch.ones_like(photo.alpha))


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("name, kind", [("typical_misc_crate", "white"), ("typical_creature_elephant", "gradient"), ("typical_misc_telephone", "shadow")])
def test_matte_of_plain_backgrounds(shared_dir, name, kind):
    with Image.open(shared_dir / "photos" / f"{name}.png") as image:
        photo = load_photo(encoded(image.resize((400, 400))))
    height, width = photo.alpha.shape
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    background = {"white": torch.ones(height, width, 3), "gradient": torch.stack([0.75 - 0.35 * y, 0.8 - 0.3 * y + 0.05 * x, 0.85 - 0.25 * y], -1),
                  "shadow": (0.9 - 0.2 * torch.exp(-((x - 0.5) / 0.3) ** 2 - ((y - 0.93) / 0.05) ** 2))[..., None].expand(-1, -1, 3)}[kind]
    cut = matte(on_background(photo, background))
    assert overlap(cut.alpha > 0.5, photo.alpha > 0.5) > 0.96
    # The rim's colours are the object's, not the background's.
    rim = (photo.alpha > 0.3) & (photo.alpha < 0.7) & (cut.alpha > 0.2)
    before = on_background(photo, background).srgb
    assert float((cut.srgb - photo.srgb)[rim].abs().mean()) < float((before - photo.srgb)[rim].abs().mean())
    assert matte_preview(cut).shape == (height, width, 3)


def test_matte_keeps_given_alpha_and_refuses_empty_pictures():
    photo = Photo(torch.rand(40, 40, 3), torch.cat([torch.zeros(20, 40), torch.ones(20, 40)]))
    assert matte(photo) is photo
    assert code_of(matte, Photo(torch.full((200, 200, 3), 0.7), torch.ones(200, 200))) == "photo-no-object"
    noise = 0.5 + 0.02 * torch.randn(200, 200, 3, generator=torch.Generator().manual_seed(0))
    assert code_of(matte, Photo(noise, torch.ones(200, 200))) == "photo-no-object"
    faint = torch.zeros(200, 200)
    faint[0, 0] = 0.1
    assert code_of(matte, Photo(torch.zeros(200, 200, 3), faint)) == "photo-no-object"


def test_matte_of_a_ring_keeps_its_hole():
    y, x = torch.meshgrid(torch.arange(240.0), torch.arange(300.0), indexing="ij")
    r = ((x - 150) ** 2 + (y - 120) ** 2).sqrt()
    ring = ((r - 45).clamp(-0.5, 0.5) + 0.5) * ((90 - r).clamp(-0.5, 0.5) + 0.5)
    cut = matte(on_background(Photo(torch.tensor([0.7, 0.2, 0.1]).expand(240, 300, 3), ring), torch.tensor([0.8, 0.85, 0.9])))
    assert overlap(cut.alpha > 0.5, ring > 0.5) > 0.98
    assert float((cut.alpha - ring).abs().mean()) < 0.01


# ------------------------------------------------------------------------------------------------------ silhouettes


def watertight(mesh) -> tuple[bool, float]:
    import trimesh

    solid = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    return bool(solid.is_watertight and solid.is_winding_consistent), float(solid.volume)


def shapes(width: int = 260, height: int = 200) -> torch.Tensor:
    """A ring, a bar apart from it, and a speck."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    r = ((x - 90) ** 2 + (y - 100) ** 2).sqrt()
    alpha = ((r > 30) & (r < 70)).float()
    alpha[30:170, 200:216] = 1
    alpha[5, 5] = 1
    return alpha


CAMERAS = {
    "front": lambda w, h: orbit_camera(0.0, 0.0, 2.0, math.radians(40), w, h),
    "above": lambda w, h: orbit_camera(0.7, 0.5, 3.0, math.radians(25), w, h),
    "ortho": lambda w, h: Camera(orbit_camera(-0.4, 0.2, 2.0, 0.7, w, h).cam_from_world,
                                 torch.tensor([[200.0, 0, w / 2], [0, 200, h / 2], [0, 0, 1]]), w, h, projection="orthographic"),
}


@pytest.mark.parametrize("view", CAMERAS)
def test_silhouette_is_closed_and_projects_onto_the_matte(view):
    alpha = shapes()
    photo = Photo(torch.rand(200, 260, 3, generator=torch.Generator().manual_seed(0)), alpha, "f" * 64)
    camera = CAMERAS[view](260, 200)
    mesh, seen_from = silhouette_mesh(photo, camera)
    closed, volume = watertight(mesh)
    assert closed and volume > 0
    size = mesh.vertices.amax(0) - mesh.vertices.amin(0)
    assert float(size.max()) == pytest.approx(1, abs=1e-5) and float((mesh.vertices.amax(0) + mesh.vertices.amin(0)).abs().max()) < 1e-5
    face, _, _ = rasterise(mesh, seen_from)
    alpha[5, 5] = 0
    assert overlap(torch.from_numpy(face >= 0), alpha > 0.5) > 0.97
    assert mesh.colors is not None and mesh.sha256 == "f" * 64
    # The camera keeps its direction: only the scale and the place of the object changed.
    assert torch.allclose(seen_from.cam_from_world[:3, :3], camera.cam_from_world[:3, :3], atol=1e-5)


def test_disc_becomes_a_sphere():
    y, x = torch.meshgrid(torch.arange(300.0), torch.arange(300.0), indexing="ij")
    alpha = (100.5 - ((x - 149.5) ** 2 + (y - 149.5) ** 2).sqrt()).clamp(0, 1)
    mesh, _ = silhouette_mesh(Photo(torch.zeros(300, 300, 3), alpha), CAMERAS["ortho"](300, 300), SilhouetteSettings(fullness=1.0, max_thickness=2.0))
    radius = mesh.vertices.norm(dim=-1)
    assert float(radius.max()) < 0.52 and float(radius.min()) > 0.44


def test_silhouette_colours_front_and_back():
    alpha = torch.zeros(100, 100)
    alpha[20:80, 20:80] = 1
    srgb = torch.zeros(100, 100, 3)
    srgb[:, :50, 0] = 1
    srgb[:, 50:, 2] = 1
    mesh, _ = silhouette_mesh(Photo(srgb, alpha), CAMERAS["front"](100, 100))
    left = mesh.vertices[:, 0] < -0.05
    assert bool((mesh.colors[left, 0] > 0.95).all()) and bool((mesh.colors[mesh.vertices[:, 0] > 0.05, 2] > 0.95).all())
    assert bool((mesh.vertices[left, 1] > 0.1).any()) and bool((mesh.vertices[left, 1] < -0.1).any())


@pytest.mark.parametrize("alpha", [torch.ones(64, 64), torch.nn.functional.pad(torch.ones(3, 3), (30, 31, 30, 31)),
                                   torch.nn.functional.pad(torch.ones(1, 60), (2, 2, 30, 33))])
def test_extreme_mattes_give_a_closed_mesh(alpha):
    mesh, _ = silhouette_mesh(Photo(torch.rand(64, 64, 3), alpha), CAMERAS["front"](64, 64))
    assert watertight(mesh)[0]


def test_silhouette_refuses():
    photo = Photo(torch.zeros(64, 64, 3), torch.zeros(64, 64))
    assert code_of(silhouette_mesh, photo, CAMERAS["front"](64, 64)) == "photo-no-object"
    assert code_of(silhouette_mesh, photo, CAMERAS["front"](32, 64)) == "camera-size"
    away = torch.eye(4)
    away[2, 3] = -3
    assert code_of(silhouette_mesh, Photo(torch.zeros(64, 64, 3), torch.ones(64, 64)), Camera(away, CAMERAS["front"](64, 64).K, 64, 64)) == "camera-behind"


# ---------------------------------------------------------------------------------------------------------- sources


def test_geometry_sources(monkeypatch):
    mesh = to_asset_space(RawMesh(*quad()[:2]))
    assert {"mesh", "silhouette"} <= set(source_names())
    assert geometry_source("mesh").build(GeometryRequest(mesh=mesh))[0] is mesh
    assert code_of(geometry_source("mesh").build, GeometryRequest()) == "geometry-needs-mesh"
    assert code_of(geometry_source("silhouette").build, GeometryRequest()) == "geometry-needs-photo"
    assert code_of(geometry_source, "none") == "geometry-source-unknown"

    class Plane:
        def build(self, request):
            return mesh, request.camera

    plane = Plane()
    register_source("plane", plane)
    try:
        assert geometry_source("plane") is plane and "plane" in source_names()
        assert code_of(register_source, "plane", Plane()) == "geometry-source-taken"
    finally:
        unregister_source("plane")

    import importlib.metadata as metadata

    entries = (metadata.EntryPoint("ok", "test_photo:FakeSource", "near.geometry"), metadata.EntryPoint("bad", "no_such_module:x", "near.geometry"))
    monkeypatch.setattr("near.geometry.sources.entry_points", lambda group: entries)
    assert {"ok", "bad"} <= set(source_names())
    assert geometry_source("ok").build(GeometryRequest())[1] is None
    unregister_source("ok")
    assert code_of(geometry_source, "bad") == "geometry-source-broken"


class FakeSource:
    def build(self, request):
        return to_asset_space(RawMesh(*quad()[:2])), None
