"""Pictures a second of a whole folder, by batch size and by processes: the small world on
test_datasets/.

    python -m benchmarks.folder                                      4 pairs, 4 steps
    python -m benchmarks.folder --size full --rounds 5 --processes 1 2

Full is all sixteen pairs, each with --num_images seeds, at 20 steps. In-process rows are what
`inference_local.py` does after loading: read, encode, draw, write files and contact sheet. Rows
over processes are the whole command under `accelerate launch`, imports included, with the machine's
cores shared out evenly.
"""

import argparse
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.harness import REPOSITORY, Row, Table, alternate, finish, make_parser, parse
from elite import ElitePipeline
from elite.console import run
from elite.data import PairFolder
from elite.drawing import Drawing, draw_folder
from elite.hardware import pick_device
from small_world.flags import MODEL

PAIRS = REPOSITORY / "test_datasets"
PAIRS_DRAWN = {"tiny": 4, "full": 16}
STEPS = {"tiny": 4, "full": 20}
LAUNCH = {1: "configs/cpu.json", 2: "configs/cpu_2.json"}
SEED = 42


def pictures_a_second(pipe: ElitePipeline, args: argparse.Namespace, batch_size: int) -> float:
    """One drawing of the folder in this process."""
    pairs = PairFolder(PAIRS)
    indices = range(min(PAIRS_DRAWN[args.size], len(pairs)))
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        failures = draw_folder(
            pipe,
            pairs,
            Path(folder),
            Drawing(num_inference_steps=STEPS[args.size]),
            prompt="a photo of a S",
            seeds=range(SEED, SEED + args.num_images),
            indices=indices,
            batch_size=batch_size,
        )
        seconds = time.perf_counter() - start
    if failures:
        raise ValueError(f"{PAIRS}: cannot be drawn whole: {'; '.join(failures)}")
    return len(indices) * args.num_images / seconds


def launched_pictures_a_second(args: argparse.Namespace, processes: int) -> float:
    """One run of inference_local.py over the whole folder by so many processes."""
    pictures = len(PairFolder(PAIRS)) * args.num_images
    threads = max(1, (os.cpu_count() or 1) // processes)
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", LAUNCH[processes], "inference_local.py"]
        command += ["--output_dir", folder, "--num_images", str(args.num_images), "--device", "cpu"]
        command += ["--num_inference_steps", str(STEPS[args.size])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
    if done.returncode:
        raise ValueError(f"inference_local.py failed: {done.stderr.strip().splitlines()[-1]}")
    return pictures / seconds


def tables(args: argparse.Namespace, device: torch.device) -> list[Table]:
    pipe = ElitePipeline.from_stable_diffusion(MODEL).to(device)
    pipe.set_progress_bar_config(disable=True)
    by_batch = Table("Pictures a second in one process, by batch size", "1/s")
    by_process = Table("Pictures a second of the whole command, by processes", "1/s")
    name = f"{STEPS[args.size]} steps, {args.num_images} a pair"
    cases = {
        f"batch {size}": partial(pictures_a_second, pipe, args, size) for size in args.batch_sizes
    }
    for measure in cases.values():
        measure()  # warm up
    by_batch.rows.append(Row(name, alternate(cases, args.rounds, name)))
    if args.processes:
        cases = {
            f"{count} process{'es' * (count > 1)}": partial(launched_pictures_a_second, args, count)
            for count in args.processes
        }
        by_process.rows.append(Row(name, alternate(cases, args.rounds, name)))
    return [by_batch, by_process]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "folder")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--num_images", type=int, default=1, help="seeds a pair (default 1)")
    parser.add_argument(
        "--processes", type=int, nargs="*", choices=LAUNCH, default=[], help="default no such rows"
    )
    parser.add_argument("--device", help="default CUDA where it is, else the CPU")
    return parse(parser, "folder", argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return finish(args, tables(args, pick_device(args.device)), "folder")


if __name__ == "__main__":
    run(main, keeps=False)
