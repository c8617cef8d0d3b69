"""Make the masks NAME_bg.png of a folder of pictures, by GrabCut (Rother et al. 2004) or Segment
Anything (Kirillov et al. 2023).

    python data_scripts/make_masks.py PICTURES                       object in the middle
    python data_scripts/make_masks.py PICTURES --boxes boxes.csv     object in a box
        [--method sam --sam_name_or_path facebook/sam-vit-base]
        [--overwrite] [--sheet outputs/masks.png]

Look at the sheet before you use the masks: name, picture, outline of the mask, what is cut out.
For those that are wrong write boxes.csv, with the columns name,left,top,right,bottom in pixels of
the upright picture (right and bottom are the first ones outside), and call again with `--boxes
boxes.csv --overwrite`: pictures without a row keep their mask. For `--method sam` a box with
right = left and bottom = top is a click on that pixel.

Masks that are there stay as they are without --overwrite. Folders of more than 48 pictures get
several sheets. Exit code 2: nothing could be done; 3: some masks could not be made (they are
listed, the rest is made).
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from elite.console import (
    BAD_INPUT,
    OK,
    PARTLY_FAILED,
    complain,
    quiet_libraries,
    run,
    script_parser,
)
from elite.data import Pair, PairFolder
from elite.files import check_writable, check_writable_file, write_atomically
from elite.images import cut_out, read_image
from elite.masks import Box, Find, find_object
from elite.sheets import SHEET_ROWS, TILE, fit_tile, label_tile, tile_rows
from elite.wording import brief

BOX_COLUMNS = ("name", "left", "top", "right", "bottom")
OUTLINE = (255, 0, 255)
SHEET_COLUMNS = ["name", "input", "outline", "object"]


# --- boxes ----------------------------------------------------------------------------------------


def read_boxes(path: Path, names: set[str]) -> dict[str, Box]:
    """Boxes by name.

    Args:
        names: of the pictures there are.

    Raises:
        ValueError: no such file, no CSV with the columns, or a wrong row; the message names it.
    """
    boxes: dict[str, Box] = {}
    left = set(names)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            _check_columns(rows.fieldnames or ())
            for row in rows:
                name, box = _read_row(row, left, f"line {rows.line_num}")
                boxes[name] = box
                left.remove(name)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: {reason}") from None
    return boxes


def _check_columns(found: Sequence[str]) -> None:
    missing = [name for name in BOX_COLUMNS if name not in found]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; expected {','.join(BOX_COLUMNS)}")


def _read_row(row: Mapping[str, str | None], names: set[str], line: str) -> tuple[str, Box]:
    name, *sides = ((row[column] or "").strip() for column in BOX_COLUMNS)
    if name not in names:
        raise ValueError(
            f"{line}: {name!r} is no picture of the folder, or has a box already; expected a file "
            "name without its ending"
        )
    try:
        return name, Box(*map(int, sides))
    except ValueError:
        raise ValueError(
            f"{line}: {name} has the box {brief(','.join(sides))}; expected four whole numbers"
        ) from None


# --- masks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What became of one picture."""

    made: bool = False  # a new mask was written
    row: list[Image.Image] = field(default_factory=list)  # of the sheet
    failure: str = ""  # one line where it has no mask


def make_mask(pair: Pair, box: Box | None, find: Find) -> None:
    """Writes the mask of a picture. Raises ValueError where it cannot be made; the message names
    the picture."""
    image = read_image(pair.image_path)
    try:
        mask = find(image, box)
    except ValueError as error:
        raise ValueError(f"{pair.image_path}: {error}") from None
    write_atomically(pair.mask_path, Image.fromarray(mask).save)


def is_wanted(pair: Pair, boxes: Mapping[str, Box] | None, overwrite: bool) -> bool:
    """Whether the mask of a picture is to be made.

    Raises:
        ValueError: boxes are given, but the picture has neither a box nor a mask.
    """
    has_box = boxes is None or pair.name in boxes
    if pair.mask_path.exists():
        return has_box and overwrite
    if not has_box:
        raise ValueError(
            f"{pair.image_path}: has neither a mask nor a box; add a row for {pair.name}"
        )
    return True


def make_masks(
    pairs: Iterable[Pair], boxes: Mapping[str, Box] | None, overwrite: bool, find: Find
) -> Iterator[Result]:
    """Makes the masks that are wanted, one after the other.

    Args:
        boxes: by name; None takes the middle of each picture.
        overwrite: make those that are there, too.
        find: the mask of an image and its box.
    """
    for pair in pairs:
        try:
            wanted = is_wanted(pair, boxes, overwrite)
            if wanted:
                make_mask(pair, None if boxes is None else boxes[pair.name], find)
            yield Result(made=wanted, row=sheet_row(pair, wanted))
        except ValueError as error:
            yield Result(failure=str(error))


# --- the sheets -----------------------------------------------------------------------------------


def outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image, uint8 (H, W, 3), with the border of the mask drawn over it."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    thickness = max(1, round(2 * max(mask.shape) / TILE))  # two pixels of the sheet
    return cv2.drawContours(image.copy(), contours, -1, OUTLINE, thickness)


def sheet_row(pair: Pair, made: bool) -> list[Image.Image]:
    """Name, picture, outline and cut-out as tiles. Raises ValueError where a file cannot be
    read."""
    image, mask = pair.read()
    pictures = image, outlined(image, mask), cut_out(image, mask)
    name = label_tile(pair.name if made else f"{pair.name}\n(kept)")
    return [name, *(fit_tile(Image.fromarray(picture)) for picture in pictures)]


class Sheets:
    """Contact sheets, each written as soon as it is full.

    Args:
        path: of the first one; the next has this name with _2.

    Attributes:
        written: their paths.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, list[Path]()
        self._rows: list[list[Image.Image]] = []

    def add(self, row: list[Image.Image]) -> None:
        self._rows.append(row)
        if len(self._rows) == SHEET_ROWS:
            self.finish()

    def finish(self) -> None:
        """Writes the rows that are on no sheet yet, if there are any."""
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        number = len(self.written) + 1
        target = self.path.with_stem(f"{self.path.stem}_{number}") if number > 1 else self.path
        write_atomically(target, tile_rows(rows, SHEET_COLUMNS).save)
        self.written.append(target)


# --- the command line -----------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="pictures (jpg, png, webp, ...)")
    parser.add_argument("--boxes", type=Path, help="CSV file of name,left,top,right,bottom")
    parser.add_argument(
        "--method",
        choices=("grabcut", "sam"),
        default="grabcut",
        help="grabcut (default) needs no model; sam is Segment Anything",
    )
    parser.add_argument(
        "--sam_name_or_path",
        help="folder or hub name of a Segment Anything model, as facebook/sam-vit-base",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make masks anew that are there already"
    )
    parser.add_argument(
        "--sheet",
        type=Path,
        default=Path("outputs/masks.png"),
        help="contact sheet to check the masks (default outputs/masks.png)",
    )
    return parser.parse_args(arguments)


def finder(method: str, sam_name_or_path: str | None) -> Find:
    """Raises ValueError where the method and its model do not go together or cannot be loaded."""
    if (method == "sam") != (sam_name_or_path is not None):
        raise ValueError(
            "--method sam and --sam_name_or_path need each other; the latter is a folder or hub "
            "name, as facebook/sam-vit-base"
        )
    if sam_name_or_path is None:
        return find_object
    quiet_libraries()
    from elite.sam import Sam

    return Sam(sam_name_or_path)


def check_sheet(path: Path, folder: Path) -> None:
    """Raises ValueError where the sheet is no PNG, or would be taken for one of the pictures."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--sheet {path}: expected a file name that ends in .png")
    if path.resolve().parent == folder.resolve():
        raise ValueError(f"--sheet {path}: lies among the pictures; choose another folder")
    check_writable_file(path)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    pairs = PairFolder(args.folder, folders=False)
    pairs.check_names()
    check_sheet(args.sheet, args.folder)
    check_writable(args.folder)
    names = {pair.name for pair in pairs.pairs}
    boxes = None if args.boxes is None else read_boxes(args.boxes, names)
    find = finder(args.method, args.sam_name_or_path)
    bar = tqdm(pairs.pairs, desc="masks", unit="picture")
    sheets, made, failures = Sheets(args.sheet), 0, []
    try:
        for result in make_masks(bar, boxes, args.overwrite, find):
            made += result.made
            if result.failure:
                failures.append(result.failure)
            else:
                sheets.add(result.row)
    finally:  # of an interrupted run, too
        sheets.finish()
    for failure in failures:
        complain(failure)
    if not sheets.written:
        return BAD_INPUT
    print(f"{args.folder}: masks made: {made}; look at {', '.join(map(str, sheets.written))} first")
    return PARTLY_FAILED if failures else OK


if __name__ == "__main__":
    run(main)
