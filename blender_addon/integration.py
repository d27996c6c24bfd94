"""Scene integration: the assets among ordinary objects of another engine, joined by the compositor.

The scene keeps its engine. Its proxies are hidden from its camera, but still cast shadows and show in mirrors; so the picture
has everything that is behind an asset, with the asset's shadow on it. A second scene with our engine holds the assets alone, and
the compositor joins both by depth, with the assets' own soft edges. One click sets it up, another one removes every trace.

Blender renders both scenes in one go, so F12, animations and `-b` need nothing else.
"""

from __future__ import annotations

import bpy

from .engine import ENGINE
from .errors import NearError
from .scene.objects import is_proxy, proxies

SUFFIX = " (NeAR)"
MARK = "near_integration"          # custom property on everything that we made
_RENDER = ("resolution_x", "resolution_y", "resolution_percentage", "pixel_aspect_x", "pixel_aspect_y", "fps", "fps_base", "use_border",
           "use_crop_to_border", "border_min_x", "border_max_x", "border_min_y", "border_max_y", "use_multiview")
_LIGHT = ("source", "file", "rotation", "strength", "rows", "samples", "probe_object")


def assets_scene(scene: bpy.types.Scene) -> bpy.types.Scene | None:
    """The scene that renders this one's assets, where integration is on."""
    name = scene.get(MARK)
    other = bpy.data.scenes.get(name) if isinstance(name, str) else None
    return other if other is not None and other.get(MARK) is True else None


def is_on(scene: bpy.types.Scene) -> bool:
    """Whether the scene is set up."""
    return assets_scene(scene) is not None


def enable(scene: bpy.types.Scene) -> bpy.types.Scene:
    """Sets it up; -> the assets' scene. Doing it twice brings it up to date (new proxies, another resolution).

    Raises:
        NearError: `integration-engine`, `integration-no-asset`.
    """
    if scene.get(MARK) is True or scene.render.engine in (ENGINE, "BLENDER_WORKBENCH"):
        raise NearError("integration-engine", "Scene integration joins the assets with a picture of Cycles or EEVEE.",
                        "Choose Cycles or EEVEE as the scene's render engine first.")
    if not proxies(scene):
        raise NearError("integration-no-asset", "The scene holds no relightable asset.", "Create one, or append one, first.")
    other = assets_scene(scene) or _new_scene(scene)
    _copy_settings(scene, other)
    for obj in _holders(scene):
        if obj.name not in other.collection.objects:
            other.collection.objects.link(obj)
    for obj in proxies(scene):
        if MARK not in obj:
            obj[MARK] = obj.visible_camera
        obj.visible_camera = False
    for view_layer in (*scene.view_layers, other.view_layers[0]):
        view_layer.use_pass_z = True
    scene[MARK] = other.name
    _compose(scene, other)
    return other


def disable(scene: bpy.types.Scene) -> None:
    """Takes it all away again."""
    other = assets_scene(scene)
    for obj in proxies(scene):
        if MARK in obj:
            obj.visible_camera = bool(obj[MARK])
            del obj[MARK]
    tree = _tree(scene, create=False)
    if tree is not None:
        _remove_nodes(tree)
    if MARK in scene:
        del scene[MARK]
    if other is not None:
        bpy.data.scenes.remove(other)


def _holders(scene: bpy.types.Scene) -> list[bpy.types.Object]:
    """The scene's proxies, and the empties that place collections with proxies in them."""
    placed = [obj for obj in scene.objects if obj.instance_type == "COLLECTION" and obj.instance_collection is not None
              and any(is_proxy(inner) for inner in obj.instance_collection.all_objects)]
    return [*(obj for obj in proxies(scene) if not obj.hide_render), *placed]


def _new_scene(scene: bpy.types.Scene) -> bpy.types.Scene:
    other = bpy.data.scenes.new(scene.name + SUFFIX)
    other[MARK] = True
    other.render.engine = ENGINE
    return other


def _copy_settings(scene: bpy.types.Scene, other: bpy.types.Scene) -> None:
    """What both pictures must agree in. The light is that of the first scene: its World, or a probe of its objects."""
    other.camera, other.world = scene.camera, scene.world
    other.frame_start, other.frame_end, other.frame_step = scene.frame_start, scene.frame_end, scene.frame_step
    for name in _RENDER:
        setattr(other.render, name, getattr(scene.render, name))
    other.render.film_transparent = True
    for name in _LIGHT:
        setattr(other.near_light, name, getattr(scene.near_light, name))
    other.near_light.probe_scene = scene


# ---------------------------------------------------------------- compositor
def _tree(scene: bpy.types.Scene, create: bool = True) -> bpy.types.NodeTree | None:
    """The scene's compositing nodes; a node group of its own from Blender 5.0 on."""
    if hasattr(scene, "compositing_node_group"):
        if scene.compositing_node_group is None and create:
            scene.compositing_node_group = bpy.data.node_groups.new("Compositing", "CompositorNodeTree")
        return scene.compositing_node_group
    if create:
        scene.use_nodes = True
    return scene.node_tree


def _remove_nodes(tree: bpy.types.NodeTree) -> None:
    """Our nodes go, what fed them feeds what they fed."""
    ours = [node for node in tree.nodes if node.get(MARK)]
    over = next((node for node in ours if node.get(MARK) == "over"), None)
    if over is not None:
        source = next((link.from_socket for link in _colours(over)[0].links), None)
        for link in list(over.outputs[0].links):
            target = link.to_socket
            tree.links.remove(link)
            if source is not None:
                tree.links.new(source, target)
    for node in ours:
        tree.nodes.remove(node)


def _colours(node: bpy.types.Node) -> list[bpy.types.NodeSocket]:
    return [socket for socket in node.inputs if socket.type == "RGBA"]


def _output(tree: bpy.types.NodeTree) -> bpy.types.NodeSocket:
    """The socket whose colour is the picture; made where the tree has none."""
    kind = "CompositorNodeComposite" if hasattr(bpy.types, "CompositorNodeComposite") else "NodeGroupOutput"
    node = next((n for n in tree.nodes if n.bl_idname == kind), None)
    if node is None:
        if kind == "NodeGroupOutput" and not any(item.in_out == "OUTPUT" for item in tree.interface.items_tree):
            tree.interface.new_socket("Image", in_out="OUTPUT", socket_type="NodeSocketColor")
        node = tree.nodes.new(kind)
    return node.inputs[0]


def _layers_node(tree: bpy.types.NodeTree, scene: bpy.types.Scene) -> bpy.types.Node:
    node = tree.nodes.new("CompositorNodeRLayers")
    node.scene = scene
    return node


def _compose(scene: bpy.types.Scene, other: bpy.types.Scene) -> None:
    """picture -> Z Combine with the assets -> output. Whatever fed the output before is kept as the picture."""
    tree = _tree(scene)
    _remove_nodes(tree)
    target = _output(tree)
    base = next((link.from_socket for link in target.links), None)
    first, second = _layers_node(tree, scene), _layers_node(tree, other)
    join = tree.nodes.new("CompositorNodeZcombine")
    for node, mark, place in ((first, "first", (-400, 200)), (second, "second", (-400, -200)), (join, "over", (0, 0))):
        node[MARK], node.location = mark, place
    _switch(join, "use_alpha", "Use Alpha", True)
    # Where neither picture has a depth, smoothing the choice between them would draw dark lines along every edge.
    _switch(join, "use_antialias_z", "Anti-Alias", False)
    colours = _colours(join)
    depths = [socket for socket in join.inputs if socket.type == "VALUE"]
    for source, sink in ((base or first.outputs["Image"], colours[0]), (first.outputs["Depth"], depths[0]), (second.outputs["Image"], colours[1]),
                         (second.outputs["Depth"], depths[1]), (join.outputs[0], target)):
        tree.links.new(source, sink)


def _switch(node: bpy.types.Node, name: str, socket: str, value: bool) -> None:
    """An option that became a socket in Blender 5."""
    if hasattr(node, name):
        setattr(node, name, value)
    elif socket in node.inputs:
        node.inputs[socket].default_value = value
