"""Grouped attention, sparse convolution, resampling and codes, against plain loops."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from near.errors import NearError
from near.nn import (CrossAttention, HeadRMSNorm, KeyValue, LayerNorm32, ModulatedCrossBlock, SelfAttention, SparseTensor,
                     SubmanifoldConv3, absolute_position_code, apply_rotary, attend_context, attend_groups, cast_weights, downsample,
                     group_rows, nerf_encoding, object_groups, per_row, random_sane_weights, rotary_tables, row_slices, timestep_embedding,
                     upsample, weight_dtype, window_groups)
from near.nn.kernels import blocked_attention, dense_attention
from near.nn.parallel import by_rows, run_all


def random_coords(counts, resolution=12, seed=0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rows = []
    for b, n in enumerate(counts):
        cells = torch.randperm(resolution**3, generator=g)[:n]
        xyz = torch.stack([cells // resolution**2, cells // resolution % resolution, cells % resolution], 1)
        rows.append(torch.cat([torch.full((n, 1), b), xyz], 1))
    return torch.cat(rows).int()


def loop_attention(qkv: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The oracle: one group after the other."""
    out = torch.empty_like(qkv[:, 0])
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1)
        q, k, v = qkv[rows].permute(1, 2, 0, 3)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1)
        out[rows] = (weights @ v).transpose(0, 1)
    return out


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(1, 3))
def test_grouped_attention_equals_a_loop(labels, heads):
    labels = torch.tensor(labels)
    qkv = torch.randn(len(labels), 3, heads, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attend_groups(qkv, group_rows(labels)), loop_attention(qkv, labels), atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(2, 5), st.integers(0, 3), st.integers(0, 99))
def test_windows_are_the_cells_of_a_shifted_grid(counts, window, shift, seed):
    coords = random_coords(counts, seed=seed)
    groups = window_groups(coords, window, shift)
    cells = {}
    for row, (b, *xyz) in enumerate(coords.tolist()):
        cells.setdefault((b, *((c + shift) // window for c in xyz)), set()).add(row)
    found = [set(groups.order[s].tolist()) for s in row_slices(groups.lengths)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, cells.values()))
    assert groups.boundaries.tolist() == [0, *torch.tensor(groups.lengths).cumsum(0).tolist()]


def test_padding_stays_small_and_batches_few():
    lengths = torch.randint(1, 512, (300,), generator=torch.Generator().manual_seed(0))
    groups = group_rows(torch.arange(300).repeat_interleave(lengths))
    padded = sum(bucket.index.numel() for bucket in groups.buckets)
    assert padded < 1.2 * int(lengths.sum()) and len(groups.buckets) <= 22


@pytest.mark.parametrize("counts", [(7,), (5, 5, 5), (3, 9, 1)])
def test_object_attention_and_context_attention_per_object(counts):
    torch.manual_seed(0)
    qkv = torch.randn(sum(counts), 3, 2, 8)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    torch.testing.assert_close(attend_groups(qkv, object_groups(counts)), loop_attention(qkv, labels), atol=1e-5, rtol=1e-4)
    kv = KeyValue(torch.randn(len(counts), 2, 6, 8), torch.randn(len(counts), 2, 6, 8))
    out = attend_context(qkv[:, 0], kv, counts)
    for b, rows in enumerate(row_slices(counts)):
        expected = F.scaled_dot_product_attention(qkv[rows, 0].transpose(0, 1), kv.key[b], kv.value[b]).transpose(0, 1)
        torch.testing.assert_close(out[rows], expected, atol=1e-5, rtol=1e-4)


def test_a_shared_context_serves_every_object():
    torch.manual_seed(0)
    attention, x = CrossAttention(16, 12, 4), torch.randn(11, 16)
    context = torch.randn(1, 5, 12)
    torch.testing.assert_close(attention(x, context, (4, 7)), attention(x, context.expand(2, -1, -1), (4, 7)))
    torch.testing.assert_close(attention(x, attention.project(context), (4, 7)), attention(x, context, (4, 7)))


def test_gradients_flow_through_windows():
    torch.manual_seed(0)
    attention = SelfAttention(16, 4, qk_rms_norm=True)
    x = torch.randn(50, 16, requires_grad=True)
    attention(x, window_groups(random_coords((50,)), 4, 2)).square().sum().backward()
    assert x.grad.abs().sum(1).gt(0).all() and attention.q_rms_norm.gamma.grad.abs().sum() > 0


def dense_convolution(x: SparseTensor, conv: SubmanifoldConv3, resolution: int) -> torch.Tensor:
    """The oracle: a dense convolution over the filled grid, read at the occupied voxels."""
    grid = torch.zeros(x.num_objects, x.feats.shape[1], *[resolution] * 3)
    b, i, j, k = x.coords.long().unbind(1)
    grid[b, :, i, j, k] = x.feats
    return F.conv3d(grid, conv.conv.weight.permute(0, 4, 1, 2, 3), conv.conv.bias, padding=1)[b, :, i, j, k]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(0, 99))
def test_submanifold_convolution_equals_a_dense_one(counts, seed):
    torch.manual_seed(seed)
    x = SparseTensor.create(torch.randn(sum(counts), 5), random_coords(counts, 6, seed))
    conv = SubmanifoldConv3(5, 7)
    with torch.no_grad():
        torch.testing.assert_close(conv(x).feats, dense_convolution(x, conv, 6), atol=1e-5, rtol=1e-4)
    conv(x).feats.sum().backward()
    assert conv.conv.weight.grad is not None


@pytest.mark.parametrize("include_zero", [True, False])
def test_downsampling_pools_and_upsampling_copies(include_zero):
    coords = random_coords((40, 30), 8)
    x = SparseTensor.create(torch.randn(70, 3), coords)
    coarse = downsample(x, 2, include_zero)
    cells = [tuple(c) for c in coarse.coords.tolist()]
    assert cells == sorted(set(cells)) and coarse.counts == tuple(sum(c[0] == b for c in cells) for b in (0, 1))
    parents = torch.cat([coords[:, :1], coords[:, 1:] // 2], 1)
    for cell, feats in zip(coarse.coords, coarse.feats):
        children = x.feats[(parents == cell).all(1)]
        torch.testing.assert_close(feats, children.sum(0) / (len(children) + include_zero))
    fine = upsample(coarse, x)
    assert fine.coords is x.coords
    for row in (0, 33, 69):
        torch.testing.assert_close(fine.feats[row], coarse.feats[(coarse.coords == parents[row]).all(1)][0])


def test_index_structures_are_shared_between_tensors_on_the_same_voxels():
    x = SparseTensor.create(torch.randn(40, 3), random_coords((40,)))
    assert x.windows(4, 2) is x.replace(torch.randn(40, 9)).windows(4, 2)
    assert downsample(x).objects() is downsample(x.replace(x.feats)).objects()


@pytest.mark.parametrize("coords", [torch.zeros(0, 4).int(), torch.zeros(3, 4), torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [0, 2, 2, 2]]),
                                    torch.tensor([[1, 0, 0, 0]]), torch.zeros(3, 5).int()])
def test_bad_voxel_tables_are_refused(coords):
    with pytest.raises(NearError) as caught:
        SparseTensor.create(torch.zeros(len(coords), 2), coords)
    assert caught.value.code == "sparse-coords"


def test_features_must_fit_their_voxels():
    with pytest.raises(NearError, match="do not fit"):
        SparseTensor.create(torch.zeros(3, 2), torch.zeros(1, 3).int())


def test_position_code_of_an_odd_width_is_padded():
    code = absolute_position_code(torch.tensor([[1, 2, 3]]), 64)
    freqs = 10000 ** (-torch.arange(10) / 10)
    torch.testing.assert_close(code[0, :60], torch.cat([torch.cat([(c * freqs).sin(), (c * freqs).cos()]) for c in (1, 2, 3)]))
    assert not code[0, 60:].any()


def test_nerf_code_layout():
    code = nerf_encoding(torch.tensor([[0.1, 0.2, 0.3]]), 4)[0]
    assert code.shape == (27,)
    assert code[3 + 4 + 2] == torch.sin(torch.tensor(0.2) * 4)  # dimension-major: second axis, third octave
    assert code[15] == torch.sin(torch.tensor(0.1) + math.pi / 2)


def test_timestep_code_starts_with_cosines():
    code = timestep_embedding(torch.tensor([0.0, 500.0]), 256)
    assert code[0].tolist() == [1.0] * 128 + [0.0] * 128
    assert code[1, 0] == pytest.approx(math.cos(500), abs=1e-5)


def test_rotary_code_depends_on_distance_only():
    tables = rotary_tables(32, 8)
    q, k = torch.randn(1, 8).expand(32, 8), torch.randn(1, 8).expand(32, 8)
    scores = apply_rotary(q, tables) @ apply_rotary(k, tables).T
    torch.testing.assert_close(scores[3, 1], scores[20, 18], atol=1e-5, rtol=1e-4)


def test_norms_keep_float32_statistics_and_the_streams_type():
    torch.manual_seed(0)
    x = torch.randn(6, 32, dtype=torch.bfloat16) * 100
    for norm in (LayerNorm32(32), LayerNorm32(32, affine=True)):
        assert norm(x).dtype == torch.bfloat16
        torch.testing.assert_close(norm(x).float(), F.layer_norm(x.float(), (32,), eps=1e-6), atol=1e-2, rtol=1e-2)
    heads = HeadRMSNorm(2, 16)(torch.randn(5, 2, 16))
    torch.testing.assert_close(heads.norm(dim=-1), torch.full((5, 2), 4.0))


def test_modulated_block_treats_objects_apart():
    torch.manual_seed(0)
    block = random_sane_weights(ModulatedCrossBlock(24, 10, 3, qk_rms_norm=True))
    counts, x, embedding, context = (6, 9), torch.randn(15, 24), torch.randn(2, 24), torch.randn(2, 4, 10)
    with torch.no_grad():
        both = block(x, embedding, context, object_groups(counts), counts)
        for b, rows in enumerate(row_slices(counts)):
            alone = block(x[rows], embedding[b : b + 1], context[b : b + 1], object_groups(counts[b : b + 1]), counts[b : b + 1])
            torch.testing.assert_close(both[rows], alone, atol=1e-5, rtol=1e-4)


def test_per_row_expands_by_object():
    assert per_row(torch.tensor([[1.0], [2.0]]), (2, 3)).flatten().tolist() == [1, 1, 2, 2, 2]
    assert per_row(torch.tensor([[1.0]]), (5,)).shape == (1, 1)


def test_casting_spares_the_norms():
    block = cast_weights(ModulatedCrossBlock(24, 10, 3, qk_rms_norm=True), torch.bfloat16)
    assert weight_dtype(block) == torch.bfloat16
    assert block.norm2.weight.dtype == block.self_attn.q_rms_norm.gamma.dtype == torch.float32


@pytest.fixture()
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("batch", "rows", "tokens"), [(1, 300, 2048), (1, 5, 7), (20, 40, 40), (2, 900, 600)])
@pytest.mark.parametrize("spread", [0.3, 12.0])  # small scores, and scores that would overflow without their maximum
@pytest.mark.parametrize("masked", [False, True])
def test_blocked_attention_equals_the_fused_one(batch, rows, tokens, spread, masked, two_threads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, 3, n, 16).bfloat16() for n in (rows, tokens, tokens))
    q, k = q * spread, k * spread
    mask = (torch.rand(batch, tokens) < 0.7).index_fill(1, torch.tensor([0]), True) if masked else None
    exact = dense_attention(q.float(), k.float(), v.float(), mask)
    with torch.no_grad():
        out = blocked_attention(q, k, v, mask)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
    error = (out.float() - exact).abs()
    # Rounded scores shift weights by a share of the score: large scores make a nearly hard choice uncertain.
    assert error.mean() < (0.01 if spread < 1 else 0.05), (error.mean(), error.max())


def test_16_bit_windows_on_threads_equal_float32(two_threads):
    torch.manual_seed(0)
    coords = random_coords((900, 500), 16)
    qkv, groups = torch.randn(1400, 3, 4, 16), window_groups(coords, 5, 2)
    with torch.inference_mode():
        out = attend_groups(qkv.bfloat16(), groups)
    torch.testing.assert_close(out.float(), attend_groups(qkv, groups), atol=0.06, rtol=0.05)


def test_a_large_common_key_does_not_cost_16_bit_precision():
    torch.manual_seed(0)
    attention = CrossAttention(32, 16, 2)
    with torch.no_grad():
        attention.to_kv.bias[:32] = 30.0  # the same for every token: no softmax sees it
    x, context = torch.randn(40, 32), torch.randn(1, 50, 16)
    exact = attention(x, context, (40,))
    with torch.inference_mode():
        rough = cast_weights(attention, torch.bfloat16)(x.bfloat16(), context, (40,))
    assert (rough.float() - exact).abs().max() < 0.06


def test_row_pieces_equal_the_whole(two_threads):
    x = torch.randn(5000, 8)
    layer = torch.nn.Linear(8, 3)
    with torch.inference_mode():
        torch.testing.assert_close(by_rows(layer, x, chunk=700), layer(x))
        assert torch.get_num_threads() == 2
    assert by_rows(layer, x, chunk=700).requires_grad


def test_a_failing_piece_raises_and_drops_the_rest(two_threads):
    begun = []

    def task(i):
        begun.append(i)
        if i == 0:
            raise NearError("cancelled", "Stopped.", "Start again.")
        time.sleep(0.02)

    with torch.no_grad(), pytest.raises(NearError, match="Stopped"):
        run_all([lambda i=i: task(i) for i in range(50)])
    assert len(begun) < 50


@pytest.mark.gpu
def test_cuda_attention_equals_the_cpus():
    torch.manual_seed(0)
    groups = window_groups(random_coords((300, 200)), 4, 2)
    qkv = torch.randn(500, 3, 4, 64)
    moved = window_groups(random_coords((300, 200)).cuda(), 4, 2)
    expected = attend_groups(qkv, groups)
    torch.testing.assert_close(attend_groups(qkv.cuda(), moved).cpu(), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(attend_groups(qkv.cuda().half(), moved).float().cpu(), expected, atol=5e-3, rtol=5e-2)


def test_timm_imports():
    from near.nn.timm_import import import_timm

    assert import_timm() is import_timm()
