"""Open Images as training data: boxes for stage 1, masks for stage 2, and their captions.

Where their bytes come from is a `Source`: the folder, or shards of it (`elite/shards.py`). Another
dataset needs what `OpenImagesBoxes` and `OpenImagesMasks` have: `len`, `sample` and `name`.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from elite.annotations import (
    REBUILD,
    for_set,
    load_mask_boxes,
    mask_boxes_path,
    read_blocks,
    read_boxes,
    same_masks,
    usable_masks,
)
from elite.augment import clip_view, object_view, scaled_target
from elite.defaults import PLACEHOLDER
from elite.files import with_text_names
from elite.images import (
    fit_mask,
    object_box,
    read_image,
    read_mask,
    resize,
    to_clip_pixels,
    to_pixels,
)
from elite.stream import Shards
from elite.wording import brief, note

# The 27 captions of textual inversion's "small" ImageNet set, which come from CLIP's prompts.
PHOTO_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)

BOX_PADDING = 10  # pixels around a box of stage 1
NO_FILE = (-1, -1)
KEEP = "python data_scripts/keep_downloaded.py DIR"


# --- captions -------------------------------------------------------------------------------------


def with_framing(caption: str, phrase: str) -> str:
    """The caption with its leading article replaced, as a word, by the phrase.

    Deviation: the release replaces letters and trains on "ahe photo of a S".
    """
    rest = re.sub(r"^(a|an|the)\s+", "", caption)
    return f"{phrase} {rest}"


def _draw_caption(placeholder_token: str, rng: np.random.Generator) -> str:
    return PHOTO_TEMPLATES[rng.integers(len(PHOTO_TEMPLATES))].format(placeholder_token)


# --- Open Images ----------------------------------------------------------------------------------


class Source(Protocol):
    """Where annotations and bytes come from. Ids of images and rows of masks are the source's own;
    errors of reading are ValueErrors that name the file."""

    def boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """Image ids (N,) and boxes float32 (N, 4), x0 x1 y0 y1 in [0, 1], of stage 1."""

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Image ids (N,) and rows (N,) with hs, he, ws, we of stage 2."""

    def image_name(self, image_id: Any) -> str:
        """What a user knows an image by: its file."""

    def image_keys(self, image_ids: np.ndarray) -> np.ndarray:
        """The names of images in annotations, bytes (N,)."""

    def image_state(self, image_id: Any) -> tuple[int, int]:
        """Two numbers that change with an image; `NO_FILE` without one."""

    def read_image(self, image_id: Any) -> np.ndarray:
        """An image, uint8 (H, W, 3)."""

    def mask_name(self, row: Any) -> str:
        """The file of a mask."""

    def read_mask(self, row: Any) -> np.ndarray:
        """A mask, bool (H, W)."""

    def shards_of(self, image_ids: np.ndarray) -> Shards | None:
        """The shards that a dataset of these images lies in, one a row; None for a folder."""


class OpenImagesFolder:
    """The files of Open Images V6 on the disk, a `Source`.

    Args:
        root: folder with `images/test/ID.jpg`; of stage 1, `annotations/test-annotations-bbox.csv`;
            of stage 2, `segs/test/` with masks in it or its subfolders, `segs/test_bbox_dict.npy`
            and `annotations/test-annotations-object-segmentation.csv`.
        set_name: `test`, `validation` or `train`, as in the names of files and folders.
    """

    def __init__(self, root: Path | str, set_name: str = "test") -> None:
        self.root, self.set_name = Path(root), set_name
        self.image_folder = self.root / "images" / set_name
        self.mask_folder = self.root / "segs" / set_name

    def table(self, name: str) -> Path:
        """The file of the table of boxes, `bbox`, or of masks, `object-segmentation`."""
        return self.root / "annotations" / f"{self.set_name}-annotations-{name}.csv"

    def boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """Raises ValueError: no such table, or no usable box in it."""
        path = self.table("bbox")
        image_ids, boxes = read_boxes(path)
        if not len(boxes):
            raise ValueError(f"{path}: no box covers 2 to 80 % of its image; nothing to train on")
        return image_ids, boxes

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Raises ValueError: table or index is missing or pickled, or has no usable mask."""
        path = self.table("object-segmentation")
        index_path = mask_boxes_path(self.root, self.set_name)
        index = load_mask_boxes(index_path)
        usable = usable_masks(index)
        if not usable.any():
            raise ValueError(
                f"{index_path}: no mask of 100 px or more with an aspect of 0.5 to 2; nothing to "
                "train on"
            )
        if left_out := int((~usable).sum()):
            note(
                f"{index_path}: {left_out:,} of {len(index):,} masks are left out; they have under "
                "100 px or an aspect beyond 0.5 to 2"
            )
        blocks = read_blocks(path, ["MaskPath", "ImageID"])
        mask_names, image_ids = map(np.concatenate, zip(*blocks, strict=True))
        known = [name.encode() for name in index["name"].tolist()]
        try:
            same = same_masks(mask_names.tolist(), image_ids, known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        rows, entries = (np.array(part, dtype=np.int64) for part in same)
        rows, entries = rows[usable[entries]], entries[usable[entries]]
        if not len(rows):
            raise ValueError(
                f"{path}: names none of the {len(index)} masks of {index_path}, such as "
                f"{brief(str(index['name'][0]))}; get the table of this set, or run "
                + for_set(REBUILD, self.set_name)
            )
        return image_ids[rows], index[entries]

    def image_path(self, image_id: bytes) -> Path:
        return image_file(self.image_folder, image_id.decode())

    def mask_path(self, row: np.void) -> Path:
        return _inside(self.mask_folder, str(row["name"]))

    def image_name(self, image_id: bytes) -> str:
        return str(self.image_path(image_id))

    def image_keys(self, image_ids: np.ndarray) -> np.ndarray:
        return image_ids

    def image_state(self, image_id: bytes) -> tuple[int, int]:
        """Size in bytes and modification time in seconds."""
        try:
            state = self.image_path(image_id).stat()
        except (OSError, ValueError):
            return NO_FILE
        return state.st_size, int(state.st_mtime)

    def read_image(self, image_id: bytes) -> np.ndarray:
        path = self.image_path(image_id)
        if not path.exists():
            raise ValueError(
                f"{path}: no such file; where only some are downloaded, "
                f"{for_set(KEEP, self.set_name)} leaves out the others"
            )
        return read_image(path)

    def mask_name(self, row: np.void) -> str:
        return str(self.mask_path(row))

    def read_mask(self, row: np.void) -> np.ndarray:
        return read_mask(self.mask_path(row))

    def shards_of(self, image_ids: np.ndarray) -> None:
        return None


def as_source(source: Source | Path | str) -> Source:
    """A source, or the Open Images folder of this path."""
    return OpenImagesFolder(source) if isinstance(source, Path | str) else source


class OpenImagesBoxes:
    """Stage 1: boxes that cover 2 to 80 % of their image, groups of objects included.

    The class names of `oidv6-class-descriptions.csv` play no part in training and need not be
    there.

    Args:
        source: an Open Images folder, by its path, or another source.
        resolution: side of the target in pixels.
        clip_size: side of the CLIP input in pixels.
        placeholder_token: word that stands for the object in captions.

    Raises:
        ValueError: no annotations, or no usable box in them.
    """

    def __init__(
        self,
        source: Source | Path | str,
        *,
        resolution: int = 512,
        clip_size: int = 224,
        placeholder_token: str = PLACEHOLDER,
    ) -> None:
        self.source = as_source(source)
        self.resolution, self.clip_size = resolution, clip_size
        self.placeholder_token = placeholder_token
        self.image_ids, self.boxes = self.source.boxes()  # (N,), (N, 4) x0 x1 y0 y1 in [0, 1]
        self.shards = self.source.shards_of(self.image_ids)

    def __len__(self) -> int:
        return len(self.boxes)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor | str]:
        """Target, CLIP view and caption of a box; the target depends on the box alone.

        Returns:
            pixels: float32 (3, resolution, resolution) in [-1, 1].
            clip_pixels: float32 (3, clip_size, clip_size), augmented, CLIP-normalised.
            caption: e.g. "a photo of a S".

        Raises:
            ValueError: the image cannot be read; the message names it.
        """
        crop = self.crop(index)
        return {"pixels": self.target(crop), **self.view(crop, rng)}

    def name(self, index: int) -> str:
        """The file that a box lies in, and the box: x0, x1, y0, y1 relative to it."""
        place = ", ".join(f"{side:.3f}" for side in self.boxes[index])
        return f"{self.image_name(index)} [{place}]"

    def image_name(self, index: int) -> str:
        """The file that a box lies in."""
        return self.source.image_name(self.image_ids[index])

    def crop(self, index: int) -> np.ndarray:
        """A box with 10 px around, uint8 (h, w, 3). Raises ValueError as `sample` does."""
        image = self.source.read_image(self.image_ids[index])
        height, width = image.shape[:2]
        left, right, top, bottom = self.boxes[index] * (width, width, height, height)
        return image[padded((top, bottom, left, right), BOX_PADDING, height, width)]

    def target(self, crop: np.ndarray) -> Tensor:
        """The `pixels` of a crop."""
        return to_pixels(resize(crop, self.resolution, self.resolution))

    def view(self, crop: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor | str]:
        """The `clip_pixels` and `caption` of a crop."""
        return {
            "clip_pixels": to_clip_pixels(clip_view(crop, self.clip_size, rng)),
            "caption": _draw_caption(self.placeholder_token, rng),
        }


def padded(
    box: Sequence[float] | np.ndarray, padding: int, height: int, width: int
) -> tuple[slice, slice]:
    """Rows and columns of a box (top, bottom, left, right) in pixels, grown inside the image."""
    top, bottom, left, right = box
    return (
        slice(max(math.floor(top) - padding, 0), min(math.ceil(bottom) + padding, height)),
        slice(max(math.floor(left) - padding, 0), min(math.ceil(right) + padding, width)),
    )


def image_file(folder: Path, image_id: str) -> Path:
    """The file of an image: ID.jpg, ID.JPG, or in the folder that its archive unzips to, as
    train_0/ID.jpg."""
    names = (f"{image_id}.jpg", f"{image_id}.JPG", f"{folder.name}_{image_id[:1]}/{image_id}.jpg")
    paths = [_inside(folder, name) for name in names]
    return next((path for path in paths if path.exists()), paths[0])


def files_in(folder: Path, ending: str) -> list[Path]:
    """The files of an ending, in small letters or capitals, of a folder and its subfolders; none
    of the `._NAME` that macOS puts beside them."""
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    found = [path for path in paths if path.suffix.lower() == ending and path.name[0] != "."]
    return sorted(with_text_names(folder, found))


def _inside(folder: Path, name: str) -> Path:
    """The file of that name, or of that subfolder. Raises ValueError where a table names one
    outside the folder."""
    parts = name.split("/")
    wrong = (part in ("", ".", "..") or Path(part).name != part for part in parts)
    if any(character < " " or character == "\x7f" for character in name) or any(wrong):
        raise ValueError(f"{folder}: {brief(name)} is no file name; correct the annotations")
    return folder / name


class OpenImagesMasks:
    """Stage 2: masks with both sides of at least 100 px and an aspect of 0.5 to 2.

    Sizes are those of the mask file, which may differ from the image's.

    Args:
        source: an Open Images folder, by its path, or another source.
        resolution: side of the target in pixels.
        clip_size: side of the CLIP input in pixels.
        latent_size: side of the latent.
        placeholder_token: word that stands for the object in captions.

    Raises:
        ValueError: a table is missing or pickled, or no usable mask is in it.
    """

    def __init__(
        self,
        source: Source | Path | str,
        *,
        resolution: int = 512,
        clip_size: int = 224,
        latent_size: int = 64,
        placeholder_token: str = PLACEHOLDER,
    ) -> None:
        self.source = as_source(source)
        self.resolution, self.clip_size, self.latent_size = resolution, clip_size, latent_size
        self.placeholder_token = placeholder_token
        self.image_ids, self.index = self.source.masks()
        self.shards = self.source.shards_of(self.image_ids)

    def __len__(self) -> int:
        return len(self.index)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor | str]:
        """Target, views, masks and caption of an object.

        Returns:
            pixels: float32 (3, resolution, resolution) in [-1, 1], scale augmentation applied.
            loss_mask: float32 (1, latent_size, latent_size), M of the paper, 0 or 1 and never all
                0.
            clip_pixels: float32 (3, clip_size, clip_size), the plain crop, CLIP-normalised.
            object_pixels: float32 (3, clip_size, clip_size), the augmented object on black,
                CLIP-normalised.
            object_mask: float32 (1, clip_size, clip_size), 0 or 1, its mask under the same
                augmentation.
            caption: e.g. "a far away photo of a S".

        Raises:
            ValueError: image or mask cannot be read, or do not fit each other; the message names
                the file.
        """
        crop, mask = self._crop(index, rng)
        target = scaled_target(crop, self.resolution, self.latent_size, rng)
        object_image, object_mask = object_view(crop, mask, self.clip_size, rng)
        if not object_mask.any():
            raise ValueError(
                f"{self.name(index)}: no object pixel is left at {self.clip_size} px; "
                "remove the mask"
            )
        return {
            "pixels": to_pixels(target.image),
            "loss_mask": torch.from_numpy(target.valid).float()[None],
            "clip_pixels": to_clip_pixels(resize(crop, self.clip_size, self.clip_size)),
            "object_pixels": to_clip_pixels(object_image),
            "object_mask": torch.from_numpy(object_mask).float()[None],
            "caption": with_framing(_draw_caption(self.placeholder_token, rng), target.phrase),
        }

    def name(self, index: int) -> str:
        """The file of a mask."""
        return self.source.mask_name(self.index[index])

    def _crop(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (h, w, 3) and mask bool (h, w), the object with 10 to 19 px around."""
        row, name = self.index[index], self.name(index)
        image = self.source.read_image(self.image_ids[index])
        mask_file = self.source.read_mask(row)
        mask = fit_mask(mask_file, image, name)
        (height, width), (mask_height, mask_width) = mask.shape, mask_file.shape
        scale = np.repeat((height / mask_height, width / mask_width), 2)
        hs, he, ws, we = (row[side] for side in ("hs", "he", "ws", "we"))
        rows, columns = object_box(mask_file)
        around = rows.start - hs, he - rows.stop, columns.start - ws, we - columns.stop
        if not set(around) <= {0, 1}:  # a box has even sides
            raise ValueError(f"{name}: mask has changed since its box was found; run {REBUILD}")
        place = padded(scale * (hs, he, ws, we), int(rng.integers(10, 20)), height, width)
        return image[place], mask[place]
