"""What pictures look like before the VAE decodes them: a linear map from latents to colours, which
costs nothing beside a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor

from elite.families import family_of
from elite.images import from_pixels, to_pixels
from elite.loading import pixels_per_latent

SIDE = 16  # latents a side of the pictures that it is fitted to


@dataclass(frozen=True)
class Preview:
    """The map of one VAE.

    Args:
        weights: (C + 1, 3), of C latent channels and a constant, to colours in [-1, 1].
    """

    weights: Tensor

    def __call__(self, latents: Tensor) -> np.ndarray:
        """Latents (B, C, h, w), noisy or not, as pictures of their size: uint8 (B, h, w, 3)."""
        x = latents.float().cpu().movedim(1, -1)  # (B, h, w, C)
        colours = x @ self.weights[:-1] + self.weights[-1]
        return from_pixels(colours.movedim(-1, -3))


@torch.no_grad()
def fit_preview(pipe: DiffusionPipeline, pictures: Sequence[np.ndarray]) -> Preview | None:
    """Fits the map of a pipeline's VAE by least squares: latents of some pictures to the mean
    colours of what each stands for.

    Args:
        pictures: a few, uint8 (H, W, 3); more colours make a better map. None of them give None.
    """
    if not pictures:
        return None
    side = SIDE * pixels_per_latent(pipe.vae)
    pixels = torch.stack(
        [F.interpolate(to_pixels(x)[None], (side, side), mode="area")[0] for x in pictures]
    )  # (N, 3, side, side)
    dtype = pipe.vae.dtype
    overflows = dtype == torch.float16 and family_of(pipe.unet).vae_overflows
    if overflows:
        pipe.vae.float()
    given = pixels.to(pipe._execution_device, pipe.vae.dtype)
    latents = pipe.vae.encode(given).latent_dist.mean * pipe.vae.config.scaling_factor
    if overflows:
        pipe.vae.to(dtype)
    x = latents.float().cpu().movedim(1, -1).flatten(0, 2)  # (N SIDE^2, C)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    colours = F.adaptive_avg_pool2d(pixels, SIDE).movedim(1, -1).flatten(0, 2)  # (N SIDE^2, 3)
    return Preview(torch.linalg.lstsq(x, colours, driver="gelsd").solution)
