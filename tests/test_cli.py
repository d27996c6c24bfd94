"""The command line: help at once, frames where they belong, errors in two lines, Ctrl-C without a trace."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_engine import FakeEngine, small_asset

from near.assets import save_asset
from near.cli import COMMANDS, main
from near.commands.common import orbit, parse_camera, parse_size, read_cameras, reframed
from near.errors import NearError
from near.geometry.enclosure import encloses
from near.output import read_exr, write_exr
from near.pipeline.types import PASSES


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with an asset and a light, entered; the engine is the fake one, kept as ``place.engines``."""
    engines = []

    def make(**options):
        engines.append(FakeEngine(**options))
        return engines[-1]

    monkeypatch.setattr("near.pipeline.engine.Engine", make)
    monkeypatch.chdir(tmp_path)
    save_asset("a.near", small_asset(kind="test"))
    write_exr("light.exr", {"color": torch.full((8, 16, 4), 0.5)})
    make.engines = engines
    return make


def renders(place) -> list[tuple]:
    return [c for e in place.engines for c in e.calls if c[0] == "render"]


def run(*arguments: str) -> int:
    return main([str(a) for a in arguments])


def render(*arguments: str) -> int:
    return run("render", "a.near", "--hdri", "light.exr", "--size", "40x24", "--quiet", *arguments)


# -- starting ------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(os.name == "nt", reason="counts processor time by wait4")
def test_help_is_instant():
    """Half a second of processor time; the clock on the wall would measure what else the machine does."""
    import resource

    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run([sys.executable, "-m", "near", "--help"], capture_output=True, text=True, timeout=120, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert all(name in out.stdout for name in COMMANDS)
    assert min(times) < 0.5


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and "usage: near" in capsys.readouterr().out


def test_version_and_unknown_command(capsys):
    for argv, code in ((["--version"], 0), (["rendr"], 2), ([], 2)):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == code


# -- parsing -------------------------------------------------------------------------------------------------------------

def test_sizes_and_cameras():
    assert parse_size("640x480") == (640, 480)
    assert parse_camera("-30,20,2,40") == (-30, 20, 2, 40)
    for parse, text, code in ((parse_size, "640", "size-invalid"), (parse_size, "axb", "size-invalid"), (parse_camera, "1,2,3", "camera-invalid"),
                              (parse_camera, "0,0,-1,40", "camera-invalid"), (parse_camera, "0,0,2,180", "camera-invalid"),
                              (parse_camera, "nan,0,2,40", "camera-invalid")):
        with pytest.raises(NearError) as error:
            parse(text)
        assert error.value.code == code


def test_cameras_file_takes_both_conventions(tmp_path):
    camera = orbit((30, 20, 2, 40), 64, 48)
    flip = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    entries = [{"cam_from_world": camera.cam_from_world.tolist(), "K": camera.K.tolist(), "width": 64, "height": 48},
               {"matrix_world": (camera.world_from_cam @ flip).tolist(), "fov_deg": 40, "resolution": [64, 48]},
               {"matrix_world": (camera.world_from_cam @ flip).tolist(), "fov_deg": 40}]
    (tmp_path / "c.json").write_text(json.dumps({"cameras": entries}))
    for read in read_cameras(tmp_path / "c.json", (64, 48)):
        torch.testing.assert_close(read.cam_from_world, camera.cam_from_world, atol=1e-5, rtol=0)
        torch.testing.assert_close(read.K, camera.K, atol=1e-4, rtol=0)
    with pytest.raises(NearError, match="Camera 2 .*width"):
        read_cameras(tmp_path / "c.json", None)
    for text, code in (("{", "cameras-unreadable"), ("[]", "cameras-invalid"), ('[{"fov_deg": 40}]', "cameras-invalid"),
                       ('[{"cam_from_world": [[2,0,0,0],[0,2,0,0],[0,0,2,0],[0,0,0,1]], "fov_deg": 40}]', "camera-not-rigid")):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(NearError) as error:
            read_cameras(tmp_path / "c.json", (64, 48))
        assert error.value.code == code


def test_reframing_keeps_what_the_width_sees():
    camera = orbit((0, 0, 2, 40), 64, 64)
    wide = reframed(camera, 128, 32)
    assert float(wide.K[0, 0]) == pytest.approx(2 * float(camera.K[0, 0])) and wide.K[1, 1] == wide.K[0, 0] and float(wide.K[1, 2]) == 16


def test_enclosure():
    grid = torch.stack(torch.meshgrid(*[torch.arange(16)] * 3, indexing="ij"), -1).reshape(-1, 3)
    radius = (grid.float() + 0.5 - 8).norm(dim=-1)
    shell = grid[(radius > 5) & (radius < 6.8)]
    bowl = shell[shell[:, 2] < 8]
    for point, coords, inside in (((0, 0, 0), shell, True), ((0.3, 0, 0), shell, True), ((0.2, 0.1, -0.1), shell, True), ((0, 0, 0.9), shell, False),
                                  ((0, 0, 0), bowl, False), ((0.45, 0.45, 0.45), shell, False)):
        assert encloses(coords, 16, torch.tensor(point, dtype=torch.float32)) is inside, point


# -- rendering -----------------------------------------------------------------------------------------------------------

def test_one_picture(place, capsys):
    assert render("-o", "out.png", "--rotation", "90", "--camera", "10,5,3,30", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"] == ["out.png"] and result["size"] == [40, 24] and Path("out.png").is_file()
    (_, camera, passes, quality, env_from_world), = renders(place)
    assert passes == ("color",) and quality == "full" and (camera.width, camera.height) == (40, 24)
    assert float(camera.position.norm()) == pytest.approx(3, abs=1e-5)
    torch.testing.assert_close(env_from_world, torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]), atol=1e-6, rtol=0)


def test_exr_holds_all_passes_by_default(place):
    assert render("-o", "out.exr") == 0
    assert {"R", "depth.Z", "normal.X", "shadow.V"} <= set(read_exr("out.exr")) and renders(place)[0][2] == tuple(PASSES)


def test_turntable_goes_around_once(place):
    assert render("-o", "turn.gif", "--turntable", "4", "--camera", "10,0,2,40") == 0
    yaws = [math.degrees(math.atan2(float(c[1].position[0]), -float(c[1].position[1]))) % 360 for c in renders(place)]
    assert yaws == pytest.approx([10, 100, 190, 280], abs=1e-3)


def test_light_sweep_turns_the_light_only(place):
    assert render("-o", "sweep.mp4", "--light-sweep", "3") == 0
    calls = renders(place)
    assert all(torch.equal(c[1].cam_from_world, calls[0][1].cam_from_world) for c in calls)
    angles = [math.degrees(math.atan2(float(c[4][1, 0]), float(c[4][0, 0]))) % 360 for c in calls]
    assert angles == pytest.approx([0, 120, 240], abs=1e-3)


def test_sequence_of_passes(place):
    assert render("-o", "frames", "--turntable", "2", "--passes", "color,normal") == 0
    assert sorted(p.name for p in Path("frames").iterdir()) == ["frame_0000.normal.png", "frame_0000.png", "frame_0001.normal.png", "frame_0001.png"]


def test_video_of_a_pass_has_a_background(place):
    import imageio.v3

    assert render("-o", "n.gif", "--passes", "roughness", "--background", "ff0000") == 0
    corner = np.asarray(imageio.v3.imread("n.gif"))[0, 0, 0]
    assert corner[0] > 240 and corner[1] < 15


@pytest.mark.parametrize("options, code", [
    (["--passes", "colour"], "pass-unknown"), (["--passes", "color,normal", "-o", "v.mp4"], "output-single"), (["--turntable", "3", "-o", "a.png"], "output-single"),
    (["-o", "a.jpg"], "output-kind"), (["--turntable", "0", "-o", "v.mp4"], "frames-invalid"), (["--background", "red", "-o", "v.gif"], "colour-invalid"),
    (["--fps", "0", "-o", "v.gif"], "option-range"), (["--strength", "-1"], "option-range"), (["--strength", "nan"], "option-range"),
    (["--rotation", "inf"], "rotation-invalid"), (["--camera", "0,0,2"], "camera-invalid"), (["--camera", "0,0,2,40", "--cameras", "x.json"], "options-conflict"),
])
def test_options_that_make_no_sense(place, capsys, options, code):
    options = options if "-o" in options else [*options, "-o", "out.png"]
    assert render(*options) == 2
    error = capsys.readouterr().err
    assert f"Error [{code}]: " in error and "What to do: " in error and "Traceback" not in error
    assert sorted(p.name for p in Path().iterdir()) == ["a.near", "light.exr"] and not renders(place)


def test_error_as_json(place, capsys):
    assert render("-o", "a.jpg", "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "output-kind"


def test_failure_during_a_sequence_leaves_nothing(place, monkeypatch):
    frames = FakeEngine.render

    def second_fails(self, *args, **options):
        if sum(c[0] == "render" for c in self.calls):
            raise NearError("device-memory", "The GPU is out of memory.", "Choose a smaller size.")
        return frames(self, *args, **options)

    monkeypatch.setattr(FakeEngine, "render", second_fails)
    for output in ("frames", "v.mp4", "v.gif"):
        assert render("-o", output, "--turntable", "3") == 2
    assert sorted(p.name for p in Path().iterdir()) == ["a.near", "light.exr"]


# -- assets --------------------------------------------------------------------------------------------------------------

def cube(path: Path) -> Path:
    import trimesh

    trimesh.creation.box().export(path)
    return path


def test_create_and_encode_and_inspect(place, capsys):
    from PIL import Image

    picture = np.zeros((64, 48, 4), np.uint8)
    picture[16:48, 12:36] = 255
    Image.fromarray(picture).save("p.png")
    cube(Path("m.glb"))
    assert run("create", "p.png", "-o", "made.near", "--mesh", "m.glb", "--camera", "0,0,2,40", "--mask", "mask.png", "--steps", "2",
               "--exposure", "0.5", "--json") == 0
    created = json.loads(capsys.readouterr().out)
    assert created["meta"]["kind"] == "create" and Path("made.near").is_file() and Path("mask.png").is_file()
    call = place.engines[-1].calls[0]
    assert (call[3].width, call[3].height) == (48, 64) and call[4:] == (2, 0.5)
    assert run("encode", "m.glb", "-o", "encoded.near", "--quiet") == 0
    capsys.readouterr()
    assert run("inspect", "encoded.near", "--json", "--save", "copy.near") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["voxels"] == len(small_asset()) and record["meta"]["kind"] == "encode" and Path("copy.near").is_file()
    assert run("inspect", "encoded.near") == 0 and "features" in capsys.readouterr().out


def test_assets_have_their_own_suffix(place, capsys):
    cube(Path("m.glb"))
    assert run("encode", "m.glb", "-o", "m.asset", "--quiet") == 2 and "[output-kind]" in capsys.readouterr().err


# -- the rest ------------------------------------------------------------------------------------------------------------

def test_doctor_reports_and_judges(capsys, monkeypatch):
    import near.doctor

    monkeypatch.setattr(near.doctor, "CHECKS", tuple(c for c in near.doctor.CHECKS if c.__name__ != "_blender"))
    status = run("doctor", "--json")
    report = json.loads(capsys.readouterr().out)
    assert status == (2 if report["verdict"] == "problem" else 0)
    assert {"python", "device", "memory", "AgX table"} <= {f["name"] for f in report["findings"]}
    assert all(f["remedy"] for f in report["findings"] if f["state"] in ("warning", "problem"))

    def breaks():
        raise RuntimeError("broken")
        yield

    monkeypatch.setattr(near.doctor, "CHECKS", (breaks,))
    assert run("doctor") == 2 and "broken" in capsys.readouterr().out


def test_demo_makes_everything_it_names(place, capsys, monkeypatch):
    from near.lighting import samples, uniform_environment

    monkeypatch.setattr(samples, "sample_environment", lambda name, height: uniform_environment(0.5))
    assert run("demo", "-o", "demo", "--frames", "3", "--size", "48", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["made"]) == {"asset", "lights", "turntable", "light_sweep", "exr", "passes", "contact_sheet"}
    assert all(Path(p).exists() for p in result["made"].values()) and set(result["seconds"]) >= {"create", "turntable", "light_sweep"}


def test_bench_measures_every_stage(place, capsys):
    assert run("bench", "--size", "32", "--frames", "3", "--lights", "2", "--cycles-samples", "0", "--out", "b.json", "--quiet") == 0
    result = json.loads(Path("b.json").read_text())
    assert set(result["median_seconds"]) == {"encode", "create", "orbit_frame", "new_light", "light_turn"} and result["peak_memory_mb"] > 50
    assert "cycles" not in result and "frames/s" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_interrupted_render_leaves_nothing(tmp_path, number):
    """A real process, stopped in the middle of a sequence."""
    save_asset(tmp_path / "a.near", small_asset())
    write_exr(tmp_path / "light.exr", {"color": torch.full((8, 16, 4), 0.5)})
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import fake_engine, near.pipeline.engine
class Slow(fake_engine.FakeEngine):
    def render(self, *a, **k):
        print('frame', flush=True); time.sleep(0.3)
        return super().render(*a, **k)
near.pipeline.engine.Engine = Slow
from near.cli import main
sys.exit(main(['render', 'a.near', '--hdri', 'light.exr', '--size', '32x32', '--turntable', '500', '-o', 'frames', '--quiet']))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "frame\n" and process.stdout.readline() == "frame\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Stopped" in errors and "Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.near", "light.exr"]
