"""A share of all samples and steps: everything runs as it would in hours, for some minutes."""

import argparse
from contextlib import suppress


def scaled(number: int, scale: float) -> int:
    """That share of a number of samples or steps, at least one."""
    return max(1, round(number * scale))


def add_scale(parser: argparse.ArgumentParser) -> None:
    """--scale of commands that make the small world."""
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
