"""What a person shows of an object by hand: a picture made square, and a mask from the middle, a
box, brush strokes or a file."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from elite.images import fit_mask, read_image, read_mask
from elite.masks import Box, Find, find_object

Squaring = Literal["crop", "pad"]
Method = Literal["centre", "box", "brush", "file", "whole"]

MAX_POINTS = 20_000  # of all strokes
MAX_LENGTH = 40 * MAX_POINTS  # characters of the text that marks come in
WHITE = 255  # what pads pictures, as behind transparent ones


@dataclass(frozen=True)
class Stroke:
    """One line of the brush; lengths are shares of the picture's side."""

    points: tuple[tuple[float, float], ...]  # x, y
    width: float
    erase: bool = False


@dataclass(frozen=True)
class Marks:
    """What was drawn on a square picture: a box (left, top, right, bottom) in shares of its side,
    where left = right and top = bottom is a click, and strokes."""

    box: tuple[float, float, float, float] | None = None
    strokes: tuple[Stroke, ...] = ()


@dataclass(frozen=True)
class Shown:
    """An object as a person shows it.

    Args:
        picture: its file; None where there is none yet.
        squaring: "crop" cuts the longer side, "pad" adds white at the shorter one.
        position: which part a crop keeps and where a padded picture lies, from 0 (left, top) to 1.
        method: what the mask starts from; strokes paint and erase on top of that.
        mask: file of a mask of the picture before squaring, for the method "file".
        max_pixels: limit for both files; None means none.
        find: what finds the object in the middle or in a box.
    """

    picture: Path | str | None
    squaring: Squaring = "crop"
    position: float = 0.5
    method: Method = "centre"
    marks: Marks = field(default_factory=Marks)
    mask: Path | str | None = None
    max_pixels: int | None = None
    find: Find = find_object

    def read_picture(self) -> np.ndarray:
        """The picture, uint8 (H, W, 3), not yet square.

        Raises:
            ValueError: there is none, it cannot be read, or it has too many pixels.
        """
        if not self.picture:
            raise ValueError("no picture yet; upload or paste one, or pick an example")
        with folder_hidden(self.picture):
            return read_image(self.picture, self.max_pixels)

    def square(self, picture: np.ndarray) -> np.ndarray:
        """The picture (H, W, 3) or mask (H, W) of it, made square (S, S). Raises ValueError where
        white would make it too large."""
        side = max(picture.shape[:2])
        if self.squaring == "pad" and self.max_pixels is not None and side**2 > self.max_pixels:
            raise ValueError(
                f"a square of {side} x {side} is more than {self.max_pixels / 1e6:g} million "
                "pixels; cut the longer side off, or make the picture smaller"
            )
        return make_square(picture, self.squaring, self.position)

    def read_mask(self, picture: np.ndarray) -> np.ndarray:
        """The mask, bool (S, S), of what `read_picture` gives, once that is square.

        Raises:
            ValueError: nothing is marked, nothing is found, or the mask file does not fit.
        """
        start: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "centre": lambda square: self.find(square, None),
            "box": self._cut_box,
            "brush": lambda square: np.zeros(square.shape[:2], dtype=bool),
            "file": lambda square: self.square(self._read_file(picture)),
            "whole": lambda square: np.ones(square.shape[:2], dtype=bool),
        }
        if self.method not in start:
            raise ValueError(f"way to mark {self.method!r}; expected one of {', '.join(start)}")
        mask = paint(start[self.method](self.square(picture)), self.marks.strokes)
        if not mask.any():
            raise ValueError("nothing is marked as object; paint over it with the brush")
        return mask

    def _cut_box(self, square: np.ndarray) -> np.ndarray:
        if self.marks.box is None:
            raise ValueError("no box yet; draw one around the object")
        box = Box(*(round(share * len(square)) for share in self.marks.box))
        if box.is_click:  # the last pixel ends where the picture does
            x, y = min(box.left, len(square) - 1), min(box.top, len(square) - 1)
            box = Box(x, y, x, y)
        return self.find(square, box)

    def _read_file(self, picture: np.ndarray) -> np.ndarray:
        if not self.mask:
            raise ValueError("no mask yet; upload one: white where the object is, black elsewhere")
        with folder_hidden(self.mask):
            return fit_mask(read_mask(self.mask, self.max_pixels), picture, str(self.mask))


@contextmanager
def folder_hidden(path: Path | str) -> Iterator[None]:
    """Within it, errors name the file as the person knows it, without the folder of the upload."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), Path(path).name)) from None


def make_square(array: np.ndarray, squaring: Squaring, position: float) -> np.ndarray:
    """Picture uint8 (H, W, 3) or mask bool (H, W) to (S, S, ...); a square one stays as it is.

    Raises:
        ValueError: unknown way, or a position outside 0 to 1.
    """
    if squaring not in ("crop", "pad") or not 0 <= position <= 1:
        raise ValueError(f"squaring {squaring!r} at {position}; expected crop or pad, at 0 to 1")
    height, width = array.shape[:2]
    extra = abs(height - width)
    before = round(position * extra)
    if squaring == "crop":
        side = min(height, width)
        top, left = (before, 0) if height > width else (0, before)
        return array[top : top + side, left : left + side]
    margins = [(0, 0)] * array.ndim
    margins[1 if height > width else 0] = (before, extra - before)
    return np.pad(array, margins, constant_values=0 if array.dtype == bool else WHITE)


def paint(mask: np.ndarray, strokes: tuple[Stroke, ...]) -> np.ndarray:
    """The mask, bool (S, S), after the strokes, one over the other."""
    side = len(mask)
    canvas = mask.astype(np.uint8)
    for stroke in strokes:
        line = np.array([*stroke.points, stroke.points[-1]])  # OpenCV draws no line of one point
        points = np.round(line * side - 0.5).astype(np.int32)
        width = max(1, round(stroke.width * side))
        cv2.polylines(canvas, [points], False, int(not stroke.erase), width)
    return canvas > 0


def read_marks(text: str | None) -> Marks:
    """Marks from the text of the page: JSON of `box` and `strokes`, all in shares of the side.

    Raises:
        ValueError: the text is something else, or too long.
    """
    if not text:
        return Marks()
    try:
        if not isinstance(text, str) or len(text) > MAX_LENGTH:
            raise ValueError
        content = json.loads(text)
        box = content.get("box")
        strokes = tuple(_read_stroke(stroke) for stroke in content.get("strokes", ()))
        if sum(len(stroke.points) for stroke in strokes) > MAX_POINTS:
            raise ValueError
        return Marks(_read_box(box) if box else None, strokes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"marks cannot be read, or have more than {MAX_POINTS} points; clear them and draw "
            "again"
        ) from None


def _read_stroke(stroke: Mapping[str, Any]) -> Stroke:
    points = tuple((share(x), share(y)) for x, y in stroke["points"])
    if not points:
        raise ValueError
    return Stroke(points, share(stroke["width"]), bool(stroke.get("erase")))


def _read_box(box: list[Any]) -> tuple[float, float, float, float]:
    left, top, right, bottom = map(share, box)
    return left, top, right, bottom


def share(value: Any) -> float:
    """The value, a number from 0 to 1. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError
    return float(value)
