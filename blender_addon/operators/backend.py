"""Set up, start, stop, release, log, report."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import bpy

from .. import preferences, session, settings_now, wire
from ..errors import NearError
from ..process import Setup, environment_stamp
from . import common

ADDON = Path(__file__).resolve().parents[1]
TORCH_CUDA_FOR_WINDOWS = "https://download.pytorch.org/whl/cu128"


def backend_source() -> str:
    """What pip installs: the wheel inside the extension, or the checkout that the add-on is used from.

    Raises:
        NearError: `backend-source-missing`.
    """
    wheels = sorted((ADDON / "backend").glob("near_relight-*.whl"))
    if wheels:
        return str(wheels[-1])
    if (ADDON.parent / "pyproject.toml").is_file() and (ADDON.parent / "backend" / "near").is_dir():
        return str(ADDON.parent)
    raise NearError("backend-source-missing", "This build of the add-on does not bring the backend along.",
                    "Install near-relight in a Python 3.11 to 3.13 and choose that Python in the preferences.")


def set_up_already() -> bool:
    """Whether a backend can be started without setting one up."""
    choice = settings_now.choice()
    return choice.remote or (choice.python.is_file() and (bool(preferences.settings().python)
                                                          or bool(environment_stamp(preferences.environment_folder()))))


class NEAR_OT_backend_setup(bpy.types.Operator):
    """Make an environment for the backend and install it there (downloads PyTorch: 1 to 4 GB)"""

    bl_idname = "near.backend_setup"
    bl_label = "Set Up Backend"

    @classmethod
    def poll(cls, _context: bpy.types.Context) -> bool:
        return session.get().setup is None

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        return context.window_manager.invoke_confirm(self, event)

    def execute(self, _context: bpy.types.Context) -> set[str]:
        return common.guarded(self._begin, self)

    def _begin(self) -> set[str]:
        if not preferences.settings().online:
            raise NearError("offline", "Blender's online access is off, and setting up the backend downloads PyTorch.",
                            "Allow online access in Preferences > System, then set it up.")
        here = session.get()
        here.stop()
        cuda = sys.platform == "win32" and preferences.settings().device != "cpu" and shutil.which("nvidia-smi")
        setup = Setup(preferences.environment_folder(), backend_source(), settings_now.choice().home / "logs" / "setup.log",
                      TORCH_CUDA_FOR_WINDOWS if cuda else "")
        here.run_setup(setup, here.start)
        return {"FINISHED"}


class NEAR_OT_backend_setup_cancel(bpy.types.Operator):
    """End the setup; the next one goes on with what is there"""

    bl_idname = "near.backend_setup_cancel"
    bl_label = "Cancel"

    def execute(self, _context: bpy.types.Context) -> set[str]:
        here = session.get()
        if here.setup is not None:
            here.setup.cancel()
            here.setup = None
            here.notify()
        return {"FINISHED"}


class NEAR_OT_backend_start(bpy.types.Operator):
    """Start the backend and connect to it, or connect again"""

    bl_idname = "near.backend_start"
    bl_label = "Start"

    def execute(self, _context: bpy.types.Context) -> set[str]:
        session.get().start()
        if bpy.app.background:
            return common.guarded(lambda: (session.get().ensure(), {"FINISHED"})[1], self)
        return {"FINISHED"}


class NEAR_OT_backend_stop(bpy.types.Operator):
    """End the backend on this computer, or leave the one on another computer"""

    bl_idname = "near.backend_stop"
    bl_label = "Stop"

    def execute(self, _context: bpy.types.Context) -> set[str]:
        here = session.get()
        client = here.client
        if client is not None and client.connection.token and not here.local.ours:
            client.send(wire.Shutdown(id=client.new_id()))
        here.stop()
        return {"FINISHED"}


class NEAR_OT_backend_release(bpy.types.Operator):
    """Give the memory of the backend's models and of the GPU back; the next frame loads them again"""

    bl_idname = "near.backend_release"
    bl_label = "Release Memory"

    def execute(self, _context: bpy.types.Context) -> set[str]:
        here = session.get()
        client = here.client
        if client is None:
            return common.fail(self, NearError("backend-not-running", "No NeAR backend is running.", "Start it."))

        def work(job, client):
            yield from job.asking(client, wire.Release(id=client.new_id()))

        from ..jobs import Job

        here.clear_error()
        return common.carry_out(self, Job("Release memory", work), at_once=bpy.app.background)


class NEAR_OT_open_log(bpy.types.Operator):
    """Show the log of the backend, or of its setup, in a text editor of the system"""

    bl_idname = "near.open_log"
    bl_label = "Open Log"

    def execute(self, _context: bpy.types.Context) -> set[str]:
        path = newest_log()
        if path is None:
            return common.fail(self, NearError("log-missing", "There is no log yet.", "Start the backend first."))
        if not bpy.app.background:
            bpy.ops.wm.path_open(filepath=str(path))
        self.report({"INFO"}, str(path))
        return {"FINISHED"}


def newest_log() -> Path | None:
    """The log file that was written last: session, start or setup."""
    logs = [path for path in (settings_now.choice().home / "logs").glob("*.log") if path.stat().st_size]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def report_text() -> str:
    """What helps whoever is asked for help; no secrets, no file names of the user's."""
    from .. import wire

    here = session.get()
    choice = settings_now.choice()
    lines = [f"NeAR Relight in Blender {bpy.app.version_string} on {platform.platform()}, Python {platform.python_version()}",
             f"protocol {wire.PROTOCOL}, schema {wire.SCHEMA.hash}", f"backend: {'remote' if choice.remote else 'local'}, {here.state}, pack {choice.pack}, device {choice.device}",
             f"environment: {environment_stamp(preferences.environment_folder()) or 'none'}"]
    lines += [f"{key}: {here.info[key]}" for key in ("version", "device", "pack", "worker") if key in here.info]
    lines += [f"{key}: {here.beat[key]}" for key in ("worker", "memory", "queue", "starts") if key in here.beat]
    if here.last_error is not None:
        lines.append(f"error {here.last_error.code}: {here.last_error.what} {here.last_error.remedy}")
    lines += ["", "session:", *here.lines]
    log = newest_log()
    if log is not None:
        lines += ["", f"{log.name}:", *log.read_text(encoding="utf-8", errors="replace").splitlines()[-80:]]
    home = str(Path.home())
    return "\n".join(lines).replace(home, "~") + "\n"


class NEAR_OT_copy_report(bpy.types.Operator):
    """Copy versions, state and the end of the log to the clipboard, for a bug report"""

    bl_idname = "near.copy_report"
    bl_label = "Copy Report"

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.window_manager.clipboard = report_text()
        self.report({"INFO"}, "The report is in the clipboard")
        return {"FINISHED"}


class NEAR_OT_open_preferences(bpy.types.Operator):
    """Show the add-on's preferences"""

    bl_idname = "near.open_preferences"
    bl_label = "Preferences"

    def execute(self, _context: bpy.types.Context) -> set[str]:
        if bpy.app.background:
            return {"CANCELLED"}
        bpy.ops.preferences.addon_show(module=preferences.__package__)
        return {"FINISHED"}


class NEAR_OT_open_online_access(bpy.types.Operator):
    """Show where online access is allowed"""

    bl_idname = "near.open_online_access"
    bl_label = "Online Access"

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.preferences.active_section = "SYSTEM"
        if not bpy.app.background:
            bpy.ops.screen.userpref_show(section="SYSTEM")
        return {"FINISHED"}


class NEAR_OT_error_dismiss(bpy.types.Operator):
    """Take the message away"""

    bl_idname = "near.error_dismiss"
    bl_label = "Dismiss"

    def execute(self, _context: bpy.types.Context) -> set[str]:
        session.get().clear_error()
        return {"FINISHED"}


register, unregister = bpy.utils.register_classes_factory((
    NEAR_OT_backend_setup, NEAR_OT_backend_setup_cancel, NEAR_OT_backend_start, NEAR_OT_backend_stop, NEAR_OT_backend_release,
    NEAR_OT_open_log, NEAR_OT_copy_report, NEAR_OT_open_preferences, NEAR_OT_open_online_access, NEAR_OT_error_dismiss))
