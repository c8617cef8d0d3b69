"""The fewest steps of a modern sampler that draw as well as the release's 100 steps of LMS:

    python -m small_world.samplers

Runs evaluate.py, which keeps what it has drawn, on the objects of test_datasets/ for every sampler
and number of steps, and writes WORK_DIR/samplers.md. A sampler draws as well where each of
its means lies within the 95 % interval of LMS 100, or above it, and none of its pictures is far
from the one that LMS 100 draws from the same noise: intervals over a dozen objects alone are wide.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elite.config import REPOSITORY
from elite.console import check_least, run, script_parser
from elite.files import check_writable, write_text
from elite.images import read_image
from elite.markdown import table
from evaluation.rate import cases_of, results_of

REFERENCE = ("lms", 100)
CANDIDATES = [(name, steps) for steps in (8, 10, 15, 20, 25) for name in ("dpm++", "unipc")]

SHOWN = ("body", "pattern", "colour", "second", "tail", "scene")  # of all scores, which count
FAR = 10.0  # mean absolute difference of two pictures, of 255

Scores = Mapping[str, Mapping]  # metric: {"mean": ..., "interval": [low, high], ...}


@dataclass(frozen=True)
class Sampler:
    """One sampler as evaluate.py scored it."""

    name: str
    steps: int
    scores: Scores
    differences: np.ndarray  # mean absolute difference to the reference's pictures, (pictures,)

    def as_good_as(self, reference: "Sampler") -> bool:
        return not (self.differences > FAR).any() and all(
            self.scores[metric]["mean"] >= score["interval"][0]
            for metric, score in reference.scores.items()
        )


def evaluated(name: str, steps: int, args: argparse.Namespace) -> Sampler:
    """Scores of this sampler, by evaluate.py."""
    folder = args.work_dir / f"{name}_{steps}"
    flags = {
        "scheduler": name,
        "num_inference_steps": steps,
        "num_images": args.num_images,
        "batch_size": args.batch_size,
        "llambda": args.llambda,
        "output_dir": folder,
    }
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    ended = subprocess.run([sys.executable, str(REPOSITORY / "evaluate.py"), *words])
    if ended.returncode:
        raise ValueError(f"{name}, {steps} steps: evaluate.py ended with status {ended.returncode}")
    scores = json.loads((folder / "results.json").read_text(encoding="utf-8"))["scores"]
    differences = picture_differences(folder, args.work_dir / "_".join(map(str, REFERENCE)))
    return Sampler(name, steps, scores, differences)


def picture_differences(folder: Path, reference: Path) -> np.ndarray:
    """Mean absolute difference, 0 to 255, of each picture that the reference has scored to its
    namesake."""
    names = sorted(case.path for case in cases_of(reference, results_of(reference)))
    return np.array(
        [
            np.abs(read_image(folder / name).astype(int) - read_image(reference / name)).mean()
            for name in names
        ]
    )


def fewest(reference: Sampler, candidates: Sequence[Sampler]) -> Sampler:
    """The first of the fewest steps that is as good as the reference; the reference if none is."""
    good = [sampler for sampler in candidates if sampler.as_good_as(reference)]
    return min(good, key=lambda sampler: sampler.steps, default=reference)


def markdown(reference: Sampler, candidates: Sequence[Sampler]) -> str:
    """A table of all, with the scores of SHOWN."""
    rows = []
    for sampler in (reference, *candidates):
        cells = [_cell(sampler.scores[name]) for name in SHOWN]
        cells += [f"{sampler.differences.mean():.1f}", f"{(sampler.differences > FAR).mean():.1%}"]
        good = "-" if sampler is reference else "yes" if sampler.as_good_as(reference) else "no"
        rows.append([sampler.name, str(sampler.steps), *cells, good])
    return table(["sampler", "steps", *SHOWN, "difference", "far", "as good"], rows) + "\n"


def _cell(score: Mapping) -> str:
    low, high = score["interval"]
    return f"{score['mean']:.1%} ({low:.1%} to {high:.1%})"


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/small_world/samplers"))
    parser.add_argument("--num_images", type=int, default=4, help="seeds per object and prompt")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--llambda", type=float, default=0.8)
    args = parser.parse_args()
    check_least(args, num_images=1, batch_size=1)
    check_writable(args.work_dir)
    reference = evaluated(*REFERENCE, args)
    candidates = [evaluated(*candidate, args) for candidate in CANDIDATES]
    text, chosen = markdown(reference, candidates), fewest(reference, candidates)
    write_text(args.work_dir / "samplers.md", text)
    print(text)
    print(f"difference: mean over the pictures, of 255; far: of pictures more than {FAR:g} away")
    print(f"fewest steps: {chosen.name}, {chosen.steps}")
    return 0


if __name__ == "__main__":
    run(main)
