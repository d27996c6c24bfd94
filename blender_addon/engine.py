"""The render engine: F12, animations, `-b`; the viewport part is in `viewport.py`."""

from __future__ import annotations

from collections.abc import Iterator

import bpy
import numpy as np

from . import rendering, session
from .errors import Cancelled, NearError, as_near_error
from .scene import lighting
from .viewport import ViewportDrawing, close_view

ENGINE = "NEAR_RELIGHT"
# Panels of other engines that make sense for ours too, and those that do not though they would show.
_EXCLUDED = {"VIEWLAYER_PT_filter", "VIEWLAYER_PT_layer_passes", "RENDER_PT_simplify", "RENDER_PT_hydra_debug"}


class NEAR_RE_engine(bpy.types.RenderEngine, ViewportDrawing):
    """Each viewport and each render has an instance of its own, which Blender makes and drops as it likes."""

    bl_idname = ENGINE
    bl_label = "NeAR Relight"
    bl_use_preview = False
    bl_use_postprocess = True
    bl_use_eevee_viewport = True
    bl_use_shading_nodes_custom = False

    def __del__(self) -> None:
        # Blender has freed its half by now: nothing of `self` may be asked for but its identity.
        close_view(id(self))

    # -- final renders -------------------------------------------------------------------------------------------

    def update_render_passes(self, scene=None, renderlayer=None) -> None:
        self.register_pass(scene, renderlayer, "Combined", 4, "RGBA", "COLOR")
        for name in rendering.wanted_passes(renderlayer):
            title, channels, kind = rendering.PASSES[name]
            self.register_pass(scene, renderlayer, title, len(channels), channels, kind)

    def render(self, depsgraph: bpy.types.Depsgraph) -> None:
        """Waits for the backend by polling. Nothing is raised: an engine that raises, or that calls `error_set` and leaves no
        result, crashes Blender when it writes a multilayer EXR; `report` and return stops the render and writes no file."""
        try:
            self._render(depsgraph)
        except Cancelled:
            return
        except Exception as error:
            told = as_near_error(error)
            if not isinstance(error, NearError):
                import traceback

                session.get().log(traceback.format_exc())
            session.get().report(told)
            self.report({"ERROR"}, f"{told.what} {told.remedy}")

    def _render(self, depsgraph: bpy.types.Depsgraph) -> None:
        scene = depsgraph.scene_eval
        layer = depsgraph.view_layer_eval.name
        self.update_stats("NeAR Relight", "Reading the scene")
        for view in self._views(scene):
            shot = rendering.shot_of(depsgraph, self.resolution_x, self.resolution_y, self.camera_model_matrix(scene.camera) if scene.camera else None)
            self.update_stats("NeAR Relight", "Light")
            light = lighting.capture(depsgraph, self.test_break)
            self.update_progress(0.2)
            self.update_stats("NeAR Relight", f"Rendering {len(shot.placed)} asset{'s' * (len(shot.placed) != 1)}")
            layers = rendering.render_shot(shot, light, self.test_break)
            if self.test_break():
                raise Cancelled()
            self._deliver(rendering.finish(layers, shot, light, scene.render.film_transparent), shot, layer, view)
        self.update_progress(1.0)

    def _views(self, scene: bpy.types.Scene) -> Iterator[str]:
        """Makes each stereo view the active one; a single one without a name otherwise."""
        if not scene.render.use_multiview:
            yield ""
            return
        for view in scene.render.views:
            if view.use:
                self.active_view_set(view.name)
                yield view.name

    def _deliver(self, passes: dict[str, np.ndarray], shot: rendering.Shot, layer: str, view: str) -> None:
        """Layers as Blender's passes; its rows begin at the bottom."""
        for name, channels, _ in rendering.PASSES.values():
            if name in passes:
                self.add_pass(name, len(channels), channels, layer=layer)
        height, width = shot.size
        result = self.begin_result(0, 0, width, height, layer=layer, view=view)
        target = result.layers[0].passes
        for name, value in passes.items():
            found = target.find_by_name(name, view)
            if found is not None:
                found.rect.foreach_set(np.ascontiguousarray(value[::-1], np.float32).ravel())
        self.end_result(result)

    # -- viewport ------------------------------------------------------------------------------------------------

    def view_update(self, context: bpy.types.Context, depsgraph: bpy.types.Depsgraph) -> None:
        self._scene_changed(context, depsgraph)

    def view_draw(self, context: bpy.types.Context, depsgraph: bpy.types.Depsgraph) -> None:
        self._draw_view(context, depsgraph)


def compatible_panels() -> list[type]:
    """Blender's own panels that show for its simplest engine; ours shows them as well."""
    return [panel for panel in bpy.types.Panel.__subclasses__()
            if "BLENDER_RENDER" in getattr(panel, "COMPAT_ENGINES", ()) and panel.__name__ not in _EXCLUDED]


def register() -> None:
    bpy.utils.register_class(NEAR_RE_engine)
    for panel in compatible_panels():
        panel.COMPAT_ENGINES.add(ENGINE)


def unregister() -> None:
    for panel in bpy.types.Panel.__subclasses__():
        getattr(panel, "COMPAT_ENGINES", set()).discard(ENGINE)
    bpy.utils.unregister_class(NEAR_RE_engine)
