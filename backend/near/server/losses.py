"""The sentences for work that a lost worker leaves behind."""

from __future__ import annotations

import signal

from near import wire
from near.errors import Cancelled, NearError
from near.server.backend import out_of_memory
from near.server.session import Job
from near.server.workerlink import Loss

DOING = {"view": "rendering a viewport", "frame": "rendering a frame", "quick": "preparing", "job": "working on a long job"}


def cancelled() -> NearError:
    return Cancelled()


def fault(request_id: str, error: NearError) -> wire.Fault:
    """The error as a message."""
    return wire.Fault(id=request_id, code=error.code[:80], what=error.what[:2000], remedy=error.remedy[:2000])


def describe(loss: Loss, job: Job) -> NearError:
    """What happened to `job`, and what to do."""
    doing = {"Create": "creating an asset", "Encode": "encoding a mesh", "Export": "exporting"}.get(
        type(job.request).__name__, DOING[job.kind])
    again = "The backend has restarted by itself; start the work again."
    if loss.by == "deadline":
        return NearError("deadline-exceeded", f"The backend took too long while {doing} and was restarted.",
                         "Try a smaller frame or fewer assets, or allow more time.")
    if loss.by in ("stall", "silence", "nonsense"):
        return NearError("worker-hung", f"The backend stopped responding while {doing} and was restarted.", again)
    if loss.by == "memory":
        return out_of_memory(doing)
    if loss.by == "start":
        last = f" Its last words: {loss.last_words[-1][:200]}" if loss.last_words else ""
        return NearError("worker-cannot-start", f"The backend's worker process cannot start.{last}",
                         "Run near doctor, which tells what is missing; the session log has the details.")
    if loss.by == "signal" and loss.exit_code == -getattr(signal, "SIGKILL", 9):
        return NearError("worker-killed", f"The system ended the backend's worker while {doing} (often because memory ran out).",
                         f"{again} If this returns, close other programs or use smaller frames.")
    if loss.by == "exit" and loss.exit_code == 70:
        return out_of_memory(doing)
    return NearError("worker-crashed", f"The backend's worker crashed while {doing} (exit code {loss.exit_code}).", again)
