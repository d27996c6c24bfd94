"""Checked dataclasses and the multipart codec `[json header][raw buffer]...` under `wire.py`.

Standard library only; `blender_addon/wirecodec.py` is a byte-equal copy (`tools/sync_wire.py`). A field's rule stands in
its annotation, `Annotated[int, Int(0, 9)]`, and is applied on construction, on both sides: a decoded message is as safe
as one made by hand. Nothing here trusts the length, depth, type or number of anything that arrives.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

PROTOCOL = 1
MAX_HEADER_BYTES = 256 * 1024
MAX_PARTS = 17  # the header and at most sixteen buffers
MAX_BUFFER_BYTES = 1024 ** 3
ITEM_BYTES = {"u1": 1, "f2": 2, "f4": 4}  # little-endian; numpy's dtype codes


try:  # the backend's and, where it has one, the add-on's error for users: same three words
    from .errors import NearError as WireError
except ImportError:
    class WireError(Exception):
        """An error with a remedy: `code`, `what` happened, `remedy` (DESIGN section 7)."""

        def __init__(self, code: str, what: str, remedy: str) -> None:
            super().__init__(f"{what} {remedy}")
            self.code, self.what, self.remedy = code, what, remedy

        def as_dict(self) -> dict[str, str]:
            return {"code": self.code, "what": self.what, "remedy": self.remedy}


def malformed(detail: str) -> WireError:
    return WireError("bad-message", f"A message could not be read: {detail}.",
                     "Update the add-on and the backend to the same release and try again.")


# ---------------------------------------------------------------- field rules
@dataclass(frozen=True)
class Int:
    low: int = 0
    high: int = 2 ** 53

    def check(self, value: Any, where: str) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise malformed(f"{where} is {_short(value)}, not an integer in {self.low}..{self.high}")
        return value


@dataclass(frozen=True)
class Num:
    low: float = -1e30
    high: float = 1e30

    def check(self, value: Any, where: str) -> float:
        if type(value) not in (int, float) or not self.low <= value <= self.high:  # NaN fails both comparisons
            raise malformed(f"{where} is {_short(value)}, not a number in {self.low:g}..{self.high:g}")
        return float(value)


@dataclass(frozen=True)
class Text:
    longest: int = 200
    pattern: str = ""

    def check(self, value: Any, where: str) -> str:
        if type(value) is not str or len(value) > self.longest or "\0" in value or not _encodable(value):
            raise malformed(f"{where} is not a text of at most {self.longest} characters")
        if self.pattern and not re.fullmatch(self.pattern, value, re.ASCII):
            raise malformed(f"{where} is {_short(value)}, which is not of the form {self.pattern}")
        return value


@dataclass(frozen=True)
class OneOf:
    choices: tuple[str, ...]

    def check(self, value: Any, where: str) -> str:
        if type(value) is not str or value not in self.choices:
            raise malformed(f"{where} is {_short(value)}, not one of {', '.join(self.choices)}")
        return value


@dataclass(frozen=True)
class Flag:
    def check(self, value: Any, where: str) -> bool:
        if type(value) is not bool:
            raise malformed(f"{where} is {_short(value)}, not true or false")
        return value


@dataclass(frozen=True)
class Many:
    item: Any
    least: int = 0
    most: int = 16

    def check(self, value: Any, where: str) -> tuple:
        if type(value) not in (list, tuple) or not self.least <= len(value) <= self.most:
            raise malformed(f"{where} is not a list of {self.least} to {self.most} items")
        return tuple(self.item.check(item, where) for item in value)


@dataclass(frozen=True)
class Part:
    """A nested checked dataclass; `optional` also allows null."""
    kind: type = field(repr=False)
    optional: bool = False

    def __repr__(self) -> str:  # without the module, which differs between the two copies of wire.py
        return f"Part({self.kind.__name__}{_describe(self.kind)}, {self.optional})"

    def check(self, value: Any, where: str) -> Any:
        if isinstance(value, self.kind) or (value is None and self.optional):
            return value
        return build(self.kind, value, where)


@dataclass(frozen=True)
class Json:
    """Free-form results (used by replies only): objects whose text stays under `longest` characters."""
    longest: int = 65_536

    def check(self, value: Any, where: str) -> dict:
        try:
            fits = type(value) is dict and len(json.dumps(value, allow_nan=False)) <= self.longest
        except (ValueError, TypeError, RecursionError):
            fits = False
        if not fits:
            raise malformed(f"{where} is not an object of at most {self.longest} characters")
        return value


def _encodable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _short(value: Any) -> str:
    if type(value) is int and value.bit_length() > 200:
        return "a huge integer"
    text = ascii(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- checked dataclasses
class Checked:
    """Base of every dataclass on the wire: fields are checked and normalised on construction."""

    def __post_init__(self) -> None:
        for name, rule in rules(type(self)):
            object.__setattr__(self, name, rule.check(getattr(self, name), f"{type(self).__name__}.{name}"))
        self.check()

    def check(self) -> None:
        """Rules that span fields; raises WireError."""


@functools.lru_cache(maxsize=None)
def rules(kind: type) -> tuple[tuple[str, Any], ...]:
    """(field name, rule) of a checked dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple((entry.name, get_args(hints[entry.name])[1]) for entry in dataclasses.fields(kind))


def _describe(kind: type) -> str:
    return ";".join(f"{name}:{rule!r}" for name, rule in rules(kind))


@functools.lru_cache(maxsize=None)
def _names(kind: type) -> tuple[frozenset, frozenset]:
    fields = dataclasses.fields(kind)
    return (frozenset(f.name for f in fields),
            frozenset(f.name for f in fields if f.default is dataclasses.MISSING))


def build(kind: type, value: Any, where: str) -> Any:
    """Plain data -> checked dataclass; every required field must be there and nothing else."""
    if type(value) is not dict:
        raise malformed(f"{where} is not an object")
    known, required = _names(kind)
    if not required <= value.keys() <= known:
        raise malformed(f"{where} has missing or unknown fields")
    return kind(**value)


def to_plain(value: Any) -> Any:
    """Checked dataclass -> dicts, lists, numbers and texts."""
    if dataclasses.is_dataclass(value):
        return {name: to_plain(getattr(value, name)) for name, _ in rules(type(value))}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def canonical(plain: Any) -> bytes:
    """One text for equal data, to be hashed."""
    return json.dumps(plain, allow_nan=False, separators=(",", ":"), sort_keys=True).encode()


# ---------------------------------------------------------------- messages and the codec
@dataclass(frozen=True)
class Message(Checked):
    """`id` pairs replies with requests; unique per client, chosen by whoever asks."""
    LANES: ClassVar[tuple[str, ...]] = ()  # lanes on which a client may send it; empty: only the backend sends it
    id: Annotated[str, Text(48, r"[\w\-]+")]


@dataclass(frozen=True)
class Buffer:
    """A named block of numbers: `data` is anything with the buffer interface, contiguous, little-endian."""
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Any


def buffer_bytes(entry: dict) -> int:
    """Bytes that a description {"dtype", "shape"} needs."""
    return math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]


class Schema:
    """A closed set of messages by kind, with a hash that changes when any field or limit does."""

    def __init__(self) -> None:
        self.kinds: dict[str, type] = {}

    def __call__(self, kind: type) -> type:
        self.kinds[kind.__name__] = kind
        return kind

    @functools.cached_property
    def hash(self) -> str:
        seen = [f"{name}{_describe(kind)}" for name, kind in sorted(self.kinds.items())]
        return hashlib.sha256("\n".join([str(PROTOCOL), *seen]).encode()).hexdigest()[:16]

    def encode(self, message: Message, buffers: tuple[Buffer, ...] | list[Buffer] = ()) -> list:
        """-> [header bytes, buffer, ...], ready for `send_multipart`."""
        header = {"kind": type(message).__name__, "protocol": PROTOCOL, **to_plain(message)}
        header["buffers"] = [{"name": b.name, "dtype": b.dtype, "shape": list(b.shape)} for b in buffers]
        text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
        if len(text) > MAX_HEADER_BYTES:
            raise malformed(f"its header has {len(text)} bytes, the limit is {MAX_HEADER_BYTES}")
        return [text, *(b.data for b in buffers)]

    def decode(self, parts: list, reader: str = "backend") -> tuple[Message, list[Buffer]]:
        """Parts as received (bytes or memoryviews) -> message and its buffers (views, not copies).

        `reader` says which side decodes, "backend" or "client"; an error about versions names both.

        Raises:
            WireError: for anything that is not exactly a message of this schema.
        """
        header = peek(parts)
        if header["protocol"] != PROTOCOL:
            raise version_mismatch(header["protocol"], reader)
        kind = self.kinds.get(header["kind"])
        if kind is None:
            raise malformed("its kind is unknown")
        buffers = _buffers(header.pop("buffers", None), parts[1:])
        del header["kind"], header["protocol"]
        return build(kind, header, kind.__name__), buffers


def peek(parts: list) -> dict:
    """The header as plain data; `kind`, `protocol` and `id` are there and well typed, whatever the protocol version."""
    if not 1 <= len(parts) <= MAX_PARTS:
        raise malformed(f"it has {len(parts)} parts, not 1 to {MAX_PARTS}")
    if len(parts[0]) > MAX_HEADER_BYTES:
        raise malformed(f"its header has {len(parts[0])} bytes, the limit is {MAX_HEADER_BYTES}")
    try:
        header = json.loads(bytes(parts[0]).decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise malformed(f"its header is not JSON ({type(error).__name__})") from None
    if type(header) is not dict or type(header.get("kind")) is not str:
        raise malformed("its header has no kind")
    Int(0, 2 ** 31).check(header.get("protocol"), "protocol")
    Text(48, r"[\w\-]+").check(header.get("id"), "id")
    return header


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _unique(pairs: list) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


_DTYPE, _BUFFER_NAME = OneOf(tuple(ITEM_BYTES)), Text(40, r"[\w.\-]+")
_SHAPE = Many(Int(0, MAX_BUFFER_BYTES), 1, 4)


def _buffers(entries: Any, parts: list) -> list[Buffer]:
    if type(entries) is not list or len(entries) != len(parts):
        raise malformed(f"it has {len(parts)} buffers but describes another number of them")
    found = []
    for entry, part in zip(entries, parts):
        if type(entry) is not dict or entry.keys() != {"name", "dtype", "shape"}:
            raise malformed("a buffer's description is not name, dtype and shape")
        _DTYPE.check(entry["dtype"], "buffer dtype")
        _BUFFER_NAME.check(entry["name"], "buffer name")
        _SHAPE.check(entry["shape"], "buffer shape")
        view = memoryview(part)
        if view.nbytes != buffer_bytes(entry):
            raise malformed(f"buffer {entry['name']} has {view.nbytes} bytes, its shape needs another number")
        found.append(Buffer(entry["name"], entry["dtype"], tuple(entry["shape"]), view))
    return found


def version_mismatch(theirs: int, reader: str) -> WireError:
    """Names both versions and which side to update."""
    client, backend = (theirs, PROTOCOL) if reader == "backend" else (PROTOCOL, theirs)
    older = "add-on (or other client)" if client < backend else "backend"
    return WireError("protocol-mismatch",
                     f"The client speaks NeAR protocol {client} but the backend speaks protocol {backend}.",
                     f"Update the {older}, so that both are of the same release.")
