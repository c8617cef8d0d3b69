"""Time of a denoising step, and peak memory of a generation: ELITE against the stock pipeline.

    python -m benchmarks.generation                    tiny models, a minute
    python -m benchmarks.generation --size full --rounds 5 --batch_sizes 1 2 4 \
        --resolutions 256 512 768                      Stable Diffusion v1-4's sizes

Three cases share one UNet, scheduler, batch, number type and size: the stock pipeline; ELITE with a
concept; and ELITE with K and V computed at each step, as when a callback may change the text. A
step is timed inside the loop, from the end of the first step to the end of the last; what comes
before (text, K and V) has a table of its own. Memory is measured in a fresh process a case, where
the stock pipeline does not hold ELITE's image encoder and mappers.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.harness import (
    Goal,
    Row,
    Table,
    alternate,
    finish,
    make_parser,
    parse,
    synchronize,
    use_threads,
)
from benchmarks.memory import memory_rows, peak_memory
from benchmarks.models import (
    DTYPES,
    PROMPT,
    build_elite,
    build_parts,
    build_stable_diffusion,
    build_stock,
    plain,
    random_concept,
)
from elite.console import run
from elite.inference import pick_device
from elite.loading import DEFAULT_SAMPLER, SCHEDULERS, side_in_pixels
from elite.pipeline import initial_noise

STOCK, ELITE, EACH_STEP = "stock", "ELITE", "K and V at each step"
CASES = (STOCK, ELITE, EACH_STEP)
GOAL = Goal(ELITE, 1.02)
GUIDANCE = 5.0

Draw = Callable[..., object]  # with options of the pipeline's call


class Pipelines:
    """The three cases over one set of parts.

    Args:
        compiled: the UNet is compiled, for each setting anew.
    """

    def __init__(
        self, size: str, device: torch.device, dtype: torch.dtype, scheduler: str, compiled: bool
    ) -> None:
        self.parts = build_parts(size, device, dtype, scheduler)
        self.elite, self.stock = build_elite(self.parts), build_stock(self.parts)
        self.device = device
        self.compiled = compiled
        self.concept = random_concept(self.elite)

    def draw(self, case: str, resolution: int, batch_size: int, **options: Any) -> None:
        """One generation under `ready`, to latents unless the options say otherwise."""
        if case == STOCK:
            _draw_stock(self.stock, resolution, batch_size, **options)
        else:
            _draw_elite(self.elite, case, self.concept, resolution, batch_size, **options)

    def ready(self, case: str) -> AbstractContextManager[None]:
        """Within it, the shared UNet is the one of this case."""
        return plain(self.parts) if case == STOCK else nullcontext()

    def recompile(self) -> None:
        """Compiles for shapes to come, and forgets those before."""
        if self.compiled:
            torch.compiler.reset()
            compiled = torch.compile(self.parts["unet"], dynamic=False)
            self.elite.unet = self.stock.unet = compiled


def _draw_stock(pipe: Any, resolution: int, batch_size: int, **options: Any) -> None:
    latents = initial_noise(pipe, range(batch_size), resolution, resolution)
    pipe([PROMPT] * batch_size, latents=latents, **_common(resolution, options))


def _draw_elite(
    pipe: Any, case: str, concept: Any, resolution: int, batch_size: int, **options: Any
) -> None:
    if case == EACH_STEP:
        options["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
        options.setdefault("callback_on_step_end", lambda pipe, step, t, tensors: tensors)
    pipe(
        [PROMPT] * batch_size,
        concept=concept,
        seed=list(range(batch_size)),
        **_common(resolution, options),
    )


def _common(resolution: int, options: dict[str, Any]) -> dict[str, Any]:
    size = {"height": resolution, "width": resolution, "guidance_scale": GUIDANCE}
    return {"output_type": "latent", **size, **options}


def step_time(
    draw: Draw,
    unet: nn.Module,
    steps: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Seconds of a step, and of all that comes before the UNet's first call."""
    stamps: list[float] = []

    def stamp() -> None:
        synchronize(device)
        stamps.append(clock())

    def before_unet(module: nn.Module, inputs: tuple) -> None:
        if len(stamps) == 1:
            stamp()

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in (0, steps - 1):
            stamp()
        return tensors

    with unet.register_forward_pre_hook(before_unet):
        stamp()
        draw(num_inference_steps=steps, callback_on_step_end=after_step)
    start, begin, first, last = stamps
    return (last - first) / (steps - 1), begin - start


def measure(
    pipes: Pipelines, resolution: int, batch_size: int, steps: int, rounds: int, name: str
) -> tuple[Row, Row]:
    """Seconds of a step, and before the first, of every case."""
    pipes.recompile()
    before: dict[str, list[float]] = {case: [] for case in CASES}

    def one(case: str) -> float:
        draw = partial(pipes.draw, case, resolution, batch_size)
        with pipes.ready(case):
            step, preparation = step_time(draw, pipes.elite.unet, steps, pipes.device)
        before[case].append(preparation)
        return step

    for case in CASES:  # warm up
        with pipes.ready(case):
            pipes.draw(case, resolution, batch_size, num_inference_steps=2)
    figures = alternate({case: partial(one, case) for case in CASES}, rounds, name)
    return Row(name, figures), Row(name, before)


def generation_peak(
    case: str,
    size: str,
    device: torch.device,
    dtype: str,
    resolution: int,
    batch_size: int,
    output_type: str,
    threads: int | None,
) -> dict[str, float]:
    """Peak memory of one generation of two steps, in a process that has drawn nothing before."""
    use_threads(threads)
    options = {"num_inference_steps": 2, "output_type": output_type}
    if case == STOCK:
        parts = build_stable_diffusion(size, device, DTYPES[dtype])
        draw = partial(_draw_stock, build_stock(parts))
    else:
        pipe = build_elite(build_parts(size, device, DTYPES[dtype]))
        draw = partial(_draw_elite, pipe, case, random_concept(pipe))
    return peak_memory(partial(draw, resolution, batch_size, **options), device)


def time_tables(pipes: Pipelines, args: argparse.Namespace, resolution: int) -> list[Table]:
    """At the usual size over batch sizes, and one picture over resolutions."""
    steps, rounds = args.steps, args.rounds
    by_batch = Table("Time of a denoising step, by pictures a batch", "s", GOAL)
    by_side = Table("Time of a denoising step, by resolution, one picture", "s", GOAL)
    before = Table("Time before the first step: text, and K and V once", "s")
    for batch_size in args.batch_sizes:
        name = f"{resolution} px, batch {batch_size}"
        step, preparation = measure(pipes, resolution, batch_size, steps, rounds, name)
        by_batch.rows.append(step)
        before.rows.append(preparation)
    for side in args.resolutions:
        step, _ = measure(pipes, side, 1, steps, rounds, f"{side} px, batch 1")
        by_side.rows.append(step)
    return [by_batch, by_side, before]


def memory_tables(
    size: str,
    device: torch.device,
    dtypes: Sequence[str],
    resolution: int,
    batch_size: int,
    threads: int | None,
    rounds: int,
) -> list[Table]:
    """Of the denoising loop and of whole pictures, without and with what was there before."""
    above = Table("Peak memory of a generation above the loaded models", "MiB", GOAL)
    total = Table("Peak memory of a generation, loaded models included", "MiB", GOAL)
    for dtype in dtypes:
        for output_type, what in (("latent", "denoising"), ("np", "whole picture")):
            setting = (size, device, dtype, resolution, batch_size, output_type, threads)
            name = f"{what}, {dtype}, {resolution} px, batch {batch_size}"
            cases = {case: (case, *setting) for case in CASES}
            rows = memory_rows(cases, generation_peak, rounds, name)
            above.rows.append(rows["above"])
            total.rows.append(rows["total"])
    return [above, total]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__, "generation")
    parser.add_argument("--steps", type=int, default=4, help="a generation (default 4)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--resolutions", type=int, nargs="*", default=[], help="growth at one picture (default no)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default=DEFAULT_SAMPLER)
    parser.add_argument("--compile", action="store_true", help="the UNet")
    parser.add_argument("--device", help="default CUDA where it is, else the CPU")
    parser.add_argument(
        "--memory_rounds", type=int, default=1, help="0 leaves memory out (default 1)"
    )
    args = parse(parser, "generation", argv)
    if args.steps < 2:
        raise ValueError(f"--steps {args.steps}: expected 2 or more; the first is not timed")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    device = pick_device(args.device)
    pipes = Pipelines(args.size, device, DTYPES[args.dtype], args.scheduler, args.compile)
    resolution = side_in_pixels(pipes.elite.unet, pipes.elite.vae)
    tables = time_tables(pipes, args, resolution)
    del pipes
    if args.memory_rounds:
        setting = (args.size, device, [args.dtype], resolution, args.batch_sizes[0], args.threads)
        tables += memory_tables(*setting, args.memory_rounds)
    return finish(args, tables, "generation")


if __name__ == "__main__":
    run(main)
