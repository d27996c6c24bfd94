"""The errors a user can meet: a code, what happened, what to do (DESIGN section 7)."""

from __future__ import annotations


class NearError(Exception):
    """An error with a remedy.

    Args:
        code: stable kebab-case identifier, e.g. ``"photo-truncated"``; programs match on it.
        what: one sentence that says what happened.
        remedy: one sentence that says what to do about it.
    """

    def __init__(self, code: str, what: str, remedy: str) -> None:
        super().__init__(f"{what} {remedy}")
        self.code, self.what, self.remedy = code, what, remedy

    def __reduce__(self):
        # The default reduction would call NearError(message) and fail on the way back from a child process.
        return type(self), (self.code, self.what, self.remedy)

    def as_dict(self) -> dict[str, str]:
        """Plain data for ``--json`` output and the wire."""
        return {"code": self.code, "what": self.what, "remedy": self.remedy}


class Cancelled(NearError):
    """Raised inside a long computation after its caller asked it to stop."""

    def __init__(self, code: str = "cancelled", what: str = "The work was cancelled.",
                 remedy: str = "Start it again when you are ready; nothing was written.") -> None:
        super().__init__(code, what, remedy)
