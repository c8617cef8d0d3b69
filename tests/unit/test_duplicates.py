"""Perceptual hashes, and which pictures repeat others."""

import io

import numpy as np
import pytest
from PIL import Image

from data_scripts.duplicates import perceptual_hash, repeats
from small_world.render import draw
from small_world.world import SCENES
from tests.critters import CRITTER


def bits(one, other):
    return (one ^ other).bit_count()


def photo(seed):
    scenes = sorted(SCENES)
    return draw(CRITTER, scenes[seed % len(scenes)], np.random.default_rng(seed), 256)[0]


def as_seen_again(image):
    """Half as large, a coarse JPEG, darker."""
    smaller = Image.fromarray((image * 0.8).astype(np.uint8)).resize((128, 128))
    file = io.BytesIO()
    smaller.save(file, "JPEG", quality=40)
    return np.asarray(Image.open(file))


def test_the_same_picture_again_has_nearly_the_same_hash():
    images = [photo(seed) for seed in range(8)]
    hashes = [perceptual_hash(image) for image in images]
    again = [perceptual_hash(as_seen_again(image)) for image in images]
    assert max(bits(a, b) for a, b in zip(hashes, again, strict=True)) <= 4
    others = [bits(a, b) for i, a in enumerate(hashes) for b in again[i + 1 :]]
    assert min(others) > 4


def test_a_plain_picture_has_a_hash():
    assert perceptual_hash(np.zeros((3, 50, 3), np.uint8)) >= 0


@pytest.mark.parametrize("distance", [0, 1, 4, 16])
def test_repeats_are_those_of_comparing_all(distance):
    rng = np.random.default_rng(distance)
    hashes = []
    for base in rng.integers(0, 2**63, 40).tolist():
        for flips in rng.integers(0, distance + 4, 5).tolist():
            changed = base
            for bit in rng.choice(64, flips, replace=False).tolist():
                changed ^= 1 << bit
            hashes.append(changed)
    expected, kept = {}, []
    for number, value in enumerate(hashes):
        near = [other for other in kept if bits(hashes[other], value) <= distance]
        if near:
            expected[number] = near[0]
        else:
            kept.append(number)
    assert expected and repeats(hashes, distance) == expected


def test_nothing_repeats_without_a_distance():
    assert repeats([5, 5], -1) == {}
