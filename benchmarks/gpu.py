"""Everything at once on an NVIDIA GPU: denoising, share of the chip's matrix rate, every speed,
memory, training.

    python -m benchmarks.gpu --size full --rounds 7
    python -m benchmarks.gpu                           tiny models, on a CPU too: does it run?

ELITE against the stock pipeline at the model's own resolution (512 px), fp16 and bf16, eager and
compiled, batches of 1, 4 and 16 pictures. The matrix rate is that of a large product in the same
number type, measured beside the steps; FLOPs of a step are counted by torch. Whole pictures are
those of `benchmarks.ladder` and `benchmarks.hardware`, training that of `benchmarks.training`, at a
batch of 4. Exit code 2: no such GPU here for models of full size.
"""

import argparse
from functools import partial

import torch

from benchmarks import hardware, ladder, training
from benchmarks.generation import ELITE, GOAL, STOCK, Pipelines, measure
from benchmarks.harness import Row, Table, finish, make_parser, parse, timed
from benchmarks.models import DTYPES
from benchmarks.training import CASES, STAGES
from elite.console import run
from elite.defaults import DEFAULT_STEPS
from elite.hardware import pick_device
from elite.loading import side_in_pixels
from elite.speed import RUNGS

MATRIX_SIDE = {"full": 8192, "tiny": 256}
PRODUCTS = 20  # of matrices, a turn
MATRIX = "matrix product"


def step_flops(pipes: Pipelines, case: str, resolution: int, batch_size: int) -> int:
    """Of one denoising step: what three steps take more than two."""
    with pipes.ready(case):
        draw = partial(pipes.draw, case, resolution, batch_size)
        two, three = (
            ladder.counted_flops(partial(draw, num_inference_steps=steps)) for steps in (2, 3)
        )
    return three - two


def matrix_rate(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of square products."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.matmul(a, b)

    products()
    return PRODUCTS * 2 * side**3 / timed(products, device)()


def rate_row(step: Row, flops: dict[str, int], matrix: list[float]) -> Row:
    """TFLOP/s of the steps of a row beside those of matrix products."""
    rates = {MATRIX: [rate / 1e12 for rate in matrix]}
    for case, count in flops.items():
        rates[case] = [count / seconds / 1e12 for seconds in step.rounds[case]]
    return Row(step.name, rates)


def generation_tables(args: argparse.Namespace, device: torch.device) -> list[Table]:
    """Seconds of a step, rates, and seconds before the first step."""
    times = Table("Time of a denoising step", "s", GOAL)
    rates = Table("Rate of a denoising step", "TFLOP/s")
    before = Table("Time before the first step: text, and K and V once", "s")
    for name in args.dtypes:
        pipes = Pipelines(args.size, device, DTYPES[name], args.scheduler, compiled=False)
        resolution = side_in_pixels(pipes.elite.unet, pipes.elite.vae)
        flops = {
            size: {case: step_flops(pipes, case, resolution, size) for case in (STOCK, ELITE)}
            for size in args.batch_sizes
        }
        for pipes.compiled in (False,) if args.eager else (False, True):
            for batch_size in args.batch_sizes:
                label = f"{name}, {'compiled' if pipes.compiled else 'eager'}, batch {batch_size}"
                rows = measure(pipes, resolution, batch_size, args.steps, args.rounds, label)
                side = MATRIX_SIDE[args.size]
                matrix = [matrix_rate(side, DTYPES[name], device) for _ in range(args.rounds)]
                times.rows.append(rows["step"])
                rates.rows.append(rate_row(rows["step"], flops[batch_size], matrix))
                before.rows.append(rows["before"])
    return [times, rates, before]


def ladder_tables(args: argparse.Namespace, device: torch.device) -> list[Table]:
    """Whole pictures at every rung, in the first of the number types."""
    of_pictures = {"cases": list(RUNGS), "dtype": args.dtypes[0], "resolution": None}
    of_pictures |= {"batch_size": 1, "steps": DEFAULT_STEPS}
    return ladder.tables(argparse.Namespace(**{**vars(args), **of_pictures}), device)


def hardware_tables(args: argparse.Namespace, device: torch.device) -> list[Table]:
    """Whole pictures in little memory and with other kernels."""
    cases = [case for case in hardware.CASES if case != "compile" or not args.eager]
    of_pictures = {
        "cases": cases,
        "batch_sizes": [1, 4],
        "dtypes": args.dtypes[:1],
        "resolution": None,
        "steps": DEFAULT_STEPS,
        "rounds": args.memory_rounds,
    }
    return hardware.tables(argparse.Namespace(**{**vars(args), **of_pictures}), device)


def training_tables(args: argparse.Namespace, device: torch.device) -> list[Table]:
    cases = [name for name, case in CASES.items() if not (case.compiled and args.eager)]
    of_training = {"batch_size": args.train_batch_size, "stages": STAGES, "cases": cases}
    return training.tables(argparse.Namespace(**{**vars(args), **of_training}), device)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "gpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16", "bf16"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=10, help="a turn (default 10)")
    parser.add_argument("--scheduler", default="dpm++")
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--memory_rounds", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    return parse(parser, "gpu", argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.size == "full" and not torch.cuda.is_available():
        raise ValueError("no CUDA device here; run this on a machine with an NVIDIA GPU")
    device = pick_device(None)
    tables = generation_tables(args, device)
    tables += ladder_tables(args, device)
    if args.memory_rounds:
        tables += hardware_tables(args, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    tables += training_tables(args, device)
    return finish(args, tables, "gpu")


if __name__ == "__main__":
    run(main, keeps=False)
