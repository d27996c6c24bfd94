"""What the add-on costs the user, measured inside the journey's Blender: how long it holds the main thread, and what it leaves on the GPU.

Two times are taken of every call: the clock's, and the clock's without what this thread stood in line for a processor (Linux
counts that in schedstat): another program's work is no stall of ours. Both are reported.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

UPLOAD = "image upload"


def queued_ms() -> float:
    """How long this thread has been ready to run without a processor, since its start; 0 where the system does not say."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e6
    except (OSError, IndexError, ValueError):
        return 0.0


class Stalls:
    """Calls of wrapped functions: name -> [(clock ms, of it held by us ms)]. What is nested counts for the inner one alone."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[float, float]]] = {}
        self._inner: list[list[float]] = []

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Replaces `owner.attribute` by itself with a watch."""
        function = getattr(owner, attribute)

        def watched(*arguments, **options):
            clock, queue = time.perf_counter(), queued_ms()
            self._inner.append([0.0, 0.0])
            try:
                return function(*arguments, **options)
            finally:
                total = (time.perf_counter() - clock) * 1e3
                held = max(total - (queued_ms() - queue), 0.0)
                inner = self._inner.pop()
                self.calls.setdefault(name, []).append((total - inner[0], held - inner[1]))
                if self._inner:
                    self._inner[-1][0] += total
                    self._inner[-1][1] += held

        setattr(owner, attribute, watched)

    def told(self) -> dict[str, dict]:
        """Per name: count, 50th and 99th percentile and largest, in ms; `clock` and `held` (without waiting for a processor)."""
        return {name: {"count": len(calls), **{kind: _spread([call[index] for call in calls]) for index, kind in enumerate(("clock", "held"))}}
                for name, calls in self.calls.items()}


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p50_ms": 0.5, "p99_ms": 0.99}
    return {**{key: round(ordered[int(len(ordered) * share)], 2) for key, share in at.items()}, "max_ms": round(ordered[-1], 2)}


def watch(module: Callable[[str], Any]) -> Stalls:
    """Watches everything of the add-on that Blender calls in its main thread by itself. `module`: gives one of the add-on's."""
    stalls = Stalls()
    viewport, overlay, proxies, panels = module("viewport"), module("overlay"), module("proxydepth"), ("main", "create", "asset", "light", "render", "batch", "match", "backend")
    stalls.wrap(module("session").Session, "poll", "timer")
    stalls.wrap(viewport, "_tick", "timer of views")
    stalls.wrap(module("display"), "_measure", "display table")
    stalls.wrap(overlay, "paint", "GPU")
    stalls.wrap(proxies.ProxyDepth, "draw", "GPU")
    stalls.wrap(proxies, "seen", "proxies' meshes")
    stalls.wrap(overlay.OverlayView, "draw", "overlay")
    stalls.wrap(viewport.ViewportDrawing, "_draw_view", "engine's viewport")
    stalls.wrap(viewport, "_texture", UPLOAD)
    for name in panels:
        _wrap_draw(stalls, getattr(module(f"panels.{name}"), f"NEAR_PT_{name}"))
    return stalls


def _wrap_draw(stalls: Stalls, panel: type) -> None:
    """Blender counts the arguments that a panel's `draw` names."""
    stalls.wrap(panel, "draw", "panels")
    watched = panel.draw
    panel.draw = lambda self, context: watched(self, context)


# ---------------------------------------------------------------- GPU
_MOST_NAMES = 20_000


def gl_textures() -> int:
    """Number of OpenGL textures in the context that is current now: to be called while something is drawn."""
    library = ctypes.CDLL("libGL.so.1")
    library.glIsTexture.restype, library.glIsTexture.argtypes = ctypes.c_ubyte, [ctypes.c_uint]
    return sum(bool(library.glIsTexture(name)) for name in range(1, _MOST_NAMES))
