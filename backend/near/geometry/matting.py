"""Cutting an object out of its photo without a network: for plain backgrounds, also gradients and soft shadows.

Alpha in the file always wins. Otherwise the background's colour is modelled from the border, the object's from what differs,
and a random walk between the two (Grady 2005, with priors) decides each pixel: it stops at edges and carries labels
across texture. The rim is then solved for coverage and its colours are freed of the background.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import cg

from near.geometry.photo import Photo, no_object

_WORK_SIDE = 448
_MIN_OBJECT_SHARE = 0.001
_D65 = np.array([0.9505, 1.0, 1.089])
_XYZ_FROM_RGB = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


@dataclass(frozen=True)
class MattingSettings:
    """Constants of the built-in method; colour distances are CIELAB units."""

    border: float = 0.03  # width of the band taken as background, relative to the image's side
    noise: float = 2.5  # distance below which a pixel is surely like the background
    prior: float = 0.06  # pull of the colour models against the pixels' neighbours
    edge: float = 5.0  # colour step that stops the walk
    rounds: int = 3
    darkest_shadow: float = 0.45  # lightness of a shadow relative to the background
    shadow_edge: float = 2.0  # steps per pixel, at working size, that a soft shadow does not reach

    def __post_init__(self) -> None:
        if not (0 < self.border < 0.3 and self.noise > 0 and self.prior > 0 and self.edge > 0 and self.rounds >= 1
                and 0 < self.darkest_shadow <= 1 and self.shadow_edge > 0):
            raise ValueError(f"matting settings out of range: {self}")


def matte(photo: Photo, settings: MattingSettings = MattingSettings()) -> Photo:
    """The photo with an alpha channel that shows only the object.

    A photo that has one is returned as it is.

    Raises:
        NearError: ``photo-no-object`` when nothing stands out from the background.
    """
    if photo.has_matte:
        if float((photo.alpha > 0.5).float().mean()) < 1e-5:
            raise no_object()
        return photo
    srgb = photo.srgb.numpy()
    small = _resized(srgb, _WORK_SIDE)
    foreground = _segment(to_lab(small), settings)
    if foreground.mean() < _MIN_OBJECT_SHARE or foreground[1:-1, 1:-1].all():
        raise no_object()
    alpha, colour = _refine(srgb, foreground)
    return replace(photo, srgb=torch.from_numpy(colour), alpha=torch.from_numpy(alpha))


def matte_preview(photo: Photo, cell: int = 16) -> np.ndarray:
    """The cut-out object on a checkerboard, uint8 [H, W, 3]: shows holes and leftovers at a glance."""
    alpha = photo.alpha.numpy()[..., None]
    y, x = np.indices(alpha.shape[:2]) // cell
    board = np.where(((x + y) % 2)[..., None], 0.42, 0.62)
    return ((photo.srgb.numpy() * alpha + board * (1 - alpha)) * 255).round().clip(0, 255).astype(np.uint8)


def to_lab(srgb: np.ndarray) -> np.ndarray:
    """sRGB 0..1 [..., 3] to CIELAB, float32."""
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((np.maximum(srgb, 0) + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _XYZ_FROM_RGB.T / _D65
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1).astype(np.float32)


def _resized(srgb: np.ndarray, side: int) -> np.ndarray:
    height, width = srgb.shape[:2]
    scale = min(side / max(height, width), 1.0)
    image = Image.fromarray((srgb * 255).round().clip(0, 255).astype(np.uint8))
    return np.asarray(image.resize((max(round(width * scale), 2), max(round(height * scale), 2)), Image.Resampling.BOX), np.float32) / 255


def _segment(lab: np.ndarray, s: MattingSettings) -> np.ndarray:
    """bool [h, w] at working size."""
    h, w = lab.shape[:2]
    band = max(2, round(s.border * max(h, w)))
    border = np.ones((h, w), bool)
    border[band:-band, band:-band] = False
    step = _gradient(lab)
    graph = _grid_graph(lab, s.edge)
    background = border
    foreground = None
    for _ in range(s.rounds):
        distance = _background_distance(lab, background, s.noise)
        distance = np.where(_soft_shadow(lab, background, step, s), np.minimum(distance, 1.0), distance)
        far = distance > 4
        if foreground is not None:
            far &= foreground
        if not far.any():
            return far
        like_object = _mixture_distance(lab, far, s.noise)
        # Log-odds of object against background, with the object's model never overruling a surely different colour.
        odds = np.clip(0.5 * (distance ** 2 - np.minimum(like_object, 3) ** 2), -8, 8)
        prior = 1 / (1 + np.exp(-(odds - 1)))
        prior[:1], prior[-1:], prior[:, :1], prior[:, -1:] = (np.minimum(prior[e], 0.2) for e in
                                                              (np.s_[:1], np.s_[-1:], np.s_[:, :1], np.s_[:, -1:]))
        certainty = s.prior * (0.05 + np.abs(2 * prior - 1))
        probability = _random_walk(graph, prior.ravel(), certainty.ravel()).reshape(h, w)
        foreground = _tidy(probability > 0.5, distance, step)
        background = ndimage.binary_erosion(~foreground, iterations=2, border_value=1)
        if background.sum() < border.sum() // 4:
            background = border & ~foreground
        if not background.any():
            return foreground
    return foreground


def _gradient(lab: np.ndarray) -> np.ndarray:
    return np.sqrt(sum(ndimage.gaussian_gradient_magnitude(lab[..., k], 1.0) ** 2 for k in range(3)))


def _soft_shadow(lab: np.ndarray, background: np.ndarray, step: np.ndarray, s: MattingSettings) -> np.ndarray:
    """bool [h, w]: a darker shade of the background that is reached from it without crossing an edge."""
    smooth, _ = _smooth_background(lab, background, s.noise)
    tint = np.linalg.norm(lab[..., 1:] - smooth[..., 1:], axis=-1)
    shade = lab[..., 0] / np.maximum(smooth[..., 0], 1.0)
    alike = (tint < 2 * s.noise) & (shade > s.darkest_shadow) & (shade < 1.05) & (step < s.shadow_edge)
    return ndimage.binary_propagation(background & alike, mask=alike)


def _background_distance(lab: np.ndarray, where: np.ndarray, noise: float) -> np.ndarray:
    """[h, w] distance to the background, in units of its spread: a smooth colour gradient or a few colours, what fits."""
    smooth, spread = _smooth_background(lab, where, noise)
    gradient = np.linalg.norm((lab - smooth) / spread, axis=-1)
    colours = _mixture_distance(lab, where, noise)
    # The mixture knows nothing of place: use it only where the gradient does not explain the border.
    explained = float((gradient[where] < 3).mean())
    return gradient if explained > 0.9 else np.minimum(gradient, colours)


def _smooth_background(lab: np.ndarray, where: np.ndarray, noise: float) -> tuple[np.ndarray, float]:
    """Cubic polynomial of place through the background's colours, fitted robustly."""
    h, w = where.shape
    y, x = np.indices((h, w)) / max(h, w) * 2 - 1
    terms = np.stack([x ** i * y ** j for i in range(4) for j in range(4 - i)], -1)
    a, b = terms[where], lab[where].astype(float)
    weight = np.ones(len(a))
    for _ in range(6):
        root = np.sqrt(weight)[:, None]
        gram = (a * root).T @ (a * root) + 1e-3 * len(a) * np.diag([0.0] + [1e-3] * (a.shape[1] - 1))
        solution = np.linalg.solve(gram + 1e-9 * np.eye(len(gram)), (a * root).T @ (b * root))
        residual = np.linalg.norm(a @ solution - b, axis=-1)
        scale = max(1.5 * float(np.median(residual)), noise)
        weight = 1 / (1 + (residual / scale) ** 2) ** 2
    return terms @ solution, scale


def _mixture_distance(lab: np.ndarray, where: np.ndarray, noise: float, colours: int = 6) -> np.ndarray:
    """[h, w] smallest distance to a few colours found among ``where``, in units of their spread."""
    rng = np.random.default_rng(0)
    points = lab[where].astype(float)
    points = points[rng.permutation(len(points))[:6000]]
    centres = points[:1]
    for _ in range(min(colours, len(points)) - 1):  # farthest first, of a high quantile: robust to single pixels
        d = np.min(np.linalg.norm(points[:, None] - centres, axis=-1), 1)
        centres = np.concatenate([centres, points[np.argsort(d)[int(0.98 * (len(d) - 1))]][None]])
    for _ in range(8):
        nearest = np.argmin(np.linalg.norm(points[:, None] - centres, axis=-1), 1)
        centres = np.stack([points[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(len(centres))])
    nearest = np.argmin(np.linalg.norm(points[:, None] - centres, axis=-1), 1)
    best = np.full(lab.shape[:2], np.inf)
    for k in range(len(centres)):
        member = points[nearest == k]
        if len(member) < max(8, 0.005 * len(points)):
            continue
        covariance = np.cov(member.T) + noise ** 2 * np.eye(3)
        offset = lab.reshape(-1, 3) - centres[k]
        best = np.minimum(best, np.sqrt(np.einsum("nc,cd,nd->n", offset, np.linalg.inv(covariance), offset)).reshape(best.shape))
    return best


def _grid_graph(lab: np.ndarray, edge: float):
    """Laplacian of the 4-connected pixel graph; colour steps weaken the links."""
    h, w = lab.shape[:2]
    index = np.arange(h * w).reshape(h, w)
    rows, columns, weights = [], [], []
    for a, b, p, q in ((index[:, :-1], index[:, 1:], lab[:, :-1], lab[:, 1:]), (index[:-1], index[1:], lab[:-1], lab[1:])):
        link = np.exp(-np.sum((p - q) ** 2, -1) / (2 * edge ** 2)) + 1e-3
        rows += [a.ravel(), b.ravel()]
        columns += [b.ravel(), a.ravel()]
        weights += [link.ravel()] * 2
    adjacency = coo_matrix((np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=(h * w, h * w)).tocsr()
    return diags(np.asarray(adjacency.sum(1)).ravel()) - adjacency


def _random_walk(laplacian, prior: np.ndarray, certainty: np.ndarray) -> np.ndarray:
    """Probability that a walk from each pixel ends at the object's prior."""
    system = (laplacian + diags(certainty)).tocsr()
    inverse_diagonal = diags(1 / system.diagonal())
    solution, _ = cg(system, certainty * prior, x0=prior, rtol=1e-4, maxiter=400, M=inverse_diagonal)
    return solution


def _tidy(foreground: np.ndarray, distance: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Drop specks; fill gaps inside the object unless they are clearly background seen through a hole."""
    labels, count = ndimage.label(foreground)
    if count:
        size = ndimage.sum_labels(foreground, labels, np.arange(1, count + 1))
        keep = size >= max(0.01 * size.max(), 16)
        foreground = np.concatenate([[False], keep])[labels]
    holes, count = ndimage.label(~foreground)
    outside = set(np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]])))
    for k, box in enumerate(ndimage.find_objects(holes), start=1):
        if k in outside:
            continue
        mine = holes[box] == k
        inner = mine & (step[box] < np.median(step[box][mine]) + 1e-6)
        rim = ndimage.binary_dilation(mine) & ~ndimage.binary_erosion(mine)
        # A hole shows the plain background behind a sharp edge; a highlight or a white patch fades or differs.
        is_hole = mine.sum() >= 24 and np.median(distance[box][inner]) < 1.0 and np.median(step[box][rim]) > 6
        if not is_hole:
            foreground[box] |= mine
    return foreground


def _refine(srgb: np.ndarray, foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of the rim at full size, and colours without the background.

    Returns: alpha float32 [H, W], srgb float32 [H, W, 3].
    """
    h, w = srgb.shape[:2]
    scale = max(h, w) / max(foreground.shape)
    mask = np.asarray(Image.fromarray(foreground.astype(np.float32)).resize((w, h), Image.Resampling.BILINEAR))
    reach = 1.2 * scale + 0.8  # what the working size cannot tell
    inside = ndimage.distance_transform_edt(mask > 0.5)
    outside = ndimage.distance_transform_edt(mask <= 0.5)
    sure_object, sure_background = inside > reach, outside > reach
    if not sure_object.any() or not sure_background.any():
        return (mask > 0.5).astype(np.float32), srgb.astype(np.float32)
    f = _spread(srgb, sure_object, reach)
    b = _spread(srgb, sure_background, reach)
    line = f - b
    length = np.einsum("hwc,hwc->hw", line, line)
    along = np.einsum("hwc,hwc->hw", srgb - b, line) / np.maximum(length, 1e-6)
    # Where object and background look alike the colours say nothing; the walk's own boundary stands.
    trust = np.clip(length / 0.02, 0, 1)
    ramp = np.clip(0.5 + (inside - outside) / (2 * reach), 0, 1)
    alpha = np.clip(trust * along + (1 - trust) * ramp, 0, 1)
    alpha = np.where(sure_object, 1.0, np.where(sure_background, 0.0, alpha))
    alpha = np.where(alpha > 0.97, 1.0, np.where(alpha < 0.03, 0.0, alpha))
    # I = a F + (1 - a) B solved for F, leaning on the nearby object colour where coverage is low.
    solved = (srgb - (1 - alpha[..., None]) * b) / np.maximum(alpha[..., None], 0.05)
    mixed = alpha[..., None] * np.clip(solved, 0, 1) + (1 - alpha[..., None]) * f
    colour = np.where((alpha >= 1)[..., None], srgb, np.clip(mixed, 0, 1))
    return alpha.astype(np.float32), colour.astype(np.float32)


def _spread(srgb: np.ndarray, known: np.ndarray, reach: float) -> np.ndarray:
    """Colours of ``known`` pixels carried to the others: a local mean where it reaches, else the nearest."""
    weight = ndimage.gaussian_filter(known.astype(np.float32), reach)
    mean = np.stack([ndimage.gaussian_filter(np.where(known, srgb[..., k], 0), reach) for k in range(3)], -1)
    nearest = srgb[tuple(ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True))]
    return np.where((weight > 1e-3)[..., None], mean / np.maximum(weight, 1e-6)[..., None], nearest)
