"""Building blocks: sparse tensors, attention, positional codes, sparse convolution, normalisation.

Everything works on packed rows: the voxels of all objects in one [N, C] matrix, objects contiguous.
"""

from near.nn.attention import CrossAttention, KeyValue, SelfAttention, attend_context, attend_groups
from near.nn.blocks import FeedForward, ModulatedCrossBlock, RegisterLightBlock, RegisterSelfBlock, SelfBlock, modulate
from near.nn.conv import SubmanifoldConv3, coarsen, downsample, upsample
from near.nn.groups import RowGroups, group_rows, object_groups, window_groups
from near.nn.init import random_sane_weights
from near.nn.norms import FLOAT32_EPS, HeadRMSNorm, LayerNorm32, layer_norm_5
from near.nn.parallel import by_rows, piecewise, run_all
from near.nn.positional import absolute_position_code, apply_rotary, nerf_encoding, rotary_tables, timestep_embedding
from near.nn.precision import cast_weights, weight_dtype
from near.nn.sparse import SparseTensor, object_counts, per_row, row_slices

__all__ = [
    "CrossAttention", "FLOAT32_EPS", "FeedForward", "HeadRMSNorm", "KeyValue", "LayerNorm32", "ModulatedCrossBlock",
    "RegisterLightBlock", "RegisterSelfBlock", "RowGroups", "SelfAttention", "SelfBlock", "SparseTensor", "SubmanifoldConv3",
    "absolute_position_code", "apply_rotary", "attend_context", "attend_groups", "by_rows", "cast_weights", "coarsen", "downsample",
    "group_rows", "layer_norm_5", "modulate", "nerf_encoding", "object_counts", "object_groups", "per_row", "piecewise",
    "random_sane_weights", "rotary_tables", "row_slices", "run_all", "timestep_embedding", "upsample", "weight_dtype", "window_groups",
]
