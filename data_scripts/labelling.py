"""What in a pile of photos is worth training on: duplicates, boxes, masks, and why something is
dropped."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_scripts.cal_bbox_by_seg import tight_box
from data_scripts.duplicates import perceptual_hash, repeats
from data_scripts.index_shards import in_parallel
from elite.data import pictures_in
from elite.files import digest_files, read_text, write_atomically, write_text
from elite.images import read_image, read_mask
from elite.masks import Box, Find, Found

REPEAT, NOTHING, NO_MASK = "repeats another", "nothing found", "no mask"
LOW_SCORE, OVERLAP, UNREADABLE = "low score", "overlaps a better one", "unreadable"
TOO_SMALL = "too few pixels"

# From an image, uint8 (H, W, 3), to what is in it, best first.
Detect = Callable[[np.ndarray], list[Found]]


# --- photos ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photo:
    """A picture of the pile.

    Args:
        name: below the pile's folder.
        digest: of the bytes of its file.
        size: height and width, upright.
        hash: `perceptual_hash`.
    """

    path: Path
    name: str
    digest: str
    size: tuple[int, int]
    hash: int


def measure(path: Path, root: Path) -> Photo | str:
    """Reads a photo; a text says what is wrong with it."""
    try:
        image = read_image(path)
    except ValueError as error:
        return str(error)
    name, (height, width) = path.relative_to(root).as_posix(), image.shape[:2]
    return Photo(path, name, digest_files(path), (height, width), perceptual_hash(image))


def measure_all(root: Path, workers: int) -> tuple[list[Photo], list[str]]:
    """The photos of a folder and of the folders in it, but hidden ones, by name; and what is wrong
    with the others.

    Raises:
        ValueError: there is none.
    """
    inside = (path.relative_to(root) for path in sorted(root.rglob("*/")) if path.is_dir())
    seen = [path for path in inside if not any(part[0] == "." for part in path.parts)]
    paths = [path for folder in (Path(), *seen) for path in pictures_in(root / folder)]
    if not paths:
        raise ValueError(f"{root}: no picture in it; expected photos (jpg, png, webp, ...)")
    photos, failures = [], []
    found = in_parallel(partial(measure, root=root), paths, workers)
    for measured in tqdm(found, "read", len(paths), unit="photo"):
        (failures if isinstance(measured, str) else photos).append(measured)
    return sorted(photos, key=lambda photo: photo.name), sorted(failures)


def twins(photos: Sequence[Photo], distance: int) -> dict[Photo, Photo]:
    """Photos that repeat one of more pixels, with that one."""
    ranked = sorted(photos, key=lambda photo: (-math.prod(photo.size), photo.name))
    found = repeats([photo.hash for photo in ranked], distance)
    return {ranked[one]: ranked[other] for one, other in found.items()}


# --- what is kept ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What an object has to be like; the defaults are what training reads."""

    min_score: float = 0.3
    min_side: int = 100  # of box and mask, pixels
    max_aspect: float = 2.0
    min_share: float = 0.02  # of the picture
    max_share: float = 0.8
    max_overlap: float = 0.7  # intersection over union with a better one

    def drop(self, found: Found, size: tuple[int, int], better: Sequence[Box]) -> str:
        """Why what was found in a picture of this size, height and width, is not taken; nothing
        where it is.

        Args:
            better: boxes that are taken.
        """
        if found.score < self.min_score:
            return LOW_SCORE
        if any(overlap(found.box, other) > self.max_overlap for other in better):
            return OVERLAP
        return self.misfit(found.box, size)

    def misfit(self, box: Box, size: tuple[int, int]) -> str:
        """Why the box of an object or of its mask is no use; nothing where it is."""
        sides = box.right - box.left, box.bottom - box.top
        share = math.prod(sides) / math.prod(size)
        if min(sides) < self.min_side:
            return TOO_SMALL
        if max(sides) > self.max_aspect * min(sides):
            return "too long and thin"
        if share < self.min_share:
            return "too little of the picture"
        return "too much of the picture" if share > self.max_share else ""


@dataclass(frozen=True)
class Thing:
    """What was found in a photo; `dropped` says why it is not taken."""

    found: Found
    dropped: str = ""
    mask_path: Path | None = None
    mask_box: tuple[int, int, int, int] = (0, 0, 0, 0)  # hs, he, ws, we


@dataclass(frozen=True)
class Labelled:
    """A photo with what was found in it, best first.

    Args:
        dropped: why it is not taken; nothing where it is.
        twin: the photo that it repeats.
    """

    photo: Photo
    dropped: str
    things: tuple[Thing, ...] = ()
    twin: Photo | None = None

    @property
    def kept(self) -> list[Thing]:
        return [thing for thing in self.things if not thing.dropped]


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    shared = max(width, 0) * max(height, 0)
    return shared / (one.area + other.area - shared)


class Unreadable(ValueError):
    """A photo that could be read is gone or damaged since."""


def read_again(path: Path) -> np.ndarray:
    try:
        return read_image(path)
    except ValueError as error:
        raise Unreadable(str(error)) from None


def kept_mask(path: Path, size: tuple[int, int]) -> np.ndarray | None:
    """A mask of an earlier run; None where it cannot be read or has another size."""
    try:
        mask = read_mask(path)
    except ValueError:
        return None
    return mask if mask.shape == size else None


class Labeller:
    """Looks for objects and their masks in photos, and writes down what it found.

    Args:
        folder: what was found in a photo, STEM.json and STEM.N.png.
        models: names of what looks, and for what.
    """

    def __init__(
        self, detect: Detect, find: Find, limits: Limits, folder: Path, models: str
    ) -> None:
        self.detect, self.find, self.limits = detect, find, limits
        self.folder, self.models = folder, models

    def __call__(self, photo: Photo) -> Labelled:
        """Raises Unreadable, and ValueError where the folder cannot be written."""
        if min(photo.size) < self.limits.min_side:
            return Labelled(photo, TOO_SMALL)
        name = hashlib.sha256(f"{self.models} {photo.digest}".encode()).hexdigest()[:32]
        image = cache(partial(read_again, photo.path))  # read where something is missing
        things: list[Thing] = []
        for number, found in enumerate(self._found(self.folder / f"{name}.json", image)):
            taken = [thing.found.box for thing in things if not thing.dropped]
            thing = Thing(found, self.limits.drop(found, photo.size, taken))
            if not thing.dropped:
                path = self.folder / f"{name}.{number}.png"
                thing = self._masked(found, path, photo.size, image)
            things.append(thing)
        reasons = [thing.dropped for thing in things]
        dropped = "" if "" in reasons else next(iter(reasons), NOTHING)
        return Labelled(photo, dropped, tuple(things))

    def _found(self, path: Path, image: Callable[[], np.ndarray]) -> list[Found]:
        """What the detector says of an image, or has said."""
        try:
            rows = json.loads(read_text(path, "expected what was found in a photo"))
            return [Found(row["word"], row["score"], Box(**row["box"])) for row in rows]
        except (ValueError, TypeError, KeyError):  # not there, or damaged
            found = self.detect(image())
            write_text(path, json.dumps([asdict(one) for one in found]))
            return found

    def _masked(
        self, found: Found, path: Path, size: tuple[int, int], image: Callable[[], np.ndarray]
    ) -> Thing:
        """An object with its mask, which is made where it is not there, or damaged."""
        mask = kept_mask(path, size)
        if mask is None:
            pixels = image()
            try:
                mask = self.find(pixels, found.box)
            except ValueError:
                mask = np.zeros(size, dtype=bool)
            write_atomically(path, Image.fromarray(mask).save)
        box = tight_box(mask)
        if box is None:
            return Thing(found, NO_MASK)
        top, bottom, left, right = box
        return Thing(found, self.limits.misfit(Box(left, top, right, bottom), size), path, box)


def label_all(
    photos: Sequence[Photo], label: Labeller, distance: int
) -> tuple[list[Labelled], list[str]]:
    """What is in each photo that repeats no other; and what was wrong with others."""
    same, labelled, failures = twins(photos, distance), [], []
    for photo in tqdm(photos, desc="label", unit="photo"):
        try:
            twin = same.get(photo)
            labelled.append(Labelled(photo, REPEAT, twin=twin) if twin else label(photo))
        except Unreadable as error:
            failures.append(str(error))
    return labelled, failures
