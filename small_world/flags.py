"""The flags that several commands have."""

import argparse
from pathlib import Path

from elite.defaults import DEFAULT_STEPS, GUIDANCE_SCALE
from small_world.paths import JUDGE, MODEL


def add_drawing(parser: argparse.ArgumentParser, samples: int, what: str) -> None:
    """How pictures are drawn and by whom they are judged; `samples` is a default."""
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--judge", type=Path, default=JUDGE, help="folder of the judge")
    parser.add_argument("--samples", type=int, default=samples, help=f"pictures {what}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance_scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--num_inference_steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--batch_size", type=int, default=25)
