"""The pretraining set: critters seen twice, with captions and attributes, rendered once to a
memory-mapped array.

The first view is framed as ELITE's own datasets will show objects later: whole scenes, tight crops,
small on black, zoomed in; the second shows the same critter in another scene and pose, or cut out.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from elite.files import write_text
from elite.images import to_pixels
from small_world.captions import fill, place, random_noun, random_template
from small_world.render import draw
from small_world.world import SCENES, labels, random_critter

FRAMINGS = {"scene": 0.6, "tight": 0.22, "far": 0.1, "zoom": 0.08}
SECOND_FRAMINGS = {"scene": 0.35, "tight": 0.4, "cutout": 0.25}
SIDE = 64  # stored pictures; the VAE and the UNet see them at half of it
CHUNK = 250  # samples per rendering task


def crop_box(mask: np.ndarray, pad: int) -> tuple[slice, slice]:
    """Rows and columns of the object, padded inside the picture."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        slice(max(rows[0] - pad, 0), rows[-1] + 1 + pad),
        slice(max(columns[0] - pad, 0), columns[-1] + 1 + pad),
    )


def _resize(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def whole_view(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A whole picture with its mask, (SIDE, SIDE, 4)."""
    return _resize(np.dstack([image, mask]))


def framed(
    view: np.ndarray, scene: str, framing: str, rng: np.random.Generator
) -> tuple[np.ndarray, str, str | None]:
    """A picture (H, W, 4) with its mask in that framing, (SIDE, SIDE, 4), the template of its
    caption, and the scene as far as it is visible."""
    if framing == "scene":
        named = scene if rng.random() < 0.9 else None
        return _resize(view), random_template(rng) + place(named), scene
    rows, columns = crop_box(view[..., 3], pad=int(rng.integers(3, 10)))
    crop = view[rows, columns]
    if framing == "cutout":
        view = (crop if rng.random() < 0.75 else view).copy()
        view[view[..., 3] == 0] = 0
        return _resize(view), random_template(rng), None
    if framing == "zoom":
        zoomed = _resize(crop, int(SIDE * rng.uniform(1.2, 1.4)))
        top, left = rng.integers(0, len(zoomed) - SIDE + 1, size=2)
        words = f"{rng.choice(['zoomed in', 'close up'])} photo of a {{}}"
        return zoomed[top : top + SIDE, left : left + SIDE], words, None
    if framing == "far":
        small = _resize(crop, int(SIDE * rng.uniform(1 / 3, 0.6)))
        canvas = np.zeros((SIDE, SIDE, 4), np.uint8)
        top, left = rng.integers(0, SIDE - len(small) + 1, size=2)
        canvas[top : top + len(small), left : left + len(small)] = small
        return canvas, f"{rng.choice(['a far away', 'very small'])} photo of a {{}}", None
    return _resize(crop), random_template(rng), None


def _render_chunk(pool: str, seed: int) -> tuple[np.ndarray, list[dict]]:
    cv2.setNumThreads(1)
    rng = np.random.default_rng(seed)
    views = np.empty((CHUNK, 2, SIDE, SIDE, 4), np.uint8)
    records = []
    for i in range(CHUNK):
        critter = random_critter(rng, pool)
        scenes = [str(name) for name in rng.choice(list(SCENES), 2, replace=False)]
        shown: list[dict] = []
        for scene, framings in zip(scenes, (FRAMINGS, SECOND_FRAMINGS), strict=True):
            framing = str(rng.choice(list(framings), p=list(framings.values())))
            view = np.dstack(draw(critter, scene, rng, 2 * SIDE))
            views[i, len(shown)], template, visible = framed(view, scene, framing, rng)
            shown.append({"framing": framing, "template": template, "scene": visible})
        noun = random_noun(critter, rng)
        records.append(
            {
                "template": shown[0]["template"],
                "noun": noun,
                "caption": fill(shown[0]["template"], noun),
                "framings": [view["framing"] for view in shown],
                "labels": [labels(critter, view["scene"]) for view in shown],
            }
        )
    return views, records


def render_samples(folder: Path, count: int, pool: str, seed: int = 0, workers: int = 2) -> None:
    """Writes `views.npy` (count, 2, SIDE, SIDE, 4: RGB and mask) and `records.json` of critters of
    the pool; does nothing where they exist."""
    if (folder / "records.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    views = np.lib.format.open_memmap(
        folder / "views.npy", mode="w+", dtype=np.uint8, shape=(count, 2, SIDE, SIDE, 4)
    )
    records: list[dict] = []
    chunks = range(seed * 1_000_000, seed * 1_000_000 + -(-count // CHUNK))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        work = executor.map(partial(_render_chunk, pool), chunks)
        for pictures, described in tqdm(work, "render", len(chunks), unit="chunk"):
            start = len(records)
            views[start : start + CHUNK] = pictures[: count - start]
            records += described[: count - start]
    views.flush()
    write_text(folder / "records.json", json.dumps(records))


def load_samples(folder: Path) -> tuple[np.ndarray, list[dict]]:
    """The memory-mapped views and the records."""
    return np.load(folder / "views.npy", mmap_mode="r"), json.loads(
        (folder / "records.json").read_text(encoding="utf-8")
    )


def small_pixels(view: np.ndarray) -> Tensor:
    """A view (64, 64, 4) as the base model sees it: (3, 32, 32) in [-1, 1]."""
    return F.avg_pool2d(to_pixels(view[..., :3]), 2)
