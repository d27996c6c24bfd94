"""Blender's display transform as a table, for what is drawn in display space: whatever view, look, exposure and gamma the scene has.

It is measured from Blender itself: all colours of the table are saved as a picture and read back. The first picture of a view
transform makes Blender prepare that transform, which can take a quarter of a second, so a second Blender does it.
"""

from __future__ import annotations

import time

import bpy
import numpy as np

from . import viewport
from .errors import NearError
from .scene import bake, bake_child, colour

SIZE = 33
LOG2_LOW, LOG2_RANGE = -8.0, 15.0      # the table's axes are log2(x + 2^-8), up to 2^7
IDLE_S, TICK_S = 30.0, 0.1             # how long the second Blender waits for another change


class DisplayTable:
    """Scene-linear to display values, [n, n, n] over a logarithmic shaper."""

    def __init__(self) -> None:
        self.key: tuple | None = None              # the settings that `values` are of
        self.values: np.ndarray | None = None      # float32 [blue, green, red, 3]
        self._texture = None
        self._baker, self._asked, self._used = bake.Baker(), None, 0.0

    @staticmethod
    def key_of(scene: bpy.types.Scene) -> tuple:
        view = scene.view_settings
        return scene.display_settings.display_device, view.view_transform, view.look, view.exposure, view.gamma

    def measure(self, scene: bpy.types.Scene) -> None:
        """Here and now; makes data-blocks, so not while something is drawn."""
        key = self.key_of(scene)
        self._take(key, bake_child.display_table(*key, SIZE, LOG2_LOW, LOG2_RANGE))

    def _take(self, key: tuple, values: np.ndarray) -> None:
        self.key, self.values, self._texture = key, np.ascontiguousarray(values, np.float32).reshape(SIZE, SIZE, SIZE, 3), None

    def ready(self, scene: bpy.types.Scene) -> bool:
        """Whether there is a table; sees to a new one where the settings have changed, until when the old one serves."""
        if self.key != self.key_of(scene) and not bpy.app.timers.is_registered(_measure):
            bpy.app.timers.register(_measure, first_interval=0.0)
        return self.values is not None

    def advance(self, scene: bpy.types.Scene) -> bool:
        """A step of measuring it elsewhere; -> whether there is more to come. Never waits."""
        try:
            if self._baker.busy:
                found = self._baker.poll()
                if found is not None:
                    self._take(self._asked, found)
                    self._used = time.monotonic()
                    viewport.redraw()
            elif self.key != self.key_of(scene):
                self._asked = self.key_of(scene)
                _, out = self._baker.paths()
                self._baker.begin(bake.Job(out, colour.working_space(), view=self._asked, table=(SIZE, LOG2_LOW, LOG2_RANGE)))
        except NearError:                          # no second Blender to be had: then this one
            self.measure(scene)
            viewport.redraw()
        if self._baker.busy or time.monotonic() - self._used < IDLE_S:
            return True
        self._baker.close()
        return False

    def bound(self):
        """As a 3D texture."""
        import gpu

        if self._texture is None:
            rgba = np.concatenate([self.values, np.ones_like(self.values[..., :1])], -1).ravel()
            self._texture = gpu.types.GPUTexture((SIZE,) * 3, format="RGBA16F", data=gpu.types.Buffer("FLOAT", len(rgba), rgba))
        return self._texture

    def close(self) -> None:
        """Frees what is on the GPU, and the second Blender."""
        self._texture = self.values = self.key = None
        self._baker.close()


table = DisplayTable()


def _measure() -> float | None:
    from . import session
    from .errors import as_near_error

    try:
        return TICK_S if table.advance(bpy.context.scene) else None
    except Exception as error:                     # a raise would end the timer without a word
        session.get().report(as_near_error(error))
        return None


def register() -> None:
    """Nothing to be done before the first drawing."""


def unregister() -> None:
    if bpy.app.timers.is_registered(_measure):
        bpy.app.timers.unregister(_measure)
    table.close()
