"""What several operators share."""

from __future__ import annotations

from collections.abc import Callable

import bpy

from .. import session
from ..errors import NearError, as_near_error
from ..jobs import Job


def fail(operator: bpy.types.Operator, error: BaseException) -> set[str]:
    """Shows an error in the panel and in Blender's own report; for scripts, the operator raises RuntimeError."""
    told = as_near_error(error)
    session.get().report(told)
    operator.report({"ERROR"}, f"{told.what} {told.remedy}")
    return {"CANCELLED"}


def carry_out(operator: bpy.types.Operator, job: Job, at_once: bool) -> set[str]:
    """Runs a job in the background (from a button), or here and now (from a script, or without a window)."""
    try:
        if at_once or bpy.app.background:
            session.get().finish(job)
        else:
            session.get().run(job)
    except NearError as error:
        return fail(operator, error)
    return {"FINISHED"}


class AtOnce:
    """Mixin: a button's click (invoke) goes on in the background, a script's call (execute) waits."""

    at_once = True

    def invoke(self, context: bpy.types.Context, _event: bpy.types.Event) -> set[str]:
        self.at_once = False
        return self.execute(context)


def guarded(work: Callable[[], set[str]], operator: bpy.types.Operator) -> set[str]:
    """`work`, with whatever it raises in the panel."""
    try:
        return work()
    except Exception as error:
        return fail(operator, error)


def no_job(cls: type[bpy.types.Operator]) -> bool:
    """For `poll`: one long job at a time."""
    if session.get().jobs:
        cls.poll_message_set("Another job is running; wait for it or cancel it")
        return False
    return True
