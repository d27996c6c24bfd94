"""Colour: AgX as Blender has it, its inverse for photos, the sRGB curve. Linear Rec.709 everywhere else (DESIGN section 4)."""

from near.colour.agx import agx_inverse, agx_srgb
from near.colour.ocio import agx_srgb_ocio
from near.colour.srgb import LUMINANCE, srgb_decode, srgb_encode, to_uint8

__all__ = ["LUMINANCE", "agx_inverse", "agx_srgb", "agx_srgb_ocio", "srgb_decode", "srgb_encode", "to_uint8"]
