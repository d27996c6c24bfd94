"""Random PBR materials as shader nodes: two coats joined by a procedural mask, with variation, bumps, metal and paint.

Everything ends in one Principled shader, as in user assets, so renders, buffers and surface samples treat both alike.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import bpy
import numpy as np

METALS = ((.91, .92, .92), (1., .77, .34), (.95, .64, .54), (.56, .57, .58), (.91, .78, .42), (.66, .61, .53), (.55, .55, .60), (.76, .79, .83))
MASKS = ("noise", "voronoi", "cells", "wave", "rings", "checker", "brick", "height", "magic")


@dataclass(frozen=True)
class Coat:
    """One layer: linear base colour, roughness, metallic."""

    rgb_lin709: tuple[float, float, float]
    roughness: float
    metallic: float


def random_coat(rng: np.random.Generator) -> Coat:
    """Paint, plastic, wood, stone, cloth or metal, by its numbers only."""
    if rng.random() < 0.3:
        rgb = np.array(METALS[rng.integers(len(METALS))]) * rng.uniform(0.7, 1.0) if rng.random() < 0.75 else colour(rng, 0.75)
        return Coat(tuple(map(float, rgb)), float(np.exp(rng.uniform(np.log(0.06), np.log(0.65)))), 1.0)
    return Coat(tuple(map(float, colour(rng, 0.9))), float(rng.uniform(0.05, 0.4) if rng.random() < 0.45 else rng.uniform(0.3, 1.0)), 0.0)


def colour(rng: np.random.Generator, most: float) -> np.ndarray:
    """Linear base colour; dark, pale and grey ones as often as vivid ones."""
    value = rng.beta(1.3, 1.3) * (most - 0.02) + 0.02
    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.beta(1.1, 1.5), 1.0)) ** 2.2 * value


def random_material(rng: np.random.Generator):
    """A material and a description of it (JSON data)."""
    coats = [random_coat(rng)]
    facts: dict = {"mask": None}
    if rng.random() < 0.72:
        coats.append(random_coat(rng) if rng.random() < 0.75 else _relative(rng, coats[0]))
        facts["mask"] = str(rng.choice(MASKS))
    material = bpy.data.materials.new("own")
    material.use_nodes = True
    graph = _Graph(material.node_tree, rng)
    mask = graph.mask(facts["mask"]) if facts["mask"] else None
    graph.build(coats, mask)
    facts["coats"] = [{"rgb": [round(v, 4) for v in c.rgb_lin709], "roughness": round(c.roughness, 4), "metallic": c.metallic} for c in coats]
    return material, facts


def _relative(rng: np.random.Generator, coat: Coat) -> Coat:
    """The same stuff a little different: worn, dirty, polished."""
    factor = np.exp(rng.uniform(-0.9, 0.6))
    return Coat(tuple(min(v * factor, 0.95) for v in coat.rgb_lin709), float(np.clip(coat.roughness + rng.uniform(-0.35, 0.35), 0.05, 1)), coat.metallic)


class _Graph:
    """Builds the node tree of one material; all coordinates are those of the object."""

    def __init__(self, tree, rng: np.random.Generator) -> None:
        self.tree, self.rng = tree, rng
        self.shader = next(n for n in tree.nodes if n.type == "BSDF_PRINCIPLED")
        mapping = self.node("ShaderNodeMapping")
        self.link(self.node("ShaderNodeTexCoord").outputs["Object"], mapping.inputs["Vector"])
        mapping.inputs["Rotation"].default_value = rng.uniform(0, 2 * np.pi, 3) if rng.random() < 0.6 else (0, 0, 0)
        mapping.inputs["Location"].default_value = rng.uniform(-5, 5, 3)
        self.vector = mapping.outputs[0]

    def node(self, kind: str, **settings):
        node = self.tree.nodes.new(kind)
        for name, value in settings.items():
            setattr(node, name, value)
        return node

    def link(self, source, target) -> None:
        self.tree.links.new(source, target)

    def texture(self, kind: str, scale: float, **settings):
        node = self.node(kind, **settings)
        self.link(self.vector, node.inputs["Vector"])
        if "Scale" in node.inputs:
            node.inputs["Scale"].default_value = scale
        return node

    def mask(self, kind: str):
        """A socket in 0..1, hard-edged or soft."""
        rng, scale = self.rng, float(np.exp(self.rng.uniform(np.log(1.5), np.log(14))))
        if kind == "noise":
            node = self.texture("ShaderNodeTexNoise", scale)
            node.inputs["Detail"].default_value, node.inputs["Distortion"].default_value = rng.uniform(0, 8), rng.uniform(0, 2) * (rng.random() < 0.4)
            out = node.outputs[0]
        elif kind in ("voronoi", "cells"):
            node = self.texture("ShaderNodeTexVoronoi", scale, feature="F1" if kind == "voronoi" else "DISTANCE_TO_EDGE")
            out = node.outputs["Distance"]
        elif kind in ("wave", "rings"):
            node = self.texture("ShaderNodeTexWave", scale * 0.5, wave_type="BANDS" if kind == "wave" else "RINGS")
            node.inputs["Distortion"].default_value = rng.uniform(0, 8) * (rng.random() < 0.6)
            out = node.outputs[1]
        elif kind == "checker":
            out = self.texture("ShaderNodeTexChecker", scale).outputs[1]
        elif kind == "brick":
            node = self.texture("ShaderNodeTexBrick", scale)
            node.inputs["Mortar Size"].default_value = rng.uniform(0.01, 0.08)
            out = node.outputs[1]
        elif kind == "height":
            split = self.node("ShaderNodeSeparateXYZ")
            self.link(self.node("ShaderNodeTexCoord").outputs["Object"], split.inputs[0])
            out = self.maths("MULTIPLY_ADD", split.outputs[2], 1.0, 0.5)
        else:
            out = self.texture("ShaderNodeTexMagic", scale * 0.6).outputs[1]
        middle = {"cells": rng.uniform(0.03, 0.2), "voronoi": rng.uniform(0.25, 0.6)}.get(kind, rng.uniform(0.35, 0.65))
        width = 0.005 if rng.random() < 0.55 else rng.uniform(0.02, 0.3)
        return self.range(out, middle - width, middle + width, 0, 1)

    def maths(self, operation: str, *values):
        node = self.node("ShaderNodeMath", operation=operation)
        for slot, value in zip(node.inputs, values):
            if isinstance(value, float):
                slot.default_value = value
            else:
                self.link(value, slot)
        return node.outputs[0]

    def range(self, value, low: float, high: float, start: float, end: float):
        node = self.node("ShaderNodeMapRange", clamp=True)
        self.link(value, node.inputs["Value"])
        for name, number in (("From Min", low), ("From Max", high), ("To Min", start), ("To Max", end)):
            node.inputs[name].default_value = number
        return node.outputs[0]

    def mix(self, factor, first, second, colours: bool):
        node = self.node("ShaderNodeMix", data_type="RGBA" if colours else "FLOAT")
        slots = [s for s in node.inputs if s.enabled]
        for slot, value in zip(slots, (factor, first, second)):
            if hasattr(value, "links"):
                self.link(value, slot)
            elif isinstance(value, tuple):
                slot.default_value = (*value, 1.0)
            else:
                slot.default_value = value
        return next(s for s in node.outputs if s.enabled)

    def build(self, coats: list[Coat], mask) -> None:
        rng, shader = self.rng, self.shader
        base, rough, metal = coats[0].rgb_lin709, coats[0].roughness, coats[0].metallic
        if mask is not None:
            base = self.mix(mask, coats[0].rgb_lin709, coats[1].rgb_lin709, True)
            rough = self.mix(mask, coats[0].roughness, coats[1].roughness, False)
            metal = self.mix(mask, coats[0].metallic, coats[1].metallic, False)
        grain = self.texture("ShaderNodeTexNoise", float(np.exp(rng.uniform(np.log(4), np.log(40)))))
        grain.inputs["Detail"].default_value = rng.uniform(2, 8)
        if rng.random() < 0.5:  # uneven colour
            shade = self.range(grain.outputs[0], 0.3, 0.7, rng.uniform(0.45, 0.95), 1.0)
            dark = self.node("ShaderNodeMix", data_type="RGBA", blend_type="MULTIPLY")
            slots = [s for s in dark.inputs if s.enabled]
            slots[0].default_value = 1.0
            self.link(shade, slots[2])
            self.put(base, slots[1])
            base = next(s for s in dark.outputs if s.enabled)
        if rng.random() < 0.45:  # smears and wear
            rough = self.maths("MULTIPLY", rough, self.range(grain.outputs[0], 0.25, 0.75, rng.uniform(0.5, 1.0), rng.uniform(1.0, 1.4)))
        for value, name in ((base, "Base Color"), (rough, "Roughness"), (metal, "Metallic")):
            self.put(value, shader.inputs[name])
        if rng.random() < 0.35:
            bump = self.node("ShaderNodeBump")
            bump.inputs["Strength"].default_value, bump.inputs["Distance"].default_value = rng.uniform(0.1, 0.7), rng.uniform(0.004, 0.02)
            self.link(mask if mask is not None and rng.random() < 0.6 else grain.outputs[0], bump.inputs["Height"])
            self.link(bump.outputs[0], shader.inputs["Normal"])

    def put(self, value, slot) -> None:
        if hasattr(value, "links"):
            self.link(value, slot)
        else:
            slot.default_value = (*value, 1.0) if isinstance(value, tuple) else value
