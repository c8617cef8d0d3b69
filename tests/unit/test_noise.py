"""The random numbers of training: published answers of the generator, the same for a sample
whatever its batch and device, and distributed as they should be."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from elite.noise import NOISE_STREAM, POSTERIOR_STREAM, philox, seeded_noise, seeded_timesteps

SEEDS = torch.tensor([0, 1, 2**32, 2**63 - 2])
WORD = 2**32 - 1
# Counter, key and answer, from the known-answer tests of Random123, the authors' library.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def tensors(numbers: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([number]) for number in numbers)


@pytest.mark.parametrize(("counter", "key", "answer"), PUBLISHED)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert philox(tensors(counter), tensors(key)) == tensors(answer)


def test_noise_is_box_muller_of_the_words_of_its_seed():
    """In float64, from the definition; places, stream and both halves of the seed count."""
    seed, blocks = 5 * 2**32 + 7, torch.arange(3)
    counter = (blocks, 0 * blocks, 0 * blocks + NOISE_STREAM, 0 * blocks)
    words = philox(counter, (torch.tensor(7), torch.tensor(5)))
    a, b, c, d = ((word.double() + 0.5) / 2**32 for word in words)
    expected = []
    for u, v in ((a, c), (b, d)):
        radius = (-2 * u.log()).sqrt()
        expected += [radius * (2 * torch.pi * v).cos(), radius * (2 * torch.pi * v).sin()]
    noise = seeded_noise(torch.tensor([seed]), (2, 5), NOISE_STREAM)
    assert noise.shape == (1, 2, 5) and noise.dtype == torch.float32
    # float32 has the angle to 4e-7, at a radius of at most 6.7.
    torch.testing.assert_close(
        noise.flatten().double(), torch.cat(expected)[:10], rtol=0, atol=4e-6
    )


def test_a_sample_meets_the_same_whatever_its_batch():
    noise, steps = seeded_noise(SEEDS, (3, 5, 7)), seeded_timesteps(SEEDS, 1000)
    for row in range(len(SEEDS)):
        alone = SEEDS[row : row + 1]
        assert torch.equal(noise[row : row + 1], seeded_noise(alone, (3, 5, 7)))
        assert torch.equal(steps[row : row + 1], seeded_timesteps(alone, 1000))


def test_noise_is_normal_and_seeds_and_streams_are_independent():
    seeds = torch.arange(64)
    draws = [seeded_noise(seeds, (4, 16, 16), s) for s in (NOISE_STREAM, POSTERIOR_STREAM)]
    assert kstest(torch.cat(draws).flatten().numpy(), "norm").pvalue > 0.01
    rows = torch.cat(draws).flatten(1).numpy()  # (128, 1024)
    apart = np.corrcoef(rows)[~np.eye(len(rows), dtype=bool)]
    assert np.abs(apart).max() < 6 / 1024**0.5
    along = np.corrcoef(rows[:, :-1].ravel(), rows[:, 1:].ravel())[0, 1]
    assert abs(along) < 5 / rows.size**0.5


def test_timesteps_are_uniform():
    steps = seeded_timesteps(torch.arange(20_000), 50)
    assert steps.dtype == torch.int64
    counts = torch.bincount(steps, minlength=50).numpy()
    assert len(counts) == 50 and chisquare(counts).pvalue > 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_what_a_cpu_draws():
    there = SEEDS.cuda()
    torch.testing.assert_close(
        seeded_noise(there, (4, 64, 64)).cpu(), seeded_noise(SEEDS, (4, 64, 64)), rtol=0, atol=4e-6
    )
    assert torch.equal(seeded_timesteps(there, 1000).cpu(), seeded_timesteps(SEEDS, 1000))
