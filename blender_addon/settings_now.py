"""The preferences as a session wants them; apart, so that session and process know nothing of Blender."""

from __future__ import annotations

from pathlib import Path

from . import preferences
from .process import Choice


def choice() -> Choice:
    """Which backend the preferences name now."""
    now = preferences.settings()
    python = Path(now.python) if now.python else preferences.environment_python()
    return Choice(python=python, home=now.home, device=now.device, pack=now.pack, key_file=now.key_file, remote=now.remote, online=now.online)


def auto_start() -> bool:
    return preferences.settings().auto_start
