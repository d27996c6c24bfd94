"""Asset files, published SLATs, the store."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from near.assets import Anchors, Asset, AssetStore, decode_asset, encode_asset, import_npz, inspect_asset, load_asset, save_asset
from near.assets import format as file_format
from near.errors import NearError


def make_asset(seed: int = 0, voxels: int = 7, anchors: bool = True, proxy: bool = True, visibility: int = 9, meta: dict | None = None) -> Asset:
    g = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape, dtype):
        return torch.randint(low, high, shape, generator=g).to(dtype)

    cells = torch.randperm(32 ** 3, generator=g)[:voxels].sort().values
    coords = torch.stack([cells // 1024, cells // 32 % 32, cells % 32], -1).to(torch.uint8)
    counts = integers(0, 5, voxels, dtype=torch.int32)
    total = int(counts.sum())
    discs = Anchors(counts, integers(0, 256, total, 3, dtype=torch.uint8), integers(-127, 128, total, 3, dtype=torch.int8),
                    integers(-127, 128, total, 3, dtype=torch.int8), torch.rand(total, generator=g).half(),
                    integers(-127, 128, total, 5, dtype=torch.int8), integers(-127, 128, total, visibility, dtype=torch.int8)) if anchors else None
    return Asset(coords, torch.randn(voxels, 8, generator=g).half(), 32, discs, color_feats=torch.randn(voxels, 4, generator=g).half() if seed % 2 else None,
                 proxy_vertices=torch.rand(4, 3, generator=g) if proxy else None,
                 proxy_faces=torch.tensor([(0, 1, 2), (1, 2, 3)], dtype=torch.int32) if proxy else None, meta={"seed": seed} if meta is None else meta)


def same_asset(a: Asset, b: Asset) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left) and (
        dict(a.meta) == dict(b.meta) and a.resolution == b.resolution)


def code_of(action, *args, **kwargs) -> str:
    with pytest.raises(NearError) as info:
        action(*args, **kwargs)
    assert info.value.what and info.value.remedy
    return info.value.code


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2 ** 50, 2 ** 50) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 25),
       st.dictionaries(st.text(max_size=6).filter(lambda k: k not in ("format", "version", "resolution")), JSON, max_size=3))
def test_round_trip(seed, voxels, anchors, proxy, visibility, meta):
    asset = make_asset(seed, voxels, anchors, proxy, visibility, meta)
    data = encode_asset(asset)
    back = decode_asset(data)
    assert same_asset(asset, back) and encode_asset(back) == data


def test_file_is_safetensors_with_a_record(tmp_path):
    from safetensors import safe_open

    asset = make_asset(1, meta={"pack": "compact", "licence": "CC0 – free"})
    save_asset(tmp_path / "a.near", asset)
    with safe_open(tmp_path / "a.near", "pt") as file:
        record = json.loads(file.metadata()["near"])
        assert torch.equal(file.get_tensor("coords"), asset.coords) and torch.equal(file.get_tensor("anchors.normals"), asset.anchors.normals)
    assert record["format"] == "near-asset" and record["version"] == 1 and record["resolution"] == 32 and record["licence"] == "CC0 – free"
    assert same_asset(load_asset(tmp_path / "a.near"), asset)


def test_assets_must_be_consistent():
    asset = make_asset(3)
    anchors = asset.anchors
    for change in ({"resolution": 5}, {"resolution": 0}, {"feats": asset.feats.float()}, {"feats": asset.feats[1:]}, {"coords": asset.coords.int()},
                   {"feats": asset.feats * float("nan")}, {"proxy_faces": asset.proxy_faces + 9}, {"proxy_vertices": None},
                   {"anchors": replace(anchors, counts=torch.cat([anchors.counts, torch.zeros(1, dtype=torch.int32)]))}):
        assert code_of(replace, asset, **change) == "asset-invalid", change
    assert code_of(replace, anchors, counts=anchors.counts + 1) == "asset-invalid"
    assert code_of(replace, anchors, radii=-anchors.radii) == "asset-invalid"
    assert code_of(replace, asset, coords=asset.coords[:0], feats=asset.feats[:0], anchors=None, color_feats=None) == "asset-empty"
    assert code_of(encode_asset, replace(asset, meta={"x": float("nan")})) == "asset-meta"
    assert code_of(encode_asset, replace(asset, meta={"x": object()})) == "asset-meta"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_never_crash(data):
    content = bytearray(encode_asset(make_asset(data.draw(st.integers(0, 3)))))
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(0, 5))):
        # Most damage goes where it matters: the header.
        limit = header if data.draw(st.booleans()) else len(content)
        content[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    try:
        decode_asset(bytes(content[:cut]))
    except NearError:
        pass


@settings(max_examples=100, deadline=None)
@given(JSON, st.binary(max_size=64))
def test_arbitrary_headers_never_crash(header, body):
    text = json.dumps(header).encode()
    assert code_of(decode_asset, len(text).to_bytes(8, "little") + text + body).startswith("asset-")


def container(header: dict, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_lies_about_sizes_are_found_before_memory_is_taken():
    record = {"__metadata__": {"near": json.dumps({"format": "near-asset", "version": 1, "resolution": 32})}}
    for entry in ({"dtype": "F16", "shape": [1 << 31, 1 << 31], "data_offsets": [0, 8]}, {"dtype": "F16", "shape": [2 ** 40], "data_offsets": [0, 2 ** 41]},
                  {"dtype": "F16", "shape": [-1, -4], "data_offsets": [0, 8]}, {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
                  {"dtype": "F16", "shape": [4], "data_offsets": [8, 0]}, {"dtype": "F16", "shape": [True, 4], "data_offsets": [0, 8]}, [], 7):
        assert code_of(decode_asset, container({**record, "coords": entry}, b"\0" * 8)) == "asset-damaged"
    assert code_of(decode_asset, (2 ** 62).to_bytes(8, "little") + b"{}") == "asset-damaged"
    deep = "[" * 100_000
    assert code_of(decode_asset, len(deep).to_bytes(8, "little") + deep.encode()) == "asset-damaged"


def test_other_files_and_versions(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "w.safetensors")
    assert code_of(load_asset, tmp_path / "w.safetensors") == "asset-not-ours"
    assert code_of(load_asset, tmp_path / "none.near") == "asset-missing"
    assert code_of(load_asset, tmp_path) == "cannot-read"
    (tmp_path / "e.near").write_bytes(b"")
    assert code_of(load_asset, tmp_path / "e.near") == "asset-damaged"
    newer = encode_asset(make_asset()).replace(b'\\"version\\": 1', b'\\"version\\": 7')
    assert code_of(decode_asset, newer) == "asset-too-new"
    assert code_of(decode_asset, encode_asset(make_asset()).replace(b'\\"version\\": 1', b'\\"version\\": 0')) == "asset-damaged"


def test_old_records_are_lifted_step_by_step():
    steps = {1: lambda r: {**r, "a": 1}, 2: lambda r: {**r, "b": r["a"] + 1}}
    assert file_format.migrate_record({"version": 1}, migrations=steps, target=3) == {"version": 3, "a": 1, "b": 2}


# ---------------------------------------------------------------------------------------------------------- writing


def test_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path):
    resource = pytest.importorskip("resource")
    import signal

    path = tmp_path / "a.near"
    save_asset(path, make_asset(1))
    before = path.read_bytes()
    big = make_asset(2, voxels=20_000)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert code_of(save_asset, path, big) == "disk-full"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.near"]


@pytest.mark.parametrize("error, code", [(28, "disk-full"), (13, "no-permission"), (30, "no-permission"), (5, "cannot-write")])
def test_write_errors_are_told_apart(tmp_path, monkeypatch, error, code):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(file_format.os, "fsync", refuse)
    assert code_of(save_asset, tmp_path / "a.near", make_asset()) == code
    assert not list(tmp_path.iterdir())


def test_missing_folder(tmp_path):
    assert code_of(save_asset, tmp_path / "no" / "a.near", make_asset()) == "cannot-write"


# -------------------------------------------------------------------------------------------------- published SLATs


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_published_slats(shared_dir, tmp_path):
    for file in sorted((shared_dir / "slats").glob("*.npz")):
        asset = import_npz(file)
        with np.load(file) as arrays:
            order = np.lexsort(arrays["coords"].T[::-1])
            assert np.array_equal(asset.coords.numpy(), arrays["coords"][order])
            assert np.abs(asset.feats.float().numpy() - arrays["feats"][order]).max() < 8e-3
            assert asset.color_feats is not None and asset.brm_feats is not None
        save_asset(tmp_path / "s.near", asset)
        assert same_asset(load_asset(tmp_path / "s.near"), asset)
        summary = inspect_asset(asset)
        assert summary["voxels"] == len(asset) and summary["feats"]["channels"] == 8 and json.dumps(summary)


def test_batch_column_and_refusals(tmp_path):
    coords = np.array([(0, 9, 8, 7), (0, 1, 2, 3)])
    feats = np.arange(16, dtype=np.float32).reshape(2, 8)
    asset = import_npz(write_npz(tmp_path / "a.npz", coords=coords, feats=feats))
    assert asset.coords.tolist() == [[1, 2, 3], [9, 8, 7]] and asset.feats[0, 0] == 8 and asset.resolution == 64

    def refused(**arrays) -> str:
        return code_of(import_npz, write_npz(tmp_path / "b.npz", **arrays))

    assert refused(coords=coords) == "slat-damaged"
    assert refused(coords=coords + (0, 64, 0, 0), feats=feats) == "slat-invalid"
    assert refused(coords=coords - (0, 5, 0, 0), feats=feats) == "slat-invalid"
    assert refused(coords=coords + [[0], [1]] * np.array([1, 0, 0, 0]), feats=feats) == "slat-invalid"
    assert refused(coords=coords[[0, 0]], feats=feats) == "slat-invalid"
    assert refused(coords=coords, feats=feats[:1]) == "slat-invalid"
    assert refused(coords=coords, feats=feats + np.inf) == "slat-invalid"
    assert refused(coords=coords, feats=np.array([[{}], [{}]], dtype=object)) == "slat-damaged"
    assert refused(coords=coords[:0], feats=feats[:0]) == "slat-invalid"
    assert code_of(import_npz, tmp_path / "none.npz") == "slat-missing"
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("coords.npy", b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (999999999, 3), }".ljust(117) + b"\n")
    assert code_of(import_npz, tmp_path / "bomb.npz") == "slat-damaged"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_slats_never_crash(tmp_path, data):
    write_npz(tmp_path / "a.npz", coords=np.array([(1, 2, 3), (4, 5, 6)], np.uint8), feats=np.ones((2, 8), np.float32))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "b.npz").write_bytes(content[:data.draw(st.integers(0, len(content)))])
    try:
        import_npz(tmp_path / "b.npz")
    except NearError:
        pass


# ------------------------------------------------------------------------------------------------------------ store


def test_store(tmp_path):
    store = AssetStore(tmp_path / "store")
    first, second = make_asset(1), make_asset(2)
    a, b = store.put(first), store.put(second)
    assert a == store.put(first) and a != b and a in store and "../x" not in store
    assert same_asset(store.get(a), first) and set(store.list()) == {a, b} and store.size() == sum(store.path(s).stat().st_size for s in (a, b))
    assert code_of(store.get, "0" * 64) == "asset-missing"
    assert code_of(store.path, "../../etc/passwd") == "asset-id-invalid"
    damaged = bytearray(store.path(b).read_bytes())
    damaged[-1] ^= 1
    store.path(b).write_bytes(damaged)
    assert code_of(store.get, b) == "asset-damaged"
    assert store.put(second) == b and same_asset(store.get(b), second)
    left = store.path(a).parent / ".left.tmp"
    left.write_bytes(b"x")
    os.utime(left, (time.time() - 9999,) * 2)
    assert store.gc(keep=[a]) == [b] and store.list() == [a] and not left.exists()
    assert store.remove(a) and not store.remove(a)


def test_gc_removes_the_oldest_first(tmp_path):
    store = AssetStore(tmp_path)
    hashes = [store.put(make_asset(s)) for s in range(4)]
    for age, sha in enumerate(hashes):
        os.utime(store.path(sha), (1000 + age,) * 2)
    sizes = [store.path(s).stat().st_size for s in hashes]
    assert store.gc(keep=[hashes[0]], max_bytes=sizes[2] + sizes[3]) == [hashes[1]]


def test_store_cannot_be_made_inside_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    assert code_of(AssetStore, tmp_path / "file" / "store") == "cannot-write"


def _hammer(root, seeds, failures):
    torch.set_num_threads(1)
    store = AssetStore(root)
    for _ in range(6):
        for seed in seeds:
            asset = make_asset(seed, voxels=300)
            if not same_asset(store.get(store.put(asset)), asset):
                failures.put(seed)


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_concurrent_writers(tmp_path):
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    writers = [context.Process(target=_hammer, args=(tmp_path, range(4), failures)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [w.exitcode for w in writers] == [0, 0, 0] and failures.empty()
    store = AssetStore(tmp_path)
    assert len(store.list()) == 4 and not list(tmp_path.glob("??/.*"))


def test_inspect_counts():
    summary = inspect_asset(make_asset(1))
    assert summary["anchors"]["count"] == len(make_asset(1).anchors) and summary["proxy"] == {"vertices": 4, "faces": 2}
    assert inspect_asset(make_asset(0, anchors=False, proxy=False))["anchors"] is None
    assert {f.name for f in fields(Anchors)} == {"counts", "offsets", "normals", "disc_normals", "radii", "detail", "visibility"}
