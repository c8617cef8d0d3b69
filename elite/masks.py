"""Masks without a model: GrabCut (Rother et al. 2004) from a box or from the middle of the
picture."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from elite.images import resize

# Pixels that the longer side is brought down to, and iterations. Few pixels are found as well as
# many, in a fifth of the time at the longest; one more iteration follows the outline.
PASSES = ((192, 5), (320, 1))
FRAME = 0.05  # share of each side that is background where no box is given
CENTRE = 0.85  # diameter of the likely object, as a share of the picture's sides
SPECK = 0.05  # of the largest part's area; smaller parts are no object


@dataclass(frozen=True)
class Box:
    """Where an object lies: pixels left <= x < right and top <= y < bottom. A box without any
    extent is a click on the pixel left, top."""

    left: int
    top: int
    right: int
    bottom: int

    def __str__(self) -> str:
        return f"{self.left},{self.top},{self.right},{self.bottom}"

    @property
    def area(self) -> int:
        return (self.right - self.left) * (self.bottom - self.top)

    @property
    def is_click(self) -> bool:
        return (self.left, self.top) == (self.right, self.bottom)


@dataclass(frozen=True)
class Found:
    """A thing in a picture: the word it was found by, its score in [0, 1], where it lies."""

    word: str
    score: float
    box: Box


def check_box(height: int, width: int, box: Box) -> None:
    """Raises ValueError where the box is empty or outside the picture."""
    inside = 0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height
    if not inside:
        raise ValueError(
            f"box {box} is empty or outside the picture of {width} x {height}; expected "
            f"0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
        )


# From an image, uint8 (H, W, 3), and a box to a mask, bool (H, W), as `find_object`.
Find = Callable[[np.ndarray, Box | None], np.ndarray]


def prior_of_box(height: int, width: int, box: Box) -> np.ndarray:
    """What GrabCut starts from, uint8 (H, W): likely object in the box, background around it.

    Raises:
        ValueError: the box is empty, outside the image or all of it.
    """
    check_box(height, width, box)
    if (box.right - box.left, box.bottom - box.top) == (width, height):
        raise ValueError(
            f"box {box} is the whole picture; leave some background outside, from which its "
            "colours are learned"
        )
    prior = np.full((height, width), cv2.GC_BGD, dtype=np.uint8)
    prior[box.top : box.bottom, box.left : box.right] = cv2.GC_PR_FGD
    return prior


def centred_prior(height: int, width: int) -> np.ndarray:
    """What GrabCut starts from without a box: likely object in an ellipse in the middle, background
    at the border, likely background between."""
    y = (2 * np.arange(height) + 1) / height - 1  # -1 to 1
    x = (2 * np.arange(width) + 1) / width - 1
    ellipse = np.hypot(y[:, None], x) < CENTRE
    prior = np.where(ellipse, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    prior[np.abs(y) > 1 - 2 * FRAME] = cv2.GC_BGD
    prior[:, np.abs(x) > 1 - 2 * FRAME] = cv2.GC_BGD
    return prior


def find_object(image: np.ndarray, box: Box | None = None) -> np.ndarray:
    """The object, bool (H, W), of an image uint8 (H, W, 3), by GrabCut.

    Args:
        box: around the object; None takes what lies in the middle.

    Raises:
        ValueError: no object is found, or the box does not fit.
    """
    height, width = image.shape[:2]
    prior = centred_prior(height, width) if box is None else prior_of_box(height, width, box)
    return grab_cut(image, prior)


def grab_cut(image: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """The object, bool (H, W), of an image uint8 (H, W, 3); always the same for the same input.

    Raises:
        ValueError: no object is found.
    """
    height, width = prior.shape
    labels = prior
    for side, iterations in PASSES:
        scale = min(1, side / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        labels, small_prior = (
            cv2.resize(x, size, interpolation=cv2.INTER_NEAREST) for x in (labels, prior)
        )
        # What is sure stays so, and nothing else becomes it by being found.
        likely = np.bitwise_or(labels, cv2.GC_PR_BGD)
        labels = np.where(small_prior < cv2.GC_PR_BGD, small_prior, likely).astype(np.uint8)
        cv2.setRNGSeed(0)
        colours = np.zeros((1, 65)), np.zeros((1, 65))  # models of both sides, filled in
        mode = cv2.GC_INIT_WITH_MASK
        try:
            cv2.grabCut(resize(image, *size), labels, (0, 0, 0, 0), *colours, iterations, mode)
        except cv2.error:  # a picture or box of few pixels leaves nothing to learn colours from
            labels[:] = cv2.GC_BGD
        if scale == 1:
            break
    found = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.float32)
    mask = cv2.resize(found, (width, height), interpolation=cv2.INTER_LINEAR) > 0.5
    if not mask.any():
        raise ValueError("GrabCut found no object; give it a box, or paint the mask")
    return without_specks(mask)


def without_specks(mask: np.ndarray) -> np.ndarray:
    """The parts, bool (H, W), that are not much smaller than the largest one of a mask with
    objects."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    areas = stats[:, cv2.CC_STAT_AREA]
    areas[0] = 0  # what is not object
    return (areas >= SPECK * areas.max())[labels]
