"""Pictures that show the same, by the perceptual hash of their low frequencies (Zauner 2010)."""

import itertools
from collections.abc import Sequence

import cv2
import numpy as np

SIDE, KEPT = 32, 8  # of the picture and of the frequencies that are looked at
BITS = KEPT * KEPT


def perceptual_hash(image: np.ndarray) -> int:
    """64 bits of an image, uint8 (H, W, 3): which of its 8 x 8 lowest frequencies are above their
    median. Size, compression and brightness change few of them."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small)[:KEPT, :KEPT].flatten()
    bits = low > np.median(low[1:])  # the first is the mean brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def repeats(hashes: Sequence[int], distance: int) -> dict[int, int]:
    """Which pictures repeat one before them: {number: number of the one that is kept}.

    Those that are kept differ from each other in more than `distance` bits. Two hashes of which no
    more bits differ are equal in one of `distance + 1` parts at least, so that only those are
    compared that share a part.
    """
    edges = np.linspace(0, BITS, distance + 2).astype(int).tolist()
    kept: dict[tuple[int, int], list[int]] = {}
    found = {}
    for number, value in enumerate(hashes):
        parts = [
            (low, value >> low & (1 << high - low) - 1) for low, high in itertools.pairwise(edges)
        ]
        alike = {other for part in parts for other in kept.get(part, ())}
        near = [other for other in alike if (hashes[other] ^ value).bit_count() <= distance]
        if near:
            found[number] = min(near)
            continue
        for part in parts:
            kept.setdefault(part, []).append(number)
    return found
