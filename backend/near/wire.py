"""The messages between NeAR's processes (DESIGN section 6), as frozen dataclasses.

Standard library only. `backend/near/wire.py` is the source, `blender_addon/wire.py` a byte-equal copy
(`tools/sync_wire.py`), so it imports nothing but its companion `wirecodec`. Units and spaces follow DESIGN section 4:
metres, radians, pixels, linear Rec.709, OpenCV `cam_from_world`, row-major matrices, top image row first.

Lanes: *control* (hello, status, cancel, heartbeats), *view* (newest wins, per viewport), *batch* (uploads, jobs, frames
in order). Large inputs are uploaded once and named by sha256 afterwards; a path never crosses the wire, except for
`AddFile` inside folders that the owner of the backend allowed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, ClassVar

from .wirecodec import (  # noqa: F401  (re-exported: this is the one module the others import)
    ITEM_BYTES, MAX_HEADER_BYTES, MAX_PARTS, PROTOCOL, Buffer, Checked, Flag, Int, Json, Many, Message, Num, OneOf,
    Part, Schema, Text, WireError, buffer_bytes, build, canonical, malformed, peek, to_plain, version_mismatch)

LANES = ("control", "view", "batch")
MAX_CHUNK_BYTES = 4 * 1024 * 1024
MAX_UPLOAD_BYTES = 1024 ** 3
MAX_SIDE = 16_384
MAX_PIXELS = 64 * 1024 * 1024
MAX_ASSETS = 64
MAX_STOPS = 6.0  # by which a photo may be read as if exposed longer or shorter
PASS_CHANNELS = {"color": 4, "alpha": 1, "base_color": 3, "roughness": 1, "metallic": 1, "shadow": 1, "normal": 3,
                 "depth": 1}
QUALITIES = ("draft", "full", "progressive")
UPLOAD_KINDS = ("photo", "mesh", "hdri", "asset")
EXPORT_FORMATS = ("near", "ply", "glb")

SHA256 = Text(64, "[0-9a-f]{64}")
SHA256_OR_NONE = Text(64, "([0-9a-f]{64})?")
VIEWPORT = Text(40, r"[\w.\-]+")
MATRIX4 = Many(Num(), 16, 16)
MATRIX3 = Many(Num(), 9, 9)
EYE4 = (1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
EYE3 = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
DEADLINE = Num(0, 7 * 86_400)


# ---------------------------------------------------------------- what a frame is made of
@dataclass(frozen=True)
class CameraSpec(Checked):
    """OpenCV camera: `cam_from_world` [4,4], `K` [3,3] in pixels (centres at +0.5), size in pixels, clip in metres."""
    cam_from_world: Annotated[tuple, MATRIX4]
    K: Annotated[tuple, MATRIX3]
    width: Annotated[int, Int(1, MAX_SIDE)]
    height: Annotated[int, Int(1, MAX_SIDE)]
    near: Annotated[float, Num(1e-9, 1e9)] = 0.01
    far: Annotated[float, Num(1e-9, 1e12)] = 1000.0
    projection: Annotated[str, OneOf(("perspective", "orthographic"))] = "perspective"

    def check(self) -> None:
        if self.width * self.height > MAX_PIXELS:
            raise WireError("frame-too-large", f"A frame of {self.width} x {self.height} pixels is too large.",
                            f"Render at most {MAX_PIXELS // 1024 ** 2} million pixels at a time.")


@dataclass(frozen=True)
class LightSpec(Checked):
    """Environment map by sha256 (empty: `uniform_lin709`), turned by `env_from_world` [3,3], times `strength`."""
    sha256: Annotated[str, SHA256_OR_NONE] = ""
    uniform_lin709: Annotated[tuple, Many(Num(0), 3, 3)] = (1.0, 1.0, 1.0)
    env_from_world: Annotated[tuple, MATRIX3] = EYE3
    strength: Annotated[float, Num(0, 1e9)] = 1.0


@dataclass(frozen=True)
class PlacedSpec(Checked):
    """An asset, by the sha256 that names it, and where it stands: `world_from_asset` [4,4]."""
    sha256: Annotated[str, SHA256]
    world_from_asset: Annotated[tuple, MATRIX4] = EYE4


@dataclass(frozen=True)
class Scene(Checked):
    """Everything one frame depends on. `border` = (x0, y0, x1, y1) pixels, half open; empty means the whole frame.

    `precision` f2 is the format of DESIGN section 6; f4 gives the very numbers of an in-process render.
    Depth always travels as f4.
    """
    assets: Annotated[tuple, Many(Part(PlacedSpec), 0, MAX_ASSETS)]
    light: Annotated[LightSpec, Part(LightSpec)]
    camera: Annotated[CameraSpec, Part(CameraSpec)]
    passes: Annotated[tuple, Many(OneOf(tuple(PASS_CHANNELS)), 1, len(PASS_CHANNELS))] = ("color",)
    quality: Annotated[str, OneOf(QUALITIES)] = "full"
    border: Annotated[tuple, Many(Int(0, MAX_SIDE), 0, 4)] = ()
    precision: Annotated[str, OneOf(("f2", "f4"))] = "f2"

    def check(self) -> None:
        if len(set(self.passes)) != len(self.passes):
            raise malformed("Scene.passes names a pass twice")
        if self.border:
            x0, y0, x1, y1 = (*self.border, 0, 0, 0)[:4]
            if not (len(self.border) == 4 and x0 < x1 <= self.camera.width and y0 < y1 <= self.camera.height):
                raise malformed("Scene.border does not lie inside the frame")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what comes back."""
        if self.border:
            return self.border[3] - self.border[1], self.border[2] - self.border[0]
        return self.camera.height, self.camera.width

    def layout(self) -> list[dict]:
        """Buffer descriptions of the reply, in the order of `passes`."""
        return [{"name": name, "dtype": "f4" if name == "depth" else self.precision,
                 "shape": [*self.size, PASS_CHANNELS[name]]} for name in self.passes]

    def frame_bytes(self) -> int:
        return sum(buffer_bytes(entry) for entry in self.layout())

    def key(self) -> str:
        """sha256 of the canonical text: equal scenes give equal pixels, so this names a frame."""
        return hashlib.sha256(canonical(to_plain(self))).hexdigest()


# ---------------------------------------------------------------- messages of clients
SCHEMA = Schema()


@SCHEMA
@dataclass(frozen=True)
class Hello(Message):
    """First message on the control lane; answered by `Welcome` or `Fault`. `schema` is `SCHEMA.hash` of the client."""
    LANES: ClassVar = ("control",)
    schema: Annotated[str, Text(16)]
    client: Annotated[str, Text(120)] = ""
    shared_memory: Annotated[bool, Flag()] = False


@SCHEMA
@dataclass(frozen=True)
class SharedMemoryProof(Message):
    """`proof` (hex) was read from the probe segment of `Welcome`: this client can map the backend's memory."""
    LANES: ClassVar = ("control",)
    proof: Annotated[str, Text(64)]


@SCHEMA
@dataclass(frozen=True)
class Ping(Message):
    """Answered at once by `Done`."""
    LANES: ClassVar = ("control", "view", "batch")


@SCHEMA
@dataclass(frozen=True)
class Bye(Message):
    """The client leaves; its queued work is dropped."""
    LANES: ClassVar = ("control",)


@SCHEMA
@dataclass(frozen=True)
class Status(Message):
    """Answered by `Done`: worker, queues, memory, clients, and the last `log_lines` lines of the session log."""
    LANES: ClassVar = ("control",)
    log_lines: Annotated[int, Int(0, 400)] = 0


@SCHEMA
@dataclass(frozen=True)
class Cancel(Message):
    """Stops request `target`, queued or running; answered by `Done` when it has stopped."""
    LANES: ClassVar = ("control",)
    target: Annotated[str, Text(48, r"[\w\-]+")]


@SCHEMA
@dataclass(frozen=True)
class Release(Message):
    """Gives memory back: the models, or the whole worker process with its GPU context."""
    LANES: ClassVar = ("control",)
    what: Annotated[str, OneOf(("models", "process"))] = "process"


@SCHEMA
@dataclass(frozen=True)
class Shutdown(Message):
    """Ends the backend in good order."""
    LANES: ClassVar = ("control",)


@SCHEMA
@dataclass(frozen=True)
class Have(Message):
    """Answered by `Done` {"missing": [...]}: which of these uploads the backend lacks."""
    LANES: ClassVar = ("control", "batch")
    sha256s: Annotated[tuple, Many(SHA256, 0, 256)]


@SCHEMA
@dataclass(frozen=True)
class Upload(Message):
    """One chunk (the only buffer, u1 [n]) of a file that has `size` bytes in all; answered by `Done` {"offset", "complete"}."""
    LANES: ClassVar = ("batch",)
    sha256: Annotated[str, SHA256]
    type: Annotated[str, OneOf(UPLOAD_KINDS)]
    size: Annotated[int, Int(1, MAX_UPLOAD_BYTES)]
    offset: Annotated[int, Int(0, MAX_UPLOAD_BYTES)]


@SCHEMA
@dataclass(frozen=True)
class AddFile(Message):
    """Takes in a file that lies on the backend's machine, in a folder its owner allowed; `Done` {"sha256"}."""
    LANES: ClassVar = ("batch",)
    type: Annotated[str, OneOf(UPLOAD_KINDS)]
    path: Annotated[str, Text(2000)]


@SCHEMA
@dataclass(frozen=True)
class Fetch(Message):
    """A piece of an asset or export by sha256; `Done` {"size"} with one buffer (u1 [n], n <= `length`)."""
    LANES: ClassVar = ("batch",)
    sha256: Annotated[str, SHA256]
    offset: Annotated[int, Int(0, MAX_UPLOAD_BYTES)] = 0
    length: Annotated[int, Int(1, MAX_CHUNK_BYTES)] = MAX_CHUNK_BYTES


@SCHEMA
@dataclass(frozen=True)
class Create(Message):
    """Photo (and mesh) -> asset; `Progress`..., then `Done` {"sha256", ...}. `steps` 0 and `deadline_s` 0: the usual.

    `shape`: another photo, of what gives the shape (style transfer); `generator`: an installed geometry source, empty for
    the mesh, where there is one, or else the photo's outline; `exposure_stops`: the photo is read as if exposed longer by so much.
    """
    LANES: ClassVar = ("batch",)
    photo: Annotated[str, SHA256]
    mesh: Annotated[str, SHA256_OR_NONE] = ""
    shape: Annotated[str, SHA256_OR_NONE] = ""
    generator: Annotated[str, Text(60)] = ""
    camera: Annotated[object, Part(CameraSpec, optional=True)] = None
    seed: Annotated[int, Int()] = 0
    steps: Annotated[int, Int(0, 1000)] = 0
    exposure_stops: Annotated[float, Num(-MAX_STOPS, MAX_STOPS)] = 0.0
    deadline_s: Annotated[float, DEADLINE] = 0.0


@SCHEMA
@dataclass(frozen=True)
class Matte(Message):
    """What would be cut out of a photo: a `Progress` with the preview, then `Done` {"width", "height", "share"}."""
    LANES: ClassVar = ("batch",)
    photo: Annotated[str, SHA256]
    deadline_s: Annotated[float, DEADLINE] = 0.0


@SCHEMA
@dataclass(frozen=True)
class Encode(Message):
    """Mesh with its materials -> asset; `Progress`..., then `Done` {"sha256", ...}."""
    LANES: ClassVar = ("batch",)
    mesh: Annotated[str, SHA256]
    seed: Annotated[int, Int()] = 0
    deadline_s: Annotated[float, DEADLINE] = 0.0


@SCHEMA
@dataclass(frozen=True)
class Export(Message):
    """Asset -> file in `format` (ply: splats under `light`; glb: textures, on the UVs of the uploaded `mesh`, which is in asset
    space, if given); `Done` {"sha256", "size"}, to be fetched."""
    LANES: ClassVar = ("batch",)
    asset: Annotated[str, SHA256]
    format: Annotated[str, OneOf(EXPORT_FORMATS)] = "near"
    mesh: Annotated[str, SHA256_OR_NONE] = ""
    light: Annotated[object, Part(LightSpec, optional=True)] = None
    deadline_s: Annotated[float, DEADLINE] = 0.0


@SCHEMA
@dataclass(frozen=True)
class Assets(Message):
    """`list` -> `Done` {"assets": [...]}; `load` / `unload` warm or free one of them in the worker."""
    LANES: ClassVar = ("control", "batch")
    action: Annotated[str, OneOf(("list", "load", "unload"))] = "list"
    sha256: Annotated[str, SHA256_OR_NONE] = ""


@SCHEMA
@dataclass(frozen=True)
class SetLight(Message):
    """Prepares a light (prefiltering, tokens), so that the next frame under it is quick; `Done`."""
    LANES: ClassVar = ("control", "batch")
    light: Annotated[LightSpec, Part(LightSpec)]


@SCHEMA
@dataclass(frozen=True)
class ViewRender(Message):
    """Newest wins: a larger `seq` of the same `viewport` replaces it. `progressive` answers twice: draft, then full.

    Any answer (frame, fault, superseded) with a `seq` or for a request is also the end of all older ones of its viewport.
    """
    LANES: ClassVar = ("view",)
    viewport: Annotated[str, VIEWPORT]
    seq: Annotated[int, Int(1)]
    scene: Annotated[Scene, Part(Scene)]


@SCHEMA
@dataclass(frozen=True)
class CloseViewport(Message):
    """The viewport is gone: drop its work and memory."""
    LANES: ClassVar = ("view",)
    viewport: Annotated[str, VIEWPORT]


@SCHEMA
@dataclass(frozen=True)
class Received(Message):
    """The frame that answered `target` was taken over; opens the window for the next one, frees shared memory `slot`."""
    LANES: ClassVar = ("view", "batch")
    target: Annotated[str, Text(48, r"[\w\-]+")]
    slot: Annotated[int, Int(-1, 1 << 30)] = -1


@SCHEMA
@dataclass(frozen=True)
class BatchFrame(Message):
    """A frame that will come, once, whatever happens to the worker; `key` names it (empty: `scene.key()`)."""
    LANES: ClassVar = ("batch",)
    scene: Annotated[Scene, Part(Scene)]
    key: Annotated[str, Text(120, r"[\w.\-]*")] = ""
    deadline_s: Annotated[float, DEADLINE] = 0.0


# ---------------------------------------------------------------- messages of the backend
@SCHEMA
@dataclass(frozen=True)
class Welcome(Message):
    """`info`: version, pid, packs, limits, operations; `probe`: shared memory segment to prove (empty: not offered)."""
    schema: Annotated[str, Text(16)]
    info: Annotated[dict, Json()]
    probe: Annotated[str, Text(300)] = ""


@SCHEMA
@dataclass(frozen=True)
class Beat(Message):
    """Once a second to every client: state of worker and queues."""
    state: Annotated[dict, Json()]


@SCHEMA
@dataclass(frozen=True)
class Done(Message):
    """The request's result."""
    result: Annotated[dict, Json(250_000)]


@SCHEMA
@dataclass(frozen=True)
class Fault(Message):
    """The request failed: code, one sentence what happened, one what to do. Its shape stays in all protocol versions."""
    code: Annotated[str, Text(80)]
    what: Annotated[str, Text(2000)]
    remedy: Annotated[str, Text(2000)]


@SCHEMA
@dataclass(frozen=True)
class Progress(Message):
    """News of a long job; `fraction` 0..1 of all of it, `eta_s` -1 when unknown; perhaps a buffer `preview` (u1 [h,w,3], sRGB)."""
    stage: Annotated[str, Text(120)]
    fraction: Annotated[float, Num(0, 1)]
    elapsed_s: Annotated[float, Num(0)] = 0.0
    eta_s: Annotated[float, Num(-1)] = -1.0


@SCHEMA
@dataclass(frozen=True)
class FrameDone(Message):
    """A frame: as buffers, or (slot >= 0) in shared memory `segment` at byte `start`, laid out as `Scene.layout()`.

    `final` false announces a better one of the same `seq`.
    """
    seq: Annotated[int, Int()] = 0
    viewport: Annotated[str, Text(40)] = ""
    key: Annotated[str, Text(120)] = ""
    quality: Annotated[str, OneOf(QUALITIES)] = "full"
    final: Annotated[bool, Flag()] = True
    render_ms: Annotated[float, Num(0)] = 0.0
    segment: Annotated[str, Text(300)] = ""
    slot: Annotated[int, Int(-1, 1 << 30)] = -1
    start: Annotated[int, Int()] = 0
    layout: Annotated[tuple, Many(Json(400), 0, 8)] = ()


@SCHEMA
@dataclass(frozen=True)
class Superseded(Message):
    """A view request came too late, after the newer `by`, or its viewport was closed (`by` 0)."""
    viewport: Annotated[str, Text(40)]
    by: Annotated[int, Int()]
