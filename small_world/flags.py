"""The flags that several commands have, and where the shipped weights lie."""

import argparse
from contextlib import suppress
from pathlib import Path

from elite.config import REPOSITORY
from elite.console import check_least
from elite.defaults import DEFAULT_STEPS, GUIDANCE_SCALE

MODEL = REPOSITORY / "checkpoints" / "small_world"
JUDGE = REPOSITORY / "checkpoints" / "small_world_judge"


def add_drawing(parser: argparse.ArgumentParser, samples: int, what: str) -> None:
    """How pictures are drawn and by whom they are judged; `samples` is a default."""
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--judge", type=Path, default=JUDGE, help="folder of the judge")
    parser.add_argument("--samples", type=int, default=samples, help=f"pictures {what}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance_scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--num_inference_steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--batch_size", type=int, default=25)


def check_drawing(args: argparse.Namespace, samples: int = 1) -> None:
    """Raises ValueError where one of these flags is out of range, --samples below `samples`."""
    check_least(args, samples=samples, seed=0, num_inference_steps=1, batch_size=1)


def add_scale(parser: argparse.ArgumentParser) -> None:
    """--scale of commands that make the small world: everything runs as it would in hours, for some
    minutes."""
    parser.add_argument(
        "--scale",
        type=_share,
        default=1.0,
        help="share of all samples and steps, to see that it runs (default 1)",
    )


def _share(text: str) -> float:
    with suppress(ValueError):  # no number at all
        if 0 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text}: expected more than 0, at most 1")


def scaled(number: int, scale: float) -> int:
    """That share of a number of samples or steps, at least one."""
    return max(1, round(number * scale))
