"""Render the small world as an Open Images folder for training, and its held-out test objects.

    python data_scripts/make_small_world.py OUT_DIR [--count 6000] [--seed 1] [--workers 2]
    python data_scripts/make_small_world.py --test_datasets test_datasets

The first writes what Open Images V6 has on disk (images/test, segs/test with its index of boxes,
annotations), with things that may be trained on alone. The folder appears whole or not at all; it
depends on count, seed and size, not on workers. The second writes a dozen objects that nothing was
trained on, NAME.jpg with NAME_bg.png. Exit code 2: nothing was written.
"""

import argparse
import csv
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from data_scripts.cal_bbox_by_seg import Box, tight_box
from elite.console import OK, run
from elite.files import check_writable, write_atomically
from elite.open_images import mask_boxes_path, save_mask_boxes
from small_world.render import Pose, draw
from small_world.world import SCENES, SHAPES, Thing, random_thing, things

BOX_COLUMNS = [
    "ImageID",
    "Source",
    "LabelName",
    "Confidence",
    "XMin",
    "XMax",
    "YMin",
    "YMax",
    "IsOccluded",
    "IsTruncated",
    "IsGroupOf",
    "IsDepiction",
    "IsInside",
]
MASK_COLUMNS = [
    "MaskPath",
    "ImageID",
    "LabelName",
    "BoxID",
    "BoxXMin",
    "BoxXMax",
    "BoxYMin",
    "BoxYMax",
    "PredictedIoU",
    "Clicks",
]
JPEG_QUALITY = 95
CHUNK = 50  # pictures handed to a process at a time

TEST_OBJECTS = (  # held out, each with the scene of its picture
    (Thing("mug", "striped", "yellow", "blue"), "bricks"),
    (Thing("mug", "dotted", "blue", "white"), "grass"),
    (Thing("star", "solid", "orange"), "night"),
    (Thing("star", "dotted", "purple", "yellow"), "snow"),
    (Thing("fish", "striped", "blue", "orange"), "table"),
    (Thing("fish", "dotted", "pink", "green"), "water"),
    (Thing("house", "solid", "green"), "road"),
    (Thing("house", "dotted", "white", "red"), "grass"),
    (Thing("car", "striped", "red", "white"), "beach"),
    (Thing("heart", "solid", "purple"), "table"),
    (Thing("umbrella", "striped", "yellow", "purple"), "beach"),
    (Thing("tree", "striped", "green", "pink"), "snow"),
)


@dataclass(frozen=True)
class Record:
    """A picture that was written: what its annotations say."""

    image_id: str
    shape: str
    box: Box  # rows hs..he, columns ws..we of the mask

    @property
    def label(self) -> str:
        return f"/m/sw_{self.shape}"

    @property
    def box_id(self) -> str:
        return self.image_id[-8:]

    @property
    def mask_name(self) -> str:
        return f"{self.image_id}_{self.label.strip('/').replace('/', '')}_{self.box_id}.png"


@cache
def trainable() -> list[Thing]:
    return things(held_out_only=False)


def write_picture(root: Path, seed: int, size: int, number: int) -> Record:
    """Draws picture `number` of the seed and writes it with its mask, 1 bit as in Open Images."""
    rng = np.random.default_rng((seed, number))
    thing = random_thing(rng, trainable())
    image, mask = draw(thing, str(rng.choice(list(SCENES))), rng, size)
    box = tight_box(mask)
    assert box is not None
    record = Record(f"{number:016x}", thing.shape, box)
    path = root / "images" / "test" / f"{record.image_id}.jpg"
    Image.fromarray(image).save(path, quality=JPEG_QUALITY)
    Image.fromarray(mask > 0).save(root / "segs" / "test" / record.mask_name)
    return record


def make_open_images(root: Path, count: int, seed: int, size: int, workers: int) -> None:
    """The whole folder. Raises ValueError where it is there already."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root}: is there already; remove it or choose another folder")
    write_atomically(root, partial(_fill_folder, count, seed, size, workers))


def _fill_folder(count: int, seed: int, size: int, workers: int, root: Path) -> None:
    for folder in ("images/test", "segs/test", "annotations"):
        (root / folder).mkdir(parents=True)
    write = partial(write_picture, root, seed, size)
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)
    ) as pool:
        written = pool.map(write, range(count), chunksize=CHUNK)
        records = list(tqdm(written, "render", count, unit="picture"))
    write_annotations(root / "annotations", records, size)
    save_mask_boxes(mask_boxes_path(root), {r.mask_name: r.box for r in records})


def write_annotations(folder: Path, records: list[Record], size: int) -> None:
    """The three CSV files of Open Images V6."""
    boxes, masks = [], []
    for r in records:
        top, bottom, left, right = (round(side / size, 6) for side in r.box)
        box = (left, right, top, bottom)
        boxes.append((r.image_id, "xclick", r.label, 1, *box, 0, 0, 0, 1, 0))
        masks.append((r.mask_name, r.image_id, r.label, r.box_id, *box, 1, ""))
    classes = [(f"/m/sw_{shape}", shape.capitalize()) for shape in SHAPES]
    write_csv(folder / "oidv6-class-descriptions.csv", ("LabelName", "DisplayName"), classes)
    write_csv(folder / "test-annotations-bbox.csv", BOX_COLUMNS, boxes)
    write_csv(folder / "test-annotations-object-segmentation.csv", MASK_COLUMNS, masks)


def write_csv(path: Path, header: Iterable[str], rows: Iterable[tuple]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def name_of(thing: Thing) -> str:
    """'striped_mug_yellow_blue', 'solid_star_orange'."""
    words = (thing.pattern, thing.shape, thing.colour, thing.second)
    return "_".join(word for word in words if word)


def make_test_datasets(folder: Path, size: int) -> None:
    """The test objects, centred and nearly upright, as NAME.jpg and NAME_bg.png."""
    for number, (thing, scene) in enumerate(TEST_OBJECTS):
        rng = np.random.default_rng((0, number))
        pose = Pose(0.5, 0.5, rng.uniform(0.36, 0.42), rng.uniform(-6, 6), bool(rng.integers(2)))
        image, mask = draw(thing, scene, rng, size, pose)
        picture, cut = Image.fromarray(image), Image.fromarray(mask)
        write_atomically(
            folder / f"{name_of(thing)}.jpg", partial(picture.save, quality=JPEG_QUALITY)
        )
        write_atomically(folder / f"{name_of(thing)}_bg.png", cut.save)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path, nargs="?", help="Open Images folder to make")
    parser.add_argument("--count", type=int, default=6000, help="pictures (default 6000)")
    parser.add_argument("--seed", type=int, default=1, help="of everything random (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--size", type=int, default=256, help="side in pixels (default 256)")
    parser.add_argument("--test_datasets", type=Path, help="folder for the held-out test objects")
    return parser.parse_args(arguments)


def check_args(args: argparse.Namespace) -> None:
    if args.out_dir is None and args.test_datasets is None:
        raise ValueError("nothing to make: expected OUT_DIR, --test_datasets DIR or both")
    for name, least in (("count", 1), ("seed", 0), ("workers", 1), ("size", 32)):
        if (value := getattr(args, name)) < least:
            raise ValueError(f"--{name} {value}: expected {least} or more")
    for folder in (args.out_dir, args.test_datasets):
        if folder is not None:
            check_writable(folder)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    check_args(args)
    if args.test_datasets is not None:
        make_test_datasets(args.test_datasets, args.size)
        print(f"{args.test_datasets}: {len(TEST_OBJECTS)} held-out objects with masks")
    if args.out_dir is not None:
        make_open_images(args.out_dir, args.count, args.seed, args.size, args.workers)
        print(f"{args.out_dir}: {args.count} pictures in Open Images layout")
    return OK


if __name__ == "__main__":
    run(main)
