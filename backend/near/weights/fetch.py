"""Where parts come from: the hub or a mirror of it, or a local folder laid out as the hub.

Both sources answer the same two questions: what does this part consist of (``resolve``), and give me this file
(``fetch``). Downloads go to a staging folder, continue where they stopped, and are checked before they are installed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from near.errors import NearError
from near.weights.integrity import CHUNK, safe_relative, sha256_file
from near.weights.packs import Part

TRUE_WORDS = ("1", "true", "yes", "on")


@dataclass(frozen=True)
class RemoteFile:
    """One file on offer; ``sha256`` where the source tells it."""

    name: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Listing:
    """A resolved revision and its files."""

    revision: str
    files: tuple[RemoteFile, ...]


class Source(Protocol):
    """See the module's docstring."""

    label: str

    def resolve(self, part: Part, revision: str | None) -> Listing: ...

    def fetch(self, part: Part, revision: str, file: RemoteFile, staging: Path) -> None: ...


def is_offline(flag: bool = False) -> bool:
    """True if the flag or ``NEAR_OFFLINE`` / ``HF_HUB_OFFLINE`` forbids the network."""
    return flag or any(os.environ.get(name, "").lower() in TRUE_WORDS for name in ("NEAR_OFFLINE", "HF_HUB_OFFLINE"))


def open_source(location: str | None, offline: bool = False) -> Source:
    """Source named by ``--from``: a folder, a mirror's URL, or None for the hub.

    Raises: NearError ``offline`` or ``weights-source``.
    """
    if location and not location.startswith(("http://", "https://")):
        return FolderSource(Path(location).expanduser())
    if is_offline(offline):
        raise NearError("offline", "Downloads are switched off (--offline, NEAR_OFFLINE or HF_HUB_OFFLINE).",
                        "Allow the network for this command, or give a local folder with --from.")
    return HubSource(location)


def wanted(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    """Names that match a pattern (``*`` also crosses folders), sorted."""
    return sorted(n for n in names if any(fnmatch(n, p) for p in patterns))


def check_space(folder: Path, needed: int) -> None:
    """Raises: NearError ``disk-full`` when ``needed`` bytes do not fit (with 1 % to spare)."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed * 1.01 > free:
        raise NearError("disk-full", f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free in {folder}.",
                        "Free some space, or point NEAR_HOME to another disk.")


class FolderSource:
    """A folder with ``org/name/<files>``, or a hub cache with ``models--org--name/snapshots/<revision>/<files>``.

    An optional ``SHA256SUMS`` beside the files (lines ``<hex>  <name>``) is trusted as the hub's checksums would be.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise NearError("weights-source", f"The folder {root} does not exist.", "Check the path given to --from.")
        self.root, self.label = root, "folder"

    def _folder(self, part: Part, revision: str | None) -> tuple[Path, str]:
        plain = self.root / part.repo
        if plain.is_dir():
            return plain, "local"
        cache = self.root / ("models--" + part.repo.replace("/", "--"))
        if revision is None and (ref := cache / "refs" / "main").is_file():
            revision = ref.read_text().strip()
        if revision and (cache / "snapshots" / safe_relative(revision)).is_dir():
            return cache / "snapshots" / revision, revision
        raise NearError("weights-source", f"{self.root} holds no {part.repo}.",
                        f"Lay the folder out as the hub: {self.root / part.repo}/<files>.")

    def resolve(self, part: Part, revision: str | None) -> Listing:
        folder, found = self._folder(part, revision)
        sums = _read_sums(folder / "SHA256SUMS")
        names = wanted((p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()), part.files)
        files = tuple(RemoteFile(n, (folder / n).stat().st_size, sums.get(n)) for n in names)
        return Listing(found, files)

    def fetch(self, part: Part, revision: str, file: RemoteFile, staging: Path) -> None:
        source = self._folder(part, revision)[0] / file.name
        target = staging / safe_relative(file.name)
        partial = target.with_name(target.name + ".part")
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            if target.stat().st_size == file.bytes and sha256_file(target) == sha256_file(source):
                return
            target.unlink()
        # A partial copy is continued; the caller's checksum catches a source that changed in between.
        done = partial.stat().st_size if partial.exists() and partial.stat().st_size <= file.bytes else 0
        with open(source, "rb") as reader, open(partial, "r+b" if done else "wb") as writer, \
                tqdm(total=file.bytes, initial=done, unit="B", unit_scale=True, desc=file.name, disable=None) as bar:
            reader.seek(done)
            writer.seek(done)
            while chunk := reader.read(CHUNK):
                writer.write(chunk)
                bar.update(len(chunk))
        os.replace(partial, target)


class HubSource:
    """The Hugging Face hub, or a mirror that speaks its protocol at ``endpoint``."""

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint, self.label = endpoint, endpoint or "hub"

    def resolve(self, part: Part, revision: str | None) -> Listing:
        from huggingface_hub import HfApi

        with _hub_errors(part):
            info = HfApi(endpoint=self.endpoint).model_info(part.repo, revision=revision, files_metadata=True)
        files = {s.rfilename: RemoteFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None) for s in info.siblings or []}
        return Listing(info.sha or revision or "main", tuple(files[n] for n in wanted(files, part.files)))

    def fetch(self, part: Part, revision: str, file: RemoteFile, staging: Path) -> None:
        from huggingface_hub import hf_hub_download

        safe_relative(file.name)
        with _hub_errors(part):
            hf_hub_download(part.repo, file.name, revision=revision, local_dir=staging, endpoint=self.endpoint)


class _hub_errors:
    """Turn the hub client's exceptions into ours."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> bool:
        if error is None or isinstance(error, NearError) or not isinstance(error, Exception):
            return False
        from huggingface_hub import errors as hub

        repo = self.part.repo
        if isinstance(error, hub.GatedRepoError):
            raise NearError("weights-gated", f"{repo} must be requested on its page first.",
                            f"Open https://huggingface.co/{repo}, accept its terms and run `hf auth login`.") from error
        if isinstance(error, hub.RevisionNotFoundError):
            raise NearError("weights-revision", f"{repo} no longer has the pinned revision.",
                            "Run the command with --update to accept the present one.") from error
        if isinstance(error, (hub.RepositoryNotFoundError, hub.EntryNotFoundError)):
            raise NearError("weights-source", f"{repo} was not found there.", "Check the mirror, or try the hub itself.") from error
        raise NearError("download-failed", f"The download of {repo} stopped: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                        "Check the connection and run the same command again: it continues where it stopped.") from error


def _read_sums(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    pairs = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {name.lstrip("*").strip(): digest.lower() for digest, name in pairs}
