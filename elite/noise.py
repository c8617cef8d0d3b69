"""The random numbers of training, a function of seed, stream and place alone.

They come from a counter-based generator, Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011), computed for all samples at once on the device of the seeds. So what a
sample meets does not depend on batch size, processes, previews or resuming; timesteps are the same
on every device, normal numbers to float32 rounding.
"""

import math

import torch
from torch import Tensor

POSTERIOR_STREAM, NOISE_STREAM, TIMESTEP_STREAM = 0, 1, 2  # independent draws of one sample seed
ROUNDS, WORD = 10, 0xFFFFFFFF
MULTIPLIERS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)

Uint32s = tuple[Tensor, ...]  # int64 tensors of 32 bits, without sign


def seeded_noise(seeds: Tensor, shape: tuple[int, ...], stream: int = NOISE_STREAM) -> Tensor:
    """Standard normal float32 (B, *shape), row i a function of seeds[i] alone; int64 (B,), 0 or
    more. `stream` tells independent draws of one sample apart."""
    count = math.prod(shape)
    x = _words(seeds, stream, -(-count // 4))
    radius = [(-2 * torch.log(_uniform(word))).sqrt() for word in x[:2]]  # Box-Muller
    angle = [2 * math.pi * _uniform(word) for word in x[2:]]
    normal = [radius[0] * angle[0].cos(), radius[0] * angle[0].sin()]
    normal += [radius[1] * angle[1].cos(), radius[1] * angle[1].sin()]
    return torch.cat(normal, dim=1)[:, :count].reshape(len(seeds), *shape)


def seeded_timesteps(seeds: Tensor, num_train_timesteps: int) -> Tensor:
    """Uniform timesteps int64 (B,), one per sample seed."""
    return (_words(seeds, TIMESTEP_STREAM, 1)[0][:, 0] * num_train_timesteps) >> 32


def _uniform(word: Tensor) -> Tensor:
    """float32 in (0, 1]."""
    return word.float() * 2**-32 + 2**-33


def _words(seeds: Tensor, stream: int, blocks: int) -> Uint32s:
    """Four words (B, blocks) for each seed and block."""
    place = torch.arange(blocks, device=seeds.device).expand(len(seeds), -1)
    zero = torch.zeros_like(place)
    key = (seeds[:, None] & WORD, seeds[:, None] >> 32)
    return philox((place, zero, zero + stream, zero), key)


def philox(counter: Uint32s, key: Uint32s) -> Uint32s:
    """Philox4x32-10: four words from a counter of four and a key of two, which broadcast."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # Of a product of two words the bits are right even where they run into int64's sign.
        product0, product1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1 = (product1 >> 32 & WORD) ^ x1 ^ k0, product1 & WORD
        x2, x3 = (product0 >> 32 & WORD) ^ x3 ^ k1, product0 & WORD
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return x0, x1, x2, x3
