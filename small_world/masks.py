"""How well GrabCut masks held-out critters: overlap with the true masks, from the middle of the
picture and from a box 6 px wider than the object.

    python -m small_world.masks [--count 40] [--size 256]

Prints a Markdown table: per case the median intersection over union and how many masks exceed 0.9.
"""

from functools import partial

import cv2
import numpy as np
from tqdm import tqdm

from elite.console import OK, run, script_parser
from elite.masks import Box, find_object
from small_world.render import Pose, draw
from small_world.world import SCENES, random_critter

MARGIN = 6  # pixels between object and box
GOOD = 0.9
# Half width of the object, and how far its centre is from the middle, in fractions of the picture.
CASES = {
    "in the middle, 64 % of the width": (0.32, 0),
    "in the middle, 30 %": (0.15, 0),
    "in a corner, 40 %": (0.2, 0.25),
    "wider than the picture, 104 %": (0.52, 0),
}


def render(case: str, seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A held-out critter of a case, uint8 (size, size, 3), and its mask, bool (size, size)."""
    rng = np.random.default_rng(seed)
    critter, scene = random_critter(rng, "combinations"), str(rng.choice(list(SCENES)))
    half_width, away = CASES[case]
    x, y = 0.5 + away * rng.choice([-1, 1], 2)
    pose = Pose(x, y, half_width, rng.uniform(-12, 12), bool(rng.integers(2)))
    image, mask = draw(critter, scene, rng, size, pose)
    return image, mask > 0


def box_around(mask: np.ndarray) -> Box:
    """The box of a mask, bool (H, W), widened by MARGIN as far as the picture goes."""
    rows, columns = np.nonzero(mask)
    (top, bottom), (left, right) = (
        (max(0, line.min() - MARGIN), min(length, line.max() + 1 + MARGIN))
        for line, length in zip((rows, columns), mask.shape, strict=True)
    )
    return Box(left, top, right, bottom)


def overlap(image: np.ndarray, mask: np.ndarray, box: Box | None) -> float:
    """Intersection over union of found and true mask; 0 where GrabCut refuses."""
    try:
        found = find_object(image, box)
    except ValueError:
        return 0.0
    return float((found & mask).sum() / (found | mask).sum())


def measure(case: str, count: int, size: int) -> str:
    """A row of the table."""
    renders = [render(case, seed, size) for seed in tqdm(range(count), desc=case)]
    cells = []
    for boxed in (False, True):
        values = np.array([overlap(i, m, box_around(m) if boxed else None) for i, m in renders])
        cells.append(f"{np.median(values):.2f}, {(values > GOOD).sum()} of {count}")
    return f"| {case} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--count", type=int, default=40, help="renders of each case")
    parser.add_argument("--size", type=int, default=256, help="side of the renders in pixels")
    args = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    rows = list(map(partial(measure, count=args.count, size=args.size), CASES))
    print(f"| object | centred, IoU, over {GOOD} | boxed, IoU, over {GOOD} |\n|---|---|---|")
    print("\n".join(rows))
    return OK


if __name__ == "__main__":
    run(main)
