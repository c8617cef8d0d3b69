"""Render the small world as an Open Images folder for training, and its held-out test objects.

    python data_scripts/make_small_world.py OUT_DIR [--count 6000] [--seed 1] [--workers 2]
    [--art ART/fluent ...]
    python data_scripts/make_small_world.py --test_datasets test_datasets

The first writes what Open Images V6 has on disk (images/test, segs/test with its index of boxes,
annotations), with critters that may be trained on alone; with --art every second picture shows a
thing of these folders instead (PNGs as fetch_art.py leaves them, but for one in six that is held
out). The folder appears whole or not at all; it depends on count, seed, size and art, not on
workers. The second writes sixteen critters that nothing was trained on, NAME.jpg with NAME_bg.png.
Exit code 2: nothing was written.
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from data_scripts.cal_bbox_by_seg import Box, tight_box
from elite.annotations import mask_boxes_path, save_mask_boxes
from elite.console import OK, check_least, run, script_parser
from elite.files import check_writable, write_atomically
from elite.workers import worker_pool
from small_world.captions import CLASS_WORD
from small_world.objects import NUM_OBJECTS, name_of, object_rng, test_object
from small_world.render import Pose, draw
from small_world.things import composite, find_things, read_thing
from small_world.world import SCENES, random_critter

BOX_COLUMNS = (
    *("ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax"),
    *("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"),
)
MASK_COLUMNS = (
    *("MaskPath", "ImageID", "LabelName", "BoxID", "BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax"),
    *("PredictedIoU", "Clicks"),
)
JPEG_QUALITY = 95
LABEL = f"/m/sw_{CLASS_WORD}"
CHUNK = 50  # pictures handed to a process at a time


@dataclass(frozen=True)
class Record:
    """A picture that was written: what its annotations say."""

    image_id: str
    box: Box  # rows hs..he, columns ws..we of the mask

    @property
    def box_id(self) -> str:
        return self.image_id[-8:]

    @property
    def mask_name(self) -> str:
        return f"{self.image_id}_{LABEL.strip('/').replace('/', '')}_{self.box_id}.png"


def write_picture(
    root: Path, seed: int, size: int, number: int, things: Sequence[Path] = ()
) -> Record:
    """Draws picture `number` of the seed and writes it with its mask, 1 bit as in Open Images; the
    odd ones show a thing, where there are things."""
    rng = np.random.default_rng((seed, number))
    if things and number % 2:
        thing = read_thing(things[rng.integers(len(things))])
        image, mask = composite(thing, str(rng.choice(list(SCENES))), rng, size)
    else:
        critter = random_critter(rng, "trained")
        image, mask = draw(critter, str(rng.choice(list(SCENES))), rng, size)
    return write_pair(root, number, image, mask > 0)


def write_pair(
    root: Path, number: int, image: np.ndarray, mask: np.ndarray, quality: int = JPEG_QUALITY
) -> Record:
    """Writes a picture, uint8 (H, W, 3), and the mask of its one object, bool (H, W)."""
    box = tight_box(mask)
    assert box is not None
    record = Record(f"{number:016x}", box)
    path = root / "images" / "test" / f"{record.image_id}.jpg"
    Image.fromarray(image).save(path, quality=quality)
    Image.fromarray(mask).save(root / "segs" / "test" / record.mask_name)
    return record


def make_open_images(
    root: Path, count: int, seed: int, size: int, workers: int, things: Sequence[Path] = ()
) -> None:
    """The whole folder."""
    write_atomically(root, partial(_fill_folder, count, seed, size, workers, things))


def _fill_folder(
    count: int, seed: int, size: int, workers: int, things: Sequence[Path], root: Path
) -> None:
    make_folders(root)
    write = partial(write_picture, root, seed, size, things=things)
    with worker_pool(workers) as pool:
        written = pool.map(write, range(count), chunksize=CHUNK)
        records = list(tqdm(written, "render", count, unit="picture"))
    write_annotations(root, records, size, size)


def make_folders(root: Path) -> None:
    """The folders of Open Images V6."""
    for folder in ("images/test", "segs/test", "annotations"):
        (root / folder).mkdir(parents=True)


def write_annotations(root: Path, records: list[Record], width: int, height: int) -> None:
    """The three CSV files of Open Images V6 and the index of mask boxes, of pictures of one
    size."""
    folder, boxes, masks = root / "annotations", [], []
    for r in records:
        top, bottom, left, right = r.box
        sides = left / width, right / width, top / height, bottom / height
        box = tuple(round(side, 6) for side in sides)
        boxes.append((r.image_id, "xclick", LABEL, 1, *box, 0, 0, 0, 1, 0))
        masks.append((r.mask_name, r.image_id, LABEL, r.box_id, *box, 1, ""))
    classes = [(LABEL, CLASS_WORD.capitalize())]
    write_csv(folder / "oidv6-class-descriptions.csv", ("LabelName", "DisplayName"), classes)
    write_csv(folder / "test-annotations-bbox.csv", BOX_COLUMNS, boxes)
    write_csv(folder / "test-annotations-object-segmentation.csv", MASK_COLUMNS, masks)
    save_mask_boxes(mask_boxes_path(root), {r.mask_name: r.box for r in records})


def write_csv(path: Path, header: Iterable[str], rows: Iterable[tuple]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def make_test_datasets(folder: Path, size: int) -> None:
    """The test objects, centred and nearly upright, as NAME.jpg and NAME_bg.png."""
    for number in range(NUM_OBJECTS):
        critter, scene = test_object(number)
        rng = object_rng(NUM_OBJECTS + number)
        pose = Pose(0.5, 0.5, rng.uniform(0.4, 0.46), rng.uniform(-6, 6), bool(rng.integers(2)))
        image, mask = draw(critter, scene, rng, size, pose)
        picture, cut = Image.fromarray(image), Image.fromarray(mask)
        path = folder / f"{name_of(number)}.jpg"
        write_atomically(path, partial(picture.save, quality=JPEG_QUALITY))
        write_atomically(folder / f"{name_of(number)}_bg.png", cut.save)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("out_dir", type=Path, nargs="?", help="Open Images folder to make")
    parser.add_argument("--count", type=int, default=6000, help="pictures (default 6000)")
    parser.add_argument("--seed", type=int, default=1, help="of everything random (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--size", type=int, default=256, help="side in pixels (default 256)")
    parser.add_argument("--art", type=Path, nargs="+", default=[], help="folders of PNGs")
    parser.add_argument("--test_datasets", type=Path, help="folder for the held-out test objects")
    return parser.parse_args(arguments)


def check_args(args: argparse.Namespace) -> None:
    if args.out_dir is None and args.test_datasets is None:
        raise ValueError("nothing to make: expected OUT_DIR, --test_datasets DIR or both")
    check_least(args, count=1, seed=0, workers=1, size=32)
    for folder in (args.out_dir, args.test_datasets):
        if folder is not None:
            check_writable(folder)
    root = args.out_dir
    if root is not None and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root}: is there already; remove it or choose another folder")
    if None not in (root, args.test_datasets) and root.resolve() == args.test_datasets.resolve():
        raise ValueError(f"{root}: is given for --test_datasets, too; choose another folder")


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    check_args(args)
    things = [file for folder in args.art for file in find_things(folder, held_out=False)]
    if args.test_datasets is not None:
        make_test_datasets(args.test_datasets, args.size)
        print(f"{args.test_datasets}: {NUM_OBJECTS} held-out objects with masks")
    if args.out_dir is not None:
        make_open_images(args.out_dir, args.count, args.seed, args.size, args.workers, things)
        print(f"{args.out_dir}: {args.count} pictures in Open Images layout")
    return OK


if __name__ == "__main__":
    run(main)
