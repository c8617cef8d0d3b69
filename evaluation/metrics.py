"""How near pictures are to their concept and to their prompt: CLIP-I, CLIP-T, DINO-I as DreamBench
measures them (Ruiz et al. 2023), and confidence intervals.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModel, CLIPModel, CLIPTokenizer

from elite.images import CLIP_MEAN, CLIP_STD, normalise
from elite.loading import load_model, load_part
from elite.text import read_prompt

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESAMPLES = 2000  # of the bootstrap


def centre_square(picture: Image.Image, side: int, shorter_side: int) -> np.ndarray:
    """Shorter side to `shorter_side` (bicubic), then the middle: uint8 (side, side, 3)."""
    scale = shorter_side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


class Clip:
    """CLIP's joint space of pictures and texts; DreamBench takes ViT-B/32.

    Args:
        source: folder or hub name of a CLIPModel with its tokenizer.

    Raises:
        ValueError: it cannot be loaded.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        self.model = load_model(CLIPModel, source).to(device)
        self.tokenizer = load_part(CLIPTokenizer, source)
        self.side = self.model.config.vision_config.image_size

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (B, D)."""
        squares = [centre_square(picture, self.side, self.side) for picture in pictures]
        pixels = torch.stack([normalise(square, CLIP_MEAN, CLIP_STD) for square in squares])
        pooled = self.model.vision_model(pixels.to(self.model.device)).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D)."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            read_prompt(texts, self.tokenizer, limit),
            padding=True,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        ).to(self.model.device)
        pooled = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)


class Dino:
    """The CLS token of a self-supervised ViT; DreamBench takes DINO ViT-S/16.

    Pictures are 256 px on the shorter side before the middle 224 px are taken, as DINO is
    evaluated.

    Args:
        source: folder or hub name of a ViT.

    Raises:
        ValueError: it cannot be loaded.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        self.model = load_model(AutoModel, source, unread="pooler.").to(device)
        if not isinstance(side := getattr(self.model.config, "image_size", None), int):
            raise ValueError(
                f"{source}: no vision transformer; expected one such as DINO's ViT-S/16"
            )
        self.side = side
        self.shorter_side = self.side * 256 // 224

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (B, D)."""
        squares = [centre_square(picture, self.side, self.shorter_side) for picture in pictures]
        pixels = torch.stack([normalise(square, IMAGENET_MEAN, IMAGENET_STD) for square in squares])
        hidden = self.model(pixel_values=pixels.to(self.model.device)).last_hidden_state
        return F.normalize(hidden[:, 0], dim=-1)


def mean_cosine(vector: Tensor, others: Tensor) -> float:
    """Mean cosine of a unit vector (D,) with unit vectors (N, D): DreamBench's mean over pairs."""
    return float((others @ vector).mean())


def bootstrap(values: Sequence[float], groups: Sequence[str]) -> tuple[float, float, float]:
    """Mean with its 95 % interval from resampling whole groups.

    Pictures of one concept resemble each other, so concepts are drawn with replacement, not
    pictures; with one group the interval is the mean itself.

    Returns:
        mean, low, high.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(index)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)
