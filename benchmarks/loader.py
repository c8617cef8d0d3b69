"""Training samples a second and core, from files and from shards, and how long the index takes.

    python -m benchmarks.loader                        small pictures, seconds
    python -m benchmarks.loader --size full --rounds 5 --count 32 \
        --index_rows 1000 10000 100000 1000000 --workers 0 1 2 --shard_rows 10000000

An Open Images folder of textured JPEGs (full: 1024 x 768, samples at 512 px) is made for the
purpose, and shards of it. Rates are samples per second of CPU time of one thread, beside decoding
the same files with Pillow, or reading the tars, and doing nothing else; with workers they are per
second of the clock. A server of 100 MB a second shows whether shards are waited for. Where the time
of a sample goes, `python -m cProfile -s tottime -m benchmarks.loader` shows.
"""

import argparse
import csv
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

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
from benchmarks.memory import memory_rows, peak_memory
from data_scripts import make_shards
from data_scripts.make_small_world import Record, make_folders, write_annotations, write_pair
from elite.console import check_least, run
from elite.open_images import OpenImagesBoxes, OpenImagesMasks, Source
from elite.shard_cache import Listed, Store
from elite.shards import OpenImagesShards, open_source, save_index, shards_in, table_type
from elite.stream import TrainingStream, stream_loader

DECODE, SAMPLE, CSV_ALONE, INDEX = "decoding alone", "sample", "csv.reader alone", "index"
GOAL = Goal(SAMPLE, 10, "least", "median")
SHARDS, TARS = "sample from shards", "reading the tars alone"
SHARDS_GOAL = Goal(SHARDS, 0.9, "least")
SHARD_RATES = "Samples a second of CPU time from shards, one core"
SERVED_EPOCH = "An epoch of shards from a server of 100 MB a second"
EPOCH, FIRST, LATER = "an epoch", "waited in the first window", "waited after it"
BATCH_SIZE = 4
WINDOW = 2  # shards
SERVED, BLOCK = 100e6, 2**18  # bytes a second of the slow server, and at a time
IMAGES_A_SHARD, BOXES_AN_IMAGE = 1000, 8  # of Open Images in shards of 256 MB, about

Dataset = OpenImagesBoxes | OpenImagesMasks


class Sizes(NamedTuple):
    """Sides in pixels, and megabytes of a shard: a few pictures."""

    width: int
    height: int
    resolution: int
    clip: int
    shard_mb: float


SIZES = {"full": Sizes(1024, 768, 512, 224, 1), "tiny": Sizes(320, 240, 64, 32, 0.03)}


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


def open_datasets(source: Source | Path, sizes: Sizes) -> dict[str, Dataset]:
    fixed = {"resolution": sizes.resolution, "clip_size": sizes.clip}
    return {
        "stage 1, boxes": OpenImagesBoxes(source, **fixed),
        "stage 2, masks": OpenImagesMasks(source, latent_size=sizes.resolution // 8, **fixed),
    }


# --- rates ----------------------------------------------------------------------------------------


def rate(work: Callable[[], object], count: int) -> Measure:
    """Measures samples a second of CPU time, of `work` that is done with `count` of them."""
    seconds = timed(work, clock=time.process_time)
    return lambda: count / seconds()


def sample(dataset: Dataset) -> None:
    for index in range(len(dataset)):
        dataset.sample(index, np.random.default_rng(index))


def decode(root: Path, dataset: Dataset) -> None:
    """The files of all samples, decoded by Pillow."""
    for index in range(len(dataset)):
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


# --- shards ---------------------------------------------------------------------------------------


def open_shards(location: Path | str, cache: Path) -> OpenImagesShards:
    source = open_source(location, cache=cache, window=WINDOW)
    assert isinstance(source, OpenImagesShards)
    return source


def read_tars(shards: Path) -> None:
    """Every file of the tars."""
    for path in shards_in(shards):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                file.read()


def shard_table(
    datasets: dict[str, Dataset], shards: Path, cache: Path, sizes: Sizes, rounds: int
) -> Table:
    """Against the folder, with all shards in the cache."""
    source = open_shards(shards, cache)
    for listed in source.index.shards:
        source.store.path(listed)
    table = Table(SHARD_RATES, "1/s", SHARDS_GOAL)
    for name, dataset in open_datasets(source, sizes).items():
        count = len(dataset)
        cases = {
            SAMPLE: rate(partial(sample, datasets[name]), count),
            SHARDS: rate(partial(sample, dataset), count),
            TARS: rate(partial(read_tars, shards), count),
        }
        table.rows.append(Row(name, alternate(cases, rounds, name)))
    return table


class SlowHandler(SimpleHTTPRequestHandler):
    """Sends so many bytes a second to all who ask."""

    turn = threading.Lock()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while block := source.read(BLOCK):
            with self.turn:
                time.sleep(len(block) / SERVED)
            outputfile.write(block)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def served_slowly(folder: Path) -> Iterator[str]:
    """The URL of a folder."""
    handler = partial(SlowHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Watched:
    """A `Store` that counts the seconds in which its files are waited for."""

    def __init__(self, store: Store) -> None:
        self.store, self.seconds = store, 0.0

    def path(self, file: Listed) -> Path:
        start = time.perf_counter()
        try:
            return self.store.path(file)
        finally:
            self.seconds += time.perf_counter() - start

    def expect(self, files: Sequence[Listed]) -> None:
        self.store.expect(files)


def epoch_from_server(url: str, sizes: Sizes) -> dict[str, float]:
    """Seconds of an epoch of stage 1 that begins with an empty cache, and of it those in which it
    has waited for shards."""
    with TemporaryDirectory() as cache:
        source = open_shards(url, Path(cache))
        dataset = open_datasets(source, sizes)["stage 1, boxes"]
        source.store = store = Watched(source.store)
        stream, waited = TrainingStream(dataset, 0), [0.0, 0.0]
        start = time.perf_counter()
        for position in range(len(dataset)):
            before = store.seconds
            stream[position]
            waited[min(stream.order.find(position)[0], 1)] += store.seconds - before
        return {EPOCH: time.perf_counter() - start, FIRST: waited[0], LATER: waited[1]}


def server_table(shards: Path, sizes: Sizes, rounds: int) -> Table:
    table = Table(SERVED_EPOCH, "s")
    with served_slowly(shards) as url:
        seen = [epoch_from_server(url, sizes) for _ in range(rounds)]
    row = {case: [figures[case] for figures in seen] for case in (EPOCH, FIRST, LATER)}
    table.rows.append(Row(f"stage 1, windows of {WINDOW} shards", row))
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


def write_shard_index(folder: Path, count: int) -> None:
    """The index of so many boxes, in the order of their shards, without any shard."""
    images = np.zeros(-(-count // BOXES_AN_IMAGE), dtype=table_type("images", width=20))
    images["shard"] = np.arange(len(images)) // IMAGES_A_SHARD
    boxes = np.zeros(count, dtype=table_type("boxes"))
    boxes["image"] = np.arange(count) // BOXES_AN_IMAGE
    boxes["box"] = 0.25, 0.75, 0.25, 0.75
    tables = {"images": images, "boxes": boxes, "masks": np.zeros(0, dtype=table_type("masks"))}
    numbers = range(int(images["shard"][-1]) + 1)
    save_index(folder, [Listed(f"{n:06d}.tar", 256 * 10**6, "0" * 64) for n in numbers], tables)


def open_index(folder: str) -> dict[str, float]:
    """Memory and CPU seconds from nothing to the first position of the stream, the SHA-256 of the
    tables included."""
    start = time.process_time()
    memory = peak_memory(
        lambda: TrainingStream(OpenImagesBoxes(open_source(folder)), 0).order.row(0),
        torch.device("cpu"),
    )
    return {**memory, "seconds": time.process_time() - start}


def shard_index_tables(sizes: list[int], rounds: int) -> list[Table]:
    times = Table("CPU time to open shards, in a fresh process", "s")
    peaks = Table("Peak memory of opening shards, pages of the tables included", "MiB")
    for count in sizes:
        with TemporaryDirectory() as folder:
            write_shard_index(Path(folder), count)
            rows = memory_rows({INDEX: (folder,)}, open_index, rounds, f"{count:,} boxes")
        times.rows.append(rows["seconds"])
        peaks.rows.append(rows["above"])
    return [times, peaks]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "loader")
    parser.add_argument("--count", type=int, default=8, help="pictures (default 8)")
    parser.add_argument("--index_rows", type=int, nargs="+", default=[1000])
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[], help="of the loader; 0 is none (default no)"
    )
    parser.add_argument(
        "--shard_rows", type=int, nargs="*", default=[], help="boxes of shards to open (default no)"
    )
    args = parse(parser, "loader", argv)
    check_least(args, count=BATCH_SIZE)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    sizes = SIZES[args.size]
    with TemporaryDirectory() as folder:
        root, shards = Path(folder) / "open_images", Path(folder) / "shards"
        write_pictures(root, args.count, sizes.width, sizes.height)
        flags = ["--shard_mb", str(sizes.shard_mb), "--workers", "1"]
        make_shards.main([str(root), str(shards), *flags])
        datasets = open_datasets(root, sizes)
        tables = [
            rate_table(root, datasets, args.rounds),
            shard_table(datasets, shards, Path(folder) / "cache", sizes, args.rounds),
            server_table(shards, sizes, args.rounds),
        ]
        if args.workers:
            tables.append(worker_table(datasets, args.workers, args.rounds))
    tables.append(index_table(args.index_rows, args.rounds))
    tables += shard_index_tables(args.shard_rows, args.rounds)
    return finish(args, tables, "loader")


if __name__ == "__main__":
    run(main, keeps=False)
