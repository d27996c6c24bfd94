"""The extension as a user gets it: built, checked, installed and used hard in this Blender and in older and newer ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY / "tools"))

import blender_pythons  # noqa: E402
import build_extension  # noqa: E402

pytestmark = [pytest.mark.bpy, pytest.mark.timeout(600),
              pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-in backend is a shell script")]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Built for this platform, without the backend's wheel; checked by Blender's own program."""
    folder = tmp_path_factory.mktemp("extension")
    program = build_extension.find_blender_ext()
    assert program is not None
    try:
        return build_extension.build(folder / "repository", folder / "work", ["linux-x64"], with_backend=False, program=program)
    except SystemExit as stopped:
        if "could be downloaded" in str(stopped):
            pytest.skip(f"no package index in reach: {stopped}")
        raise


def test_contents_and_repository_index(archive):
    names = zipfile.ZipFile(archive).namelist()
    manifest = tomllib.loads(zipfile.ZipFile(archive).read("blender_manifest.toml").decode())
    assert manifest["id"] == "near_relight" and "blender" not in manifest["name"].lower() and set(manifest["permissions"]) == {"files", "network", "clipboard"}
    assert sorted(name.split("-")[2] for name in manifest["wheels"]) == ["cp311", "cp313"]
    assert {name.removeprefix("./") for name in manifest["wheels"]} <= set(names) and {"__init__.py", "LICENSE", "setup_backend.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    index = json.loads((archive.parent / "index.json").read_text())
    assert [entry["id"] for entry in index["data"]] == ["near_relight"] and index["data"][0]["archive_url"].endswith(archive.name)


def test_the_same_sources_give_the_same_zip(archive, tmp_path):
    manifest = zipfile.ZipFile(archive).read("blender_manifest.toml").decode()
    wheels = sorted((archive.parent.parent / "work" / "pyzmq" / "named").glob("*.whl"))
    build_extension.write_zip(tmp_path / "again.zip", manifest, wheels, None)
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def journal(python: Path, options: list[str], archive: Path, folder: Path, *search: Path) -> dict:
    """What `shell_journal.py` saw."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "NEAR_", "BLENDER_"))}
    environment["NEAR_TEST_PYTHON"] = sys.executable
    done = subprocess.run([str(python), *options, str(HERE / "shell_journal.py"), str(archive), str(folder), *map(str, search)],
                          env=environment, capture_output=True, text=True, timeout=500, cwd=folder)
    line = next((line for line in done.stdout.splitlines() if line.startswith("JOURNAL ")), None)
    assert line is not None, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return json.loads(line.removeprefix("JOURNAL "))


def judge(told: dict, folder: Path) -> None:
    assert "error" not in told, told["error"]
    assert told["step"] == "done"
    assert Path(told["zmq"]).is_relative_to(folder / "user"), "the bundled zmq is the one in use"
    assert Path(told["user_folder"]).is_relative_to(folder / "user")
    for before, after in (told["after_20_enables"], told["after_10_loads"]):
        assert after == before and not before["timer"]            # in -b there is no timer
    assert told["after_50_undos"] == [3.0, 1, True]
    gone = told["disabled"]
    assert gone == {"handlers": [], "sockets": 0, "pipes": told["after_20_enables"][0]["pipes"], "eventfds": 0, "children": [], "classes": [],
                    "timer": False, "engine": False}
    assert told["backend_pid"] > 0 and not Path(f"/proc/{told['backend_pid']}").exists(), "the backend ends with the add-on"
    assert told["uninstalled"]


def test_install_and_use_hard_in_this_blender(archive, tmp_path):
    """In an interpreter that finds bpy and numpy, but no zmq of this environment."""
    search = tmp_path / "packages"
    search.mkdir()
    for name in ("bpy", "numpy", "numpy.libs", "requests", "urllib3", "certifi", "idna", "charset_normalizer"):
        spec = find_spec(name) if "." not in name else None
        source = Path(next(iter(spec.submodule_search_locations))) if spec else Path(find_spec("numpy").origin).parents[1] / name
        if source.exists():
            (search / name).symlink_to(source)
    folder = tmp_path / "here"
    folder.mkdir()
    judge(journal(Path(sys.executable), ["-S", "-E"], archive, folder, search), folder)


@pytest.mark.parametrize("version", ["4.2.23", "5.2.3"])
def test_install_and_use_hard_in_other_blenders(archive, tmp_path, version):
    python = blender_pythons.environment(version)
    if python is None:
        pytest.skip(f"no environment with bpy {version} here; make one with: python tools/blender_pythons.py {version}")
    told = journal(python, [], archive, tmp_path)
    assert told["blender"].startswith(version)
    judge(told, tmp_path)
