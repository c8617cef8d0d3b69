"""Pack training data into shards: tar files that training reads from a folder or fetches from a
URL.

    python data_scripts/make_shards.py SOURCE TARGET [--side 1024] [--shard_mb 256] [--workers 16]

SOURCE is an Open Images folder, or one of pairs NAME.jpg and NAME_bg.png. The tars are those of
WebDataset: KEY.jpg, KEY.json with the boxes, KEY.mask.N.png. Files are copied as they are, except
that images with a side of more than --side are made smaller. Interrupted, it goes on with the
shards that are missing. Exit code 2: nothing could be done; 3: some images could not be read (they
are listed, the rest is packed). Tars made elsewhere are indexed by data_scripts/index_shards.py.
"""

import argparse
import hashlib
import io
import itertools
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from data_scripts.index_shards import Contents, in_parallel, index_shards, labels_of_masks, report
from elite.console import add_set_name, add_workers, check_least, run, script_parser
from elite.data import Pair, PairFolder
from elite.files import (
    check_writable,
    digest_files,
    is_file,
    read_text,
    sole_writer,
    write_atomically,
    write_text,
)
from elite.images import fit_mask, read_image, read_mask, resize
from elite.open_images import OpenImagesFolder
from elite.shards import key_of, shards_in

PLAN, LOCK = "plan.json", "pack.lock"
PLAN_FORMAT = "elite-shard-plan 1"  # to be counted up when what is packed changes
JPEG_QUALITY = 95
SAMPLED = 32  # images made smaller to tell how much smaller they get
OVERHEAD = 2048  # bytes that an image takes in a tar besides those of its files
SIDES = ("hs", "he", "ws", "we")


# --- what is packed -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """An image with what belongs to it.

    Args:
        labels: of KEY.json; None takes boxes from the masks.
    """

    key: str
    image: Path
    masks: list[Path]
    labels: dict[str, list] | None

    def size(self) -> int:
        """Bytes of its files; one that is missing counts as empty."""
        return sum(path.stat().st_size for path in [self.image, *self.masks] if path.exists())

    def changed(self) -> int:
        """When its image last was, in seconds; 0 where that is missing."""
        return int(self.image.stat().st_mtime) if self.image.exists() else 0


class Packed(Protocol):
    """What shards are made of, image by image."""

    def __len__(self) -> int: ...

    def item(self, number: int) -> Item: ...


class PackedFolder:
    """An Open Images folder by image; `len` and `item`.

    Rows of the tables go into KEY.json, so that the index of the shards has their order.

    Raises:
        ValueError: it has neither boxes nor masks, or a table is damaged.
    """

    def __init__(self, folder: OpenImagesFolder) -> None:
        self.folder, nothing = folder, np.zeros(0, "S1")
        tables = [
            folder.boxes() if folder.table("bbox").exists() else (nothing, nothing),
            folder.masks() if folder.mask_folder.is_dir() else (nothing, nothing),
        ]
        self.ids = np.unique(np.concatenate([ids for ids, _ in tables]))
        if not len(self.ids):
            raise ValueError(
                f"{folder.root}: neither {folder.table('bbox').name} nor masks; expected a folder "
                "of Open Images, or of pairs NAME.jpg and NAME_bg.png"
            )
        self.boxes, self.masks = (Grouped(self.ids, ids, rows) for ids, rows in tables)

    def __len__(self) -> int:
        return len(self.ids)

    def item(self, number: int) -> Item:
        image_id = self.ids[number]
        box_rows, boxes = self.boxes[number]
        mask_rows, masks = self.masks[number]
        labels = {
            "boxes": [[float(side) for side in box] for box in boxes],
            "box_rows": box_rows,
            "masks": [str(mask["name"]) for mask in masks],
            "mask_boxes": [[int(mask[side]) for side in SIDES] for mask in masks],
            "mask_rows": mask_rows,
        }
        paths = [self.folder.mask_path(mask) for mask in masks]
        return Item(key_for(image_id.decode()), self.folder.image_path(image_id), paths, labels)


class Grouped:
    """Rows of a table by image: numbers and rows of the image at a place of `ids`."""

    def __init__(self, ids: np.ndarray, row_ids: np.ndarray, rows: np.ndarray) -> None:
        self.order, self.rows = np.argsort(row_ids, kind="stable"), rows
        ordered = row_ids[self.order]
        self.starts, self.stops = (
            np.searchsorted(ordered, ids, side) for side in ("left", "right")
        )

    def __getitem__(self, number: int) -> tuple[list[int], list]:
        numbers = self.order[self.starts[number] : self.stops[number]]
        return numbers.tolist(), [self.rows[row] for row in numbers]


class PackedPairs:
    """A folder of pairs, each one an image with one mask, those of folders in it too; `len` and
    `item`. Raises ValueError where two pictures share a name."""

    def __init__(self, folder: Path) -> None:
        pairs = [each for pair in PairFolder(folder).pairs for each in (pair, *pair.others)]
        self.pairs: dict[str, Pair] = {}
        for pair in pairs:
            key = key_for(pair.image_path.relative_to(folder).with_suffix("").as_posix())
            if (other := self.pairs.setdefault(key, pair)) is not pair:
                raise ValueError(
                    f"{pair.image_path}: has the name of {other.image_path.name}; rename one of "
                    "them"
                )
        self.keys = list(self.pairs)

    def __len__(self) -> int:
        return len(self.keys)

    def item(self, number: int) -> Item:
        key = self.keys[number]
        return Item(key, self.pairs[key].image_path, [self.pairs[key].mask_path], None)


def key_for(name: str) -> str:
    """A name without dots, which would end a key."""
    return name.replace("%", "%25").replace(".", "%2E")


def open_packed(source: Path, set_name: str) -> Packed:
    """Raises ValueError where the folder holds nothing to pack."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; expected one of Open Images, or of pairs")
    if (source / "annotations").is_dir():
        return PackedFolder(OpenImagesFolder(source, set_name))
    return PackedPairs(source)


# --- shards ---------------------------------------------------------------------------------------


def packed(item: Item, side: int | None) -> Iterator[tuple[str, bytes]]:
    """The files of an item in a tar, by name. Raises ValueError where one cannot be read."""
    image, masks = read_image(item.image), [_bytes_of(path) for path in item.masks]
    content, ending = item.image.read_bytes(), item.image.suffix.lower()
    if side is not None and max(image.shape[:2]) > side:
        content, ending = _smaller(image, side), ".jpg"
    labels = item.labels
    if labels is None:
        named = list(zip(item.masks, masks, strict=True))
        read = [read_mask(path, content=mask) for path, mask in named]
        for (path, _), mask in zip(named, read, strict=True):
            fit_mask(mask, image, str(path))
        labels = labels_of_masks(read)
    yield f"{item.key}{ending}", content
    yield f"{item.key}.json", json.dumps(labels).encode()
    for number, mask in enumerate(masks):
        yield f"{item.key}.mask.{number}.png", mask


def _bytes_of(path: Path) -> bytes:
    if not is_file(path):  # a pipe would block
        raise ValueError(f"{path}: no such file; expected a mask")
    return path.read_bytes()


def _smaller(image: np.ndarray, side: int) -> bytes:
    """A JPEG of the image with its longer side at `side` px."""
    height, width = (max(1, round(n * side / max(image.shape[:2]))) for n in image.shape[:2])
    file = io.BytesIO()
    Image.fromarray(resize(image, width, height)).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def write_shard(task: tuple[Path, Sequence[Item]], side: int | None) -> list[str]:
    """Packs items into a tar, which appears whole or not at all. Returns what could not be read."""
    path, items = task
    failures: list[str] = []
    write_atomically(path, partial(_fill, items, side, failures))
    return failures


def _fill(items: Sequence[Item], side: int | None, failures: list[str], path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for item in items:
            try:
                files = list(packed(item, side))
            except (ValueError, OSError) as error:
                failures.append(_told(error))
                continue
            for name, content in files:
                member = tarfile.TarInfo(name)  # with the time 0, so that tars are reproducible
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _told(error: ValueError | OSError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}; copy it again or leave out its image"
    return str(error)


# --- the work -------------------------------------------------------------------------------------


def plan_shards(source: Packed, side: int | None, shard_bytes: int) -> tuple[np.ndarray, str]:
    """Which shard each image belongs to, ascending (N,); and a fingerprint of all there is."""
    digest = hashlib.sha256(f"{PLAN_FORMAT} {side} {shard_bytes}".encode())
    sizes = np.zeros(len(source), dtype=np.int64)
    for number in tqdm(range(len(source)), "files", unit="image"):
        item = source.item(number)
        sizes[number] = item.size()
        is_pair = item.labels is None
        content = digest_files(item.image, *item.masks) if is_pair else item.changed()
        digest.update(f"{item.key} {sizes[number]} {item.labels}{content}\n".encode())
    sizes = np.round(sizes * _shrinkage(source, side)).astype(np.int64) + OVERHEAD
    starts = np.cumsum(sizes) - sizes
    return np.unique(starts // shard_bytes, return_inverse=True)[1], digest.hexdigest()


def _shrinkage(source: Packed, side: int | None) -> float:
    """About what share of their bytes items keep in a tar, by some of them."""
    before = after = 0
    for number in np.linspace(0, len(source) - 1, SAMPLED, dtype=int) if side else ():
        item = source.item(int(number))
        try:
            after += sum(len(content) for _, content in packed(item, side))
            before += item.size()
        except (ValueError, OSError):
            continue
    return min(1.0, after / before) if before else 1.0


def check_plan(target: Path, fingerprint: str) -> None:
    """Writes down what is packed, or compares it with what was when this was interrupted.

    Raises:
        ValueError: that was something else, or other shards lie in the folder.
    """
    path = target / PLAN
    plan = {"format": PLAN_FORMAT, "fingerprint": fingerprint}
    if path.exists():
        is_this = read_text(path, "expected what is packed here") == json.dumps(plan)
        changed = "shards of another source, or made with other options, or of files since changed"
        other = None if is_this else changed
    else:
        other = "shards made elsewhere" if shards_in(target) else None
    if other is not None:
        raise ValueError(f"{target}: holds {other}; remove them or choose another folder")
    if not path.exists():
        write_text(path, json.dumps(plan))


@dataclass(frozen=True)
class Task:
    """A shard to be written."""

    path: Path
    images: range  # of the source


def pack(
    source: Packed, target: Path, side: int | None, shard_bytes: int, workers: int
) -> tuple[list[Task], list[str]]:
    """Writes the shards that are not there yet. Returns those that are kept, and what was wrong
    with images left out of the others."""
    numbers, fingerprint = plan_shards(source, side, shard_bytes)
    bounds = np.searchsorted(numbers, range(int(numbers[-1]) + 2)).tolist()
    tasks = [
        Task(target / f"{number:06d}.tar", range(start, stop))
        for number, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]
    with sole_writer(target / LOCK, "packs"):
        check_plan(target, fingerprint)
        kept = [task for task in tasks if task.path.exists()]
        todo = (
            (task.path, [source.item(image) for image in task.images])
            for task in tasks
            if not task.path.exists()
        )
        failures: list[str] = []
        written = in_parallel(partial(write_shard, side=side), todo, workers)
        for failed in tqdm(written, "pack", len(tasks), initial=len(kept), unit="shard"):
            failures += failed
    return kept, failures


def left_out(source: Packed, kept: Sequence[Task], shards: Sequence[Contents]) -> list[str]:
    """The images that an earlier run has left out of the shards that are kept."""
    found = {shard.listed.name: shard.tables["images"]["name"] for shard in shards}
    missing = []
    for task in kept:
        names = found[task.path.name]
        if len(names) < len(task.images):
            keys = {key_of(name.decode("utf-8", "surrogateescape")) for name in names.tolist()}
            items = (source.item(image) for image in task.images)
            missing += [
                f"{item.image}: was left out of {task.path} by an earlier run; repair it, and "
                "pack into another folder"
                for item in items
                if item.key not in keys
            ]
    return missing


# --- the command line -----------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("source", type=Path, help="Open Images root, or folder of pairs")
    parser.add_argument("target", type=Path, help="folder for the shards")
    add_packing(parser)
    add_set_name(parser)
    return parser.parse_args(arguments)


def add_packing(parser: argparse.ArgumentParser) -> None:
    """The flags of `pack_and_index`."""
    parser.add_argument(
        "--side", type=int, help="longest side that images keep, in pixels (default: any)"
    )
    parser.add_argument(
        "--shard_mb", type=float, default=256, help="megabytes of a shard, about (default 256)"
    )
    add_workers(parser)


def check_packing(args: argparse.Namespace) -> None:
    """Raises ValueError where one of these flags is out of range."""
    check_least(args, side=64, workers=1)
    if not 0 < args.shard_mb < 10**6 or not round(args.shard_mb * 10**6):
        raise ValueError(f"--shard_mb {args.shard_mb}: expected a number above 0 and below 10^6")


def pack_and_index(
    source: Packed, target: Path, args: argparse.Namespace, failures: Sequence[str] = ()
) -> int:
    """Packs, indexes and reports as the flags say. Returns the exit status.

    Args:
        failures: of what came before, reported with the others.
    """
    shard_bytes = round(args.shard_mb * 10**6)
    kept, unreadable = pack(source, target, args.side, shard_bytes, args.workers)
    shards = index_shards(target, whole=False, workers=args.workers)
    told = [*failures, *unreadable, *left_out(source, kept, shards)]
    if told and not any(len(shard.tables["images"]) for shard in shards):
        raise ValueError(f"no image of {len(told)} could be packed; {told[0]}")
    return report(target, shards, whole=False, failures=told)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    check_packing(args)
    source, target = open_packed(args.source, args.set_name), args.target
    check_writable(target)
    return pack_and_index(source, target, args)


if __name__ == "__main__":
    run(main)
