"""The messages: round trips, limits, and that nothing malformed gets through or breaks anything."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from near import wire, wirecodec
from near.errors import NearError

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = ("wire.py", "wirecodec.py", "sharedmem.py", "connection.py", "frames.py", "client.py")


# ---------------------------------------------------------------- well-formed messages, made from the rules themselves
def values_of(rule) -> st.SearchStrategy:
    """Values that a field's rule accepts."""
    if isinstance(rule, wire.Int):
        return st.integers(rule.low, rule.high)
    if isinstance(rule, wire.Num):
        return st.floats(rule.low, rule.high, allow_nan=False)
    if isinstance(rule, wire.Text):
        if rule.pattern:
            samples = [t for t in ("", "a", "A-b_9", "a.b", "0" * 64, "9f" * 32) if re.fullmatch(rule.pattern, t) and len(t) <= rule.longest]
            return st.sampled_from(samples)
        return st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=min(rule.longest, 40))
    if isinstance(rule, wire.OneOf):
        return st.sampled_from(rule.choices)
    if isinstance(rule, wire.Flag):
        return st.booleans()
    if isinstance(rule, wire.Many):
        most = min(rule.most, max(rule.least, 3))
        return st.lists(values_of(rule.item), min_size=rule.least, max_size=most, unique=isinstance(rule.item, wire.OneOf)).map(tuple)
    if isinstance(rule, wire.Json):
        return st.dictionaries(st.text("abc", max_size=3), st.one_of(st.integers(-9, 9), st.text("xyz", max_size=5), st.none()), max_size=3)
    assert isinstance(rule, wire.Part)
    made = instances(rule.kind)
    return st.one_of(st.none(), made) if rule.optional else made


@functools.cache
def instances(kind: type) -> st.SearchStrategy:
    if kind is wire.CameraSpec:
        return st.builds(kind, values_of(wire.MATRIX4), values_of(wire.MATRIX3), st.integers(1, 4000), st.integers(1, 4000))
    fields = {name: values_of(rule) for name, rule in wirecodec.rules(kind)}
    if kind is wire.Scene:
        fields["border"] = st.just(())
    return st.builds(kind, **fields)


MESSAGES = st.one_of([instances(kind) for kind in wire.SCHEMA.kinds.values()])
BUFFERS = st.lists(st.tuples(st.sampled_from(sorted(wire.ITEM_BYTES)), st.lists(st.integers(0, 5), min_size=1, max_size=4)), max_size=4).map(
    lambda found: [wire.Buffer(f"b{i}", dtype, tuple(shape), bytes(math.prod(shape) * wire.ITEM_BYTES[dtype]))
                   for i, (dtype, shape) in enumerate(found)])


@given(MESSAGES, BUFFERS)
@settings(max_examples=150, deadline=None)
def test_round_trip(message, buffers):
    decoded, received = wire.SCHEMA.decode([bytes(p) for p in wire.SCHEMA.encode(message, buffers)])
    assert decoded == message
    assert [(b.name, b.dtype, b.shape, bytes(b.data)) for b in received] == [(b.name, b.dtype, b.shape, b.data) for b in buffers]


@given(MESSAGES, BUFFERS, st.data())
@settings(max_examples=300, deadline=None)
def test_mutations_are_refused_or_still_valid(message, buffers, data):
    """Whatever is done to a message, decoding gives a checked message or a WireError, never another exception."""
    parts = [bytes(p) for p in wire.SCHEMA.encode(message, buffers)]
    index = data.draw(st.integers(0, len(parts) - 1))
    part = bytearray(parts[index])
    way = data.draw(st.sampled_from(["flip", "cut", "insert", "drop part", "add part"]))
    if way == "flip" and part:
        part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    elif way == "cut":
        del part[data.draw(st.integers(0, len(part))):]
    elif way == "insert":
        part[data.draw(st.integers(0, len(part))):0] = data.draw(st.binary(max_size=8))
    parts[index] = bytes(part)
    if way == "drop part":
        del parts[index]
    elif way == "add part":
        parts.insert(index, data.draw(st.binary(max_size=40)))
    try:
        decoded, _ = wire.SCHEMA.decode(parts)
    except wire.WireError as error:
        assert error.code and error.what and error.remedy and len(error.what) < 500
    else:
        assert type(decoded).__name__ in wire.SCHEMA.kinds


@given(st.lists(st.binary(max_size=300), max_size=5))
@settings(max_examples=200, deadline=None)
def test_noise_is_refused(parts):
    with pytest.raises(wire.WireError):
        wire.SCHEMA.decode(parts)


PING = {"kind": "Ping", "protocol": wire.PROTOCOL, "id": "a", "buffers": []}


@pytest.mark.parametrize("header", [
    {**PING, "extra": 1}, {**PING, "kind": "Nothing"}, {**PING, "kind": 7}, {**PING, "id": "x" * 99}, {**PING, "id": 5},
    {**PING, "protocol": "1"}, {**PING, "protocol": True}, {**PING, "buffers": None}, {**PING, "buffers": [{}]},
    {k: v for k, v in PING.items() if k != "id"}, {**PING, "kind": "__init__"}, [PING], "Ping", None, 3])
def test_wrong_headers(header):
    with pytest.raises(wire.WireError):
        wire.SCHEMA.decode([json.dumps(header).encode()])


@pytest.mark.parametrize("raw", [
    b"", b"\xff\xfe{}", b"[" * 100_000, b'{"kind":"Ping","protocol":1,"id":NaN}', b"9" * 9000, b" " * (wire.MAX_HEADER_BYTES + 1),
    b'{"kind":"Ping","kind":"Ping","protocol":1,"id":"a","buffers":[]}'])
def test_wrong_json(raw):
    with pytest.raises(wire.WireError):
        wire.SCHEMA.decode([raw])


@pytest.mark.parametrize("dtype, shape, size", [
    ("f4", [2 ** 40], 8), ("f4", [2 ** 31, 2 ** 31], 8), ("f8", [1], 8), ("O", [1], 8), ("u1", [-8], 8), ("u1", [8.0], 8), ("u1", [], 1),
    ("u1", [1] * 9, 1), ("f2", [4], 7), ("f2", [4], 9), ("u1", [True], 1), ("u1", "8", 8)])
def test_wrong_buffers(dtype, shape, size):
    header = {**PING, "buffers": [{"name": "b", "dtype": dtype, "shape": shape}]}
    with pytest.raises(wire.WireError):
        wire.SCHEMA.decode([json.dumps(header).encode(), bytes(size)])


def test_numbers_must_be_finite_and_in_range():
    for bad in (math.nan, math.inf, -math.inf, "1", None, True, 10 ** 400):
        with pytest.raises(wire.WireError):
            wire.LightSpec(strength=bad)
    with pytest.raises(wire.WireError) as caught:
        wire.CameraSpec(wire.EYE4, wire.EYE3, 16_000, 16_000)
    assert caught.value.code == "frame-too-large"
    with pytest.raises(wire.WireError):
        wire.CameraSpec(wire.EYE4, wire.EYE3, 0, 10)
    with pytest.raises(wire.WireError):
        wire.PlacedSpec("../../etc/passwd")


def a_scene(**values) -> wire.Scene:
    return wire.Scene(assets=(wire.PlacedSpec("a" * 64),), light=wire.LightSpec(),
                      camera=wire.CameraSpec(wire.EYE4, wire.EYE3, 40, 30), **values)


def test_scene_layout_and_border():
    scene = a_scene(passes=("color", "depth", "normal"), border=(10, 5, 30, 25))
    assert scene.size == (20, 20)
    assert [(e["name"], e["dtype"], e["shape"]) for e in scene.layout()] == [
        ("color", "f2", [20, 20, 4]), ("depth", "f4", [20, 20, 1]), ("normal", "f2", [20, 20, 3])]
    assert scene.frame_bytes() == 400 * (8 + 4 + 6)
    for border in ((0, 0, 41, 5), (5, 5, 5, 9), (9, 9, 5, 12), (1, 2, 3)):
        with pytest.raises(wire.WireError):
            a_scene(border=border)
    with pytest.raises(wire.WireError):
        a_scene(passes=("color", "color"))


def test_scene_key_names_the_pixels():
    assert a_scene().key() == a_scene().key() != a_scene(quality="draft").key()
    again = wirecodec.build(wire.Scene, json.loads(json.dumps(wire.to_plain(a_scene()))), "scene")
    assert again == a_scene() and again.key() == a_scene().key()


def test_protocol_mismatch_names_both_sides():
    for theirs, older in ((wire.PROTOCOL + 1, "backend"), (wire.PROTOCOL - 1, "add-on")):
        header = json.dumps({**PING, "kind": "FromTheFuture", "protocol": theirs, "news": [1]}).encode()
        with pytest.raises(wire.WireError) as caught:
            wire.SCHEMA.decode([header])
        assert caught.value.code == "protocol-mismatch"
        assert f"client speaks NeAR protocol {theirs}" in caught.value.what and f"protocol {wire.PROTOCOL}" in caught.value.what
        assert f"Update the {older}" in caught.value.remedy
    with pytest.raises(wire.WireError) as caught:
        wire.SCHEMA.decode([header], "client")
    assert f"client speaks NeAR protocol {wire.PROTOCOL}" in caught.value.what


def test_schema_hash_follows_fields_and_limits():
    def made(rule):
        from typing import Annotated

        schema = wirecodec.Schema()
        schema(dataclasses.make_dataclass("Thing", [("x", Annotated[int, rule])], bases=(wire.Message,), frozen=True))
        return schema.hash

    assert made(wire.Int(0, 9)) == made(wire.Int(0, 9)) != made(wire.Int(0, 8))
    assert wire.SCHEMA.hash == wire.SCHEMA.hash and len(wire.SCHEMA.hash) == 16


def test_wire_error_is_the_error_users_meet():
    assert issubclass(wire.WireError, NearError)


# ---------------------------------------------------------------- the copies, and what they may import
@pytest.mark.parametrize("name", SHARED)
def test_the_addons_copy_is_equal(name):
    assert (REPOSITORY / "blender_addon" / name).read_bytes() == (REPOSITORY / "backend" / "near" / name).read_bytes(), \
        "run tools/sync_wire.py"


@pytest.mark.parametrize("name", SHARED)
def test_shared_modules_import_the_standard_library_and_each_other(name):
    allowed = {*sys.stdlib_module_names, "zmq", "numpy"}   # numpy only inside functions, for who asks for arrays
    tree = ast.parse((REPOSITORY / "backend" / "near" / name).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            inside = [node.module] if node.module else [alias.name for alias in node.names]
            assert all(f"{module}.py" in (*SHARED, "errors.py") for module in inside)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert all(module.split(".")[0] in allowed for module in names)
            assert all(n != "threading" for n in names)     # the add-on must not use threads
    top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not any("numpy" in ast.unparse(n) for n in top)
    if name.startswith("wire"):
        assert not any("zmq" in ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)))


def test_the_client_runs_as_an_addon_would_run_it(tmp_path):
    """In a package of another name, with nothing but the standard library and pyzmq to be had, without the backend's package."""
    folder = tmp_path / "some_addon"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in SHARED:
        (folder / name).write_bytes((REPOSITORY / "backend" / "near" / name).read_bytes())
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('numpy', 'torch', 'near', 'psutil'): raise ImportError(name)
sys.meta_path.insert(0, Block())
from some_addon import client, wire
assert wire.SCHEMA.hash == sys.argv[1], 'the copies must agree on the schema'
try: client.Client.connect()
except wire.WireError as error: print(error.code)
"""
    result = subprocess.run([sys.executable, "-c", code, wire.SCHEMA.hash], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                            env={"PATH": "", "NEAR_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "backend-not-running"


def test_no_pickle_anywhere_in_the_service():
    folder = REPOSITORY / "backend" / "near"
    for path in [*(folder / "server").glob("*.py"), *(folder / name for name in SHARED)]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else \
                [node.attr] if isinstance(node, ast.Attribute) else []
            assert not {"pickle", "marshal", "shelve", "recv_pyobj", "send_pyobj", "eval", "exec"} & set(names), path.name
