"""Whole pictures at every speed against the stock pipeline: their time, and FLOPs counted by torch.

    python -m benchmarks.ladder                        tiny models, a minute
    python -m benchmarks.ladder --size full --rounds 5 --cases exact balanced fast

The baseline is the stock pipeline with 20 steps of UniPC and guidance. Beside it its own default of
50 steps of PNDM, the rungs of `elite/speed.py`, and each of their knobs alone. A picture is all of
a call: text, K and V, every step, and the VAE. FLOPs are those of matrix products, convolutions and
attention, counted in the call that warms up.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.generation import ELITE, STOCK, Pipelines
from benchmarks.harness import Goal, Row, Table, alternate, finish, make_parser, parse, timed
from benchmarks.models import DTYPES
from elite.console import run
from elite.defaults import DEFAULT_SAMPLER, DEFAULT_STEPS
from elite.hardware import pick_device
from elite.loading import make_scheduler, side_in_pixels
from elite.speed import RUNGS, single_knobs

STOCK_DEFAULT, STOCK_SAMPLER, STOCK_STEPS = "stock, 50 steps of PNDM", "pndm", 50
GOALS = {"exact": 1.02, "balanced": 0.5, "fast": 0.3}  # of the time of the stock pipeline
CASES = (STOCK_DEFAULT, *RUNGS, *single_knobs())


def picture(pipes: Pipelines, case: str, resolution: int, batch_size: int, steps: int) -> None:
    """One call of a case."""
    options = {"num_inference_steps": steps, "output_type": "np"}
    is_stock = case in (STOCK, STOCK_DEFAULT)
    if case == STOCK_DEFAULT:
        options["num_inference_steps"] = STOCK_STEPS
    if not is_stock:
        options["speed"] = {**RUNGS, **single_knobs()}[case]
    sampler = STOCK_SAMPLER if case == STOCK_DEFAULT else DEFAULT_SAMPLER
    pipes.stock.scheduler = pipes.elite.scheduler = make_scheduler(sampler)
    kind = STOCK if is_stock else ELITE
    with pipes.ready(kind):
        pipes.draw(kind, resolution, batch_size, **options)


def counted_flops(work: Callable[[], object]) -> int:
    """Torch alone leaves out the fused attention of CPUs."""

    def attention_flops(Q: tuple, K: tuple, V: tuple, *_: object, **__: object) -> int:  # shapes
        return sdpa_flop_count(Q, K, V)

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={fused: attention_flops})
    with counter:
        work()
    return counter.get_total_flops()


def tables(args: argparse.Namespace, device: torch.device) -> list[Table]:
    """Times with a goal for each rung, times of all else, FLOPs."""
    pipes = Pipelines(args.size, device, DTYPES[args.dtype], DEFAULT_SAMPLER, compiled=False)
    side = args.resolution or side_in_pixels(pipes.elite.unet, pipes.elite.vae)
    setting = {"resolution": side, "batch_size": args.batch_size, "steps": args.steps}
    works = {case: partial(picture, pipes, case, **setting) for case in (STOCK, *args.cases)}
    name = f"{side} px, batch {args.batch_size}, {args.dtype}"
    flops = Row(name, {case: [counted_flops(work) / 1e12] for case, work in works.items()})
    figures = {case: timed(work, device) for case, work in works.items()}
    times = alternate(figures, args.rounds, name)

    def row(*cases: str) -> Row:
        return Row(name, {case: times[case] for case in (STOCK, *cases)})

    rungs = [rung for rung in RUNGS if rung in works]
    others = [case for case in works if case not in (STOCK, *rungs)]
    found = [
        Table(f"Time of a whole picture, {rung}", "s", Goal(rung, GOALS[rung]), [row(rung)])
        for rung in rungs
    ]
    if others:
        found.append(Table("Time of a whole picture, single knobs and others", "s", None))
        found[-1].rows.append(row(*others))
    return [*found, Table("Work of a whole picture", "TFLOP", None, [flops])]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "ladder")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="of all but stock's 50")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--resolution", type=int, help="default the model's own")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="default all"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", help="default CUDA where it is, else the CPU")
    return parse(parser, "ladder", argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return finish(args, tables(args, pick_device(args.device)), "ladder")


if __name__ == "__main__":
    run(main, keeps=False)
