"""Multi-head attention over packed rows: among the rows of a group, or from rows to an object's context tokens.

Parameters carry the published names (spec section 2): `to_qkv`, `to_q`, `to_kv`, `to_out`, `q_rms_norm`, `k_rms_norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from near.nn.groups import Bucket, RowGroups
from near.nn.kernels import HALF_TYPES, dense_attention, varlen_attention
from near.nn.norms import HeadRMSNorm
from near.nn.parallel import by_rows, run_all
from near.nn.sparse import row_slices

PIECE_ROWS = 512  # rows of windows that one CPU thread attends at once


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of context tokens, each [B, heads, T, d]; B is 1 when all objects share the context."""

    key: Tensor
    value: Tensor

    def to(self, *args, **kwargs) -> "KeyValue":
        return KeyValue(self.key.to(*args, **kwargs), self.value.to(*args, **kwargs))

    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


def attend_groups(qkv: Tensor, groups: RowGroups) -> Tensor:
    """Full attention inside each group.

    Args: qkv [N, 3, heads, d]; groups a partition of the N rows. Returns: [N, heads, d].
    """
    if groups.uniform:
        q, k, v = qkv.unflatten(0, (len(groups.lengths), -1)).permute(2, 0, 3, 1, 4)
        return dense_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    packed = varlen_attention(qkv, groups)
    if packed is not None:
        return packed
    if qkv.device.type == "cpu" and not torch.is_grad_enabled():
        out = torch.empty_like(qkv[:, 0])
        run_all([lambda b=b, p=p: _fill(out, qkv, b, p) for b in reversed(groups.buckets) for p in _pieces(b)])
        return out
    return torch.cat([_attend_bucket(qkv, bucket) for bucket in groups.buckets])[groups.bucket_inverse]


def _attend_bucket(qkv: Tensor, bucket: Bucket) -> Tensor:
    """Groups of one bucket -> their real rows [slots, heads, d]."""
    q, k, v = qkv[bucket.index].permute(2, 0, 3, 1, 4)
    out = dense_attention(q, k, v, bucket.mask).transpose(1, 2).flatten(0, 1)
    return out if bucket.mask is None else out[bucket.slots]


def _pieces(bucket: Bucket) -> list[slice]:
    """Runs of groups small enough for one CPU task."""
    groups, length = bucket.index.shape
    step = max(1, PIECE_ROWS // length)
    return [slice(s, s + step) for s in range(0, groups, step)]


def _fill(out: Tensor, qkv: Tensor, bucket: Bucket, piece: slice) -> None:
    """Attend some groups of a bucket and write their rows of ``out``."""
    index, mask = bucket.index[piece], None if bucket.mask is None else bucket.mask[piece]
    slots = torch.arange(index.numel()) if mask is None else mask.flatten().nonzero().squeeze(1)
    out[index.flatten()[slots]] = _attend_bucket(qkv, Bucket(index, mask, slots))


def attend_context(q: Tensor, kv: KeyValue, counts: Sequence[int]) -> Tensor:
    """Every row of object b attends to context b.

    Args: q [N, heads, d], objects contiguous with ``counts`` rows each; kv of B = 1 or len(counts) objects.
    Returns: [N, heads, d].
    """
    key, value = kv.key.to(q.dtype), kv.value.to(q.dtype)
    if len(key) == 1:
        counts = (len(q),)
    if len(set(counts)) == 1:
        q = q.unflatten(0, (len(counts), -1)).transpose(1, 2)
        return dense_attention(q, key, value).transpose(1, 2).flatten(0, 1)
    return torch.cat([dense_attention(q[rows].transpose(0, 1)[None], key[b : b + 1], value[b : b + 1])[0].transpose(0, 1)
                      for b, rows in enumerate(row_slices(counts))])


class SelfAttention(nn.Module):
    """Attention among the rows of a group.

    Args:
        channels: width D. heads: number of heads. qk_rms_norm: normalise queries and keys per head.
    """

    def __init__(self, channels: int, heads: int, qk_rms_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        if qk_rms_norm:
            self.q_rms_norm = HeadRMSNorm(heads, channels // heads)
            self.k_rms_norm = HeadRMSNorm(heads, channels // heads)
        self.qk_rms_norm = qk_rms_norm

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of x [N, D]: [N, 3, heads, d]."""
        qkv = self.to_qkv(x).unflatten(1, (3, self.heads, -1))
        if not self.qk_rms_norm:
            return qkv
        q, k, v = qkv.unbind(1)
        return torch.stack([self.q_rms_norm(q), self.k_rms_norm(k), v], 1)

    def forward(self, x: Tensor, groups: RowGroups) -> Tensor:
        """x [N, D] -> [N, D]."""
        return by_rows(self.to_out, attend_groups(by_rows(self.project, x), groups).flatten(1))


class CrossAttention(nn.Module):
    """Attention from rows to context tokens; the tokens' keys and values can be computed once and kept.

    Args: channels: width of the rows. context_channels: width of the tokens. heads: number of heads.
    """

    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(context_channels, 2 * channels)
        self.to_out = nn.Linear(channels, channels)

    def project(self, context: Tensor) -> KeyValue:
        """Keys and values of context [B, T, context_channels].

        In 16 bits the keys lose their mean, which changes no softmax and keeps scores, and so their rounding, small.
        """
        kv = self.to_kv(context.to(self.to_kv.weight.dtype))
        key, value = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if key.dtype in HALF_TYPES:
            key = (key.float() - key.float().mean(2, keepdim=True)).to(key.dtype)
        return KeyValue(key.contiguous(), value.contiguous())

    def forward(self, x: Tensor, context: Tensor | KeyValue, counts: Sequence[int]) -> Tensor:
        """x [N, D], context [B, T, context_channels] or its `project`ion -> [N, D]."""
        kv = context if isinstance(context, KeyValue) else self.project(context)
        q = by_rows(self.to_q, x).unflatten(-1, (self.heads, -1))
        return by_rows(self.to_out, attend_context(q, kv, counts).flatten(1))
