"""Random geometry: parts of about unit size as Blender objects, made from a generator of random numbers alone."""

from __future__ import annotations

import string

import bpy
import numpy as np

Shape = tuple[np.ndarray, list]  # vertices [V, 3], faces as lists of indices


def linked(data, name: str = "part"):
    """A new object of ``data`` in the present scene."""
    item = bpy.data.objects.new(name, data)
    bpy.context.scene.collection.objects.link(item)
    return item


def mesh_object(shape: Shape):
    mesh = bpy.data.meshes.new("part")
    mesh.from_pydata(np.asarray(shape[0], float).tolist(), [], [list(map(int, f)) for f in shape[1]])
    mesh.validate()
    return linked(mesh)


def grid_faces(rows: int, columns: int, wrap: bool) -> list:
    """Quads of a grid of vertices in row order; ``wrap`` closes each row."""
    last = columns if wrap else columns - 1
    return [(r * columns + c, r * columns + (c + 1) % columns, (r + 1) * columns + (c + 1) % columns, (r + 1) * columns + c)
            for r in range(rows - 1) for c in range(last)]


def smooth_curve(points: np.ndarray, count: int) -> np.ndarray:
    """Catmull-Rom through points [P, K], sampled ``count`` times."""
    p = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, len(points) - 1, count)
    k = np.minimum(t.astype(int), len(points) - 2)
    f = (t - k)[:, None]
    a, b, c, d = (p[k + i] for i in range(4))
    return 0.5 * (2 * b + (c - a) * f + (2 * a - 5 * b + 4 * c - d) * f ** 2 + (3 * b - a - 3 * c + d) * f ** 3)


def outline(rng: np.random.Generator, count: int) -> np.ndarray:
    """A closed plane outline [count, 2] of size about 1: round, polygon, star, gear or wavy."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    corners, kind = int(rng.integers(3, 9)), rng.integers(5)
    if kind == 0:
        radius = np.ones(count)
    elif kind == 1:  # regular polygon
        radius = np.cos(np.pi / corners) / np.cos((angle % (2 * np.pi / corners)) - np.pi / corners)
    elif kind == 2:
        radius = 1 - rng.uniform(0.2, 0.55) * np.abs((angle * corners / np.pi) % 2 - 1)
    elif kind == 3:
        radius = 1 - rng.uniform(0.08, 0.2) * (np.sin(angle * corners * 2) > 0)
    else:
        radius = 1 + rng.uniform(0.05, 0.3) * np.sin(corners * angle)
    stretch = np.array([1, rng.uniform(0.5, 1)])
    return np.stack([np.cos(angle), np.sin(angle)], -1) * (radius[:, None] * 0.5) * stretch


# -- kinds of parts ----------------------------------------------------------------------------------------------------


def box(rng: np.random.Generator):
    """A box with bevelled edges."""
    size = rng.uniform(0.25, 1, 3)
    corners = np.array([[x, y, z] for z in (-.5, .5) for y in (-.5, .5) for x in (-.5, .5)]) * size
    item = mesh_object((corners, [(0, 2, 3, 1), (4, 5, 7, 6), (0, 1, 5, 4), (2, 6, 7, 3), (0, 4, 6, 2), (1, 3, 7, 5)]))
    bevel(item, float(size.min()) * rng.uniform(0.01, 0.35), int(rng.integers(1, 5)))
    return item


def bevel(item, width: float, segments: int) -> None:
    modifier = item.modifiers.new("bevel", "BEVEL")
    modifier.width, modifier.segments, modifier.limit_method = width, segments, "ANGLE"


def lathe(rng: np.random.Generator):
    """A turned profile: vases, bowls (with an inside), knobs, columns."""
    count = int(rng.integers(3, 8))
    height = np.sort(rng.uniform(0, 1, count))
    height = (height - height[0]) / max(height[-1] - height[0], 1e-3) * rng.uniform(0.4, 1.6)
    knots = np.stack([rng.uniform(0.08, 0.5, count), height], -1)
    profile = smooth_curve(knots, 40) if rng.random() < 0.7 else knots
    profile[:, 0] = np.abs(profile[:, 0]).clip(0.02)
    if rng.random() < 0.4:  # open at the top: go back down inside
        inside = profile[::-1] - [rng.uniform(0.015, 0.05), 0]
        inside[:, 0] = inside[:, 0].clip(0.004)
        inside[-1, 1] += 0.04
        profile = np.concatenate([profile, inside])
    profile = np.concatenate([[[0, profile[0, 1]]], profile, [[0, profile[-1, 1]]]])
    segments = int(rng.choice([5, 6, 8, 48, 64], p=[.08, .08, .09, .4, .35]))
    angle = np.arange(segments) * 2 * np.pi / segments
    rings = [np.stack([r * np.cos(angle), r * np.sin(angle), np.full(segments, z)], -1) for r, z in profile]
    item = mesh_object((np.concatenate(rings), grid_faces(len(profile), segments, True)))
    item.modifiers.new("poles", "WELD").merge_threshold = 1e-5
    return item


def sweep(rng: np.random.Generator):
    """An outline along a path: arcs, springs, knots, random curves; thickness may vary."""
    count, kind = 120, rng.integers(4)
    t = np.linspace(0, 1, count)
    if kind == 0:
        path = smooth_curve(rng.uniform(-0.6, 0.6, (int(rng.integers(3, 6)), 3)), count)
    elif kind == 1:
        turns, rise = rng.uniform(2, 6), rng.uniform(0.4, 1.2)
        path = np.stack([0.4 * np.cos(2 * np.pi * turns * t), 0.4 * np.sin(2 * np.pi * turns * t), rise * (t - 0.5)], -1)
    elif kind == 2:
        p, q = [(2, 3), (3, 2), (2, 5), (3, 4), (1, 0)][rng.integers(5)]
        around = 0.38 + 0.15 * np.cos(q * 2 * np.pi * t)
        path = np.stack([around * np.cos(p * 2 * np.pi * t), around * np.sin(p * 2 * np.pi * t), 0.15 * np.sin(q * 2 * np.pi * t)], -1)
    else:
        arc = t * rng.uniform(0.8, 5.5)
        path = np.stack([0.5 * np.cos(arc), np.zeros(count), 0.5 * np.sin(arc)], -1)
    closed = bool(np.linalg.norm(path[0] - path[-1]) < 1e-6)
    section = outline(rng, int(rng.choice([4, 6, 24]))) * rng.uniform(0.06, 0.28)
    width = np.ones(count) if closed else 1 + rng.uniform(-0.7, 0.7) * t + rng.uniform(0, 0.3) * np.sin(np.pi * t)
    return mesh_object(swept(path, section, width, closed))


def swept(path: np.ndarray, section: np.ndarray, width: np.ndarray, closed: bool) -> Shape:
    """Carry ``section`` [S, 2] along ``path`` [P, 3] without twisting it more than needed."""
    tangent = np.gradient(path, axis=0)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-9)
    side = np.cross(tangent[0], [0.31, 0.17, 0.93])
    rings = []
    for p, along, w in zip(path, tangent, width):
        side = side - along * (side @ along)
        side /= max(np.linalg.norm(side), 1e-9)
        rings.append(p + (section[:, :1] * side + section[:, 1:] * np.cross(along, side)) * max(w, 0.1))
    faces, n = grid_faces(len(path), len(section), True), len(section)
    if closed:
        return np.concatenate(rings[:-1]), [tuple(i % ((len(path) - 1) * n) for i in f) for f in faces]
    return np.concatenate(rings), [*faces, tuple(range(n))[::-1], tuple(range((len(path) - 1) * n, len(path) * n))]


def extrusion(rng: np.random.Generator):
    """An outline with thickness and bevelled rims, or a letter."""
    if rng.random() < 0.3:
        curve = bpy.data.curves.new("letter", "FONT")
        curve.body = "".join(rng.choice(list(string.ascii_uppercase + "0123456789&@"), int(rng.integers(1, 3))))
        curve.align_x, curve.align_y = "CENTER", "CENTER"
        curve.extrude, curve.bevel_depth, curve.bevel_resolution = rng.uniform(0.06, 0.25), rng.uniform(0, 0.03), 2
        return linked(curve)
    loop, depth = outline(rng, 64), rng.uniform(0.06, 0.7)
    n = len(loop)
    shape = np.concatenate([np.c_[loop, np.full(n, z)] for z in (-depth / 2, depth / 2)])
    item = mesh_object((shape, [*grid_faces(2, n, True), tuple(range(n))[::-1], tuple(range(n, 2 * n))]))
    bevel(item, rng.uniform(0.004, 0.06), 2)
    if rng.random() < 0.35:
        modifier = item.modifiers.new("twist", "SIMPLE_DEFORM")
        modifier.deform_method, modifier.deform_axis, modifier.angle = "TWIST", "Z", rng.uniform(-1.5, 1.5)
    return item


def superquadric(rng: np.random.Generator):
    """Between ball, box and pillow."""
    e1, e2 = np.exp(rng.uniform(np.log(0.15), np.log(2.2), 2))
    v, u = np.linspace(-np.pi / 2, np.pi / 2, 49), np.linspace(-np.pi, np.pi, 64, endpoint=False)
    power = lambda x, e: np.sign(x) * np.abs(x) ** e  # noqa: E731
    cv, sv = power(np.cos(v), e1)[:, None], power(np.sin(v), e1)[:, None]
    points = np.stack([cv * power(np.cos(u), e2), cv * power(np.sin(u), e2), np.broadcast_to(sv, (49, 64))], -1).reshape(-1, 3)
    item = mesh_object((points * rng.uniform(0.25, 0.55, 3), grid_faces(49, 64, True)))
    item.modifiers.new("poles", "WELD").merge_threshold = 1e-5
    return item


def blob(rng: np.random.Generator):
    """Metaballs that flow into each other."""
    data = bpy.data.metaballs.new("blob")
    data.resolution = data.render_resolution = 0.045
    data.threshold = 0.4
    for _ in range(int(rng.integers(2, 8))):
        element = data.elements.new(type=str(rng.choice(["BALL", "ELLIPSOID", "CAPSULE"])))
        element.co = rng.uniform(-0.35, 0.35, 3)
        element.radius = rng.uniform(0.2, 0.4)
        element.size_x, element.size_y, element.size_z = rng.uniform(0.1, 0.3, 3)
        element.rotation = quaternion(rng)
    # Metaballs of one name family share a surface.
    item = linked(data, f"blob{len(bpy.data.objects)}x")
    return item


def carved(rng: np.random.Generator):
    """A solid with others cut out of it, added or intersected (booleans)."""
    item = [box, extrusion_solid, superquadric][rng.integers(3)](rng)
    for _ in range(int(rng.integers(1, 4))):
        tool = [box, superquadric, extrusion_solid][rng.integers(3)](rng)
        tool.scale = [rng.uniform(0.35, 0.8)] * 3
        tool.location = rng.uniform(-0.4, 0.4, 3)
        tool.rotation_mode, tool.rotation_quaternion = "QUATERNION", quaternion(rng)
        tool.hide_render = True
        modifier = item.modifiers.new("cut", "BOOLEAN")
        modifier.object, modifier.solver = tool, "EXACT"
        modifier.operation = str(rng.choice(["DIFFERENCE", "UNION"], p=[0.75, 0.25]))
        tool["helper"] = True
    return item


def extrusion_solid(rng: np.random.Generator):
    loop, depth = outline(rng, 48), rng.uniform(0.3, 0.9)
    n = len(loop)
    shape = np.concatenate([np.c_[loop, np.full(n, z)] for z in (-depth / 2, depth / 2)])
    return mesh_object((shape, [*grid_faces(2, n, True), tuple(range(n))[::-1], tuple(range(n, 2 * n))]))


def bumpy(rng: np.random.Generator):
    """A ball pushed in and out by smooth noise: stones, fruit, coral."""
    v, u = np.linspace(-np.pi / 2, np.pi / 2, 65), np.linspace(-np.pi, np.pi, 96, endpoint=False)
    unit = np.stack([np.outer(np.cos(v), np.cos(u)), np.outer(np.cos(v), np.sin(u)), np.outer(np.sin(v), np.ones(96))], -1).reshape(-1, 3)
    radius, frequency, amplitude = np.ones(len(unit)), rng.uniform(1, 3), rng.uniform(0.1, 0.35)
    for _ in range(4):
        for _ in range(3):
            wave = rng.normal(size=3)
            radius += amplitude * 0.4 * np.sin(unit @ (wave / np.linalg.norm(wave)) * frequency * np.pi + rng.uniform(0, 6.3))
        frequency, amplitude = frequency * 1.9, amplitude * rng.uniform(0.25, 0.6)
    item = mesh_object((unit * radius[:, None].clip(0.2) * rng.uniform(0.3, 0.5, 3), grid_faces(65, 96, True)))
    item.modifiers.new("poles", "WELD").merge_threshold = 1e-5
    return item


def sheet(rng: np.random.Generator):
    """A thin bent plate: leaves, cloth, panels, with holes at times."""
    n = 48
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, n), np.linspace(-0.5, 0.5, n))
    z = sum(rng.uniform(-0.12, 0.12) * np.sin(rng.uniform(1, 9) * x + rng.uniform(1, 9) * y + rng.uniform(0, 6.3)) for _ in range(3))
    faces = grid_faces(n, n, False)
    if rng.random() < 0.3:
        hole = int(rng.integers(4, 9))
        faces = [f for f in faces if not ((f[0] // n) % hole in (1, 2) and (f[0] % n) % hole in (1, 2))]
    item = mesh_object((np.stack([x, y * rng.uniform(0.5, 1), z], -1).reshape(-1, 3), faces))
    item.modifiers.new("thick", "SOLIDIFY").thickness = rng.uniform(0.01, 0.06)
    return item


def quaternion(rng: np.random.Generator) -> np.ndarray:
    q = rng.normal(size=4)
    return q / np.linalg.norm(q)


KINDS = {"box": (0.16, box), "lathe": (0.18, lathe), "sweep": (0.12, sweep), "extrusion": (0.12, extrusion), "superquadric": (0.1, superquadric),
         "blob": (0.1, blob), "carved": (0.1, carved), "bumpy": (0.07, bumpy), "sheet": (0.05, sheet)}


def random_part(rng: np.random.Generator):
    """A part of a random kind: the object and the kind's name."""
    names = list(KINDS)
    name = names[rng.choice(len(names), p=[KINDS[n][0] for n in names])]
    return KINDS[name][1](rng), name
