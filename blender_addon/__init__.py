"""NeAR Relight: a photo becomes a relightable neural asset that stands in the scene as an object."""

from __future__ import annotations

import importlib

# In this order; unregistered in the opposite one.
_MODULES = ("preferences", "properties", "pictures", "handlers", "render_properties", "viewport", "engine", "display", "overlay",
            "operators.backend", "operators.create", "operators.encode", "operators.asset", "operators.export", "operators.light",
            "operators.integration", "operators.batch", "operators.match",
            "panels.main", "panels.create", "panels.asset", "panels.light", "panels.render", "panels.match", "panels.batch", "panels.backend")
_registered: list = []


def register() -> None:
    for name in _MODULES:
        module = importlib.import_module(f".{name}", __package__)
        module.register()
        _registered.append(module)


def unregister() -> None:
    while _registered:
        _registered.pop().unregister()
