"""Contact sheets: rows of pictures as one."""

import textwrap
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE = 160  # side of a sheet's pictures in pixels
HEADER = 18
SHEET_ROWS, SHEET_COLUMNS = 48, 24  # a larger sheet is no longer looked at
LABEL_WIDTH = 24  # characters that fit into a tile


def tile_rows(rows: list[list[Image.Image]], columns: list[str], title: str = "") -> Image.Image:
    """Rows of pictures as one sheet with a title and column names; small pictures keep their pixels
    visible."""
    top = HEADER * (2 if title else 1)
    sheet = Image.new("RGB", (len(columns) * TILE, top + len(rows) * TILE), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), title, fill="black", font=_font())
    for i, name in enumerate(columns):
        draw.text((i * TILE + 4, top - HEADER + 3), name, fill="black", font=_font())
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(fit_tile(picture), (x * TILE, top + y * TILE))
    return sheet


def fit_tile(picture: Image.Image) -> Image.Image:
    """The picture as a TILE x TILE square, letterboxed."""
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    tile = Image.new("RGB", (TILE, TILE), "white")
    tile.paste(picture.resize(size, method), ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile


def label_tile(text: str) -> Image.Image:
    """A white tile with a text on it, broken into lines at blanks and after underscores."""
    tile = Image.new("RGB", (TILE, TILE), "white")
    spaced = (line.replace("_", "_ ") for line in text.splitlines())
    lines = [
        part.replace("_ ", "_") for line in spaced for part in textwrap.wrap(line, LABEL_WIDTH)
    ]
    draw = ImageDraw.Draw(tile)
    draw.multiline_text((4, 4), "\n".join(lines), fill="black", font=_font())
    return tile


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Of Matplotlib, since Pillow's own lacks letters with accents."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)
