"""Two concepts in one picture: does each keep its own colour?

Draws couples of held-out critters side by side, "a S1 next to a S2 on the grass", in a picture of
twice the width, with and without regions (S1 in the left half, S2 in the right half). The judge
names the main colour of each half: the concept's own, the other concept's (that is confusion) or a
third one. No part of the small world was trained on two critters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from elite.encoding import batches
from elite.markdown import percent, table
from elite.pipeline import ElitePipeline
from elite.sheets import SHEET_ROWS, tile_rows
from small_world.attributes import judged, right_ones
from small_world.claims import interval
from small_world.classifier import Judge
from small_world.pretrain import to_image
from small_world.score import Case, make_cases
from small_world.world import SCENES

NAMES = ("S1", "S2")
OUTCOMES = ("own", "other's", "third")


@dataclass(frozen=True)
class Couple:
    """Two critters of different main colours, left and right in the scene of the left one."""

    left: Case
    right: Case

    @property
    def prompt(self) -> str:
        return f"a {NAMES[0]} next to a {NAMES[1]} {SCENES[self.left.scene]}"


def make_couples(count: int, seed: int) -> list[Couple]:
    """Random couples of held-out critters."""
    lefts = make_cases(count, "held out", seed)
    others = iter(make_cases(20 * count, "held out", seed + 1))
    return [
        Couple(left, next(case for case in others if case.critter.colour != left.critter.colour))
        for left in lefts
    ]


def halves(height: int, width: int) -> dict[str, np.ndarray]:
    """Left half and right half of a picture, as the regions of S1 and S2."""
    left = np.arange(width) < width // 2
    return {
        name: np.broadcast_to(half, (height, width))
        for name, half in zip(NAMES, (left, ~left), strict=True)
    }


def draw_couples(
    pipe: ElitePipeline, couples: Sequence[Couple], in_regions: bool, **options
) -> Tensor:
    """Pictures in [-1, 1], (B, 3, H, 2 H)."""
    side = pipe.resolution
    cases = [[couple.left for couple in couples], [couple.right for couple in couples]]
    out = pipe(
        [couple.prompt for couple in couples],
        concepts={
            name: [pipe.encode_concept(*case.source) for case in column]
            for name, column in zip(NAMES, cases, strict=True)
        },
        regions=halves(side, 2 * side) if in_regions else None,
        seed=[couple.left.seed for couple in couples],
        height=side,
        width=2 * side,
        output_type="pt",
        **options,
    )
    return 2 * out.images - 1


def colours_seen(judge: Judge, pixels: Tensor, couples: Sequence[Couple]) -> Tensor:
    """Whose colour each half shows: (B, 2), an index of OUTCOMES."""
    wanted = torch.tensor([[couple.left.wanted, couple.right.wanted] for couple in couples])
    columns = []
    for half, view in enumerate(pixels.chunk(2, dim=3)):
        logits, _ = judged(judge, view)
        own, other = (
            right_ones(logits, wanted[:, which])["colour"] == 1 for which in (half, 1 - half)
        )
        columns.append(torch.where(own, 0, torch.where(other, 1, 2)))
    return torch.stack(columns, dim=1)


def score_couples(
    judge: Judge, pipe: ElitePipeline, couples: Sequence[Couple], batch_size: int, **options
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `colours_seen` sees, and the pictures, without and with regions."""
    outcomes, pictures = {}, {}
    with tqdm(total=2 * len(couples), desc="couples", unit="picture") as progress:
        for name, in_regions in (("without regions", False), ("with regions", True)):
            drawn, seen = [], []
            for batch in batches(iter(couples), batch_size):
                drawn.append(draw_couples(pipe, batch, in_regions, **options))
                seen.append(colours_seen(judge, drawn[-1], batch))
                progress.update(len(batch))
            outcomes[name] = torch.cat(seen)
            pictures[name] = torch.cat(drawn)
    return outcomes, pictures


def halves_of(outcomes: dict[str, Tensor]) -> dict[str, dict[str, int]]:
    """How many halves have which outcome."""
    return {
        name: {outcome: int((seen == i).sum()) for i, outcome in enumerate(OUTCOMES)}
        for name, seen in outcomes.items()
    }


def markdown(outcomes: dict[str, Tensor]) -> str:
    """Shares of the halves in per cent, with 95 % intervals from a bootstrap over couples."""
    rows = []
    for name, seen in outcomes.items():
        shares = ((seen == i).double().mean(1).numpy() for i in range(len(OUTCOMES)))
        rows.append([name, *(percent(*interval(share)) for share in shares)])
    head = ["main colour of a half, % (95 % interval)", "own", "other's (confusion)", "third"]
    return table(head, rows) + "\n"


def sheet(couples: Sequence[Couple], pictures: dict[str, Tensor]) -> Image.Image:
    """Both inputs and the pictures of the first couples."""
    rows = []
    for row, couple in enumerate(couples[: SHEET_ROWS // 4]):
        tiles = [Image.fromarray(case.source[0]) for case in (couple.left, couple.right)]
        rows.append([*tiles, *(to_image(drawn[row]) for drawn in pictures.values())])
    return tile_rows(rows, [*NAMES, *pictures], "a S1 next to a S2, in the scene asked for")
