"""The pretraining set: framed pictures with captions and attributes, rendered once to memory-mapped
arrays.

Framings follow what ELITE's own datasets will show later: whole scenes, tight crops, small on
black, zoomed in; `cutout` (object alone on black) is for the image encoder only.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from elite.open_images import PHOTO_TEMPLATES
from small_world.render import draw
from small_world.world import (
    ALL_SHAPES,
    COLOURS,
    PATTERNS,
    SCENES,
    Thing,
    random_thing,
    with_article,
)

FRAMINGS = {"scene": 0.56, "tight": 0.16, "far": 0.09, "zoom": 0.07, "cutout": 0.12}
SIDE = 64  # stored pictures; the VAE and the UNet see them at half of it
CHUNK = 500  # samples per rendering task


def crop_box(mask: np.ndarray, pad: int) -> tuple[slice, slice]:
    """Rows and columns of the object, padded inside the picture."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        slice(max(rows[0] - pad, 0), rows[-1] + 1 + pad),
        slice(max(columns[0] - pad, 0), columns[-1] + 1 + pad),
    )


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def _noun(thing: Thing, rng: np.random.Generator) -> str:
    """The thing's words, now and then fewer of them."""
    return thing.shape if rng.random() < 0.12 else thing.words


def _phrase(noun: str, rng: np.random.Generator) -> str:
    """'a red mug', or one of the photo templates with it."""
    if rng.random() < 0.4:
        return with_article(noun)
    caption = PHOTO_TEMPLATES[rng.integers(len(PHOTO_TEMPLATES))].format(noun)
    return caption.replace("a " + noun, with_article(noun))


def framed(
    thing: Thing, scene: str, framing: str, rng: np.random.Generator
) -> tuple[np.ndarray, str, bool]:
    """A picture (SIDE, SIDE, 3) of the thing in that framing, its caption, and whether the scene is
    visible."""
    size = 2 * SIDE
    image, mask = draw(thing, scene, rng, size)
    noun = _noun(thing, rng)
    if framing == "scene":
        place = "" if rng.random() < 0.1 else f" {SCENES[scene]}"
        return _resize(image, SIDE), _phrase(noun, rng) + place, True
    rows, columns = crop_box(mask, pad=int(rng.integers(3, 10)))
    if framing == "cutout":
        image = image * (mask[..., None] > 0)
        if rng.random() < 0.5:
            image = image[rows, columns]
        return _resize(image, SIDE), _phrase(noun, rng), False
    if framing == "zoom":
        zoomed = _resize(image[rows, columns], int(SIDE * rng.uniform(1.2, 1.4)))
        top, left = rng.integers(0, len(zoomed) - SIDE + 1, size=2)
        words = f"{rng.choice(['zoomed in', 'close up'])} photo of {with_article(noun)}"
        return zoomed[top : top + SIDE, left : left + SIDE], words, True
    if framing == "far":
        small = _resize(image[rows, columns], int(SIDE * rng.uniform(1 / 3, 0.6)))
        canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
        top, left = rng.integers(0, SIDE - len(small) + 1, size=2)
        canvas[top : top + len(small), left : left + len(small)] = small
        words = f"{rng.choice(['a far away', 'very small'])} photo of {with_article(noun)}"
        return canvas, words, False
    return _resize(image[rows, columns], SIDE), _phrase(noun, rng), True


def _render_chunk(pool: list[Thing], seed: int) -> tuple[np.ndarray, list[dict]]:
    cv2.setNumThreads(1)
    rng = np.random.default_rng(seed)
    images, records = [], []
    for _ in range(CHUNK):
        thing = random_thing(rng, pool)
        scene = str(rng.choice(list(SCENES)))
        framing = str(rng.choice(list(FRAMINGS), p=list(FRAMINGS.values())))
        image, caption, scene_visible = framed(thing, scene, framing, rng)
        images.append(image)
        records.append(
            {
                "caption": caption,
                "framing": framing,
                "labels": labels(thing, scene if scene_visible else None),
            }
        )
    return np.stack(images), records


def labels(thing: Thing, scene: str | None) -> list[int]:
    """[shape, pattern, main colour, second colour, scene] as indices; -1 where there is none."""
    colours = list(COLOURS)
    return [
        ALL_SHAPES.index(thing.shape),
        PATTERNS.index(thing.pattern),
        colours.index(thing.colour),
        -1 if thing.second is None else colours.index(thing.second),
        -1 if scene is None else list(SCENES).index(scene),
    ]


def render_samples(
    folder: Path, count: int, pool: list[Thing], seed: int = 0, workers: int = 2
) -> None:
    """Writes `images.npy` (count, SIDE, SIDE, 3) and `records.json` of things of the pool; does
    nothing where they exist."""
    if (folder / "records.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=(count, SIDE, SIDE, 3)
    )
    records: list[dict] = []
    chunks = range(seed * 1_000_000, seed * 1_000_000 + count // CHUNK)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        work = executor.map(partial(_render_chunk, pool), chunks)
        rendered = tqdm(work, "render", len(chunks), unit="chunk")
        for i, (pictures, described) in enumerate(rendered):
            images[i * CHUNK : (i + 1) * CHUNK] = pictures
            records += described
    images.flush()
    temporary = folder / "records.json.tmp"
    temporary.write_text(json.dumps(records), encoding="utf-8")
    temporary.replace(folder / "records.json")


def load_samples(folder: Path) -> tuple[np.ndarray, list[dict]]:
    """The memory-mapped pictures and the records."""
    return np.load(folder / "images.npy", mmap_mode="r"), json.loads(
        (folder / "records.json").read_text(encoding="utf-8")
    )
