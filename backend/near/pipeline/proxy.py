"""A light mesh that stands for the asset in a scene: for selecting, shadows and holdouts."""

from __future__ import annotations

import torch
from torch import Tensor

from near.geometry.mesh import PbrMesh

MAX_PROXY_FACES = 20_000


def proxy_mesh(mesh: PbrMesh, max_faces: int = MAX_PROXY_FACES) -> tuple[Tensor, Tensor]:
    """The mesh itself where it is small, else its vertices clustered on a grid.

    Returns: vertices float32 [V, 3] in asset space, faces int32 [F, 3].
    """
    vertices, faces = torch.as_tensor(mesh.vertices).float(), torch.as_tensor(mesh.faces).long()
    cells = 256
    while len(faces) > max_faces and cells >= 16:
        key = ((vertices + 0.5) * cells).floor().clamp(0, cells - 1).long()
        key = (key[:, 0] * cells + key[:, 1]) * cells + key[:, 2]
        _, group = torch.unique(key, return_inverse=True)
        count = int(group.max()) + 1
        size = torch.zeros(count).index_add_(0, group, torch.ones(len(group)))
        clustered = torch.zeros(count, 3).index_add_(0, group, vertices) / size[:, None]
        faces = group[faces]
        distinct = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])
        faces = torch.unique(faces[distinct], dim=0)
        vertices, cells = clustered, cells * 3 // 4
    return vertices, faces.int()
