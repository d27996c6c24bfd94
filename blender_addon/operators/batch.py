"""Works the batch queue off: picture by picture beside the user's work, or all at once in `-b`."""

from __future__ import annotations

import bpy
from bpy.app.handlers import persistent

from .. import batch, session
from ..errors import as_near_error

_outcome: list[str] = []         # how the render under way ended, told by Blender's handlers


@persistent
def _complete(*_args) -> None:
    _outcome.append("complete")


@persistent
def _cancelled(*_args) -> None:
    _outcome.append("cancelled")


_HANDLERS = (("render_complete", _complete), ("render_cancel", _cancelled))


class NEAR_OT_batch_render(bpy.types.Operator):
    """Render all cameras, lights and frames of the batch panel; pictures that are on disc are kept if asked"""

    bl_idname = "near.batch_render"
    bl_label = "Render Batch"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return batch.current is None

    def execute(self, context: bpy.types.Context) -> set[str]:
        """Waits for each picture: for `-b`."""
        if not self._begin(context):
            return {"CANCELLED"}
        queue = batch.current
        try:
            while not queue.finished:
                queue.prepare()
                bpy.ops.render.render(write_still=True, scene=queue.scene.name)
                queue.took()
        except RuntimeError as error:            # what the engine reported
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        finally:
            queue.restore()
            batch.current = None
        return {"FINISHED"}

    def invoke(self, context: bpy.types.Context, _event: bpy.types.Event) -> set[str]:
        if bpy.app.background:
            return self.execute(context)
        if not self._begin(context):
            return {"CANCELLED"}
        for name, handler in _HANDLERS:
            getattr(bpy.app.handlers, name).append(handler)
        _outcome.clear()
        self._running = False
        self._timer = context.window_manager.event_timer_add(0.1, window=context.window)
        context.window_manager.modal_handler_add(self)
        return {"RUNNING_MODAL"}

    def _begin(self, context: bpy.types.Context) -> bool:
        try:
            items = batch.plan(context)
        except Exception as error:
            session.get().report(as_near_error(error))
            self.report({"ERROR"}, str(error))
            return False
        if not items:
            self.report({"INFO"}, "All pictures are on disc already.")
            return False
        batch.current = batch.Queue(context.scene, items)
        return True

    def modal(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        queue = batch.current
        if queue is None or event.type != "TIMER":
            return {"PASS_THROUGH"} if queue is not None else self._end(context)
        if _outcome:
            ended = _outcome.pop()
            _outcome.clear()
            self._running = False
            if ended == "cancelled":
                return self._end(context)
            queue.took()
            session.get().notify()
            if queue.finished:
                return self._end(context)
        if not self._running and not bpy.app.is_job_running("RENDER"):
            queue.prepare()
            self._running = True
            bpy.ops.render.render("INVOKE_DEFAULT", write_still=True, scene=queue.scene.name)
        return {"PASS_THROUGH"}

    def _end(self, context: bpy.types.Context) -> set[str]:
        context.window_manager.event_timer_remove(self._timer)
        for name, handler in _HANDLERS:
            if handler in getattr(bpy.app.handlers, name):
                getattr(bpy.app.handlers, name).remove(handler)
        queue, batch.current = batch.current, None
        if queue is not None:
            queue.restore()
        session.get().notify()
        return {"FINISHED"}


class NEAR_OT_batch_stop(bpy.types.Operator):
    """Stop after the picture that is being rendered (Esc stops that one too)"""

    bl_idname = "near.batch_stop"
    bl_label = "Stop Batch"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return batch.current is not None

    def execute(self, context: bpy.types.Context) -> set[str]:
        queue, batch.current = batch.current, None
        queue.restore()
        return {"FINISHED"}


_classes = (NEAR_OT_batch_render, NEAR_OT_batch_stop)
_register, _unregister = bpy.utils.register_classes_factory(_classes)
register = _register


def unregister() -> None:
    for name, handler in _HANDLERS:
        if handler in getattr(bpy.app.handlers, name):
            getattr(bpy.app.handlers, name).remove(handler)
    batch.current = None
    _unregister()
