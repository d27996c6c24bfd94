"""Who may import whom (DESIGN section 3), and what every file owes its reader."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BACKEND, ADDON = ROOT / "backend" / "near", ROOT / "blender_addon"
STANDARD = set(sys.stdlib_module_names)


def python_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def imported(path: Path) -> set[str]:
    """Top-level names of all absolute imports of a file, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def offenders(folder: Path, forbidden: set[str]) -> dict[str, set[str]]:
    return {str(p.relative_to(ROOT)): hit for p in python_files(folder) if (hit := imported(p) & forbidden)}


def test_backend_never_imports_blender():
    assert offenders(BACKEND, {"bpy", "mathutils", "bpy_extras", "gpu"}) == {}


def test_addon_imports_neither_the_backend_nor_its_libraries():
    assert offenders(ADDON, {"torch", "near", "numba", "scipy", "PIL", "threading", "multiprocessing", "concurrent"}) == {}


def test_wire_is_standard_library_only():
    for wire in (BACKEND / "wire.py", ADDON / "wire.py"):
        if wire.exists():
            assert imported(wire) <= STANDARD, wire


def test_start_script_is_standard_library_only():
    assert imported(ROOT / "tools" / "run.py") <= STANDARD


def test_files_stay_readable():
    long = {str(p.relative_to(ROOT)): n for folder in (BACKEND, ADDON, ROOT / "tools") for p in python_files(folder)
            if (n := len(p.read_text(encoding="utf-8").splitlines())) > 420}
    assert long == {}


@pytest.mark.parametrize("folder", [BACKEND, ROOT / "tools"], ids=lambda p: p.name)
def test_every_module_says_what_it_is(folder):
    silent = [str(p.relative_to(ROOT)) for p in python_files(folder) if p.stat().st_size and not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert silent == []


def test_nothing_unpickles():
    """Weights and messages come from strangers: safetensors, npz without objects, or torch.load(weights_only=True)."""
    found = []
    for path in python_files(BACKEND):
        if imported(path) & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}:
            found.append(f"{path.relative_to(ROOT)} imports pickle")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                safe = options.get("weights_only") == "True" if "torch" in ast.unparse(node.func) else options.get("allow_pickle", "False") == "False"
                if not safe:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_help_needs_no_heavy_import():
    code = "import sys, near.cli; near.cli.build_parser('render'); print(sorted({'torch', 'numpy', 'rich', 'PIL'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"


def test_no_private_paths_in_the_tree():
    """Nothing that only exists on one machine."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    marks = tuple(a + b for a, b in (("/root", "/"), ("/home", "/"), ("/work", "/main"), ("/work", "/shared"), ("/opt", "/wheels")))
    found = []
    for name in tracked.stdout.split("\0"):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".txt", ".sh", ".yaml", ".yml") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name}: {mark}" for mark in marks if mark in text]
    assert found == []


def test_readme_tables_are_what_the_reports_say():
    """Numbers in documents are written by a tool, never typed."""
    out = subprocess.run([sys.executable, str(ROOT / "tools" / "results_table.py"), "--check"], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stdout


def test_readme_cameras_are_understood(tmp_path):
    import re

    from near.commands.common import read_cameras

    example = re.search(r"```json\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    (tmp_path / "c.json").write_text(example)
    first, second = read_cameras(tmp_path / "c.json", None)
    assert (first.width, second.width) == (640, 640)
    assert first.cam_from_world.allclose(second.cam_from_world, atol=1e-6)
