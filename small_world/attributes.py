"""The small world's own metric for `evaluate.py`: does the judge see the concept's attributes?"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from elite.images import to_pixels
from evaluation.cases import Case
from small_world.classifier import Judge
from small_world.objectives import ATTRIBUTES
from small_world.samples import SIDE, labels
from small_world.world import COLOURS, PATTERNS, SCENES, SHAPES, Thing

INPUT_SIDE = SIDE // 2  # of the pictures the judge was trained on


def thing_of(name: str) -> Thing:
    """'striped_mug_yellow_blue' to the thing. Raises ValueError for any other kind of name."""
    pattern, shape, colour, second = ([*name.split("_"), None, None, None, None])[:4]
    known = pattern in PATTERNS and shape in SHAPES and colour in COLOURS
    if not known or (second is None) != (pattern == "solid") or second not in (None, *COLOURS):
        raise ValueError(
            f"{name}: not a thing of the small world; expected a name like "
            "striped_mug_yellow_blue, or other --metrics"
        )
    return Thing(str(shape), str(pattern), str(colour), second)


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
    """1 where the judge sees the attribute, 0 where not, None where the thing has none.

    Args:
        cases: all that will be asked, so that a foreign name is told before anything is drawn.

    Raises:
        ValueError: a subject is no thing of the small world, or a prompt names no scene.
    """

    def __init__(self, judge: Judge, cases: Sequence[Case]) -> None:
        self.judge = judge
        self.wanted = {
            case: labels(thing_of(case.subject.name), scene_of(case.template)) for case in cases
        }

    @torch.no_grad()
    def __call__(
        self, pictures: Sequence[Image.Image], cases: Sequence[Case]
    ) -> dict[str, list[float | None]]:
        pixels = torch.stack([to_pixels(np.asarray(picture)) for picture in pictures])
        wanted = torch.tensor([self.wanted[case] for case in cases])
        found = verdicts(self.judge, pixels, wanted)
        return {
            name: [None if value < 0 else float(value) for value in values]
            for name, values in found.items()
        }


@torch.no_grad()
def verdicts(judge: Judge, pixels: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Per attribute 1 for right, 0 for wrong, -1 where the thing has none: (B,) each.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        wanted: labels (B, attributes), -1 for none.
    """
    device = next(judge.parameters()).device
    small = F.adaptive_avg_pool2d(pixels.float().to(device), INPUT_SIDE).clamp(-1, 1)
    logits, wanted = judge(small), wanted.to(device)
    return {
        name: torch.where(target < 0, -1, (logits[name].argmax(1) == target).long()).cpu()
        for name, target in zip(ATTRIBUTES, wanted.T, strict=True)
    }
