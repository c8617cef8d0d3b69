"""Time to encode a concept: ELITE against the two CLIP passes that it cannot do without.

    python -m benchmarks.encoding                                tiny models, seconds
    python -m benchmarks.encoding --size full --rounds 15        Stable Diffusion v1-4's sizes

`ElitePipeline.encode_concept` starts from a decoded picture of 1024 x 768: views, CLIP, mappers.
The baseline runs CLIP alone on the two finished views, one after the other. The other parts, and
reading the concept from its file, are measured beside it.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.harness import Goal, Row, Table, alternate, finish, make_parser, parse, timed
from benchmarks.models import DTYPES, build_elite, build_parts, picture
from elite import Concept, ElitePipeline
from elite.console import run
from elite.hardware import pick_device
from elite.mappers import clip_levels

CLIP, ELITE = "two CLIP passes", "encode_concept"
GOAL = Goal(ELITE, 1.05)


@torch.no_grad()
def clip_alone(pipe: ElitePipeline, views: dict[str, Tensor]) -> None:
    for name in ("clip_pixels", "object_pixels"):
        pipe.image_encoder(views[name].to(pipe.image_encoder.dtype))


@torch.no_grad()
def mappers_alone(pipe: ElitePipeline, levels: list[Tensor], patch_mask: Tensor) -> None:
    pipe.global_mapper(levels)
    if pipe.local_mapper is not None:
        pipe.local_mapper(levels, patch_mask)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "encoding")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", help="default CUDA where it is, else the CPU")
    return parse(parser, "encoding", argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    pipe = build_elite(build_parts(args.size, device, DTYPES[args.dtype]))
    encode, make_views = (partial(f, *picture()) for f in (pipe.encode_concept, pipe.concept_views))
    views = {name: view.to(pipe.device) for name, view in make_views().items()}
    with torch.no_grad():
        layers = pipe.global_mapper.config.hidden_layers
        levels = clip_levels(pipe.image_encoder, views["clip_pixels"], layers)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "concept.safetensors"
        encode().save(path)
        cases: dict[str, Callable[[], object]] = {
            CLIP: partial(clip_alone, pipe, views),
            ELITE: encode,
            "views": make_views,
            "mappers": partial(mappers_alone, pipe, levels, views["patch_mask"]),
            "Concept.load": partial(Concept.load, path),
        }
        for work in cases.values():
            work()  # warm up
        name = "picture of 1024 x 768"
        figures = {case: timed(work, device) for case, work in cases.items()}
        row = Row(name, alternate(figures, args.rounds, name))
        table = Table("Time to encode a concept, its parts, reading its file", "s", GOAL, [row])
        return finish(args, [table], "encoding", bytes_of_a_concept=path.stat().st_size)


if __name__ == "__main__":
    run(main, keeps=False)
