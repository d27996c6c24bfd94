"""Reading the constructor arguments that a published checkpoint's JSON files carry (spec section 1)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from near.errors import NearError

log = logging.getLogger(__name__)

# Given to every published class; they change how a model was trained or which kernel ran, not what it computes.
WITHOUT_EFFECT = frozenset({"use_fp16", "use_checkpoint", "qk_rms_norm_cross", "name"})


def pick_args(model: str, args: Mapping[str, Any], known: Iterable[str], ignored: Iterable[str] = ()) -> dict[str, Any]:
    """The arguments named in ``known`` that are present and not None.

    Unknown names are logged and dropped: what they would change in the parameters is caught by the strict key check.
    """
    known, ignored = set(known), set(ignored) | WITHOUT_EFFECT
    unknown = sorted(set(args) - known - ignored)
    if unknown:
        log.warning("%s: arguments this version does not know were ignored: %s", model, ", ".join(unknown))
    return {k: v for k, v in args.items() if k in known and v is not None}


def resolve_heads(picked: dict[str, Any], default_head_channels: int = 64) -> dict[str, Any]:
    """Replace ``num_head_channels`` by ``num_heads``, as the published classes do when only the former is given."""
    channels = picked.pop("num_head_channels", default_head_channels)
    if "num_heads" not in picked and "model_channels" in picked:
        picked["num_heads"] = picked["model_channels"] // channels
    return picked


def require(model: str, condition: bool, found: str) -> None:
    """Raise NearError ``model-config`` unless ``condition``; ``found`` says what was found, values included."""
    if not condition:
        raise NearError("model-config", f"{model}: {found}.",
                        "Check the model's JSON file, or update near-relight if the checkpoint is newer than this version.")


def one_of(model: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """`require` that a field holds one of the allowed words."""
    require(model, value in allowed, f"{name} is {value!r}, not one of {', '.join(map(repr, allowed))}")


def check_width(model: str, channels: int, heads: int) -> None:
    """`require` that the heads divide the width."""
    require(model, channels > 0 and heads > 0 and channels % heads == 0, f"{heads} heads do not divide a width of {channels}")
