"""A folder of pictures with the masks of their objects."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elite.files import digest_files
from elite.images import doubt, fit_mask, read_image, read_mask
from elite.wording import note

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Pair:
    """A picture and the file its mask is expected in."""

    name: str
    image_path: Path
    mask_path: Path
    whole: bool = False  # the whole picture is the object, and no mask is read

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H, W, 3) and mask bool (H, W).

        Raises:
            ValueError: either is missing or unreadable, or they do not fit; the message names the
                file.
        """
        image = read_image(self.image_path)
        if self.whole:
            return image, np.ones(image.shape[:2], dtype=bool)
        if not self.mask_path.exists():
            raise ValueError(
                f"{self.mask_path}: no such file; expected the mask of {self.image_path.name}"
            )
        mask = fit_mask(read_mask(self.mask_path), image, str(self.mask_path))
        if doubtful := doubt(mask):
            note(f"{self.mask_path}: {doubtful}")
        return image, mask

    @property
    def digest(self) -> str:
        """A short name for what is in the files that `read` reads."""
        return digest_files(self.image_path, *(() if self.whole else (self.mask_path,)))


def pair_of(image_path: Path, whole: bool = False) -> Pair:
    """The pair that a picture makes with the file of its mask, NAME_bg.png."""
    name = image_path.stem
    return Pair(name, image_path, image_path.with_name(f"{name}_bg.png"), whole)


class PairFolder:
    """The pairs NAME.jpg (jpeg, png, webp) and NAME_bg.png of a folder, by name.

    Args:
        whole: the whole picture is the object; no mask is read.

    Raises:
        ValueError: no such folder, or no picture in it.
    """

    def __init__(self, root: Path | str, whole: bool = False) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected NAME.jpg with NAME_bg.png in it")
        self.pairs = [
            pair_of(path, whole)
            for path in sorted(folder.iterdir(), key=lambda path: (path.stem, path.suffix))
            if is_picture(path)
        ]
        if not self.pairs:
            raise ValueError(
                f"no image + mask pairs in {folder}; expected NAME.jpg with NAME_bg.png"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and mask of a pair; see `Pair.read`."""
        return self.pairs[index].read()

    def digest(self, index: int) -> str:
        """A short name for image and mask of a pair; see `Pair.digest`."""
        return self.pairs[index].digest

    def check_names(self) -> None:
        """Raises ValueError where two pictures share a NAME, and so the files made from it."""
        for one, other in itertools.pairwise(self.pairs):  # ordered by name
            if one.name == other.name:
                raise ValueError(
                    f"{other.image_path}: has the name of {one.image_path.name}; rename one of them"
                )


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name, and no mask NAME_bg.png."""
    suffix = path.suffix.lower()
    is_mask = suffix == ".png" and path.stem.endswith("_bg")
    return suffix in PICTURES and not is_mask and not path.name.startswith(".") and path.is_file()
