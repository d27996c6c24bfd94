"""Cycles: the settings of the bench, random cameras, light from files, pictures and buffers as arrays."""

from __future__ import annotations

import tempfile
from pathlib import Path

import bpy
import numpy as np
from cycles_render import place_camera, place_light, set_up_cycles
from mathutils import Vector

from dataset.assets import principled

AOVS = {"BaseColor": ("Base Color", "COLOR"), "Roughness": ("Roughness", "VALUE"), "Metallic": ("Metallic", "VALUE")}
FAR = 7.9  # the format's farthest depth


class Stage:
    """One scene, ready to be rendered from anywhere under any light. The folder for pictures lives as long as the stage."""

    def __init__(self, materials: list, samples: int, threads: int, white: Path) -> None:
        self.samples, self.white = samples, white
        set_up_cycles(samples, threads)
        scene = self.scene = bpy.context.scene
        scene.cycles.adaptive_threshold, scene.cycles.denoising_prefilter = 0.01, "FAST"
        scene.cycles.transparent_max_bounces = 16
        scene.render.use_compositing = scene.render.use_sequencer = False
        scene.render.image_settings.color_depth, scene.render.image_settings.exr_codec = "32", "NONE"
        scene.render.use_border = False
        # Measured: with data kept between renders, a new light costs ten times the render itself at these sizes.
        scene.render.use_persistent_data = False
        scene.world.cycles.sampling_method = "MANUAL"  # the automatic size of the sampling map costs more than the render
        layer = self.layer = scene.view_layers[0]
        layer.material_override = None
        layer.use_pass_z = layer.use_pass_normal = True
        for name, (_, kind) in AOVS.items():
            aov = layer.aovs.add()
            aov.name, aov.type = name, kind
        for material in materials:
            _add_aovs(material)
        self.clay = bpy.data.materials.new("near clay")
        self.clay.use_nodes = True
        tree = self.clay.node_tree
        diffuse = tree.nodes.new("ShaderNodeBsdfDiffuse")
        diffuse.inputs["Color"].default_value = (1, 1, 1, 1)
        tree.links.new(diffuse.outputs[0], self.clay.node_tree.get_output_node("CYCLES").inputs["Surface"])
        self.folder = tempfile.TemporaryDirectory(prefix="near-dataset-")
        self.light(None)

    def camera(self, matrix_world: np.ndarray, K: np.ndarray, size: int) -> None:
        place_camera({"matrix_world": matrix_world.tolist(), "K": K.tolist(), "resolution": [size, size]})

    def light(self, file: Path | None, rotation_z_rad: float = 0.0, strength: float = 1.0) -> None:
        """None: white from everywhere, radiance 1 (the homogeneous light)."""
        place_light({"hdri": str(file or self.white), "rotation_z": rotation_z_rad})
        world = self.scene.world
        world.node_tree.nodes["Background"].inputs["Strength"].default_value = strength
        world.cycles.sample_map_resolution = world.node_tree.nodes["map"].image.size[0]

    def picture(self, seed: int, share: float = 1.0) -> np.ndarray:
        """Premultiplied linear Rec.709 RGBA [S, S, 4], with a share of the samples."""
        channels = self._render("OPEN_EXR", seed, share)
        return np.stack([channels[c] for c in "RGBA"], -1)

    def buffers(self, seed: int, share: float = 1.0) -> dict[str, np.ndarray]:
        """The picture as ``color``, and not premultiplied: base_lin709, normal [S, S, 3], roughness, metallic, alpha, depth."""
        c = self._render("OPEN_EXR_MULTILAYER", seed, share)
        stack = lambda name, parts: np.stack([c[f"{name}.{p}"] for p in parts], -1)  # noqa: E731
        color = stack("Combined", "RGBA")
        alpha = np.clip(color[..., 3], 0, 1)
        seen = alpha > 1e-3
        share = np.where(seen, alpha, 1)
        normal = stack("Normal", "XYZ")
        normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
        depth = _one(c, "Depth")
        return {"color": color, "alpha": alpha, "base_lin709": np.clip(stack("BaseColor", "RGB") / share[..., None], 0, 1) * seen[..., None],
                "roughness": np.clip(_one(c, "Roughness") / share, 0, 1) * seen, "metallic": np.clip(_one(c, "Metallic") / share, 0, 1) * seen,
                "normal": normal * seen[..., None], "depth": np.where(seen & (depth < FAR), depth, 0)}

    def clay_picture(self, seed: int, share: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Everything white and matt, direct light only: (RGB [S, S, 3] not premultiplied, smooth normals [S, S, 3])."""
        cycles = self.scene.cycles
        bounces, cycles.max_bounces, self.layer.material_override = cycles.max_bounces, 0, self.clay
        buffers = self.buffers(seed, share)
        cycles.max_bounces, self.layer.material_override = bounces, None
        return buffers["color"][..., :3] / np.maximum(buffers["alpha"], 1e-3)[..., None], buffers["normal"]

    def _render(self, kind: str, seed: int, share: float) -> dict[str, np.ndarray]:
        import OpenEXR

        scene, file = self.scene, Path(self.folder.name) / "picture.exr"
        scene.cycles.seed, scene.cycles.samples = seed % (2 ** 31), max(round(self.samples * share), 1)
        scene.render.image_settings.file_format = kind
        scene.render.filepath = str(file)
        bpy.ops.render.render(write_still=True)
        with OpenEXR.File(str(file), separate_channels=True) as exr:
            found = {name.removeprefix(f"{self.layer.name}."): np.array(c.pixels, np.float32) for name, c in exr.channels().items()}
        if len({a.shape for a in found.values()}) != 1 or not found:
            raise RuntimeError("Cycles wrote no picture")
        return {name: np.nan_to_num(a, nan=0.0, posinf=65504.0, neginf=0.0) for name, a in found.items()}


def _one(channels: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A pass of one channel, however it is called."""
    return next(channels[n] for n in (name, f"{name}.V", f"{name}.X", f"{name}.Z") if n in channels)


def _add_aovs(material) -> None:
    tree, shader = material.node_tree, principled(material)
    for name, (slot_name, kind) in AOVS.items():
        node, source = tree.nodes.new("ShaderNodeOutputAOV"), shader.inputs[slot_name]
        node.aov_name = name
        target = node.inputs["Color" if kind == "COLOR" else "Value"]
        if source.is_linked:
            tree.links.new(source.links[0].from_socket, target)
        else:
            target.default_value = source.default_value


# -- cameras -----------------------------------------------------------------------------------------------------------


def intrinsics(fov_x_rad: float, size: int) -> np.ndarray:
    f = size / 2 / np.tan(fov_x_rad / 2)
    return np.array([[f, 0, size / 2], [0, f, size / 2], [0, 0, 1]])


def orbit(yaw_rad: float, pitch_rad: float, radius: float, target=(0.0, 0.0, 0.0), roll_rad: float = 0.0) -> np.ndarray:
    """Blender camera-to-world [4, 4] on the bench's orbit: yaw 0 looks at the front (-Y), the camera sees ``target``."""
    position = radius * np.array([np.sin(yaw_rad) * np.cos(pitch_rad), -np.cos(yaw_rad) * np.cos(pitch_rad), np.sin(pitch_rad)]) + target
    look = Vector((np.asarray(target) - position).tolist()).to_track_quat("-Z", "Y").to_matrix()
    c, s = np.cos(roll_rad), np.sin(roll_rad)
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(look) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    matrix[:3, 3] = position
    return matrix


def project(points: np.ndarray, matrix_world: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Pixels [N, 2] (right, down) of world points in front of a Blender camera."""
    local = (points - matrix_world[:3, 3]) @ matrix_world[:3, :3]
    return np.stack([K[0, 2] + K[0, 0] * local[:, 0] / -local[:, 2], K[1, 2] - K[1, 1] * local[:, 1] / -local[:, 2]], -1)


def framed(rng: np.random.Generator, vertices: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """A photographer's camera: matrix_world, K, facts. The object fills half to all of the frame, seldom cut by its edge."""
    yaw, pitch, roll = rng.uniform(0, 2 * np.pi), np.radians(rng.triangular(-25, 15, 75)), np.radians(rng.normal(0, 2))
    fov = float(np.radians(np.exp(rng.uniform(np.log(14), np.log(62)))))
    K = intrinsics(fov, size)
    fill = rng.uniform(0.55, 0.95) if rng.random() < 0.85 else rng.uniform(1.0, 1.25)
    radius = 0.6 / np.tan(fov / 2) / fill
    for _ in range(3):
        matrix = orbit(yaw, pitch, radius, roll_rad=roll)
        span = np.ptp(project(vertices, matrix, K), axis=0).max() / size
        radius = float(np.clip(radius * span / fill, 0.95, 8.0))
    matrix = orbit(yaw, pitch, radius, roll_rad=roll)
    seen = project(vertices, matrix, K)
    room = max(1 - np.ptp(seen, axis=0).max() / size, 0.06)
    shift = size / 2 - (seen.min(0) + seen.max(0)) / 2 + rng.uniform(-0.45, 0.45, 2) * room * size
    K[:2, 2] += shift
    low, high = seen.min(0) + shift, seen.max(0) + shift
    cut = bool((low < -1).any() or (high > size + 1).any())
    return matrix, K, {"yaw": yaw, "pitch": pitch, "roll": roll, "radius": radius, "fov_x_rad": fov, "cut_by_frame": cut}
