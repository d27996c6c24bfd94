"""The errors a user can meet, and the button that helps (DESIGN section 7). Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


class NearError(Exception):
    """An error with a remedy: `code`, `what` happened, `remedy`; the shared modules raise it as their `WireError`."""

    def __init__(self, code: str, what: str, remedy: str) -> None:
        super().__init__(f"{what} {remedy}")
        self.code, self.what, self.remedy = code, what, remedy

    def as_dict(self) -> dict[str, str]:
        return {"code": self.code, "what": self.what, "remedy": self.remedy}


class Cancelled(NearError):
    """The user asked for an end of the work."""

    def __init__(self) -> None:
        super().__init__("cancelled", "The work was cancelled.", "Start it again when you are ready; nothing was changed.")


@dataclass(frozen=True)
class Fix:
    """A button: the operator that repairs what an error complains of."""
    operator: str
    text: str
    icon: str = "TOOL_SETTINGS"


_SETUP = Fix("near.backend_setup", "Set Up Backend", "IMPORT")
_START = Fix("near.backend_start", "Start Backend", "PLAY")
_RELEASE = Fix("near.backend_release", "Release Memory", "TRASH")
_PREFERENCES = Fix("near.open_preferences", "Open Preferences", "PREFERENCES")
_ONLINE = Fix("near.open_online_access", "Open Online Access Setting", "INTERNET")
_RELINK = Fix("near.asset_relink", "Find the File", "FILE_FOLDER")
_PHOTO = Fix("near.photo_pick", "Choose Another Photo", "FILE_IMAGE")
_SCALE = Fix("near.make_scale_uniform", "Make Scale Uniform", "FULLSCREEN_ENTER")
_CAMERA = Fix("near.make_camera_perspective", "Make Camera Perspective", "CAMERA_DATA")
_LOG = Fix("near.open_log", "Open Log", "TEXT")

FIXES: dict[str, Fix] = {
    "backend-not-set-up": _SETUP, "schema-mismatch": _SETUP, "protocol-mismatch": _SETUP, "setup-failed": _LOG,
    "backend-not-running": _START, "backend-gone": _START, "backend-silent": _START, "backend-start": _LOG,
    "backend-busy": _START, "token-refused": _START, "connection-invalid": _START, "connection-exposed": _PREFERENCES,
    "connection-missing": _PREFERENCES, "key-refused": _PREFERENCES, "remote-unreachable": _PREFERENCES,
    "remote-not-set": _PREFERENCES, "device-missing": _PREFERENCES, "offline": _ONLINE, "out-of-memory": _RELEASE,
    "gpu-fault": _RELEASE, "asset-file-missing": _RELINK, "asset-damaged": _RELINK, "asset-changed": _RELINK,
    "photo-missing": _PHOTO, "photo-not-set": _PHOTO, "photo-damaged": _PHOTO, "photo-not-an-image": _PHOTO,
    "photo-too-small": _PHOTO, "photo-too-big": _PHOTO, "photo-no-object": _PHOTO, "photo-transparent": _PHOTO,
    "photo-shape": _PHOTO, "upload-refused": _PHOTO, "scale-not-uniform": _SCALE, "transform-mirrored": _SCALE,
    "transform-invalid": _SCALE, "camera-panoramic": _CAMERA, "camera-unsupported": _CAMERA,
    "internal-error": _LOG, "addon-fault": _LOG, "worker-crashed": _LOG,
}


def fix_of(code: str) -> Fix | None:
    """The button for an error, where there is one."""
    return FIXES.get(code)


def as_near_error(error: BaseException) -> NearError:
    """Any exception in the words of a NearError; what nobody foresaw says so."""
    if isinstance(error, NearError):
        return error
    if isinstance(error, OSError) and error.strerror:
        name = f" {error.filename}" if error.filename else ""
        return NearError("file-trouble", f"A file{name} could not be used: {error.strerror}.",
                         "Check that the place exists, may be written, and has free space.")
    return NearError("addon-fault", f"The add-on failed ({type(error).__name__}: {error}).",
                     "Try again; if this returns, copy the report (NeAR panel > Backend) and send it.")
