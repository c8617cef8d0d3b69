"""Training samples a second and core, where their time goes, and how long the index takes.

    python -m benchmarks.loader                        small pictures, seconds
    python -m benchmarks.loader --size full --rounds 5 --count 32 \
        --index_rows 1000 10000 100000 1000000 --workers 0 1 2

An Open Images folder of textured JPEGs (full: 1024 x 768, samples at 512 px) is made for the
purpose. Rates are samples per second of CPU time of one thread, beside decoding the same files with
Pillow and doing nothing else; with workers they are per second of the clock. Where the time of a
sample goes, `python -m cProfile -s tottime -m benchmarks.loader` shows.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.harness import (
    Goal,
    Measure,
    Row,
    Table,
    alternate,
    finish,
    make_parser,
    parse,
    timed,
)
from data_scripts.make_small_world import Record, make_folders, write_annotations, write_pair
from elite.console import run
from elite.open_images import OpenImagesBoxes, OpenImagesMasks
from elite.stream import TrainingStream, stream_loader

DECODE, SAMPLE, CSV_ALONE, INDEX = "decoding alone", "sample", "csv.reader alone", "index"
GOAL = Goal(SAMPLE, 10, "least", "median")
BATCH_SIZE = 4

Dataset = OpenImagesBoxes | OpenImagesMasks


class Sizes(NamedTuple):
    """Sides in pixels."""

    width: int
    height: int
    resolution: int
    clip: int


SIZES = {"full": Sizes(1024, 768, 512, 224), "tiny": Sizes(320, 240, 64, 32)}


# --- the folder -----------------------------------------------------------------------------------


def textured(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Noise of several scales, uint8 (H, W, 3): a JPEG of it is as large as that of a photo."""
    picture = np.full((height, width, 3), 128.0)
    for scale in (2, 8, 32, 128):
        small = (height // scale + 2, width // scale + 2, 3)
        noise = rng.normal(scale=6 * scale**0.4, size=small)
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return picture.clip(0, 255).astype(np.uint8)


def object_mask(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """An ellipse of half to three quarters of the shorter side, bool (H, W)."""
    radii = (rng.uniform(0.25, 0.375, size=2) * min(width, height)).astype(int)
    centre = [
        int(rng.integers(r, side - r)) for r, side in zip(radii, (width, height), strict=True)
    ]
    canvas = np.zeros((height, width), dtype=np.uint8)
    cv2.ellipse(canvas, centre, [int(r) for r in radii], 0, 0, 360, 1, thickness=-1)
    return canvas > 0


def write_pictures(root: Path, count: int, width: int, height: int) -> None:
    """Pictures, masks and annotations in Open Images layout."""
    rng, records = np.random.default_rng(0), []
    make_folders(root)
    for number in tqdm(range(count), "pictures", unit="picture"):
        mask = object_mask(rng, width, height)
        records.append(write_pair(root, number, textured(rng, width, height), mask, quality=90))
    write_annotations(root, records, width, height)


def write_index(root: Path, count: int) -> None:
    """Annotations of so many objects, without any picture."""
    make_folders(root)
    corners = np.random.default_rng(0).integers(0, 100, size=(count, 2)).tolist()
    records = [
        Record(f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}", (top, top + 200, left, left + 240))
        for number, (top, left) in enumerate(corners)
    ]
    write_annotations(root, records, 400, 400)


def open_datasets(root: Path, sizes: Sizes) -> dict[str, Dataset]:
    fixed = {"resolution": sizes.resolution, "clip_size": sizes.clip}
    return {
        "stage 1, boxes": OpenImagesBoxes(root, **fixed),
        "stage 2, masks": OpenImagesMasks(root, latent_size=sizes.resolution // 8, **fixed),
    }


# --- rates ----------------------------------------------------------------------------------------


def rate(work: Callable[[int], object], count: int) -> Measure:
    """Measures how often a second of CPU time `work` is done, over indices 0 to count - 1."""

    def measure() -> float:
        start = time.process_time()
        for index in range(count):
            work(index)
        return count / (time.process_time() - start)

    return measure


def sample(dataset: Dataset, index: int) -> object:
    return dataset.sample(index, np.random.default_rng(index))


def decode(root: Path, dataset: Dataset, index: int) -> None:
    """The files of a sample, decoded by Pillow."""
    image_id = dataset.image_ids[index].decode()
    Image.open(root / "images" / "test" / f"{image_id}.jpg").load()
    if isinstance(dataset, OpenImagesMasks):
        Image.open(root / "segs" / "test" / str(dataset.index["name"][index])).load()


def rate_table(root: Path, datasets: dict[str, Dataset], rounds: int) -> Table:
    table = Table("Samples a second of CPU time, one core", "1/s", GOAL)
    for name, dataset in datasets.items():
        cases = {DECODE: partial(decode, root, dataset), SAMPLE: partial(sample, dataset)}
        figures = {case: rate(work, len(dataset)) for case, work in cases.items()}
        table.rows.append(Row(name, alternate(figures, rounds, name)))
    return table


def loader_rate(dataset: Dataset, workers: int, batches: int) -> float:
    """Samples a second of the clock, after a batch for every worker that does not count."""
    loader = stream_loader(TrainingStream(dataset, 0), batch_size=BATCH_SIZE, num_workers=workers)
    stream: Iterator = iter(loader)
    for _ in islice(stream, max(1, workers)):
        pass
    start = time.perf_counter()
    for _ in islice(stream, batches):
        pass
    return batches * BATCH_SIZE / (time.perf_counter() - start)


def worker_table(datasets: dict[str, Dataset], workers: list[int], rounds: int) -> Table:
    table = Table("Samples a second of the clock, by workers of the loader", "1/s")
    for name, dataset in datasets.items():
        batches = max(4, 2 * len(dataset) // BATCH_SIZE)
        cases = {
            f"{count} workers" if count else "none": partial(loader_rate, dataset, count, batches)
            for count in workers
        }
        table.rows.append(Row(name, alternate(cases, rounds, name)))
    return table


# --- the index ------------------------------------------------------------------------------------


def read_csv(path: Path) -> None:
    with open(path, encoding="utf-8", newline="") as file:
        for _ in csv.reader(file):
            pass


def index_table(sizes: list[int], rounds: int) -> Table:
    """Opening a dataset against reading its CSV file row by row."""
    table = Table("Time to open a dataset", "s")
    for count in sizes:
        with TemporaryDirectory() as folder:
            root = Path(folder)
            write_index(root, count)
            for kind, file in (
                (OpenImagesBoxes, "test-annotations-bbox.csv"),
                (OpenImagesMasks, "test-annotations-object-segmentation.csv"),
            ):
                path = root / "annotations" / file
                cases = {CSV_ALONE: partial(read_csv, path), INDEX: partial(kind, root)}
                name = f"{kind.__name__}, {count:,} rows"
                figures = {case: timed(work) for case, work in cases.items()}
                table.rows.append(Row(name, alternate(figures, rounds, name)))
    return table


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "loader")
    parser.add_argument("--count", type=int, default=8, help="pictures (default 8)")
    parser.add_argument("--index_rows", type=int, nargs="+", default=[1000])
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[], help="of the loader; 0 is none (default no)"
    )
    args = parse(parser, "loader", argv)
    if args.count < BATCH_SIZE:
        raise ValueError(f"--count {args.count}: expected {BATCH_SIZE} or more")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    sizes = SIZES[args.size]
    with TemporaryDirectory() as folder:
        root = Path(folder)
        write_pictures(root, args.count, sizes.width, sizes.height)
        datasets = open_datasets(root, sizes)
        tables = [rate_table(root, datasets, args.rounds)]
        if args.workers:
            tables.append(worker_table(datasets, args.workers, args.rounds))
    tables.append(index_table(args.index_rows, args.rounds))
    return finish(args, tables, "loader")


if __name__ == "__main__":
    run(main)
