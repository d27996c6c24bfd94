"""Light: environments, files, prefiltering, directional samples, conditioning for the networks."""

from near.lighting.brdf import brdf_table, multiscatter
from near.lighting.clusters import directional_samples
from near.lighting.conditioning import condition, condition_published
from near.lighting.environment import Environment, environment_from_array, rotation_z, uniform_environment
from near.lighting.equirect import resample_equirect, row_solid_angles, texel_directions
from near.lighting.files import load_environment
from near.lighting.prefilter import PrefilteredLight, prefilter

__all__ = [
    "Environment", "PrefilteredLight", "brdf_table", "condition", "condition_published", "directional_samples",
    "environment_from_array", "load_environment", "multiscatter", "prefilter", "resample_equirect", "rotation_z",
    "row_solid_angles", "texel_directions", "uniform_environment",
]
