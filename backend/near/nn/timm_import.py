"""The one place that imports the packages that drag torchvision in: timm, and peft (through transformers).

PyPI's torchvision is built for CUDA; beside a CPU build of torch its compiled operators do not load, and importing it
fails because two of them are missing. Declaring their schemas is enough: nothing here calls them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

MISSING_OPERATORS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                     "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_declared: list[torch.library.Library] = []  # the schemas live as long as this object


def repair_torchvision() -> None:
    """Make ``import torchvision`` work where only its compiled operators are missing; does nothing where it is absent."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half-imported
    if not _declared:
        library = torch.library.Library("torchvision", "DEF")
        for schema in MISSING_OPERATORS:
            library.define(schema)
        _declared.append(library)
    importlib.import_module("torchvision")


def import_timm():
    """Return the `timm` module."""
    repair_torchvision()
    return importlib.import_module("timm")


def import_peft():
    """Return the `peft` module."""
    repair_torchvision()
    return importlib.import_module("peft")
