"""The assets in the viewports of other engines: a picture with depth, tested against what is drawn there.

The overlay is drawn in display space, so it brings its own display transform (`display.table`).
"""

from __future__ import annotations

import bpy
from bpy.app.handlers import persistent

from . import display, match, proxydepth, session, viewport
from .display import table
from .engine import ENGINE
from .errors import as_near_error
from .scene.objects import proxies

_handles: list = []
_live: dict[int, OverlayView] = {}           # region -> its view
_shader = _quad = None


# ---------------------------------------------------------------- drawing
_VERTEX = "void main() { place = position * 0.5 + 0.5; gl_Position = vec4(position, 0.0, 1.0); }"
_FRAGMENT = """
void main() {
  vec4 colour = texture(picture, place);
  float z = texture(depths, place).r;
  if (colour.a < 0.004 || z < 0.0) discard;
  float view_z = push_back - z;
  // The proxy itself must not hide its asset's picture. Its neighbourhood, since viewports jitter their samples.
  ivec2 size = textureSize(proxies, 0), here = ivec2(place * vec2(size));
  float nearest = NOTHING;
  for (int y = -1; y <= 1; y++)
    for (int x = -1; x <= 1; x++)
      nearest = max(nearest, texelFetch(proxies, clamp(here + ivec2(x, y), ivec2(0), size - 1), 0).r);
  view_z = max(view_z, nearest + abs(nearest) * 1e-3);
  float ndc = perspective > 0.5 ? (p22 * view_z + p23) / -view_z : p22 * view_z + p23;
  gl_FragDepth = clamp(ndc * 0.5 + 0.5, 0.0, 1.0);
  vec3 shown = colour.rgb / colour.a;
  if (tone_mapped) {
    vec3 code = (log2(max(shown, vec3(0.0)) + exp2(LOW)) - LOW) / RANGE;
    shown = texture(table, clamp(code, 0.0, 1.0) * (1.0 - 1.0 / SIZE) + 0.5 / SIZE).rgb;
  }
  // Set by Blender: the target encodes what is written, so it must be given linear values.
  if (srgbTarget) shown = mix(shown / 12.92, pow((shown + 0.055) / 1.055, vec3(2.4)), greaterThan(shown, vec3(0.04045)));
  out_colour = vec4(shown * colour.a, colour.a);
}
"""


def _prepare() -> None:
    """The shader and its rectangle; made with the first draw, where there is a GPU context."""
    global _shader, _quad
    import gpu
    from gpu_extras.batch import batch_for_shader

    info = gpu.types.GPUShaderCreateInfo()
    for name in ("push_back", "p22", "p23", "perspective"):
        info.push_constant("FLOAT", name)
    info.push_constant("BOOL", "tone_mapped")
    info.push_constant("BOOL", "srgbTarget")
    info.sampler(0, "FLOAT_2D", "picture")
    info.sampler(1, "FLOAT_2D", "depths")
    info.sampler(2, "FLOAT_3D", "table")
    info.sampler(3, "FLOAT_2D", "proxies")
    info.vertex_in(0, "VEC2", "position")
    between = gpu.types.GPUStageInterfaceInfo("near_overlay")
    between.smooth("VEC2", "place")
    info.vertex_out(between)
    info.fragment_out(0, "VEC4", "out_colour")
    if hasattr(info, "depth_write"):         # Blender 4.2 needs no word of it
        info.depth_write("ANY")
    for name, value in (("LOW", f"({display.LOG2_LOW})"), ("RANGE", f"{display.LOG2_RANGE}"), ("SIZE", f"{float(display.SIZE)}"),
                        ("NOTHING", f"({proxydepth.NOTHING})")):
        info.define(name, value)
    info.vertex_source(_VERTEX)
    info.fragment_source(_FRAGMENT)
    _shader = gpu.shader.create_from_info(info)
    _quad = batch_for_shader(_shader, "TRIS", {"position": [(-1, -1), (1, -1), (1, 1), (-1, 1)]}, indices=[(0, 1, 2), (0, 2, 3)])


def paint(view: viewport.LiveView, window_matrix, proxies_texture=None, among_objects: bool = True) -> None:
    """Draws a view's newest picture into the bound framebuffer, depth-tested if `among_objects`. `window_matrix`: of the region
    now; `proxies_texture`: of a `ProxyDepth`."""
    import gpu

    if _shader is None:
        _prepare()
    if proxies_texture is None:
        proxies_texture = gpu.types.GPUTexture((1, 1), format="R32F", data=gpu.types.Buffer("FLOAT", 1, [proxydepth.NOTHING]))
    gpu.state.blend_set("ALPHA_PREMULT")
    gpu.state.depth_test_set("LESS_EQUAL" if among_objects else "NONE")
    gpu.state.depth_mask_set(among_objects)
    _shader.bind()
    _shader.uniform_float("push_back", view.camera.pushed_back_m)
    _shader.uniform_float("p22", window_matrix[2][2])
    _shader.uniform_float("p23", window_matrix[2][3])
    _shader.uniform_float("perspective", float(view.camera.spec.projection == "perspective"))
    _shader.uniform_bool("tone_mapped", [view.tone_mapped])
    _shader.uniform_sampler("picture", view.texture)
    _shader.uniform_sampler("depths", view.depth_texture)
    _shader.uniform_sampler("table", table.bound())
    _shader.uniform_sampler("proxies", proxies_texture)
    _quad.draw(_shader)
    gpu.state.depth_mask_set(False)
    gpu.state.depth_test_set("NONE")
    gpu.state.blend_set("NONE")


class OverlayView(viewport.LiveView):
    """A live view that knows where its proxies are."""

    def __init__(self) -> None:
        super().__init__(depth=True)
        self.proxy_depth = proxydepth.ProxyDepth()
        self._proxies: list = []

    def draw(self, context: bpy.types.Context, among_objects: bool) -> None:
        """Brings itself up to date and paints."""
        region, data, graph = context.region, context.region_data, context.view_layer.depsgraph
        if among_objects and (self.changed or not self._proxies):
            self._proxies = proxydepth.seen(graph)
        self.update(graph, region, data)
        if self.texture is None or self.depth_texture is None or not table.ready(context.scene):
            return
        if among_objects:
            self.proxy_depth.draw(self._proxies, region.width, region.height, data.view_matrix, data.window_matrix)
        paint(self, data.window_matrix, self.proxy_depth.texture, among_objects)

    def close(self) -> None:
        super().close()
        self.proxy_depth = proxydepth.ProxyDepth()


def wanted(context: bpy.types.Context) -> str:
    """How the viewport being drawn shows assets here: "objects", among those of another engine; "data", a pass that holds data in
    our engine's own viewport; or empty, not at all."""
    scene, space = context.scene, context.space_data
    if scene.render.engine == ENGINE and space.shading.type == "RENDERED":
        return "data" if scene.near_render.shown != "color" and proxies(scene) else ""
    return "objects" if scene.near_render.overlay and space.overlay.show_overlays and proxies(scene) else ""


def _draw(where: str) -> None:
    """A draw handler of all 3D viewports; an exception in it would fill the console, so none leaves it."""
    context = bpy.context
    if wanted(context) != where:
        return
    try:
        view = _live.get(context.region.as_pointer())
        if view is None:
            _prune()
            view = _live[context.region.as_pointer()] = OverlayView()
        view.draw(context, where == "objects")
    except Exception as error:
        session.get().report(as_near_error(error))


def _draw_wipe() -> None:
    """The photo over the left share of the camera's frame, as it is on disc: display values."""
    context = bpy.context
    scene, region, region_data = context.scene, context.region, context.region_data
    share = scene.near_render.wipe
    if share <= 0 or region_data.view_perspective != "CAMERA" or not match.is_matched(scene) or not scene.camera.data.background_images:
        return
    import gpu
    from bpy_extras.view3d_utils import location_3d_to_region_2d
    from gpu_extras.batch import batch_for_shader

    corners = [location_3d_to_region_2d(region, region_data, scene.camera.matrix_world @ c) for c in scene.camera.data.view_frame(scene=scene)]
    image = scene.camera.data.background_images[0].image
    if None in corners or image is None:
        return
    left, right = min(c.x for c in corners), max(c.x for c in corners)
    low, high = min(c.y for c in corners), max(c.y for c in corners)
    middle = left + share * (right - left)
    shader = gpu.shader.from_builtin("IMAGE")
    quad = batch_for_shader(shader, "TRI_FAN", {"pos": [(left, low), (middle, low), (middle, high), (left, high)],
                                                "texCoord": [(0, 0), (share, 0), (share, 1), (0, 1)]})
    gpu.state.blend_set("ALPHA_PREMULT")
    shader.bind()
    shader.uniform_sampler("image", gpu.texture.from_image(image))
    quad.draw(shader)
    gpu.state.blend_set("NONE")


def _prune() -> None:
    """Closes the views of regions that are gone."""
    there = {region.as_pointer() for window in bpy.context.window_manager.windows for area in window.screen.areas for region in area.regions}
    for key in [key for key in _live if key not in there]:
        _live.pop(key).close()


def _drop_views() -> None:
    while _live:
        _live.popitem()[1].close()


# ---------------------------------------------------------------- noticing changes
@persistent
def _changed(_scene, depsgraph=None) -> None:
    for update in depsgraph.updates if depsgraph is not None and _live else ():
        if update.is_updated_geometry:
            proxydepth.forget(update.id.name_full)
    for view in _live.values():
        view.changed = True


@persistent
def _file_loaded(*_args) -> None:
    _drop_views()
    proxydepth.clear()


_HANDLERS = (("depsgraph_update_post", _changed), ("frame_change_post", _changed), ("load_post", _file_loaded))


def register() -> None:
    for function, arguments, moment in ((_draw, ("objects",), "POST_VIEW"), (_draw, ("data",), "POST_PIXEL"), (_draw_wipe, (), "POST_PIXEL")):
        _handles.append(bpy.types.SpaceView3D.draw_handler_add(function, arguments, "WINDOW", moment))
    for name, handler in _HANDLERS:
        getattr(bpy.app.handlers, name).append(handler)


def unregister() -> None:
    global _shader, _quad
    for name, handler in _HANDLERS:
        getattr(bpy.app.handlers, name).remove(handler)
    while _handles:
        bpy.types.SpaceView3D.draw_handler_remove(_handles.pop(), "WINDOW")
    _drop_views()
    proxydepth.clear()
    _shader = _quad = None
