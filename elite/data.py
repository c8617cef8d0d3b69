"""A folder of pictures with the masks of their objects."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from elite.files import digest_files, with_text_names
from elite.images import ENDINGS, FORMATS, doubt, fit_mask, read_image, read_mask
from elite.wording import ShareNote, brief, note

PICTURES = {ending for name in FORMATS for ending in ENDINGS[name]}
# Other pictures, which are named where they are left out.
OTHERS = {ending for endings in ENDINGS.values() for ending in endings} | set(
    [".arw", ".cr2", ".cr3", ".dng", ".ico", ".jp2", ".jxl", ".nef", ".psd", ".svg", ".tga"]
)


@dataclass(frozen=True)
class Pair:
    """A picture and the file its mask is expected in, and perhaps more pictures of the object."""

    name: str
    image_path: Path
    mask_path: Path
    whole: bool = False  # the whole picture is the object, and no mask is read
    others: tuple["Pair", ...] = ()

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
            others = [self.mask_path.with_suffix(ending) for ending in sorted(OTHERS)]
            there = [f" as PNG, not {path.name}" for path in others if path.exists()][:1]
            raise ValueError(
                f"{self.mask_path}: no such file; expected the mask of {self.image_path.name}"
                + ("".join(there) or "; python data_scripts/make_masks.py makes one")
            )
        mask = fit_mask(read_mask(self.mask_path), image, str(self.mask_path))
        if doubtful := doubt(mask):
            note(f"{self.mask_path}: {doubtful}", ShareNote)
        return image, mask

    @property
    def digest(self) -> str:
        """A short name for what is in the files that `read` reads, of the others too."""
        pairs = (self, *self.others)
        files = [(p.image_path,) if p.whole else (p.image_path, p.mask_path) for p in pairs]
        return digest_files(*itertools.chain(*files))


def pair_of(image_path: Path, whole: bool = False) -> Pair:
    """The pair that a picture makes with the file of its mask, NAME_bg.png."""
    name = image_path.stem
    endings = ("_bg.png", "_bg.PNG", "_BG.png", "_BG.PNG")
    masks = [image_path.with_name(f"{name}{ending}") for ending in endings]
    mask_path = next((path for path in masks if path.exists()), masks[0])
    return Pair(name, image_path, mask_path, whole)


def pairs_of(folder: Path, whole: bool = False) -> Pair | None:
    """The pictures of a folder as those of one object, NAME/1.jpg and NAME/1_bg.png: a pair that
    has the name of the folder. Without a mask (unless `whole`) a picture is left out; None where
    none is left."""
    pairs = [pair_of(path, whole) for path in pictures_in(folder)]
    kept, left_out = [], []
    for pair in pairs:
        if whole or pair.mask_path.exists():
            kept.append(pair)
        else:
            left_out.append(pair.image_path.name)
    if left_out:
        note(f"{folder}: left out {brief(left_out)}; expected a mask NAME_bg.png for each")
    return replace(kept[0], name=folder.name, others=tuple(kept[1:])) if kept else None


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder by name. A note names what looks like one and is left out."""
    pictures, left_out = [], []
    for path in sorted(with_text_names(folder, folder.iterdir())):
        ending = path.suffix.lower()
        if is_picture(path):
            pictures.append(path)
        elif ending in OTHERS and not path.name.startswith(".") and path.is_file():
            left_out += [] if ending == ".png" else [path.name]  # masks
    if left_out:
        note(
            f"{folder}: left out {brief(left_out)}; expected {' '.join(sorted(PICTURES))}, masks "
            "as NAME_bg.png (HEIC needs pip install pillow-heif)"
        )
    return pictures


class PairFolder:
    """The pairs NAME.jpg (or png, webp, ...) and NAME_bg.png of a folder, by name; a folder NAME in
    it is one object, of which it holds several pictures.

    Args:
        whole: the whole picture is the object; no mask is read.
        folders: whether folders in it count.

    Raises:
        ValueError: no such folder, or no picture in it.
    """

    def __init__(self, root: Path | str, whole: bool = False, folders: bool = True) -> None:
        folder = Path(root)
        if not str(root) or not folder.is_dir():  # nothing would be the working directory
            what = "is a file, give its folder" if folder.is_file() else "no such folder"
            raise ValueError(f"{folder}: {what}; expected NAME.jpg with NAME_bg.png in it")
        pairs = [pair_of(path, whole) for path in pictures_in(folder)]
        inside = with_text_names(folder, folder.glob("[!.]*/")) if folders else ()
        pairs += filter(None, (pairs_of(path, whole) for path in inside))
        self.root = folder
        self.pairs = sorted(pairs, key=lambda pair: (pair.name, pair.image_path))
        if not self.pairs:
            raise ValueError(
                f"no pictures in {folder}; expected NAME.jpg with NAME_bg.png, its mask"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and mask of a pair; see `Pair.read`."""
        return self.pairs[index].read()

    def read_all(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """`read`, of every picture of the object."""
        pair = self.pairs[index]
        return [each.read() for each in (pair, *pair.others)]

    def name(self, index: int) -> str:
        return self.pairs[index].name

    def digest(self, index: int) -> str:
        """A short name for image and mask of a pair; see `Pair.digest`."""
        return self.pairs[index].digest

    def check_names(self) -> None:
        """Raises ValueError where two pictures share a NAME, and so the files made from it."""
        for one, other in itertools.pairwise(self.pairs):  # ordered by name
            if one.name == other.name:
                first, second = (
                    pair.image_path if pair.name == pair.image_path.stem else pair.image_path.parent
                    for pair in (one, other)
                )
                raise ValueError(f"{second}: has the name of {first.name}; rename one of them")


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name, and no mask NAME_bg."""
    is_taken = path.suffix.lower() in PICTURES and not path.stem.lower().endswith("_bg")
    return is_taken and not path.name.startswith(".") and path.is_file()
