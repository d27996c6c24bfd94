"""Weights that travel: every file of a pack in pieces of at most 16 MB, with an index that joining is checked against."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

PIECE_BYTES = 16_000_000
INDEX = "index.json"


def split_pack(pack: Path, out: Path, history: list[dict], piece_bytes: int = PIECE_BYTES) -> dict:
    """Write the pack's weights into ``out`` as pieces; returns the index.

    Args: history: a record per slot so far; it travels along.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.piece*"):
        old.unlink()
    manifest = json.loads((pack / "manifest.json").read_text(encoding="utf-8"))
    index = {"format": 1, "config": manifest["meta"]["config"], "history": history, "files": {}}
    for name in sorted(manifest["files"]):
        data = (pack / name).read_bytes()
        parts = []
        for number, start in enumerate(range(0, len(data), piece_bytes)):
            piece = data[start:start + piece_bytes]
            file = f"{name}.piece{number}"
            (out / file).write_bytes(piece)
            parts.append({"file": file, **_record(piece)})
        index["files"][name] = {**_record(data), "pieces": parts}
    (out / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index


def read_index(pieces: Path) -> dict:
    """The index of a folder of pieces.

    Raises: NearError ``pieces-missing``.
    """
    from near.errors import NearError

    try:
        return json.loads((pieces / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NearError("pieces-missing", f"{pieces.name} holds no index of weights in pieces.", "Name the folder weights/ of a slot's results.") from error


def join_pack(pieces: Path, pack: Path) -> dict:
    """Join and verify; ``pack`` is then a pack that --pack can name. Returns the index.

    Raises:
        NearError: ``pieces-missing``, ``pieces-damaged``; nothing is written then.
    """
    from near.errors import NearError
    from near.weights.integrity import write_manifest

    index, joined = read_index(pieces), {}
    for name, record in index["files"].items():
        parts = []
        for piece in record["pieces"]:
            path = pieces / piece["file"]
            if not path.is_file():
                raise NearError("pieces-missing", f"The piece {piece['file']} is missing.", "Copy the slot's results again.")
            parts.append(path.read_bytes())
            if _record(parts[-1]) != {k: piece[k] for k in ("sha256", "bytes")}:
                raise NearError("pieces-damaged", f"The piece {piece['file']} is not the one that was written.", "Copy the slot's results again.")
        joined[name] = b"".join(parts)
        if _record(joined[name]) != {k: record[k] for k in ("sha256", "bytes")}:
            raise NearError("pieces-damaged", f"{name} does not come together from its pieces.", "Copy the slot's results again.")
    pack.mkdir(parents=True, exist_ok=True)
    for name, data in joined.items():
        (pack / name).write_bytes(data)
    write_manifest(pack, "compact", {"config": index["config"]})
    return index


def _record(data: bytes) -> dict:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
