"""The judge's network: a small classifier of what pictures of the small world show; its training.

It is trained on renders alone and shares no weight with the models it judges.
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
from elite.images import to_pixels
from elite.run_folder import checkpoints
from elite.training import fit, make_accelerator
from small_world.objectives import ATTRIBUTES
from small_world.samples import load_samples, render_samples
from small_world.world import ALL_SHAPES, unseen_things

# What it names: the silhouettes that no model has seen, too.
JUDGED = {**ATTRIBUTES, "shape": len(ALL_SHAPES)}
NUM_UNSEEN = 30_000  # renders of those, beside the pretraining renders
# Images seen.
RECIPE = {"images": 120_000, "batch_size": 64, "learning_rate": 2e-3, "ema_decay": 0.999}


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
    """Pictures to one row of logits per attribute.

    Args:
        widths: channels at 32, 16, 8 and 4 px; there are as many stages.
    """

    @register_to_config
    def __init__(self, widths: Sequence[int] = (24, 48, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for narrow, wide in pairwise(widths):
            layers += [nn.SiLU(), nn.Conv2d(narrow, wide, 3, stride=2, padding=1)]
            layers.append(ResidualBlock(wide))
        self.features = nn.Sequential(*layers, nn.GroupNorm(8, widths[-1]), nn.SiLU())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * widths[-1], count) for name, count in JUDGED.items()}
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 3, 32, 32) in [-1, 1] to logits (B, values of the attribute) by attribute."""
        features = self.features(pixels)  # (B, C, 4, 4)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)  # (B, 2C)
        return {name: head(pooled) for name, head in self.heads.items()}


class JudgeObjective(nn.Module):
    """Cross entropy of every attribute; label -1 (nothing to see) does not count."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.judge(batch["pixels"])
        out = {"loss": torch.zeros((), device=batch["pixels"].device)}
        for name, target in zip(ATTRIBUTES, batch["labels"].T, strict=True):
            known = (target >= 0).sum().clamp(min=1)
            error = F.cross_entropy(logits[name], target, ignore_index=-1, reduction="sum")
            out["loss"] = out["loss"] + error / known
            out[f"acc_{name}"] = (logits[name].detach().argmax(1) == target).sum() / known
        return out

    def save_pretrained(self, folder: Path) -> None:
        write_atomically(folder / "judge", self.judge.save_pretrained)


class JudgeSamples:
    """The renders of some folders that show more than a cut-out, each time disturbed anew."""

    def __init__(self, *folders: Path) -> None:
        self.shown = [
            (images, i, torch.tensor(record["labels"]))
            for images, records in map(load_samples, folders)
            for i, record in enumerate(records)
            if record["framing"] != "cutout"
        ]

    def __len__(self) -> int:
        return len(self.shown)

    def name(self, index: int) -> str:
        return f"sample {index}"

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        images, i, labels = self.shown[index]
        pixels = F.avg_pool2d(to_pixels(np.array(images[i])), 2)
        return {"pixels": disturbed(pixels, rng), "labels": labels}


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
        pixels = pixels + rng.uniform(0, 0.8) * (soft - pixels)
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
    return (pixels + rng.uniform(0, 0.12) * noise).clamp(-1, 1)


def train_judge(work_dir: Path, target: Path) -> None:
    """Trains the judge on `WORK_DIR/samples` and on renders of silhouettes that nothing else is
    trained on, from its last checkpoint where there is one."""
    folder = work_dir / "judge"
    render_samples(work_dir / "unseen_samples", NUM_UNSEEN, unseen_things(), seed=1)
    objective = JudgeObjective(Judge())
    fit(
        objective,
        JudgeSamples(work_dir / "samples", work_dir / "unseen_samples"),
        make_accelerator(cpu=not torch.cuda.is_available()),
        output_dir=folder,
        max_steps=RECIPE["images"] // RECIPE["batch_size"],
        batch_size=RECIPE["batch_size"],
        learning_rate=RECIPE["learning_rate"],
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        ema_decay=RECIPE["ema_decay"],
        save_steps=250,
        checkpoints_total_limit=1,
        resume="latest" if checkpoints(folder) else None,
        config={"part": "judge", **RECIPE},
    )
    write_atomically(target, objective.judge.cpu().half().save_pretrained)


def load_judge(folder: Path) -> Judge:
    """The judge in float32. Raises ValueError where there is none."""
    try:
        if not (folder / "config.json").is_file():
            raise ValueError("no config.json in it")
        return Judge.from_pretrained(folder, torch_dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(
            f"{folder}: no judge ({reason}); make it with python -m small_world.judge train"
        ) from None
