"""Where an object's geometry comes from: a mesh of the user's, the photo's silhouette, or a plug-in.

A package adds a source by an entry point of the group ``near.geometry``: its name, and an object or a class without arguments
that has :class:`GeometrySource`'s ``build``.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from near.errors import NearError
from near.geometry.cameras import Camera
from near.geometry.mesh import PbrMesh, load_mesh
from near.geometry.photo import Photo
from near.geometry.silhouette import silhouette_mesh

ENTRY_POINTS = "near.geometry"


@dataclass(frozen=True)
class GeometryRequest:
    """What a source may use: a photo with a matte, the photo's camera (of its size), a mesh. Any may be missing."""

    photo: Photo | None = None
    camera: Camera | None = None
    mesh: Path | PbrMesh | None = None


class GeometrySource(Protocol):
    """Builds geometry. Raises NearError when the request lacks what it needs."""

    def build(self, request: GeometryRequest) -> tuple[PbrMesh, Camera | None]:
        """The mesh in asset space, and the photo's camera seen from there (None without one)."""


class MeshSource:
    """The user's own mesh; the camera is taken to be given in its asset space."""

    def build(self, request: GeometryRequest) -> tuple[PbrMesh, Camera | None]:
        if request.mesh is None:
            raise NearError("geometry-needs-mesh", "The geometry source 'mesh' was asked for without a mesh.", "Give a mesh file.")
        return request.mesh if isinstance(request.mesh, PbrMesh) else load_mesh(request.mesh), request.camera


class SilhouetteSource:
    """The photo's matte, inflated."""

    def build(self, request: GeometryRequest) -> tuple[PbrMesh, Camera | None]:
        if request.photo is None or request.camera is None:
            raise NearError("geometry-needs-photo", "The geometry source 'silhouette' needs a photo and its camera.", "Give a photo.")
        return silhouette_mesh(request.photo, request.camera)


_sources: dict[str, GeometrySource] = {"mesh": MeshSource(), "silhouette": SilhouetteSource()}


def register_source(name: str, source: GeometrySource) -> None:
    """Add a source.

    Raises:
        NearError: ``geometry-source-taken`` when the name is in use by another object.
    """
    if _sources.get(name, source) is not source:
        raise NearError("geometry-source-taken", f"A geometry source named {name!r} exists already.", "Choose another name.")
    _sources[name] = source


def unregister_source(name: str) -> None:
    """Take a registered source away; unknown names are ignored."""
    _sources.pop(name, None)


def source_names() -> list[str]:
    """Registered names and those of installed packages, without importing the packages."""
    return sorted({*_sources, *(e.name for e in entry_points(group=ENTRY_POINTS))})


def geometry_source(name: str) -> GeometrySource:
    """The source of that name.

    Raises:
        NearError: ``geometry-source-unknown``, ``geometry-source-broken``.
    """
    if name in _sources:
        return _sources[name]
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            try:
                loaded = entry.load()
                source = loaded() if isinstance(loaded, type) else loaded
            except Exception as error:  # a plug-in may fail in any way; say whose fault it is
                raise NearError("geometry-source-broken", f"The geometry source {name!r} ({entry.value}) cannot be loaded: {error}.",
                                "Update or remove the package that brings it.") from error
            _sources[name] = source
            return source
    raise NearError("geometry-source-unknown", f"There is no geometry source named {name!r}.", f"Choose from {', '.join(source_names())}.")
