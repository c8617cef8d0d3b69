"""Index tar files of images, so that training can read any sample of them from a folder or a URL.

    python data_scripts/index_shards.py SHARDS [--whole] [--workers 16]

For tars in the manner of WebDataset that were made elsewhere, by img2dataset for example
(data_scripts/make_shards.py calls it by itself). The files of a sample are KEY.jpg (or png, webp,
...), KEY.json and masks KEY.mask.N.png. Boxes are the `boxes` of KEY.json, a list of [x0, x1, y0,
y1] as shares of the picture; without them those of the masks, else with --whole the whole picture.
Nothing is extracted. Exit code 2: nothing could be done; 3: some samples could not be read (they
are listed, the rest is indexed).
"""

import argparse
import itertools
import json
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from data_scripts.cal_bbox_by_seg import tight_box
from elite.annotations import usable_boxes, usable_masks
from elite.console import add_workers, check_least, list_failures, run, script_parser
from elite.data import PICTURES
from elite.files import check_writable
from elite.images import read_mask
from elite.shard_cache import Listed
from elite.shards import INDEX, LONGEST_NAME, key_of, list_file, save_index, shards_in, table_type
from elite.wording import brief
from elite.workers import worker_pool

MOST_JSON = 2**22  # bytes of a KEY.json
WHOLE = [0, 1, 0, 1]  # the box of a whole picture
T, R = TypeVar("T"), TypeVar("R")


# --- a shard --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """What a shard holds.

    Args:
        tables: rows of those of the index, `image` counting from 0; `place` is the row in the
            dataset that it was made from, -1 where that is unknown.
        failures: what could not be read.
    """

    listed: Listed
    tables: dict[str, np.ndarray]
    failures: list[str]


def rows_type(name: str, width: int) -> np.dtype:
    """`table_type` with the place of a row in front."""
    return np.dtype([("place", "<i8"), *table_type(name, width).descr])


@dataclass
class Sample:
    """Members of a tar with one key."""

    image: tarfile.TarInfo | None = None
    labels: tarfile.TarInfo | None = None
    masks: dict[int, tarfile.TarInfo] = field(default_factory=dict)


def index_shard(path: Path, whole: bool) -> Contents:
    """Reads the headers of a tar, and its KEY.json; extracts nothing.

    Raises:
        ValueError: it is no tar, damaged or cut off.
    """
    listed, failures = list_file(path), []
    rows: dict[str, list[tuple]] = {"images": [], "boxes": [], "masks": []}
    try:
        with tarfile.open(path, "r:") as tar:
            samples, wrong = group_members(tar)
            failures += [f"{path}/{message}" for message in wrong]
            for key, sample in samples.items():
                try:
                    for name, new in rows_of(tar, sample, len(rows["images"]), whole).items():
                        rows[name] += new
                except ValueError as error:
                    failures.append(f"{path}/{key}: {error}")
            ends = tar.offset + tarfile.BLOCKSIZE <= listed.bytes
    except Exception as error:  # a parser of a stranger's bytes raises whatever it likes
        raise ValueError(f"{path}: no whole tar file ({error}); make or copy it again") from None
    if not ends:
        raise ValueError(f"{path}: no whole tar file (cut off); make or copy it again")
    width = max((len(row[-1]) for row in rows["images"]), default=1)
    tables = {name: np.array(rows[name], dtype=rows_type(name, width)) for name in rows}
    return Contents(listed, tables, failures)


def group_members(tar: tarfile.TarFile) -> tuple[dict[str, Sample], list[str]]:
    """The files of a tar by key; links, devices and sparse files are none. And what is wrong with
    the names of pictures that are left out. Raises ReadError where it is damaged."""
    samples: dict[str, Sample] = {}
    doubled: list[str] = []
    dotted: dict[str, str] = {}  # the keys of pictures whose names have more dots
    for member in tar:
        if member.size < 0:  # with which tarfile would read the same member for ever
            raise tarfile.ReadError("a member of negative size")
        if not member.isreg() or member.issparse():
            continue
        key = key_of(member.name)
        ending = member.name[len(key) :].lower()
        sample = samples.setdefault(key, Sample())
        if ending in PICTURES and sample.image is not None:
            doubled.append(member.name)
        elif ending in PICTURES:
            sample.image = member
        elif ending == ".json":
            sample.labels = member
        elif ending.startswith(".mask.") and ending.endswith(".png"):
            number = ending[len(".mask.") : -len(".png")]
            if number.isdecimal() and len(number) < 6:
                sample.masks[int(number)] = member
        elif key and PurePosixPath(ending).suffix in PICTURES:
            dotted[member.name] = key
    whole = {key: sample for key, sample in samples.items() if sample.image is not None}
    failures = [f"{name}: another picture has its name; rename it" for name in doubled]
    failures += [
        f"{name}: the first dot ends its key, and no picture has the ending behind; rename it"
        for name, key in dotted.items()
        if key not in whole
    ]
    return whole, failures


def rows_of(
    tar: tarfile.TarFile, sample: Sample, image: int, whole: bool
) -> dict[str, list[tuple]]:
    """The rows that a sample adds to the tables of a shard, the sample being its `image`-th. Raises
    ValueError where it is damaged."""
    assert sample.image is not None
    name, masks = sample.image.name.encode("utf-8", "surrogateescape"), sorted(sample.masks.items())
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a name of more than {LONGEST_NAME} bytes; shorten it")
    labels = read_labels(tar, sample.labels) if sample.labels else {}
    if masks and "mask_boxes" not in labels:
        labels = {**labels_of_masks([_mask(tar, member) for _, member in masks]), **labels}
    boxes = numbers(labels.get("boxes", [WHOLE] if whole else []), "f4")
    sides = numbers(labels.get("mask_boxes", []), "i4")
    if len(sides) != len(masks):
        raise ValueError(f"{len(sides)} boxes of {len(masks)} masks in its JSON; pack it again")
    box_places = places(labels, "box_rows", len(boxes))
    mask_places = places(labels, "mask_rows", len(sides))
    return {
        "images": [(image, 0, sample.image.offset_data, sample.image.size, name)],
        "boxes": [(place, image, box) for place, box in zip(box_places, boxes, strict=True)],
        "masks": [
            (place, image, number, member.offset_data, member.size, *box)
            for place, (number, member), box in zip(mask_places, masks, sides, strict=True)
        ],
    }


def labels_of_masks(masks: Sequence[np.ndarray]) -> dict[str, list]:
    """Boxes of masks, bool (H, W), for both stages; masks under 2 px have none."""
    boxes, mask_boxes = [], []
    for mask in masks:
        box = tight_box(mask) or (0, 0, 0, 0)
        (height, width), (top, bottom, left, right) = mask.shape, box
        boxes.append([left / width, right / width, top / height, bottom / height])
        mask_boxes.append(list(box))
    return {"boxes": boxes, "mask_boxes": mask_boxes}


def read_labels(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    """The JSON of a sample. Raises ValueError where it is none."""
    try:
        labels = json.loads(_content(tar, member, MOST_JSON))
    except (ValueError, RecursionError):
        labels = None
    if not isinstance(labels, dict):
        raise ValueError(f"{brief(member.name)} is no JSON of a sample; pack it again")
    return labels


def numbers(rows: Any, kind: str) -> np.ndarray:
    """Boxes (n, 4). Raises ValueError where they are none."""
    try:
        found = np.array(rows, dtype="f8").reshape(-1, 4)
    except (ValueError, TypeError, OverflowError):
        found = np.full((1, 4), np.nan)
    if not np.isfinite(found).all() or np.abs(found).max(initial=0) > 2**30:
        raise ValueError(f"{brief(rows)} are no boxes of four numbers; pack it again")
    return found.astype(kind)


def places(labels: dict[str, Any], name: str, count: int) -> list[int]:
    """Places of rows in their dataset, -1 where they are unknown."""
    found = labels.get(name)
    is_fit = isinstance(found, list) and len(found) == count
    if not is_fit or not all(type(place) is int and 0 <= place < 2**40 for place in found):
        return [-1] * count
    return found


def _mask(tar: tarfile.TarFile, member: tarfile.TarInfo) -> np.ndarray:
    return read_mask(member.name, content=_content(tar, member, member.size))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    file = tar.extractfile(member)
    assert file is not None and member.isreg()
    return file.read(most)


# --- the index of all -----------------------------------------------------------------------------


def write_index(folder: Path, shards: Sequence[Contents], whole: bool) -> dict[str, int]:
    """Writes the index of shards, in their order. Returns the rows of each table.

    Raises:
        ValueError: nothing in them can be trained on.
    """
    first = np.cumsum([0, *(len(shard.tables["images"]) for shard in shards)])
    for number, shard in enumerate(shards):
        shard.tables["images"]["shard"] = number
        for name in ("boxes", "masks"):
            shard.tables[name]["image"] += np.uint32(first[number])
    names = ("images", "boxes", "masks")
    tables = {name: in_order([shard.tables[name] for shard in shards], name) for name in names}
    boxes = tables["boxes"]["box"] = tables["boxes"]["box"].clip(0, 1)  # cut to the image
    is_kept = usable_boxes(boxes) | (whole & (boxes == WHOLE).all(1))
    tables["boxes"] = tables["boxes"][is_kept]
    tables["masks"] = tables["masks"][usable_masks(tables["masks"])]
    counts = {name: len(table) for name, table in tables.items()}
    if not counts["boxes"] + counts["masks"]:
        raise ValueError(
            f"{folder}: no box of 2 to 80 % of its image and no mask of 100 px or more in "
            f"{counts['images']} images; boxes belong into KEY.json, masks are KEY.mask.N.png, and "
            "--whole takes each picture as a box"
        )
    save_index(folder, [shard.listed for shard in shards], tables)
    return counts


def in_order(parts: Sequence[np.ndarray], name: str) -> np.ndarray:
    """A table of the index: rows in the order of the dataset they are from, where all say their
    place there, else in that of the shards."""
    rows = np.concatenate(parts)
    if name != "images" and len(rows) and rows["place"].min() >= 0:
        rows = rows[np.argsort(rows["place"], kind="stable")]
    width = rows.dtype["name"].itemsize if name == "images" else 1
    table = np.zeros(len(rows), dtype=table_type(name, width))
    for column in table.dtype.names or ():
        table[column] = rows[column]
    return table


def in_parallel(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """The results of all tasks as they come; no more tasks are made than are worked on.

    Args:
        workers: processes; 1 means this one.
    """
    tasks = iter(tasks)
    if workers == 1:
        yield from map(work, tasks)
        return
    with worker_pool(workers) as pool:
        running: set[Future[R]] = set()
        while True:
            for task in itertools.islice(tasks, 2 * workers - len(running)):
                running.add(pool.submit(work, task))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def index_shards(folder: Path, whole: bool, workers: int) -> list[Contents]:
    """The contents of all shards of a folder, in the order of their names."""
    paths = shards_in(folder)
    found = in_parallel(partial(index_shard, whole=whole), paths, workers)
    found = tqdm(found, "index", len(paths), unit="shard")
    return sorted(found, key=lambda contents: contents.listed.name)


# --- the command line -----------------------------------------------------------------------------


def report(folder: Path, shards: Sequence[Contents], whole: bool, failures: list[str]) -> int:
    """Writes the index and says what is in it, and what is not. Returns the exit status."""
    counts = write_index(folder, shards, whole)
    rows = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{folder / INDEX}: {len(shards)} shards, {rows}")
    failures = [*failures, *(failure for shard in shards for failure in shard.failures)]
    return list_failures(failures, "images")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of *.tar, which receives the index")
    parser.add_argument(
        "--whole", action="store_true", help="take pictures without boxes as one box each"
    )
    add_workers(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    check_least(args, workers=1)
    if not shards_in(args.folder):
        raise ValueError(f"{args.folder}: no *.tar in it; data_scripts/make_shards.py makes them")
    check_writable(args.folder)
    return report(args.folder, index_shards(args.folder, args.whole, args.workers), args.whole, [])


if __name__ == "__main__":
    run(main)
