"""Which attention kernel runs: torch's fused ones, variable-length ones on CUDA, cache-blocked bfloat16 on the CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from near.nn.groups import RowGroups
from near.nn.parallel import run_all

HALF_TYPES = (torch.float16, torch.bfloat16)
SCORES = 1 << 21  # scores held at once by the CPU kernel, about two cores' second-level cache
LARGEST_EXPONENT = 90.0  # 2^90 times any number of tokens stays within bfloat16, so no maximum need be subtracted


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.

    Args: q [B, H, N, d]; k, v [B, H, T, d]; mask bool [B, T], True where a token exists. Returns: [B, H, N, d].
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return blocked_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`dense_attention` for bfloat16 on the CPU: matrix products over pieces whose scores stay in cache.

    Torch's fused CPU kernel reaches a tenth of the 16-bit matrix rate here. Scores and weights are rounded to bfloat16,
    sums are kept in float32 by the products.
    """
    batch, heads, rows, width = q.shape
    q = q * (width**-0.5 * math.log2(math.e))  # powers of two are cheaper than powers of e
    safe = largest_norm(q) * largest_norm(k) < LARGEST_EXPONENT  # Cauchy-Schwarz: no score is larger
    if rows * k.shape[2] * 4 > SCORES:  # long: one head of one object at a time, in row pieces
        out = torch.empty_like(q)
        step = max(64, SCORES // k.shape[2])
        run_all([lambda b=b, h=h, s=s: _attend_piece(q[b, h, s : s + step], k[b, h], v[b, h], None if mask is None else mask[b],
                                                     safe, out[b, h, s : s + step])
                 for b in range(batch) for h in range(heads) for s in range(0, rows, step)])
        return out
    step = max(1, SCORES // (heads * rows * k.shape[2]))  # short: many objects (windows) in one product
    parts = [slice(s, s + step) for s in range(0, batch, step)]
    return torch.cat(run_all([lambda p=p: _attend_batch(q[p], k[p], v[p], None if mask is None else mask[p], safe) for p in parts]))


def _attend_piece(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, safe: bool, out: Tensor) -> None:
    """One head: q [n, d] already scaled, k, v [T, d], mask [T]; writes out [n, d]."""
    out.copy_(_weigh(torch.mm(q, k.T), v, mask, safe))


def _attend_batch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, safe: bool) -> Tensor:
    """Batch of heads: q [B, H, n, d] already scaled, k, v [B, H, T, d], mask [B, T]."""
    return _weigh(q @ k.transpose(-1, -2), v, None if mask is None else mask[:, None, None, :], safe)


def _weigh(scores: Tensor, v: Tensor, mask: Tensor | None, safe: bool) -> Tensor:
    """softmax(ln 2 scores) v; overwrites the scores. ``safe``: no score exceeds LARGEST_EXPONENT in size."""
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    if not safe:
        scores -= scores.amax(-1, keepdim=True)
    weights = scores.exp2_()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def largest_norm(x: Tensor) -> float:
    """Length of the longest last-axis vector; 0 for none."""
    return float(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax()) if x.numel() else 0.0


def varlen_attention(qkv: Tensor, groups: RowGroups) -> Tensor | None:
    """Attention inside groups without padding, or None where no such kernel serves these tensors.

    Args: qkv [N, 3, H, d]. Returns: [N, H, d].
    """
    if not qkv.is_cuda or qkv.dtype not in HALF_TYPES or qkv.shape[-1] > 256 or qkv.shape[-1] % 8:
        return None
    kernel = varlen_kernel()
    if kernel is None:
        return None
    q, k, v = (qkv if groups.order is None else qkv[groups.order]).unbind(1)
    out = kernel(q, k, v, groups.boundaries, max(groups.lengths))
    return out if groups.inverse is None else out[groups.inverse]


@functools.cache
def varlen_kernel() -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] | None:
    """flash-attn's kernel if it is installed, else the one newer torch versions carry, else None."""
    try:
        from flash_attn import flash_attn_varlen_func

        return lambda q, k, v, ends, longest: flash_attn_varlen_func(q, k, v, ends, ends, longest, longest)
    except ImportError:
        pass
    try:
        from torch.nn.attention.varlen import varlen_attn

        return lambda q, k, v, ends, longest: varlen_attn(q, k, v, ends, ends, longest, longest)
    except ImportError:
        return None


def cpu_has_bfloat16() -> bool:
    """Whether this processor has bfloat16 dot products (AVX-512 BF16, AMX, or Arm's BF16)."""
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    probes = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(bool(p()) for p in probes if p is not None) or "SVE" in capability
