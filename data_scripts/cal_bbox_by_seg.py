"""Find the box of every Open Images mask, once, before stage 2 training.

    python data_scripts/cal_bbox_by_seg.py OPEN_IMAGES_ROOT [--workers 16]

The folder may also be `segs/` or `segs/test/` itself; masks may lie in subfolders, as their
archives unzip. Writes `segs/test_bbox_dict.npy`: per mask file the tight box of all its object
pixels, with even sides where the image allows. Masks under 2 px are skipped. Exit code 2: nothing
could be done; 3: some masks could not be read (they are listed, the rest is written).
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from elite.annotations import save_mask_boxes
from elite.console import (
    OK,
    PARTLY_FAILED,
    add_set_name,
    add_workers,
    check_least,
    run,
    script_parser,
)
from elite.files import check_writable
from elite.images import read_mask
from elite.open_images import files_in
from elite.wording import one_line

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
    spans = []
    for axis, size in ((1, mask.shape[0]), (0, mask.shape[1])):
        filled = np.flatnonzero(mask.any(axis=axis))
        if not len(filled) or filled[-1] - filled[0] < 1:
            return None
        spans.append(even_span(int(filled[0]), int(filled[-1]) + 1, size))
    return (*spans[0], *spans[1])


def box_of_file(path: Path) -> tuple[Path, Box | None, str | None]:
    """A mask file, its box, and what was wrong with it."""
    try:
        return path, tight_box(read_mask(path)), None
    except ValueError as error:
        return path, None, str(error)


def boxes_of_files(
    paths: list[Path], workers: int
) -> Iterator[tuple[Path, Box | None, str | None]]:
    """`box_of_file` of all, in parallel, with a progress bar."""
    progress = tqdm(total=len(paths), unit="mask", desc="boxes")
    with progress, ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for result in pool.map(box_of_file, paths, chunksize=CHUNK):
            progress.update()
            yield result


def collect(
    results: Iterable[tuple[Path, Box | None, str | None]], folder: Path
) -> tuple[dict[str, Box], list[str]]:
    """Boxes by file name, from the folder on, and the messages of masks that could not be read."""
    boxes, failures = {}, []
    for path, box, failure in results:
        if box is not None:
            boxes[path.relative_to(folder).as_posix()] = box
        if failure is not None:
            failures.append(failure)
    return boxes, failures


def find_masks(folder: Path, set_name: str) -> tuple[list[Path], Path]:
    """The mask files of a root, its `segs/` or its `segs/test/`, and the folder they are in."""
    for place in (folder / "segs" / set_name, folder / set_name, folder):
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
    masks, place = find_masks(args.folder.resolve(), args.set_name)
    index_path = place.with_name(f"{place.name}_bbox_dict.npy")
    check_writable(index_path.parent)
    boxes, failures = collect(boxes_of_files(masks, args.workers), place)
    save_mask_boxes(index_path, boxes)
    print(f"{index_path}: {len(boxes)} boxes of {len(masks)} masks")
    if failures:
        lines = map(one_line, failures)
        print(f"{len(failures)} masks could not be read:", *lines, sep="\n  ", file=sys.stderr)
    return PARTLY_FAILED if failures else OK


if __name__ == "__main__":
    run(main)
