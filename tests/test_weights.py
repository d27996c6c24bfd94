"""Packs, manifests, download from a local hub and from a mirror, verification."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from near.errors import NearError
from near.weights import cli, manage
from near.weights.fetch import FolderSource, open_source
from near.weights.integrity import FileRecord, manifest_digest, read_lock, safe_relative, verify_manifest, write_manifest
from near.weights.packs import HUNYUAN3D, PARTS, Licence, Part, select_parts, weights_home

FREE = Licence("Test", "https://example.invalid", "Free.")
PART = Part("thing", "org/thing", "a test", FREE, ("*.json", "data/*"), 1)
YES = lambda part: True  # noqa: E731


def make_repo(folder: Path, **files: bytes) -> Path:
    for name, content in (files or {"config.json": b"{}", "data/a.bin": b"a" * 3000}).items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    make_repo(tmp_path / "hub" / "org" / "thing")
    (tmp_path / "hub" / "org" / "thing" / "unwanted.txt").write_text("no")
    return tmp_path / "hub"


def pull(hub: Path, home: Path, part: Part = PART, **options) -> list[Path]:
    return manage.pull([part.name], accept=options.pop("accept", YES), location=str(hub), home=home, say=options.pop("say", lambda s: None),
                       parts={part.name: part}, **options)


def code(call) -> str:
    with pytest.raises(NearError) as error:
        call()
    assert error.value.what and error.value.remedy
    return error.value.code


# -- pull, verify, remove ---------------------------------------------------------------------------------------------

def test_pull_installs_only_what_is_needed_and_pins_it(hub, tmp_path):
    said = []
    [folder] = pull(hub, tmp_path / "home", say=said.append)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")) == \
        ["config.json", "data/a.bin"]
    entry = read_lock(tmp_path / "home")["thing"]
    assert entry.trust == "first-use" and entry.files["data/a.bin"].sha256 == hashlib.sha256(b"a" * 3000).hexdigest()
    assert any("trust on first use" in s for s in said)
    assert not (tmp_path / "home" / ".incoming" / "thing").exists()
    assert manage.installed("thing", home=tmp_path / "home") == folder
    assert manage.installed_repo("org/thing", home=tmp_path / "home") == folder


def test_a_tampered_installed_file_is_refused_by_name(hub, tmp_path):
    home = tmp_path / "home"
    [folder] = pull(hub, home)
    (folder / "data" / "a.bin").write_bytes(b"b" * 3000)
    for call in (lambda: manage.verify(["thing"], home=home), lambda: manage.installed("thing", home=home)):
        with pytest.raises(NearError) as error:
            call()
        assert error.value.code == "weights-tampered" and "data/a.bin" in error.value.what
    (folder / "data" / "a.bin").unlink()
    assert code(lambda: manage.verify([], home=home)) == "weights-missing"


def test_a_source_that_changed_is_refused_until_update(hub, tmp_path):
    home = tmp_path / "home"
    pull(hub, home)
    (hub / "org" / "thing" / "data" / "a.bin").write_bytes(b"c" * 10)
    with pytest.raises(NearError) as error:
        pull(hub, home)
    assert error.value.code == "weights-tampered" and "data/a.bin" in error.value.what
    manage.verify(["thing"], home=home, say=lambda s: None)  # what was installed is untouched
    pull(hub, home, update=True)
    assert read_lock(home)["thing"].files["data/a.bin"] == FileRecord(hashlib.sha256(b"c" * 10).hexdigest(), 10)


def test_checksums_known_in_advance_are_held_against_any_source(hub, tmp_path):
    part = Part("thing", "org/thing", "", FREE, PART.files, 1, sha256={"data/a.bin": "0" * 64})
    assert code(lambda: pull(hub, tmp_path / "home", part)) == "weights-tampered"
    assert not read_lock(tmp_path / "home")
    (hub / "org" / "thing" / "SHA256SUMS").write_text(f"{'1' * 64}  config.json\n")
    assert code(lambda: pull(hub, tmp_path / "home")) == "weights-tampered"


def test_an_interrupted_copy_continues(hub, tmp_path):
    staging = tmp_path / "home" / ".incoming" / "thing"
    (staging / "data").mkdir(parents=True)
    (staging / "data" / "a.bin.part").write_bytes(b"a" * 1000)
    [folder] = pull(hub, tmp_path / "home")
    assert (folder / "data" / "a.bin").read_bytes() == b"a" * 3000


def test_the_licence_comes_first(hub, tmp_path):
    asked = []
    assert code(lambda: pull(hub, tmp_path / "home", accept=lambda part: asked.append(part.name))) == "licence-refused"
    assert asked == ["thing"] and not (tmp_path / "home").exists()


def test_a_hub_cache_folder_serves_too(tmp_path):
    cache = tmp_path / "models--org--thing"
    make_repo(cache / "snapshots" / "abc123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    pull(tmp_path, tmp_path / "home")
    assert read_lock(tmp_path / "home")["thing"].revision == "abc123"


def test_remove(hub, tmp_path):
    home = tmp_path / "home"
    [folder] = pull(hub, home)
    manage.remove(["thing"], home=home, say=lambda s: None)
    assert not folder.exists() and not read_lock(home)
    assert code(lambda: manage.remove(["near"], home=home)) == "weights-missing"
    assert code(lambda: manage.remove(["compact"], home=home)) == "weights-shipped"


@pytest.mark.parametrize("location, expected", [("/no/such/folder", "weights-source"), (None, "offline"), ("https://mirror.invalid", "offline")])
def test_offline_and_missing_folders(location, expected):
    assert code(lambda: open_source(location, offline=True)) == expected


def test_offline_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NEAR_OFFLINE", "1")
    assert code(lambda: open_source(None)) == "offline"
    assert isinstance(open_source(str(tmp_path)), FolderSource)


def test_not_in_the_folder_and_nothing_that_fits(tmp_path, hub):
    assert code(lambda: pull(tmp_path, tmp_path / "home")) == "weights-source"
    assert code(lambda: pull(hub, tmp_path / "home", Part("thing", "org/thing", "", FREE, ("*.onnx",), 1))) == "weights-source"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\..\\x", "c:x", ""])
def test_names_that_leave_the_folder(name):
    assert code(lambda: safe_relative(name)) == "weights-path"


def test_a_damaged_lock_says_so(tmp_path):
    (tmp_path / "lock.json").write_text("{")
    assert code(lambda: read_lock(tmp_path)) == "weights-lock"
    (tmp_path / "lock.json").write_text('{"parts": {"a": {}}}')
    assert code(lambda: read_lock(tmp_path)) == "weights-lock"


def test_not_enough_room(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=10))
    assert code(lambda: pull(hub, tmp_path / "home")) == "disk-full"


# -- the hub's protocol -----------------------------------------------------------------------------------------------

COMMIT = "1234567890abcdef1234567890abcdef12345678"


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub as its client needs for one repository."""

    files: dict[str, bytes] = {}
    ranges: list[str] = []
    cut: list[int] = []  # lengths after which the next answers break off

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/thing"):
            siblings = [{"rfilename": n, "size": len(c), "lfs": {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c), "pointerSize": 1}}
                        for n, c in self.files.items()]
            data = json.dumps({"id": "org/thing", "sha": COMMIT, "siblings": siblings}).encode()
            return self.send(200, data, body)
        name = path.removeprefix(f"/org/thing/resolve/{COMMIT}/")
        if name == path or name not in self.files:
            return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound" if name != path else "RepoNotFound"})
        content, start = self.files[name], 0
        if body and (wanted := self.headers.get("Range")):
            self.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.send(206 if start else 200, content[start:], body, {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes",
            **({"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {})})

    def send(self, status: int, data: bytes, body: bool, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            limit = HubHandler.cut.pop() if HubHandler.cut and len(data) > 5000 else len(data)
            self.wfile.write(data[:limit])
            if limit < len(data):
                self.close_connection = True


@pytest.fixture
def mirror():
    HubHandler.files, HubHandler.ranges, HubHandler.cut = {"config.json": b"{}", "data/a.bin": bytes(range(256)) * 40}, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_pull_from_a_mirror_pins_commit_and_published_checksums(mirror, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    said = []
    [folder] = pull(mirror, tmp_path / "home", say=said.append)
    assert (folder / "data" / "a.bin").read_bytes() == HubHandler.files["data/a.bin"]
    entry = read_lock(tmp_path / "home")["thing"]
    assert entry.revision == COMMIT and entry.trust == "published" and not any("first use" in s for s in said)
    assert not (folder / ".cache").exists()
    HubHandler.files["data/a.bin"] = b"other"
    assert code(lambda: pull(mirror, tmp_path / "home")) == "weights-tampered"


def test_a_broken_download_continues_where_it_stopped(mirror, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    chunk = 10 << 20  # what the hub's client writes at once
    HubHandler.files["data/a.bin"] = bytes(range(256)) * (50 << 10)
    HubHandler.cut = [chunk + 5000]
    try:
        [folder] = pull(mirror, tmp_path / "home")
    except NearError as error:  # the client may give up; the command is then repeated
        assert error.code == "download-failed"
        [folder] = pull(mirror, tmp_path / "home")
    assert (folder / "data" / "a.bin").read_bytes() == HubHandler.files["data/a.bin"]
    assert HubHandler.ranges == [f"bytes={chunk}-"]


def test_an_unknown_repository_is_an_error_with_a_remedy(mirror, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert code(lambda: pull(mirror, tmp_path / "home", Part("thing", "org/other", "", FREE, ("*",), 1))) == "weights-source"
    assert not read_lock(tmp_path / "home")


# -- packs and the shipped manifest -----------------------------------------------------------------------------------

def test_packs_stand_for_their_default_parts():
    names = [p.name for p in select_parts(["official"])]
    assert "near" in names and "hunyuan3d" not in names
    assert [p.name for p in select_parts(["official", "hunyuan3d"])][-1] == "hunyuan3d"
    assert code(lambda: select_parts(["offical"])) == "unknown-weights"


def test_excluded_regions_are_said_plainly():
    text = manage.licence_text(HUNYUAN3D)
    assert all(region in text for region in ("European Union", "United Kingdom", "South Korea"))


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NEAR_HOME", str(tmp_path))
    assert weights_home() == tmp_path / "weights"


def test_shipped_manifest(tmp_path):
    make_repo(tmp_path, **{"a.safetensors": b"abc", "config.json": b"{}"})
    write_manifest(tmp_path, "compact", {"licence": "Apache-2.0"})
    assert set(verify_manifest(tmp_path, "compact")["files"]) == {"a.safetensors", "config.json"}
    before = manifest_digest(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"abd")
    with pytest.raises(NearError) as error:
        verify_manifest(tmp_path, "compact")
    assert error.value.code == "weights-tampered" and "a.safetensors" in error.value.what
    write_manifest(tmp_path, "compact", {})
    assert manifest_digest(tmp_path) != before
    assert code(lambda: verify_manifest(tmp_path / "none", "compact")) == "weights-missing"


# -- command line -----------------------------------------------------------------------------------------------------

def run_cli(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["weights", *words])
    return args.run(args)


def test_command_line(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NEAR_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(PARTS, "thing", PART)
    make_repo(tmp_path / "compact", **{"a.safetensors": b"abc"})
    write_manifest(tmp_path / "compact", "compact", {})
    monkeypatch.setattr("near.weights.packs.compact_dir", lambda: tmp_path / "compact")
    monkeypatch.setattr("sys.stdin", argparse.Namespace(isatty=lambda: False))
    assert code(lambda: run_cli("pull", "thing", "--from", str(hub))) == "licence-unanswered"
    assert run_cli("pull", "thing", "--from", str(hub), "--accept-licences", "--offline") == 0
    assert "licence: Test" in capsys.readouterr().out
    assert run_cli("verify") == 0 and "as first pulled" in capsys.readouterr().out
    assert run_cli("list") == 0 and "hunyuan3d" in capsys.readouterr().out
    assert run_cli("list", "--json") == 0 and {r["name"] for r in json.loads(capsys.readouterr().out)} >= {"near", "compact"}
    assert run_cli("remove", "thing") == 0
    assert run_cli("verify") == 0 and "compact: 1 files as shipped" in capsys.readouterr().out
