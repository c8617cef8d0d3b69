"""How well GrabCut masks objects whose true masks are known: from the middle of the picture, and
from a box 6 px wider than the object.

    python -m small_world.masks [--count 40] [--size 256]                      held-out critters
    python data_scripts/fetch_art.py ART --sources stamps landscapes --side 1024
    python -m small_world.masks --size 512 --objects ART/stamps --backgrounds ART/landscapes

The second lays cut-out photographs of objects on photographs of landscapes. Prints a Markdown
table: per case the median intersection over union, how many masks exceed 0.9, and the seconds of a
core that a mask takes (median, longest).
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from elite.console import OK, check_least, run, script_parser
from elite.images import read_image
from elite.markdown import table
from elite.masks import Box, find_object
from small_world.render import Pose, draw
from small_world.things import find_things, lay_on, read_thing
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

# For a case: a picture, uint8 (size, size, 3), and the mask of its object, bool (size, size).
Render = Callable[[str, np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def random_pose(case: str, rng: np.random.Generator) -> Pose:
    half_width, away = CASES[case]
    x, y = 0.5 + away * rng.choice([-1, 1], 2)
    return Pose(x, y, half_width, rng.uniform(-12, 12), bool(rng.integers(2)))


def render_critter(case: str, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A held-out critter in a scene."""
    critter, scene = random_critter(rng, "combinations"), str(rng.choice(list(SCENES)))
    image, mask = draw(critter, scene, rng, size, random_pose(case, rng))
    return image, mask > 0


def render_photograph(
    objects: list[Path], grounds: list[Path], case: str, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A cut-out object on a square part of another picture, half to all of its height. Raises
    ValueError where a file cannot be read."""
    picture = Image.fromarray(read_image(rng.choice(np.array(grounds))))
    side = int(min(picture.size) * rng.uniform(0.5, 1))
    left, top = (int(rng.integers(length - side + 1)) for length in picture.size)
    part = picture.crop((left, top, left + side, top + side))
    ground = np.asarray(part.resize((size, size), Image.Resampling.LANCZOS))
    image, mask = lay_on(ground, read_thing(rng.choice(np.array(objects))), random_pose(case, rng))
    return image, mask > 0


def box_around(mask: np.ndarray) -> Box:
    """The box of a mask, bool (H, W), widened by MARGIN as far as the picture goes."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    right = min(left + width + MARGIN, mask.shape[1])
    bottom = min(top + height + MARGIN, mask.shape[0])
    return Box(max(0, left - MARGIN), max(0, top - MARGIN), right, bottom)


def overlap(image: np.ndarray, mask: np.ndarray, box: Box | None) -> float:
    """Intersection over union of found and true mask; 0 where GrabCut refuses."""
    try:
        found = find_object(image, box)
    except ValueError:
        return 0.0
    return float((found & mask).sum() / (found | mask).sum())


def measure(case: str, render: Render, count: int, size: int) -> list[str]:
    """A row of the table."""
    pictures = tqdm(range(count), desc=case)
    renders = [render(case, np.random.default_rng(seed), size) for seed in pictures]
    cells, seconds = [], []
    for boxed in (False, True):
        values = []
        for image, mask in renders:
            started = time.process_time()
            values.append(overlap(image, mask, box_around(mask) if boxed else None))
            seconds.append(time.process_time() - started)
        good = sum(value > GOOD for value in values)
        cells.append(f"{np.median(values):.2f}, {good} of {count}")
    cells.append(f"{np.median(seconds):.2f}, {max(seconds):.2f}")
    return [case, *cells]


def find_pictures(folder: Path) -> list[Path]:
    """Raises ValueError where there are none."""
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".jpg", ".png"))
    if not found:
        raise ValueError(f"{folder}: expected a folder of JPGs or PNGs to lay objects on")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--count", type=int, default=40, help="pictures of each case")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--objects", type=Path, help="PNGs with transparency; default critters")
    parser.add_argument("--backgrounds", type=Path, help="pictures to lay them on")
    args = parser.parse_args(arguments)
    check_least(args, count=1, size=32)
    if (args.objects is None) != (args.backgrounds is None):
        raise ValueError("--objects and --backgrounds: expected both or neither")
    render: Render = render_critter
    if args.objects is not None:
        objects, grounds = find_things(args.objects), find_pictures(args.backgrounds)
        render = partial(render_photograph, objects, grounds)
    cv2.setNumThreads(1)
    rows = [measure(case, render, args.count, args.size) for case in CASES]
    head = ["object", f"centred, IoU, over {GOOD}", f"boxed, IoU, over {GOOD}", "seconds, longest"]
    print(table(head, rows))
    return OK


if __name__ == "__main__":
    run(main)
