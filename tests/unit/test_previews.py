"""Latents as colours: exact where the VAE is linear, near for the small world's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from elite.data import PairFolder
from elite.images import read_image, to_pixels
from elite.loading import load_stable_diffusion
from elite.previews import SIDE, Preview, fit_preview
from tests.conftest import REPOSITORY


class LinearVae(torch.nn.Module):
    """Two pixels a latent: their mean colours mixed into four channels, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(block_out_channels=(1, 1), scaling_factor=0.5)
        self.dtype = torch.float32
        self.mix = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        means = F.avg_pool2d(pixels, 2).movedim(1, -1)
        latents = (means @ self.mix + 0.3).movedim(-1, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=latents))


@pytest.fixture
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(2)]


def test_a_linear_vae_is_inverted(pictures):
    vae = LinearVae()
    preview = fit_preview(SimpleNamespace(vae=vae, _execution_device="cpu"), pictures)
    picture = np.full((8, 12, 3), (10, 100, 250), np.uint8)
    latents = vae.encode(to_pixels(picture)[None]).latent_dist.mean * 0.5
    shown = preview(latents)
    assert shown.shape == (1, 4, 6, 3) and shown.dtype == np.uint8
    assert np.abs(shown[0].astype(int) - picture[0, 0]).max() <= 1


def test_of_a_batch_each_has_its_own_and_extremes_are_cut():
    preview = Preview(torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0, 0, 0]]))
    latents = torch.zeros(2, 3, 1, 1)
    latents[1] = torch.tensor([-9.0, 0, 9])[:, None, None]
    assert preview(latents.half()).tolist() == [[[[128] * 3]], [[[0, 128, 255]]]]


def test_the_small_worlds_vae(pictures):
    """Far nearer than one colour for all, on a picture that it was not fitted to."""
    parts = load_stable_diffusion(REPOSITORY / "checkpoints" / "small_world")
    examples = PairFolder(REPOSITORY / "test_datasets").pairs
    *known, other = (read_image(pair.image_path) for pair in examples[:4])
    pipe = SimpleNamespace(vae=parts["vae"], _execution_device="cpu")
    preview = fit_preview(pipe, known)
    side = SIDE * 4
    pixels = F.interpolate(to_pixels(other)[None], (side, side), mode="area")
    with torch.no_grad():
        latents = parts["vae"].encode(pixels).latent_dist.mean * parts["vae"].config.scaling_factor
    small = F.adaptive_avg_pool2d(pixels, SIDE)[0].movedim(0, -1).numpy()
    wanted = (small + 1) * 127.5
    error = np.abs(preview(latents)[0] - wanted).mean()
    assert error < 0.35 * np.abs(wanted - wanted.mean((0, 1))).mean()


def test_without_pictures_there_is_none():
    assert fit_preview(SimpleNamespace(), []) is None
