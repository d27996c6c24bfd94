"""tools/run.py: what it decides, without installing anything."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, pointed at a made-up checkout; what it would install is kept in ``script.installs``."""
    source = Path(__file__).resolve().parents[1] / "tools" / "run.py"
    spec = importlib.util.spec_from_file_location("near_run_script", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "tools").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "tools" / "constraints.txt").write_text("torch==1\n")
    for name, value in (("ROOT", tmp_path), ("VENV", tmp_path / ".venv"), ("CONSTRAINTS", tmp_path / "tools" / "constraints.txt"),
                        ("STAMP", tmp_path / ".venv" / "near-setup.json")):
        monkeypatch.setattr(module, name, value)
    module.installs = []

    def make() -> None:
        module.venv_python().parent.mkdir(parents=True, exist_ok=True)
        module.venv_python().touch()

    monkeypatch.setattr(module, "make_environment", make)
    monkeypatch.setattr(module, "pip_install", module.installs.append)
    return module


def test_second_run_installs_nothing(script):
    script.setup({"dev"})
    script.setup({"dev"})
    script.setup(set())
    assert script.installs == [{"dev"}]


def test_more_extras_are_added_to_what_is_there(script):
    script.setup(set())
    script.setup({"blender"})
    script.setup({"dev"})
    assert script.installs == [set(), {"blender"}, {"blender", "dev"}]


@pytest.mark.parametrize("file", ["pyproject.toml", "tools/constraints.txt"])
def test_changed_files_install_again(script, file):
    script.setup({"dev"})
    (script.ROOT / file).write_text("changed\n")
    script.setup({"dev"})
    assert len(script.installs) == 2


def test_damaged_stamp_installs_again(script):
    script.setup(set())
    script.STAMP.write_text("{")
    script.setup(set())
    assert len(script.installs) == 2 and json.loads(script.STAMP.read_text())["extras"] == []


def test_setup_prints_the_interpreter_last(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "setup"])
    assert script.main() == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(script.venv_python())
    assert script.installs == [{"dev", "blender"}]


def test_arguments_are_passed_on_and_the_status_comes_back(script, monkeypatch):
    called = []
    monkeypatch.setattr(script.subprocess, "call", lambda command, cwd: called.append((command, cwd)) or 7)
    monkeypatch.setattr(sys, "argv", ["run.py", "test", "-q", "tests/test_nn.py", "-k", "sparse"])
    assert script.main() == 7
    command, cwd = called[0]
    assert command[1:] == ["-m", "pytest", "-q", "tests/test_nn.py", "-k", "sparse"] and cwd == script.ROOT


def test_this_interpreter_or_another_is_found(script):
    assert script.usable(script.find_python()) in script.PYTHONS
    assert script.usable(["no-such-python"]) is None
