"""What each speed costs in likeness and prompt following, on the small world.

    python -m benchmarks.quality --output_dir runs/quality               300 pictures a speed
    python -m benchmarks.quality --output_dir runs/quality --guidance_stop 0.7 0.8 --deep_every 3

Held-out critters, each read from one picture and drawn in another scene from the same noise: at
every rung of `elite/speed.py`, with each of their knobs alone, and with the knobs that flags name.
The judge says what is seen; differences to `exact` are paired, with bootstrap intervals over the
critters. Work is counted by torch on this very model, or taken from a file of `benchmarks.ladder`;
beside it that of the same steps of a UNet of Stable Diffusion v1-4's size.
OUTPUT_DIR receives results.md, results.json, cost.png and grid.png; what is drawn already is kept.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel

from benchmarks.ladder import counted_flops
from benchmarks.models import TEXT_LENGTH, UNET
from elite.console import OK, run, script_parser
from elite.deep_features import deep_features_reused
from elite.defaults import DEFAULT_SAMPLER, LAMBDA
from elite.files import check_writable, read_text, write_atomically, write_json, write_text
from elite.loading import make_scheduler
from elite.markdown import table
from elite.speed import RUNGS, Speed, single_knobs
from small_world.claims import Condition, Interval, Verdicts, fidelity, interval
from small_world.classifier import Judge, load_judge
from small_world.flags import add_drawing, check_drawing
from small_world.methods import Method, Pictures, verdicts
from small_world.models import digest_weight_files
from small_world.report import contact_sheet
from small_world.samplers import FAR
from small_world.score import draw_concepts, gallery, load_elite, make_cases

EXACT = "exact"
SCORES: dict[str, Callable[[Verdicts], np.ndarray]] = {
    "likeness": fidelity,
    "scene": itemgetter("scene"),
    "identity": itemgetter("identity"),
}
# What may be lost of each score; where it is more than MAY_LOSE, pictures may also be far.
MAY_LOSE = 0.02
FAST_MAY_LOSE = {"fast": 0.05}
SHEET_CASES = 8


@dataclass(frozen=True)
class Compared:
    """A speed beside `exact`.

    Args:
        found: verdicts of its pictures, of `exact` those of the same critters.
        distances: mean absolute difference of each picture to that of `exact`, of 255, (N,).
        work: share of that of `exact`.
        full_work: the same of the steps at full size.
    """

    name: str
    found: Verdicts
    of_exact: Verdicts
    distances: np.ndarray
    work: float
    full_work: float

    @cached_property
    def scores(self) -> dict[str, Interval]:
        return {name: interval(score(self.found)) for name, score in SCORES.items()}

    @cached_property
    def lost(self) -> list[Condition]:
        """Differences to `exact`, each with the bound that it should be above."""
        bound = -FAST_MAY_LOSE.get(self.name, MAY_LOSE)
        return [
            Condition(f"{name}:", interval(score(self.found) - score(self.of_exact), -1.0), bound)
            for name, score in SCORES.items()
        ]

    @property
    def far(self) -> float:
        """Share of its pictures that are far from those of `exact`."""
        return float((self.distances > FAR).mean())

    @property
    def holds(self) -> bool:
        """Whether no more is lost than may be."""
        may_be_far = self.name in FAST_MAY_LOSE
        return (may_be_far or not self.far) and all(x.difference[1] > x.bound for x in self.lost)


def speeds(guidance_stops: list[float], deep_everys: list[int]) -> dict[str, Speed]:
    """The rungs, their knobs alone and those of the flags, by name."""
    more = [Speed(guidance_stop=x) for x in guidance_stops]
    more += [Speed(deep_every=x) for x in deep_everys]
    return {**RUNGS, **single_knobs(), **{str(speed): speed for speed in more}}


def counted_work(methods: Mapping[str, Method]) -> dict[str, float]:
    """FLOPs of each speed's first picture, as a share of those of `exact`."""
    flops = {
        name: counted_flops(partial(method.draw, method.tasks[:1]))
        for name, method in methods.items()
    }
    return {name: count / flops[EXACT] for name, count in flops.items()}


def work_at_full_size(
    speeds: Mapping[str, Speed], steps: int, size: str = "full"
) -> dict[str, float]:
    """FLOPs of all steps of a UNet of this size, as shares of those of EXACT. Counted without
    weights: a whole step, a step of the outermost layer alone, and as many rows as run."""
    with init_empty_weights():
        unet = UNet2DConditionModel(**UNET[size])
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.empty(2, unet.config.in_channels, side, side, device="meta")
    context = torch.empty(2, TEXT_LENGTH, width, device="meta")
    t = torch.empty(2, device="meta")
    with torch.no_grad(), deep_features_reused(unet, Speed(deep_every=2).runs_whole):
        whole, shallow = (counted_flops(partial(unet, latents, t, context)) for _ in range(2))

    def flops(speed: Speed) -> float:
        guided = speed.guided_steps(steps)
        of_rows = [1.0] * guided + [0.5] * (steps - guided)
        return sum(
            rows * (whole if speed.runs_whole(step) else shallow)
            for step, rows in enumerate(of_rows)
        )

    return {name: flops(speed) / (steps * whole) for name, speed in speeds.items()}


def work_of_ladder(path: Path, names: Iterable[str]) -> dict[str, float]:
    """The same from a file of `benchmarks.ladder`.

    Raises:
        ValueError: not such a file, or a speed is not in it.
    """
    try:
        tables = json.loads(read_text(path, "expected a file of benchmarks.ladder"))["tables"]
        (row,) = (x["rows"][0] for x in tables if x["title"] == "Work of a whole picture")
        return {name: row["medians"][name] / row["medians"][EXACT] for name in names}
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path}: no work of every speed in it ({error}); leave out --ladder"
        ) from None


def compare(
    methods: Mapping[str, Method],
    drawn: Mapping[str, np.ndarray],
    judge: Judge,
    work: Mapping[str, float],
    full_work: Mapping[str, float],
) -> list[Compared]:
    """Every speed beside `exact`, by its pictures, uint8 (N, H, W, 3), and shares of work."""
    known = gallery(judge, methods[EXACT].tasks)
    found = {name: verdicts(judge, m.tasks, drawn[name], known) for name, m in methods.items()}

    def distances(name: str) -> np.ndarray:
        return np.abs(drawn[name].astype(int) - drawn[EXACT]).mean(axis=(1, 2, 3))

    return [
        Compared(name, found[name], found[EXACT], distances(name), work[name], full_work[name])
        for name in drawn
    ]


# --- report ---------------------------------------------------------------------------------------


def markdown(compared: list[Compared]) -> str:
    """A line per speed: work, every score, what it loses, how far its pictures are."""
    lost = [f"{name} lost" for name in SCORES]
    rows = []
    for one in compared:
        cells = [one.name, f"{one.work:.2f}", f"{one.full_work:.2f}"]
        cells += [f"{100 * one.scores[name][0]:.1f}" for name in SCORES]
        cells += ["{:+.1f} ({:+.1f} to {:+.1f})".format(*_points(x.difference)) for x in one.lost]
        cells += [f"{one.far:.1%}", "-" if one.name == EXACT else "yes" if one.holds else "no"]
        rows.append(cells)
    return table(["speed", "work", "at full size", *SCORES, *lost, "far", "holds"], rows)


def _points(difference: Interval) -> list[float]:
    return [100 * value for value in difference]


def plot_cost(compared: list[Compared], path: Path) -> None:
    """Each score over work, with its interval: rungs joined by a line, single knobs as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(SCORES), 4), dpi=110)
    all_axes = figure.subplots(1, len(SCORES))
    rungs = [one for one in compared if one.name in RUNGS]
    for axes, score in zip(all_axes, SCORES, strict=True):
        alone = [[one] for one in compared if one not in rungs]
        for group, label in [(rungs, "rungs"), *((one, one[0].name) for one in alone)]:
            mean, low, high = (
                np.array(x) for x in zip(*(o.scores[score] for o in group), strict=True)
            )
            style = {"fmt": "o-" if group is rungs else "s", "capsize": 2, "elinewidth": 0.6}
            x, error = [one.work for one in group], 100 * np.stack([mean - low, high - mean])
            axes.errorbar(x, 100 * mean, yerr=error, label=label, **style)
        for one in rungs:
            at = (one.work, 100 * one.scores[score][0])
            axes.annotate(one.name, at, textcoords="offset points", xytext=(5, 5), fontsize=8)
        axes.set(xlabel="work, share of exact", ylabel=f"{score}, %", title=score)
        axes.grid(alpha=0.3)
    all_axes[-1].legend(fontsize=8)
    figure.tight_layout()
    write_atomically(path, partial(figure.savefig, format="png"))


def summary(one: Compared) -> dict:
    """For results.json."""
    lost = {name: x.difference for name, x in zip(SCORES, one.lost, strict=True)}
    return {
        "work": one.work,
        "work at full size": one.full_work,
        "scores": one.scores,
        "lost": lost,
        "far": one.far,
        "holds": one.holds,
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_drawing(parser, 300, "a speed")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quality"))
    parser.add_argument("--guidance_stop", type=float, nargs="+", default=[], help="more of them")
    parser.add_argument("--deep_every", type=int, nargs="+", default=[], help="more of them")
    parser.add_argument("--lambda_", type=float, default=LAMBDA)
    parser.add_argument("--scheduler", default=DEFAULT_SAMPLER)
    parser.add_argument("--ladder", type=Path, help="file of benchmarks.ladder to take work from")
    args = parser.parse_args(argv)
    check_drawing(args, samples=2)
    check_writable(args.output_dir)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    judge, compared_speeds = load_judge(args.judge), speeds(args.guidance_stop, args.deep_every)
    of_ladder = None if args.ladder is None else work_of_ladder(args.ladder, compared_speeds)
    elite = load_elite(args.model)
    elite.scheduler = make_scheduler(args.scheduler, elite.scheduler.config)
    cases = make_cases(args.samples, "held out", args.seed)
    drawing = {name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale")}
    concepts = partial(draw_concepts, elite, args.lambda_, **drawing)
    methods = {  # whose files are named by the knobs, so that rungs may be set otherwise
        name: Method(str(speed) or EXACT, cases, partial(concepts, speed=speed))
        for name, speed in compared_speeds.items()
    }
    names = ("lambda_", "scheduler", "samples", "seed")
    weights = digest_weight_files(args.model)
    settings = {"weights": weights, "mappers": elite.fingerprint, **drawing}
    settings |= {name: getattr(args, name) for name in names}
    pictures = Pictures(args.output_dir / "drawn", settings, args.batch_size)
    pictures.draw(list(methods.values()))
    drawn = {name: pictures.of(method) for name, method in methods.items()}
    work = of_ladder or counted_work(methods)
    full_work = work_at_full_size(compared_speeds, args.num_inference_steps)
    compared = compare(methods, drawn, judge, work, full_work)
    text = markdown(compared)
    write_text(args.output_dir / "results.md", text + "\n")
    results = {one.name: summary(one) for one in compared}
    write_json(args.output_dir / "results.json", {"settings": settings, "speeds": results})
    plot_cost(compared, args.output_dir / "cost.png")
    sheet = contact_sheet(cases[:SHEET_CASES], drawn)
    write_atomically(args.output_dir / "grid.png", sheet.save)
    print(text)
    print(f"\nmore in {args.output_dir}; look at {args.output_dir / 'cost.png'} first")
    return OK


if __name__ == "__main__":
    run(main)
