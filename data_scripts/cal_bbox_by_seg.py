"""Find the box of every Open Images mask, once, before stage 2 training.

    python data_scripts/cal_bbox_by_seg.py OPEN_IMAGES_ROOT [--workers 16]

The folder may also be `segs/` or `segs/test/` itself; masks may lie in subfolders, as their
archives unzip. Writes `segs/test_bbox_dict.npy`: per mask file the tight box of all its object
pixels, with even sides where the image allows. Masks under 2 px are skipped. Exit code 2: nothing
could be done; 3: some masks could not be read (they are listed, the rest is written).
"""

import argparse
import os
import sys
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from elite.annotations import INDEX_ENDING, save_mask_boxes
from elite.console import add_set_name, add_workers, check_least, list_failures, run, script_parser
from elite.files import check_writable
from elite.images import read_mask
from elite.open_images import files_in
from elite.workers import worker_pool

Box = tuple[int, int, int, int]  # hs, he, ws, we: mask[hs:he, ws:we] is the object
CHUNK = 64  # masks handed to a process at a time


def even_span(start: int, stop: int, size: int) -> tuple[int, int]:
    """The span made one longer where its length is odd and the image has room."""
    if (stop - start) % 2 == 0:
        return start, stop
    if stop < size:
        return start, stop + 1
    return max(start - 1, 0), stop


def tight_box(mask: np.ndarray) -> Box | None:
    """Box of all object pixels of a mask (H, W); None where a side is under 2 px."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    if min(width, height) < 2:
        return None
    rows = even_span(top, top + height, mask.shape[0])
    return (*rows, *even_span(left, left + width, mask.shape[1]))


def box_of_file(path: Path) -> Box | str | None:
    """The box of a mask file; a text says what is wrong with it."""
    try:
        return tight_box(read_mask(path))
    except ValueError as error:
        return str(error)


def boxes_of_files(
    paths: list[Path], folder: Path, workers: int
) -> tuple[dict[str, Box], list[str]]:
    """Boxes by file name, from the folder on, and the messages of masks that could not be read; in
    parallel, with a progress bar."""
    boxes, failures = {}, []
    with worker_pool(workers) as pool:
        found = zip(paths, pool.map(box_of_file, paths, chunksize=CHUNK), strict=True)
        for path, box in tqdm(found, "boxes", len(paths), unit="mask"):
            if isinstance(box, str):
                failures.append(box)
            elif box is not None:
                boxes[path.relative_to(folder).as_posix()] = box
    return boxes, failures


def find_masks(folder: Path, set_name: str) -> tuple[list[Path], Path]:
    """The mask files of a root, its `segs/` or its `segs/test/`, and the folder they are in."""
    is_above = folder.name == "segs" or (folder / "segs").is_dir()
    for place in (folder / "segs" / set_name, folder / set_name, *([] if is_above else [folder])):
        if masks := files_in(place, ".png"):
            return masks, place
    raise ValueError(
        f"{folder}: no masks (*.png); expected an Open Images folder with segs/{set_name}/"
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="Open Images root, its segs/ or its segs/test/")
    add_set_name(parser)
    add_workers(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    check_least(args, workers=1)
    masks, place = find_masks(Path(os.path.abspath(args.folder)), args.set_name)
    index_path = place.with_name(f"{place.name}{INDEX_ENDING}")
    check_writable(index_path.parent)
    boxes, failures = boxes_of_files(masks, place, args.workers)
    if not boxes:
        list_failures(failures, "masks")
        raise ValueError(f"{place}: none of {len(masks)} masks has a box; nothing was written")
    save_mask_boxes(index_path, boxes)
    print(f"{index_path}: {len(boxes)} boxes of {len(masks)} masks")
    return list_failures(failures, "masks")


if __name__ == "__main__":
    run(main)
