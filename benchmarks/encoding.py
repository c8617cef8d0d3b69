"""Time to encode a concept: ELITE against the two CLIP passes that it cannot do without.

    python -m benchmarks.encoding                                tiny models, seconds
    python -m benchmarks.encoding --size full --rounds 15        Stable Diffusion v1-4's sizes

`ElitePipeline.encode_concept` starts from a decoded picture of 1024 x 768: views, CLIP, mappers.
The baseline runs CLIP alone on the two finished views, one after the other. A second table compares
with reading the concept from its file, a third says where the time goes.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Goal, Row, Table, alternate, finish, make_parser, parse, timed
from benchmarks.models import DTYPES, build_elite, build_parts, picture
from elite import Concept, ElitePipeline
from elite.console import run
from elite.images import object_views
from elite.inference import pick_device
from elite.mappers import clip_levels

CLIP, ELITE = "two CLIP passes", "encode_concept"
GOAL = Goal(ELITE, 1.05)


def views_of(pipe: ElitePipeline) -> dict[str, Tensor]:
    """The finished views of the picture, on the pipeline's device."""
    views = object_views(*picture(), pipe.image_encoder.config.image_size, pipe.grid)
    return {name: view[None].to(pipe.device) for name, view in views.items()}


@torch.no_grad()
def clip_alone(pipe: ElitePipeline, views: dict[str, Tensor]) -> None:
    for name in ("clip_pixels", "object_pixels"):
        pipe.image_encoder(views[name].to(pipe.image_encoder.dtype))


@torch.no_grad()
def mappers_alone(pipe: ElitePipeline, levels: list[Tensor], patch_mask: Tensor) -> None:
    pipe.global_mapper(levels)
    if pipe.local_mapper is not None:
        pipe.local_mapper(levels, patch_mask)


def measure(cases: dict[str, Any], device: torch.device, rounds: int, name: str) -> Row:
    """Seconds of each case, after one call that does not count."""
    for work in cases.values():
        work()
    figures = {case: timed(work, device) for case, work in cases.items()}
    return Row(name, alternate(figures, rounds, name))


def stored_table(pipe: ElitePipeline, rounds: int) -> tuple[Table, int]:
    """Encoding against reading the file; and the bytes of the file."""
    encode = partial(pipe.encode_concept, *picture())
    with TemporaryDirectory() as folder:
        path = Path(folder) / "concept.safetensors"
        encode().save(path)
        cases = {ELITE: encode, "Concept.load": partial(Concept.load, path)}
        row = measure(cases, pipe.device, rounds, "one concept")
        return Table("A concept from its picture, or from its file", "s", None, [row]), (
            path.stat().st_size
        )


def parts_table(pipe: ElitePipeline, rounds: int) -> Table:
    """Encoding, and each of its parts alone."""
    views, side = views_of(pipe), pipe.image_encoder.config.image_size
    with torch.no_grad():
        layers = pipe.global_mapper.config.hidden_layers
        levels = clip_levels(pipe.image_encoder, views["clip_pixels"], layers)
    cases = {
        ELITE: partial(pipe.encode_concept, *picture()),
        "views": partial(object_views, *picture(), side, pipe.grid),
        CLIP: partial(clip_alone, pipe, views),
        "mappers": partial(mappers_alone, pipe, levels, views["patch_mask"]),
    }
    row = measure(cases, pipe.device, rounds, "parts")
    return Table("Where the time of encode_concept goes, each part alone", "s", None, [row])


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = make_parser(__doc__, "encoding")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", help="default CUDA where it is, else the CPU")
    return parse(parser, "encoding", argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    device = pick_device(args.device)
    pipe = build_elite(build_parts(args.size, device, DTYPES[args.dtype]))
    cases = {
        CLIP: partial(clip_alone, pipe, views_of(pipe)),
        ELITE: partial(pipe.encode_concept, *picture()),
    }
    row = measure(cases, device, args.rounds, "picture of 1024 x 768")
    table = Table("Time to encode a concept", "s", GOAL, [row])
    stored, size = stored_table(pipe, args.rounds)
    tables = [table, stored, parts_table(pipe, args.rounds)]
    return finish(args, tables, "encoding", bytes_of_a_concept=size)


if __name__ == "__main__":
    run(main)
