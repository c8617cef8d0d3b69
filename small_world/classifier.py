"""The judge's network: it names what pictures of the small world show and recognises a critter that
it has seen elsewhere; its training.

It is trained on renders of its own, of all kinds, and shares no weight with the models it judges.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from elite.files import write_atomically
from elite.loading import load_model
from small_world.flags import scaled
from small_world.objectives import ViewsObjective
from small_world.pretrain import train
from small_world.samples import load_samples, render_samples, small_pixels
from small_world.world import ATTRIBUTES

NUM_SAMPLES = 60_000
SEED = 1  # of its renders; those of the models have 0
JUDGED_FRAMINGS = ("scene", "tight")
EMBEDDING = 64
INPUT_SIDE = 32
PLACED = 48  # channels whose place in the picture counts
RECIPE = {
    "samples": 256_000,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "adam_betas": [0.9, 0.999],
    "ema_decay": 0.999,
}


class ResidualBlock(nn.Module):
    """x + conv(conv(x)), each convolution after a group norm and SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [
            layer
            for _ in range(2)
            for layer in (nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Judge(ModelMixin, ConfigMixin):
    """Pictures to one row of logits per attribute, and to a direction that tells critters apart.

    Args:
        widths: channels at 32, 16, 8 and 4 px; there are as many stages.
    """

    @register_to_config
    def __init__(self, widths: Sequence[int] = (40, 80, 128, 160)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1), ResidualBlock(widths[0])]
        for narrow, wide in pairwise(widths):
            layers += [nn.SiLU(), nn.Conv2d(narrow, wide, 3, stride=2, padding=1)]
            layers.append(ResidualBlock(wide))
        self.stages = nn.Sequential(*layers, nn.GroupNorm(8, widths[-1]), nn.SiLU())
        self.places = nn.Conv2d(widths[-1], PLACED, 1)
        cells = (INPUT_SIDE >> (len(widths) - 1)) ** 2
        width = 2 * widths[-1] + PLACED * cells
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, len(kinds)) for name, kinds in ATTRIBUTES.items()}
        )
        self.projection = nn.Linear(width, EMBEDDING)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, 32, 32) in [-1, 1] to (B, width): what is there, and where it is."""
        stages = self.stages(pixels)  # (B, C, 4, 4)
        placed = self.places(stages).flatten(1)
        return torch.cat([stages.mean((2, 3)), stages.amax((2, 3)), placed], dim=1)

    def forward(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(B, 3, 32, 32) in [-1, 1] to logits (B, kinds of the attribute) by attribute, and unit
        vectors (B, 64), the nearer the more alike."""
        features = self.features(pixels)
        logits = {name: head(features) for name, head in self.heads.items()}
        return logits, F.normalize(self.projection(features), dim=-1)


class JudgeObjective(ViewsObjective):
    """Attributes and contrast, with the judge's own heads."""

    def __init__(self, judge: Judge) -> None:
        super().__init__(width=judge.projection.in_features)
        self.judge, self.heads = judge, judge.heads

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = batch["pixels"].transpose(0, 1).flatten(0, 1)  # (2B, 3, 32, 32)
        features = self.judge.features(pixels)
        labels = batch["labels"].transpose(0, 1).flatten(0, 1)
        out = self.compare(features, self.judge.projection(features), labels)
        return {**out, "loss": out["attributes"] + out["contrast"]}

    def save_pretrained(self, folder: Path) -> None:
        write_atomically(folder / "judge", self.judge.save_pretrained)


class JudgeSamples:
    """Both views of the critters that are shown large enough, each time disturbed anew."""

    def __init__(self, folder: Path) -> None:
        self.views, records = load_samples(folder)
        self.kept = [i for i, r in enumerate(records) if r["framings"][0] in JUDGED_FRAMINGS]
        self.labels = torch.tensor([record["labels"] for record in records])

    def __len__(self) -> int:
        return len(self.kept)

    def name(self, index: int) -> str:
        return f"sample {self.kept[index]}"

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        i = self.kept[index]
        views = [small_pixels(view) for view in self.views[i]]
        return {
            "pixels": torch.stack([disturbed(pixels, rng) for pixels in views]),
            "labels": self.labels[i],
        }


def disturbed(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """(3, H, W) mirrored, shifted by up to 2 px, softened and noisy, as drawn pictures are."""
    if rng.random() < 0.5:
        pixels = pixels.flip(2)
    height, width = pixels.shape[1:]
    top, left = (int(v) for v in rng.integers(0, 5, size=2))
    wide = F.pad(pixels[None], (2, 2, 2, 2), mode="replicate")[0]
    pixels = wide[:, top : top + height, left : left + width]
    if rng.random() < 0.5:
        soft = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
        pixels = pixels + rng.uniform(0, 0.6) * (soft - pixels)
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
    return (pixels + rng.uniform(0, 0.08) * noise).clamp(-1, 1)


def train_judge(work_dir: Path, target: Path, scale: float) -> None:
    """Renders critters of all kinds and trains the judge on them, as `pretrain.train` does; a share
    of RECIPE."""
    render_samples(work_dir / "judge_samples", scaled(NUM_SAMPLES, scale), "any", SEED)
    objective = JudgeObjective(Judge())
    train("judge", RECIPE, objective, JudgeSamples(work_dir / "judge_samples"), work_dir, scale)
    write_atomically(target, objective.judge.cpu().half().save_pretrained)


def load_judge(folder: Path) -> Judge:
    """The judge in float32. Raises ValueError where there is none."""
    remedy = "expected a judge, make it with python -m small_world.judge train"
    if not (folder / "config.json").is_file():  # or the loader would look for it on a hub
        raise ValueError(f"{folder}: no judge; {remedy}")
    return load_model(Judge, folder, remedy=remedy)
