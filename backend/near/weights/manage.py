"""List, pull, verify and remove weights.

``pull`` never leaves a half-installed part: files are gathered and checked in a staging folder, then moved in one step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from near.errors import NearError
from near.weights import packs
from near.weights.fetch import FolderSource, Listing, RemoteFile, Source, check_space, open_source
from near.weights.integrity import (FileRecord, LockEntry, check_files, read_lock, record_folder, verify_manifest, write_lock)
from near.weights.packs import Licence, Part, select_parts, weights_home

Say = Callable[[str], None]
Accept = Callable[[Part], bool]  # shows the licence, returns the user's answer


@dataclass(frozen=True)
class Status:
    """One row of ``near weights list``. state: ``shipped``, ``installed``, ``absent`` or ``damaged: ...``."""

    name: str
    pack: str
    purpose: str
    licence: str
    size_mb: int
    state: str
    revision: str
    path: Path | None


def list_weights(home: Path | None = None) -> list[Status]:
    """State of every part; only sizes and time stamps are looked at (``verify`` hashes)."""
    home = home or weights_home()
    lock = read_lock(home)
    rows = []
    for pack in packs.PACKS.values():
        if pack.shipped:
            folder = packs.compact_dir()
            present = (folder / "manifest.json").exists()
            size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if present else 0
            rows.append(Status(pack.name, pack.name, pack.purpose, "Apache-2.0", round(size / 1e6),
                               "shipped" if present else "absent", "", folder if present else None))
        for part in pack.parts:
            entry = lock.get(part.name)
            folder = home / part.name
            installed = entry is not None and folder.is_dir()
            missing = [n for n, r in entry.files.items()
                       if not (folder / n).is_file() or (folder / n).stat().st_size != r.bytes] if installed else []
            state = "absent" if not installed else f"damaged: {missing[0]}" if missing else "installed"
            rows.append(Status(part.name, pack.name, part.purpose, part.licence.name, part.size_mb, state,
                               entry.revision if entry else part.revision or "", folder if installed else None))
    return rows


def licence_text(part: Part) -> str:
    """What the user is shown before a download."""
    lines = [f"{part.name} ({part.repo}, about {part.size_mb} MB): {part.purpose}",
             f"  licence: {part.licence.name}, {part.licence.url}", f"  {part.licence.note}"]
    if part.licence.excluded:
        lines.append(f"  NOT LICENSED IN: {', '.join(part.licence.excluded)}.")
    return "\n".join(lines)


def pull(names: list[str], *, accept: Accept, location: str | None = None, offline: bool = False, update: bool = False,
         home: Path | None = None, say: Say = print, parts: dict[str, Part] | None = None) -> list[Path]:
    """Install parts and return their folders.

    Args:
        names: packs or parts. accept: asked once for every part, before anything is downloaded.
        location: mirror URL or local folder instead of the hub. update: forget the pinned revision and checksums.
    Raises: NearError ``licence-refused``, ``offline``, ``weights-source``, ``weights-tampered``, ``disk-full``,
        ``download-failed``.
    """
    home = home or weights_home()
    chosen = select_parts(names, parts)
    if not chosen:
        say("Nothing to download: the compact weights come with the package.")
        return []
    source = open_source(location, offline)
    for part in chosen:
        _ask(part, accept)
    folders = []
    for part in chosen:
        folders.append(_pull_part(part, source, home, update, say))
        for extra in _foreign_parts(part, folders[-1], home):
            say(f"{part.name} also refers to {extra.repo}.")
            _ask(extra, accept)
            folders.append(_pull_part(extra, source, home, update, say))
    return folders


def verify(names: list[str], *, home: Path | None = None, say: Say = print) -> None:
    """Hash every file again. Without names: everything installed, and the shipped pack.

    Raises: NearError ``weights-tampered`` or ``weights-missing``, naming the file.
    """
    home = home or weights_home()
    lock = read_lock(home)
    known = [n for n in names if n not in lock and n != "compact"]
    selected = names if not known else [*(n for n in names if n in lock or n == "compact"),
                                        *(p.name for p in select_parts(known) if p.name in lock)]
    if known and len(selected) == len(names) - len(known):
        raise NearError("weights-missing", f"{', '.join(known)}: nothing is installed.", f"Run `near weights pull {known[0]}`.")
    if not names:
        selected = [*(["compact"] if (packs.compact_dir() / "manifest.json").exists() else []), *lock]
    for name in selected:
        if name == "compact":
            manifest = verify_manifest(packs.compact_dir(), "compact")
            say(f"compact: {len(manifest['files'])} files as shipped")
        else:
            check_files(home / name, lock[name].files, name)
            basis = "as published" if lock[name].trust == "published" else "as first pulled"
            say(f"{name}: {len(lock[name].files)} files {basis}, revision {lock[name].revision}")
    if not selected:
        say("Nothing is installed.")


def remove(names: list[str], *, home: Path | None = None, say: Say = print) -> None:
    """Delete parts and their lock entries.

    Raises: NearError ``weights-missing`` if nothing of that name is installed.
    """
    home = home or weights_home()
    lock = read_lock(home)
    targets = [n for n in names if n in lock]
    others = [n for n in names if n not in lock]
    if "compact" in others:
        raise NearError("weights-shipped", "The compact weights are part of the package.", "Uninstall near-relight to remove them.")
    targets += [p.name for p in select_parts(others) if p.name in lock] if others else []
    if not targets:
        raise NearError("weights-missing", f"{', '.join(names)}: nothing is installed.", "`near weights list` shows what is.")
    for name in targets:
        # The lock entry goes first: a part without an entry is not installed, whatever is left of its folder.
        size = sum(record.bytes for record in lock.pop(name).files.values())
        write_lock(home, lock)
        shutil.rmtree(home / name, ignore_errors=True)
        say(f"{name}: removed, {size / 1e6:.0f} MB freed")


def installed(name: str, *, home: Path | None = None) -> Path:
    """Folder of an installed part, its files checked (by stamp; by hash where a stamp changed).

    Raises: NearError ``weights-missing`` or ``weights-tampered``.
    """
    home = home or weights_home()
    entry = read_lock(home).get(name)
    if entry is None or not (home / name).is_dir():
        raise NearError("weights-missing", f"The weights {name!r} are not installed.", f"Run `near weights pull {name}`.")
    check_files(home / name, entry.files, name, use_stamps=True)
    return home / name


def installed_repo(repo: str, *, home: Path | None = None) -> Path | None:
    """Folder of the installed part that came from ``org/name``, or None."""
    home = home or weights_home()
    for name, entry in read_lock(home).items():
        if entry.repo == repo:
            return installed(name, home=home)
    return None


def _ask(part: Part, accept: Accept) -> None:
    if not accept(part):
        raise NearError("licence-refused", f"The licence of {part.name} ({part.licence.name}) was not accepted.",
                        "Read it and run the command again with --accept-licences.")


def _pull_part(part: Part, source: Source, home: Path, update: bool, say: Say) -> Path:
    lock = read_lock(home)
    pinned = None if update else lock.get(part.name)
    revision = (pinned.revision if pinned and pinned.revision != "local" else None) or (None if update else part.revision)
    listing = source.resolve(part, revision)
    if not listing.files:
        raise NearError("weights-source", f"{part.repo} holds none of the files needed: {', '.join(part.files)}.",
                        "Check the folder or mirror given to --from.")
    expected = _expected(part, listing, pinned, update)
    staging = home / ".incoming" / part.name
    check_space(home, sum(f.bytes for f in listing.files))
    for file in listing.files:
        source.fetch(part, listing.revision, file, staging)
    records = record_folder(staging, [f.name for f in listing.files])
    for name, record in records.items():
        if expected.get(name, record.sha256) != record.sha256:
            (staging / name).unlink()
            raise NearError("weights-tampered", f"{part.name}: the file {name} does not have the expected checksum and was refused.",
                            "Pull from another source; if the publisher replaced the file, use --update.")
    trust = "published" if all(n in expected for n in records) and not (pinned and pinned.trust == "first-use") else "first-use"
    if trust == "first-use" and pinned is None:
        say(f"{part.name}: no checksum was known in advance for "
            f"{', '.join(n for n in records if n not in expected)}; what arrived now is pinned from here on (trust on first use).")
    _install(staging, home / part.name, records)
    entry = LockEntry(part.repo, listing.revision, source.label, part.licence.name,
                      datetime.now(timezone.utc).date().isoformat(), trust, records)
    write_lock(home, {**read_lock(home), part.name: entry})
    check_files(home / part.name, records, part.name, use_stamps=True)
    say(f"{part.name}: {len(records)} files, {sum(r.bytes for r in records.values()) / 1e6:.0f} MB, revision {listing.revision}")
    return home / part.name


def _expected(part: Part, listing: Listing, pinned: LockEntry | None, update: bool) -> dict[str, str]:
    """Checksums each file must have: those shipped with this code, else those pinned, else those the source tells."""
    expected = {f.name: f.sha256 for f in listing.files if f.sha256}
    if pinned:
        expected.update({name: record.sha256 for name, record in pinned.files.items()})
    if not update:
        expected.update(part.sha256)
    return expected


def _install(staging: Path, target: Path, records: dict[str, FileRecord]) -> None:
    """Swap the checked files in; anything else in staging (the hub client's notes) is dropped."""
    ready = staging.with_name(staging.name + ".ready")
    shutil.rmtree(ready, ignore_errors=True)
    for name in records:
        (ready / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(ready / name)
    shutil.rmtree(staging, ignore_errors=True)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    ready.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def _foreign_parts(part: Part, folder: Path, home: Path) -> list[Part]:
    """Repositories that the part's ``pipeline.yaml`` refers to and that are not installed (spec section 1)."""
    from near.weights.checkpoint import foreign_prefixes

    if not (folder / "pipeline.yaml").is_file():
        return []
    extra: dict[str, list[str]] = {}
    for repo, prefix in foreign_prefixes(folder):
        if installed_repo(repo, home=home) is None:
            extra.setdefault(repo, []).extend([f"{prefix}.json", f"{prefix}.safetensors", f"{prefix}.pt"])
    return [Part(f"{part.name}-{repo.replace('/', '--')}", repo, f"models that {part.name} refers to",
                 Licence("see its page", f"https://huggingface.co/{repo}", "Read the licence on the repository's page."),
                 tuple(files), 0) for repo, files in extra.items()]


__all__ = ["FolderSource", "RemoteFile", "Status", "installed", "installed_repo", "licence_text", "list_weights", "pull", "remove",
           "verify"]
