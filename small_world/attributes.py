"""The small world's own metric for `evaluate.py`: does the judge see the concept's attributes?"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from elite.images import to_pixels
from evaluation.cases import Case
from small_world.classifier import INPUT_SIDE, Judge
from small_world.objects import critter_of
from small_world.world import ATTRIBUTES, SCENES, labels


def scene_of(template: str) -> str:
    """The scene a prompt asks for. Raises ValueError where it names none."""
    for scene, words in SCENES.items():
        if template.endswith(words):
            return scene
    raise ValueError(
        f"prompt {template!r}: names no scene of the small world; end it with one such as "
        f"{next(iter(SCENES.values()))!r}"
    )


class AttributeScores:
    """1 where the judge sees the attribute, 0 where not, None where the critter has none.

    Args:
        cases: all that will be asked, so that a foreign name is told before anything is drawn.

    Raises:
        ValueError: a subject is no object of the small world, or a prompt names no scene.
    """

    name = "attributes"

    def __init__(self, judge: Judge, cases: Sequence[Case]) -> None:
        self.judge = self.network = judge
        self.wanted = {
            case: labels(critter_of(case.subject.name), scene_of(case.template)) for case in cases
        }

    def __call__(
        self, pictures: Sequence[Image.Image], cases: Sequence[Case]
    ) -> dict[str, list[float | None]]:
        pixels = torch.stack([to_pixels(np.asarray(picture)) for picture in pictures])
        wanted = torch.tensor([self.wanted[case] for case in cases])
        found = right_ones(judged(self.judge, pixels)[0], wanted)
        return {
            name: [None if value < 0 else float(value) for value in values]
            for name, values in found.items()
        }


@torch.no_grad()
def judged(judge: Judge, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What the judge says of pictures (B, 3, H, W) in [-1, 1] of any size: logits by attribute, and
    unit vectors (B, 64)."""
    device = next(judge.parameters()).device
    return judge(F.adaptive_avg_pool2d(pixels.float().to(device), INPUT_SIDE).clamp(-1, 1))


def right_ones(logits: dict[str, Tensor], wanted: Tensor) -> dict[str, Tensor]:
    """Logits by attribute against labels (B, attributes), -1 for none: 1 for right, 0 for wrong, -1
    where the critter has none, (B,) each."""
    return {
        name: torch.where(target < 0, -1, (logits[name].argmax(1).cpu() == target).long())
        for name, target in zip(ATTRIBUTES, wanted.cpu().T, strict=True)
    }
