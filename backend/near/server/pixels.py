"""Float32 layers -> the bytes of the wire, into given memory; tensors and arrays alike."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from near import wire
from near.errors import NearError

_NUMPY = {"f2": np.float16, "f4": np.float32, "u1": np.uint8}


def write_layers(layers: dict[str, Any], layout: list[dict], out: memoryview) -> None:
    """Writes the layers one after the other, as `layout` (`Scene.layout()`) says, into `out`."""
    start = 0
    for entry in layout:
        size = wire.buffer_bytes(entry)
        _convert(layers[entry["name"]], entry, out[start:start + size])
        start += size


def layer_bytes(layer: Any, entry: dict) -> memoryview:
    """The layer in memory of its own."""
    out = memoryview(np.empty(wire.buffer_bytes(entry), np.uint8))
    _convert(layer, entry, out)
    return out


def _convert(layer: Any, entry: dict, out: memoryview) -> None:
    if list(layer.shape) != list(entry["shape"]):
        raise NearError("frame-shape", f"The pass {entry['name']} came out as {list(layer.shape)}, not {list(entry['shape'])}.",
                        "This is a fault of the backend; send the session log with a report.")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(layer, torch.Tensor):
        # torch converts to half precision about ten times as fast as numpy
        kind = {"f2": torch.float16, "f4": torch.float32, "u1": torch.uint8}[entry["dtype"]]
        value = layer.detach().clamp(-65504, 65504) if entry["dtype"] == "f2" else layer.detach()
        torch.frombuffer(out, dtype=kind).view(*layer.shape).copy_(value)
        return
    value = np.clip(layer, -65504, 65504) if entry["dtype"] == "f2" else layer
    np.frombuffer(out, _NUMPY[entry["dtype"]]).reshape(layer.shape)[...] = value
