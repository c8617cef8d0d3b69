"""Random views of a training crop: CLIP view of stage 1, object view and target of stage 2.

Every draw comes from the generator passed in, and every size is a fraction of the view's side, so
that small resolutions see the same amount of change as large ones.
"""

from typing import NamedTuple

import cv2
import numpy as np

from elite.images import cut_out, resize

FAR = ("a far away", "very small")  # what a caption says of an object pasted small
CLOSE = ("zoomed in", "close up")  # and of one that runs over the edges
PLAIN = "a"


class Target(NamedTuple):
    """A training target with the part of it that counts."""

    image: np.ndarray  # uint8 (resolution, resolution, 3)
    valid: np.ndarray  # bool (latent_size, latent_size), M of the paper: never empty
    phrase: str  # takes the place of the caption's leading article


# --- stage 1 --------------------------------------------------------------------------------------


def clip_view(crop: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The crop as the global mapper's CLIP sees it in training.

    Horizontal flip (p .5), rotation up to 20 degrees (p .5), blur (p .3), elastic deformation
    (p .3).

    Args:
        crop: uint8 (H, W, 3).
        size: side of the CLIP input in pixels.

    Returns:
        uint8 (size, size, 3).
    """
    view = resize(crop, size, size)
    if rng.random() < 0.5:
        view = np.ascontiguousarray(view[:, ::-1])
    if rng.random() < 0.5:
        view = _warp(view, _rotation(size, rng.uniform(-20, 20)), size, cv2.BORDER_REFLECT_101)
    if rng.random() < 0.3:
        view = blur(view, rng)
    if rng.random() < 0.3:
        view = elastic(view, rng)
    return view


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Box blur of an odd width of 3 to 7 pixels at side 224, in proportion elsewhere."""
    widest = max(3, round(7 * image.shape[0] / 224))
    width = 2 * int(rng.integers(1, (widest - 1) // 2 + 1)) + 1
    return cv2.blur(image, (width, width))


def elastic(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smooth deformation: a 6 x 6 grid of knots moves by normal steps of 2 % of the side."""
    height, width = image.shape[:2]
    knots = rng.normal(scale=0.02, size=(6, 6, 2)).astype(np.float32)
    steps = cv2.resize(knots, (width, height), interpolation=cv2.INTER_CUBIC)  # (H, W, 2)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    return cv2.remap(
        image,
        columns + steps[..., 0] * width,
        rows + steps[..., 1] * height,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )


# --- stage 2 --------------------------------------------------------------------------------------


def object_view(
    crop: np.ndarray, mask: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The object alone on black, with one random transform on picture and mask.

    Resize-crop (from sides of 1 to 256/224 of `size`), rotation up to 30 degrees, shift up to
    60/224 of `size`, each with p .5. A transform that would push the whole object out of the view
    is left out.

    Args:
        crop: uint8 (H, W, 3).
        mask: bool (H, W), with at least one object pixel.
        size: side of the CLIP input in pixels.

    Returns:
        object: uint8 (size, size, 3).
        mask: bool (size, size).
    """
    side, move = _draw_move(size, rng)
    view, view_mask = _moved(crop, mask, side, move, size)
    if not view_mask.any():
        view, view_mask = _moved(crop, mask, size, np.eye(3), size)
    return view, view_mask


def _draw_move(size: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """The side to resize to, and the matrix (3, 3) from pixels there to pixels of the view."""
    side, move = size, np.eye(3)
    if rng.random() < 0.5:
        side = int(rng.integers(size, round(size * 256 / 224) + 1))
        left, top = rng.integers(0, side - size + 1, size=2)
        move = _translation(-left, -top)
    if rng.random() < 0.5:
        move = _rotation(size, rng.uniform(-30, 30)) @ move
    if rng.random() < 0.5:
        move = _translation(*rng.uniform(-60 / 224, 60 / 224, size=2) * size) @ move
    return side, move


def _moved(
    crop: np.ndarray, mask: np.ndarray, side: int, move: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Object and mask at `side`, moved into the view; what comes in from outside is black."""
    view = resize(cut_out(crop, mask), side, side)
    small_mask = cv2.resize(mask.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
    view_mask = _warp(small_mask, move, size, cv2.BORDER_CONSTANT, cv2.INTER_NEAREST)
    return _warp(view, move, size, cv2.BORDER_CONSTANT), view_mask > 0


def scaled_target(
    crop: np.ndarray, resolution: int, latent_size: int, rng: np.random.Generator
) -> Target:
    """Scale augmentation after Custom Diffusion (Kumari et al., arXiv 2212.04488, section 3.2).

    With p 2/3 the side s is uniform in [1/3, 1] of the resolution, else in [1.2, 1.4] of it.
    Under 0.6 the crop is pasted at a random place on black, over 1 a random part of it is the
    target, in between it fills the target.
    """
    smallest, largest = (1 / 3, 1) if rng.random() < 2 / 3 else (1.2, 1.4)
    side = round(rng.uniform(smallest, largest) * resolution)
    if side < 0.6 * resolution:
        return _pasted(crop, side, resolution, latent_size, rng)
    everywhere = np.ones((latent_size, latent_size), dtype=bool)
    if side <= resolution:
        return Target(resize(crop, resolution, resolution), everywhere, PLAIN)
    left, top = rng.integers(0, side - resolution + 1, size=2)
    part = resize(crop, side, side)[top : top + resolution, left : left + resolution]
    return Target(part, everywhere, CLOSE[rng.integers(len(CLOSE))])


def _pasted(
    crop: np.ndarray, side: int, resolution: int, latent_size: int, rng: np.random.Generator
) -> Target:
    """The crop at `side` on black; valid is the pasted area less one latent cell on each side."""
    left, top = (int(place) for place in rng.integers(0, resolution - side + 1, size=2))
    image = np.zeros((resolution, resolution, 3), dtype=np.uint8)
    image[top : top + side, left : left + side] = resize(crop, side, side)
    valid = np.zeros((latent_size, latent_size), dtype=bool)
    valid[
        inner_cells(top, top + side, resolution, latent_size),
        inner_cells(left, left + side, resolution, latent_size),
    ] = True
    return Target(image, valid, FAR[rng.integers(len(FAR))])


def inner_cells(start: int, stop: int, resolution: int, latent_size: int) -> slice:
    """The latent cells of pixels start..stop less one at either end, at least the middle one."""
    first = start * latent_size // resolution + 1
    last = stop * latent_size // resolution - 1
    if first < last:
        return slice(first, last)
    middle = (start + stop) * latent_size // (2 * resolution)
    return slice(middle, middle + 1)


# --- geometry -------------------------------------------------------------------------------------


def _translation(right: float, down: float) -> np.ndarray:
    """Matrix (3, 3) that moves by pixels."""
    return np.array([[1, 0, right], [0, 1, down], [0, 0, 1]], dtype=np.float64)


def _rotation(size: int, degrees: float) -> np.ndarray:
    """Matrix (3, 3) that turns about the centre of a view of this size."""
    centre = (size - 1) / 2
    return np.vstack([cv2.getRotationMatrix2D((centre, centre), degrees, 1.0), [0, 0, 1]])


def _warp(
    image: np.ndarray, move: np.ndarray, size: int, border: int, flags: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """The image under a matrix (3, 3), cut to (size, size)."""
    return cv2.warpAffine(image, move[:2], (size, size), flags=flags, borderMode=border)
