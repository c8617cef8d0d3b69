"""Make the masks NAME_bg.png of a folder of pictures, by GrabCut (Rother et al. 2004).

    python data_scripts/make_masks.py PICTURES                       object in the middle
    python data_scripts/make_masks.py PICTURES --boxes boxes.csv     object in a box
        [--overwrite] [--sheet outputs/masks.png]

Look at the sheet before you use the masks: name, picture, outline of the mask, what is cut out.
For those that are wrong write boxes.csv, with the columns name,left,top,right,bottom in pixels of
the upright picture (right and bottom are the first ones outside), and call again with `--boxes
boxes.csv --overwrite`: pictures without a row keep their mask.

Masks that are there stay as they are without --overwrite. Exit code 2: nothing could be done; 3:
some masks could not be made (they are listed, the rest is made).
"""

import argparse
import csv
import sys
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from elite.console import BAD_INPUT, OK, PARTLY_FAILED, run
from elite.data import Pair, PairFolder
from elite.files import write_atomically
from elite.images import cut_out, read_image
from elite.masks import Box, centred_prior, grab_cut, prior_of_box
from elite.sheets import SHEET_ROWS, TILE, label_tile, tile_rows

COLUMNS = ("name", "left", "top", "right", "bottom")
OUTLINE = (255, 0, 255)


# --- boxes ----------------------------------------------------------------------------------------


def read_boxes(path: Path, names: set[str]) -> tuple[dict[str, Box], list[str]]:
    """Boxes by name, and one line per row that is wrong.

    Args:
        names: of the pictures there are.

    Raises:
        ValueError: no such file, or no CSV with the columns.
    """
    boxes: dict[str, Box] = {}
    failures = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{path}: no column {', '.join(missing)}; expected {','.join(COLUMNS)}"
                )
            for row in rows:
                try:
                    name, box = _read_row(row, names)
                    if name in boxes:
                        raise ValueError(f"{name} has a box already")
                    boxes[name] = box
                except ValueError as error:
                    failures.append(f"{path}, line {rows.line_num}: {error}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: {reason}; expected a CSV file of {','.join(COLUMNS)}") from None
    return boxes, failures


def _read_row(row: Mapping[str, str | None], names: set[str]) -> tuple[str, Box]:
    name = (row["name"] or "").strip()
    if name not in names:
        raise ValueError(
            f"no picture of the name {name!r}; expected a file name without its ending"
        )
    try:
        return name, Box(*(int(row[side] or "") for side in COLUMNS[1:]))
    except ValueError:
        sides = ",".join(row[side] or "" for side in COLUMNS[1:])
        raise ValueError(f"{name} has the box {sides}; expected four whole numbers") from None


# --- masks ----------------------------------------------------------------------------------------


def make_mask(pair: Pair, box: Box | None) -> None:
    """Writes the mask of a picture. Raises ValueError where it cannot be made; the message names
    the picture."""
    image = read_image(pair.image_path)
    try:
        size = image.shape[:2]
        mask = grab_cut(image, centred_prior(*size) if box is None else prior_of_box(*size, box))
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
    pairs: PairFolder, boxes: Mapping[str, Box] | None, overwrite: bool
) -> tuple[set[str], list[str]]:
    """Makes the masks that are wanted, with a progress bar.

    Args:
        boxes: by name; None takes the middle of each picture.
        overwrite: make those that are there, too.

    Returns:
        Names of the masks that were made, and one line per mask that could not be.
    """
    made, failures = set(), []
    for pair in tqdm(pairs.pairs, desc="masks", unit="picture"):
        try:
            if is_wanted(pair, boxes, overwrite):
                make_mask(pair, None if boxes is None else boxes[pair.name])
                made.add(pair.name)
        except ValueError as error:
            failures.append(str(error))
    return made, failures


# --- the sheet ------------------------------------------------------------------------------------


def outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image, uint8 (H, W, 3), with the border of the mask drawn over it."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    thickness = max(1, round(2 * max(mask.shape) / TILE))  # two pixels of the sheet
    return cv2.drawContours(image.copy(), contours, -1, OUTLINE, thickness)


def sheet(pairs: list[Pair], made: set[str]) -> Image.Image | None:
    """Name, picture, outline and cut-out of the first pairs; None where none can be read."""
    rows = []
    for pair in pairs[:SHEET_ROWS]:
        try:
            image, mask = pair.read()
        except ValueError:
            continue
        pictures = image, outlined(image, mask), cut_out(image, mask)
        name = label_tile(pair.name if pair.name in made else f"{pair.name}\n(kept)")
        rows.append([name, *map(Image.fromarray, pictures)])
    return tile_rows(rows, ["name", "input", "outline", "object"]) if rows else None


# --- the command line -----------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="pictures (jpg, jpeg, png, webp)")
    parser.add_argument("--boxes", type=Path, help="CSV file of name,left,top,right,bottom")
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


def check_sheet(path: Path, folder: Path) -> None:
    """Raises ValueError where the sheet is no PNG, or would be taken for one of the pictures."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--sheet {path}: expected a file name that ends in .png")
    if path.resolve().parent == folder.resolve():
        raise ValueError(f"--sheet {path}: lies among the pictures; choose another folder")


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    pairs = PairFolder(args.folder)
    pairs.check_names()
    check_sheet(args.sheet, args.folder)
    boxes, failures = None, []
    if args.boxes is not None:
        boxes, failures = read_boxes(args.boxes, {pair.name for pair in pairs.pairs})
    made, not_made = make_masks(pairs, boxes, args.overwrite)
    failures += not_made
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    picture = sheet(pairs.pairs, made)
    if picture is None:
        return BAD_INPUT
    write_atomically(args.sheet, picture.save)
    print(f"{args.folder}: {len(made)} masks made; look at {args.sheet} first")
    return PARTLY_FAILED if failures else OK


if __name__ == "__main__":
    run(main)
