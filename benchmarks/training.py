"""Time and memory of a training step, measure by measure, against the plain step.

    python -m benchmarks.training                      tiny models, a minute
    python -m benchmarks.training --size full --batch_size 1 --rounds 3
    python -m benchmarks.training --size xl --batch_size 1 --cases "+ bf16, checkpointing"

The plain step is float32 with every gradient that the authors' release computes: in stage 2 those
of the frozen global mapper too, through the text encoder (stage 1 has none to leave out, so its
first two cases are the same). Each case says what it adds. Batches are random, in the shapes of the
datasets; a step is loss, gradients and AdamW as `fit` has it. All cases of a stage share one model,
which is put in order between the turns, outside the timed part; where all of them have the frozen
parts in bfloat16, these never are in float32.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import (
    WITH_SDXL,
    Goal,
    Row,
    Table,
    alternate,
    finish,
    make_parser,
    parse,
    timed,
)
from benchmarks.memory import memory_rows, peak_memory
from benchmarks.models import PROMPT, build_parts
from elite.console import run
from elite.hardware import pick_device
from elite.loading import pixels_per_latent, side_in_pixels
from elite.mappers import Mapper
from elite.objectives import EliteObjective, GlobalObjective, LocalObjective

STAGES = {"global": "stage 1", "local": "stage 2"}


@dataclass(frozen=True)
class Measures:
    """How a step is computed."""

    autocast: bool = False  # bfloat16
    frozen_bf16: bool = False  # weights of all that is frozen
    checkpointing: bool = False  # activations of the UNet computed twice
    compiled: bool = False  # the UNet
    cached_latents: bool = False  # of stage 1; the VAE has nothing to do
    channels_last: bool = False  # weights of convolutions
    plain_attention: bool = False  # not fused, as `fit` has it over few positions
    fused: bool = True  # AdamW in one kernel
    needless_gradients: bool = False  # of the frozen global mapper


PLAIN, BEST = "plain", "+ bf16, cached latents"
LOW_MEMORY = "+ bf16, checkpointing"
GOAL = Goal(BEST, 0.4)  # of stage 1
MEMORY_GOAL = Goal(LOW_MEMORY, 12 * 1024, of="median")  # at batch 4
CASES = {
    PLAIN: Measures(needless_gradients=True),
    "needed gradients": Measures(),
    "AdamW not fused": Measures(fused=False),
    "+ channels_last": Measures(channels_last=True),
    "+ bf16": Measures(autocast=True),
    "+ bf16, frozen in bf16": Measures(autocast=True, frozen_bf16=True),
    LOW_MEMORY: Measures(autocast=True, frozen_bf16=True, checkpointing=True),
    "+ cached latents": Measures(cached_latents=True),
    BEST: Measures(autocast=True, frozen_bf16=True, cached_latents=True),
    f"{BEST}, attention not fused": Measures(
        autocast=True, frozen_bf16=True, cached_latents=True, plain_attention=True
    ),
    "+ bf16, compiled": Measures(autocast=True, frozen_bf16=True, compiled=True),
}


class Trainer:
    """One stage's objective and optimiser, for steps under any measures.

    Args:
        frozen: number type of what does not learn, unless the measures say otherwise.
    """

    def __init__(
        self,
        stage: str,
        size: str,
        device: torch.device,
        batch_size: int,
        frozen: torch.dtype = torch.float32,
    ) -> None:
        parts = build_parts(size, device, frozen)
        for name in ("global_mapper", "local_mapper"):
            parts[name].float()
        self.frozen = frozen
        mapper = parts["global_mapper"]
        self.objective: EliteObjective = (
            GlobalObjective(parts, mapper)
            if stage == "global"
            else LocalObjective(parts, mapper, parts["local_mapper"])
        )
        self.unet, self.device = parts["unet"], device
        self.compiled = torch.compile(self.unet, dynamic=False)
        self.optimizers = {
            fused: torch.optim.AdamW(self.objective.trained.parameters(), lr=1e-6, fused=fused)
            for fused in (True, False)
        }
        self.batch = random_batch(self.objective, batch_size)
        latent = torch.zeros(batch_size, *latent_shape(self.objective), device=device)
        without_pixels = {key: x for key, x in self.batch.items() if key != "pixels"}
        self.cached = {**without_pixels, "latent_mean": latent, "latent_std": latent + 1}

    @contextmanager
    def under(self, measures: Measures) -> Iterator[None]:
        """The model in order for these measures, and in float32 again after them."""
        objective = self.objective
        if measures.frozen_bf16:
            objective.cast_frozen(torch.bfloat16)
        if measures.channels_last:
            objective.to(memory_format=torch.channels_last)
        if measures.checkpointing:
            self.unet.enable_gradient_checkpointing()
        objective.unet = self.compiled if measures.compiled else self.unet
        needless = measures.needless_gradients and objective.local_mapper is not None
        try:
            with all_gradients(objective.global_mapper) if needless else nullcontext():
                yield
        finally:
            objective.unet = self.unet
            self.unet.disable_gradient_checkpointing()
            objective.cast_frozen(self.frozen)
            objective.to(memory_format=torch.contiguous_format)

    def step(self, measures: Measures) -> None:
        """One step, under `under`."""
        plain = sdpa_kernel(SDPBackend.MATH) if measures.plain_attention else nullcontext()
        with plain:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=measures.autocast):
                batch = self.cached if measures.cached_latents else self.batch
                loss = self.objective(batch)["loss"]
            loss.backward()
        self.optimizers[measures.fused].step()
        self.objective.zero_grad()

    def steps(self, measures: Measures, count: int) -> None:
        for _ in range(count):
            self.step(measures)


@contextmanager
def all_gradients(mapper: Mapper) -> Iterator[None]:
    """Within it, a frozen mapper is computed with gradients, as the release does in stage 2."""
    forward = mapper.forward
    mapper.requires_grad_(True)
    mapper.forward = torch.enable_grad()(forward)
    try:
        yield
    finally:
        del mapper.forward
        mapper.requires_grad_(False)


def random_batch(objective: EliteObjective, size: int) -> dict[str, Any]:
    """What the datasets of both stages give, collated."""
    device, generator = objective.unet.device, torch.Generator().manual_seed(0)
    side = side_in_pixels(objective.unet, objective.vae)
    clip_side = objective.image_encoder.config.image_size
    latent_size = latent_shape(objective)[1:]

    def pixels(channels: int, side: int) -> torch.Tensor:
        return torch.randn(size, channels, side, side, generator=generator).to(device)

    return {
        "pixels": pixels(3, side).clamp(-1, 1),
        "clip_pixels": pixels(3, clip_side),
        "object_pixels": pixels(3, clip_side),
        "object_mask": (pixels(1, clip_side) > 0).float(),
        "loss_mask": torch.ones(size, 1, *latent_size, device=device),
        "caption": [PROMPT] * size,
        "seed": torch.arange(size),
    }


def latent_shape(objective: EliteObjective) -> tuple[int, int, int]:
    """(C, h, w)."""
    side = side_in_pixels(objective.unet, objective.vae) // pixels_per_latent(objective.vae)
    return objective.unet.config.in_channels, side, side


def make_trainer(
    stage: str, size: str, device: torch.device, batch_size: int, cases: list[str]
) -> Trainer:
    """For steps of these cases."""
    in_bf16 = all(CASES[case].frozen_bf16 for case in cases)
    return Trainer(stage, size, device, batch_size, torch.bfloat16 if in_bf16 else torch.float32)


def training_peak(
    stage: str, case: str, size: str, device: torch.device, batch_size: int
) -> dict[str, float]:
    """Peak memory of two steps, in a process that has trained nothing before."""
    trainer, measures = make_trainer(stage, size, device, batch_size, [case]), CASES[case]
    with trainer.under(measures):
        return peak_memory(partial(trainer.steps, measures, 2), device)


def step_row(trainer: Trainer, cases: list[str], rounds: int, steps: int, name: str) -> Row:
    """Seconds of a step of every case."""

    def one(case: str) -> float:
        measures = CASES[case]
        with trainer.under(measures):
            trainer.step(measures)  # settles what the change of measures has stirred
            return timed(partial(trainer.steps, measures, steps), trainer.device)() / steps

    return Row(name, alternate({case: partial(one, case) for case in cases}, rounds, name))


def possible(case: str, stage: str) -> bool:
    """The targets of stage 2 are random, so that nothing of them can be cached."""
    return stage == "global" or not CASES[case].cached_latents


def tables(args: argparse.Namespace, device: torch.device) -> list[Table]:
    """Of every stage: seconds of a step, and peak memory without and with the loaded models."""
    times = []
    above = Table("Peak memory of training above the loaded models", "MiB")
    goal = MEMORY_GOAL if args.batch_size == 4 and LOW_MEMORY in args.cases else None
    total = Table("Peak memory of training, loaded models included", "MiB", goal)
    for stage in args.stages:
        name = f"{STAGES[stage]}, batch {args.batch_size}"
        cases = [case for case in args.cases if possible(case, stage)]
        if not cases:
            continue
        fixed = (args.size, device, args.batch_size)
        if args.memory_rounds:  # first, as there may be no room for another model later
            settings = {case: (stage, case, *fixed) for case in cases}
            rows = memory_rows(settings, training_peak, args.memory_rounds, name)
            above.rows.append(rows["above"])
            total.rows.append(rows["total"])
        trainer = make_trainer(stage, args.size, device, args.batch_size, cases)
        fast = GOAL if stage == "global" and cases[0] == PLAIN and BEST in cases else None
        row = step_row(trainer, cases, args.rounds, args.steps, name)
        times.append(Table(f"Time of a training step, {STAGES[stage]}", "s", fast, [row]))
        del trainer
    return [*times, above, total]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "training", WITH_SDXL)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=[name for name, measures in CASES.items() if not measures.compiled],
        help="the first is the baseline (default all but the compiled one)",
    )
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="a turn (default 2)")
    parser.add_argument("--device", help="default CUDA where it is, else the CPU")
    parser.add_argument(
        "--memory_rounds", type=int, default=1, help="0 leaves memory out (default 1)"
    )
    return parse(parser, "training", argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return finish(args, tables(args, pick_device(args.device)), "training")


if __name__ == "__main__":
    run(main, keeps=False)
