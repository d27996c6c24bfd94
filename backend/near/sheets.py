"""Contact sheets: labelled grids of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PAPER, INK, MUTED = (24, 25, 28), (235, 235, 238), (150, 152, 160)
MARGIN, LABEL = 10, 22


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def fit(pixels: np.ndarray, width: int, height: int, background: tuple[int, int, int] = PAPER) -> np.ndarray:
    """uint8 RGB(A) picture scaled to fit, centred on a background: uint8 [height, width, 3]."""
    from PIL import Image

    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, -1)
    picture = Image.fromarray(pixels).convert("RGBA")
    scale = min(width / picture.width, height / picture.height)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    # Alpha is weighted by Pillow's own premultiplication in resize; straight colours of empty pixels do not bleed in.
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (width, height), (*background, 255))
    canvas.alpha_composite(picture, ((width - size[0]) // 2, (height - size[1]) // 2))
    return np.asarray(canvas.convert("RGB"))


def contact_sheet(rows: Sequence[Sequence[np.ndarray | None]], *, labels: Sequence[Sequence[str]] | None = None,
                  row_titles: Sequence[str] | None = None, column_titles: Sequence[str] | None = None, title: str = "",
                  cell: tuple[int, int] = (192, 192), background: tuple[int, int, int] = PAPER) -> np.ndarray:
    """A grid of uint8 pictures (None: an empty cell) -> uint8 [H, W, 3].

    Args:
        labels: a line of text under each cell. row_titles: left of each row. column_titles: above each column.
        background: behind pictures with alpha.
    """
    from PIL import Image, ImageDraw

    columns = max(len(row) for row in rows)
    width, height = cell
    left = MARGIN + (max((_font(13).getlength(t) for t in row_titles), default=0) + MARGIN if row_titles else 0)
    left, top = int(left), MARGIN + (34 if title else 0) + (LABEL if column_titles else 0)
    pitch = height + MARGIN + (LABEL if labels else 0)
    sheet = Image.new("RGB", (left + columns * (width + MARGIN), top + len(rows) * pitch), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, _font(18))
    for c, text in enumerate(column_titles or ()):
        draw.text((left + c * (width + MARGIN), top - LABEL + 2), _shorten(text, width, 13), MUTED, _font(13))
    for r, row in enumerate(rows):
        y = top + r * pitch
        if row_titles:
            draw.text((MARGIN, y + height // 2 - 8), row_titles[r], INK, _font(13))
        for c, pixels in enumerate(row):
            if pixels is None:
                continue
            x = left + c * (width + MARGIN)
            sheet.paste(Image.fromarray(fit(pixels, width, height, background)), (x, y))
            if labels and c < len(labels[r]):
                draw.text((x, y + height + 3), _shorten(labels[r][c], width, 13), MUTED, _font(13))
    return np.asarray(sheet)


def _shorten(text: str, width: int, size: int) -> str:
    font = _font(size)
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    return text
