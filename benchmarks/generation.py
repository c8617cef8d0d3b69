"""Time of a denoising step, and peak memory of a generation: ELITE against the stock pipeline.

    python -m benchmarks.generation                    tiny models, a minute
    python -m benchmarks.generation --size full --rounds 5 --batch_sizes 1 2 4 \
        --resolutions 256 512 768                      Stable Diffusion v1-4's sizes
    python -m benchmarks.generation --size xl --dtype bf16 --memory_rounds 0    SDXL's

Three cases share one UNet, scheduler, batch, number type and size: the stock pipeline; ELITE with a
concept; and ELITE with K and V computed at each step, as when a callback may change the text. A
step is timed inside the loop, from the end of the first step to the end of the last; what comes
before (text, K and V) has a table of its own. On a CPU the cross-attentions are timed by
themselves, too: all else of a step is the same code in every case, so that the step of the stock
pipeline with their difference added says more than the whole step on a busy machine. Memory is
measured in a fresh process a case, where the stock pipeline does not hold ELITE's image encoder and
mappers.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.harness import (
    WITH_SDXL,
    Goal,
    Row,
    Table,
    alternate,
    finish,
    make_parser,
    parse,
    synchronize,
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
from elite.defaults import DEFAULT_SAMPLER, GUIDANCE_SCALE
from elite.hardware import compile_blocks, pick_device
from elite.loading import SCHEDULERS, side_in_pixels
from elite.mappers import cross_attention_layers
from elite.pipeline import initial_noise, make_generators

STOCK, ELITE, EACH_STEP = "stock", "ELITE", "K and V at each step"
CASES = (STOCK, ELITE, EACH_STEP)
GOAL = Goal(ELITE, 1.02)


class Pipelines:
    """The three cases over one set of parts.

    Args:
        compiled: the UNet's blocks are, as by --compile, for each setting anew.
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
            draw_elite(self.elite, case, self.concept, resolution, batch_size, **options)

    def ready(self, case: str) -> AbstractContextManager[None]:
        """Within it, the shared UNet is the one of this case."""
        return plain(self.parts) if case == STOCK else nullcontext()

    def recompile(self) -> None:
        """Compiles for shapes to come, and forgets those before."""
        if self.compiled:
            torch.compiler.reset()
            compile_blocks(self.parts["unet"])


def _draw_stock(pipe: Any, resolution: int, batch_size: int, **options: Any) -> None:
    latents = initial_noise(pipe, make_generators(range(batch_size)), resolution, resolution)
    pipe([PROMPT] * batch_size, latents=latents, **_common(resolution, options))


def draw_elite(
    pipe: Any, case: str, concept: Any, resolution: int, batch_size: int, **options: Any
) -> None:
    """One generation of ELITE or EACH_STEP, to latents unless the options say otherwise."""
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
    size = {"height": resolution, "width": resolution, "guidance_scale": GUIDANCE_SCALE}
    return {"output_type": "latent", **size, **options}


class Times(NamedTuple):
    """Seconds."""

    step: float
    before: float  # all that comes before the UNet's first call
    attention: float  # of a step, in the cross-attentions


@contextmanager
def timed_modules(
    modules: Iterable[nn.Module], clock: Callable[[], float]
) -> Iterator[list[tuple[float, float]]]:
    """Within it, the list grows by start and end of each call of these modules."""
    calls: list[tuple[float, float]] = []
    starts: list[float] = []
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(lambda *_: starts.append(clock())))
        hooks.append(module.register_forward_hook(lambda *_: calls.append((starts.pop(), clock()))))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def step_time(
    draw: Callable[..., object],  # with options of the pipeline's call
    unet: nn.Module,
    steps: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    attentions: Iterable[nn.Module] = (),
) -> Times:
    """Times of one generation of so many steps."""
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

    with unet.register_forward_pre_hook(before_unet), timed_modules(attentions, clock) as calls:
        stamp()
        draw(num_inference_steps=steps, callback_on_step_end=after_step)
    start, begin, first, last = stamps
    within = sum(end - begun for begun, end in calls if begun > first)
    return Times((last - first) / (steps - 1), begin - start, within / (steps - 1))


def measure(
    pipes: Pipelines, resolution: int, batch_size: int, steps: int, rounds: int, name: str
) -> dict[str, Row]:
    """Seconds of every case by the names of `Times`; attention only where it was timed."""
    pipes.recompile()
    unet = pipes.elite.unet
    is_timed = pipes.device.type == "cpu" and not pipes.compiled
    attentions = list(cross_attention_layers(unet).values()) if is_timed else []
    times: dict[str, list[Times]] = {case: [] for case in CASES}

    def one(case: str) -> float:
        draw = partial(pipes.draw, case, resolution, batch_size)
        with pipes.ready(case):
            found = step_time(draw, unet, steps, pipes.device, attentions=attentions)
        times[case].append(found)
        return found.step

    for case in CASES:  # warm up
        with pipes.ready(case):
            pipes.draw(case, resolution, batch_size, num_inference_steps=2)
    alternate({case: partial(one, case) for case in CASES}, rounds, name)
    kinds = [kind for kind in Times._fields if attentions or kind != "attention"]
    return {
        kind: Row(name, {case: [getattr(x, kind) for x in found] for case, found in times.items()})
        for kind in kinds
    }


def stock_step_with(attention: Row, step: Row) -> Row:
    """The step of the stock pipeline of each round, with the cross-attentions of each case."""
    usual = list(zip(step.rounds[STOCK], attention.rounds[STOCK], strict=True))
    rounds_of = {
        case: [whole - part + own for (whole, part), own in zip(usual, mine, strict=True)]
        for case, mine in attention.rounds.items()
    }
    return Row(step.name, rounds_of)


def generation_peak(
    case: str,
    size: str,
    device: torch.device,
    dtype: str,
    resolution: int,
    batch_size: int,
    output_type: str,
) -> dict[str, float]:
    """Peak memory of one generation of two steps, in a process that has drawn nothing before."""
    options = {"num_inference_steps": 2, "output_type": output_type}
    if case == STOCK:
        parts = build_stable_diffusion(size, device, DTYPES[dtype])
        draw = partial(_draw_stock, build_stock(parts))
    else:
        pipe = build_elite(build_parts(size, device, DTYPES[dtype]))
        draw = partial(draw_elite, pipe, case, random_concept(pipe))
    return peak_memory(partial(draw, resolution, batch_size, **options), device)


def time_tables(pipes: Pipelines, args: argparse.Namespace, resolution: int) -> list[Table]:
    """At the usual size over batch sizes, and one picture over resolutions."""
    steps, rounds = args.steps, args.rounds
    by_batch = Table("Time of a denoising step, by pictures a batch", "s")
    by_side = Table("Time of a denoising step, by resolution, one picture", "s")
    before = Table("Time before the first step: text, and K and V once", "s")
    attention = Table("Time of a step in its cross-attentions", "s")
    alike = Table("Step of the stock pipeline with the cross-attentions of each", "s", GOAL)
    settings = [(resolution, size, by_batch) for size in args.batch_sizes]
    settings += [(side, 1, by_side) for side in args.resolutions]
    for side, batch_size, table in settings:
        name = f"{side} px, batch {batch_size}"
        rows = measure(pipes, side, batch_size, steps, rounds, name)
        table.rows.append(rows["step"])
        before.rows.append(rows["before"])
        if "attention" in rows:
            attention.rows.append(rows["attention"])
            alike.rows.append(stock_step_with(rows["attention"], rows["step"]))
    return [by_batch, by_side, alike, attention, before]


def memory_tables(args: argparse.Namespace, device: torch.device, resolution: int) -> list[Table]:
    """Of the denoising loop and of whole pictures, without and with what was there before."""
    above = Table("Peak memory of a generation above the loaded models", "MiB", GOAL)
    total = Table("Peak memory of a generation, loaded models included", "MiB", GOAL)
    drawn = (args.size, device, args.dtype, resolution, args.batch_sizes[0])
    for output_type, what in (("latent", "denoising"), ("np", "whole picture")):
        name = f"{what}, {args.dtype}, {resolution} px, batch {args.batch_sizes[0]}"
        cases = {case: (case, *drawn, output_type) for case in CASES}
        rows = memory_rows(cases, generation_peak, args.memory_rounds, name)
        above.rows.append(rows["above"])
        total.rows.append(rows["total"])
    return [above, total]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "generation", WITH_SDXL)
    parser.add_argument("--steps", type=int, default=4, help="a generation (default 4)")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="*", default=[1, 2], help="memory is that of the first"
    )
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
    args = parse_args(argv)
    device = pick_device(args.device)
    pipes = Pipelines(args.size, device, DTYPES[args.dtype], args.scheduler, args.compile)
    resolution = side_in_pixels(pipes.elite.unet, pipes.elite.vae)
    tables = time_tables(pipes, args, resolution)
    del pipes
    if args.memory_rounds and args.batch_sizes:
        tables += memory_tables(args, device, resolution)
    return finish(args, tables, "generation")


if __name__ == "__main__":
    run(main, keeps=False)
