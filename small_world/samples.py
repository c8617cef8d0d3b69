"""The pretraining set: critters seen twice, with captions and attributes, rendered once to a
memory-mapped array.

The first view is framed as ELITE's own datasets will show objects later: whole scenes, tight crops,
small on black, zoomed in; the second shows the same critter in another scene and pose, or cut out.
Now and then it lacks a part there, for which the words then ask ("a S with wings").
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from elite.files import write_text
from elite.images import object_box, to_pixels
from elite.workers import worker_pool
from small_world.bodies import profile
from small_world.captions import fill, phrase_of, place, random_noun, random_template
from small_world.render import draw
from small_world.world import (
    ATTACHED,
    SCENES,
    Critter,
    has_trim,
    is_held_out,
    labels,
    random_critter,
)

FRAMINGS = {"scene": 0.6, "tight": 0.22, "far": 0.1, "zoom": 0.08}
SECOND_FRAMINGS = {"scene": 0.35, "tight": 0.4, "cutout": 0.25}
EDITED = 0.2  # share of the trained critters that lack a part in the second view
SIDE = 64  # stored pictures of the world of 32 px; the VAE and the UNet see them at half of it
# How captions name framings that are unlike others.
FRAMING_PHRASES = {"far": ["a far away", "very small"], "zoom": ["zoomed in", "close up"]}
CHUNK = 250  # samples per rendering task


def crop_box(mask: np.ndarray, pad: int) -> tuple[slice, slice]:
    """Rows and columns of the object, padded inside the picture."""
    rows, columns = (slice(max(x.start - pad, 0), x.stop + pad) for x in object_box(mask))
    return rows, columns


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def whole_view(image: np.ndarray, mask: np.ndarray, side: int = SIDE) -> np.ndarray:
    """A whole picture with its mask, (side, side, 4)."""
    return _resize(np.dstack([image, mask]), side)


def framed_template(framing: str, scene: str, rng: np.random.Generator) -> str:
    """The caption of something in that framing, with `{}` for its name."""
    if framing == "scene":
        named = scene if rng.random() < 0.9 else None
        return random_template(rng) + place(named)
    if framing in FRAMING_PHRASES:
        return f"{rng.choice(FRAMING_PHRASES[framing])} photo of a {{}}"
    return random_template(rng)


def framed(
    view: np.ndarray, scene: str, framing: str, rng: np.random.Generator, side: int = SIDE
) -> tuple[np.ndarray, str, str | None]:
    """A picture (H, W, 4) with its mask in that framing, (side, side, 4), the template of its
    caption, and the scene as far as it is visible."""
    if framing == "scene":
        return _resize(view, side), framed_template(framing, scene, rng), scene
    rows, columns = crop_box(view[..., 3], pad=int(rng.integers(3, 10)) * side // SIDE)
    crop = view[rows, columns]
    if framing == "cutout":
        shown = (crop if rng.random() < 0.75 else view).copy()
        shown[shown[..., 3] == 0] = 0
        picture = _resize(shown, side)
    elif framing == "zoom":
        zoomed = _resize(crop, int(side * rng.uniform(1.2, 1.4)))
        top, left = rng.integers(0, len(zoomed) - side + 1, size=2)
        picture = zoomed[top : top + side, left : left + side]
    elif framing == "far":
        small = _resize(crop, int(side * rng.uniform(1 / 3, 0.6)))
        picture = np.zeros((side, side, 4), np.uint8)
        top, left = rng.integers(0, side - len(small) + 1, size=2)
        picture[top : top + len(small), left : left + len(small)] = small
    else:
        picture = _resize(crop, side)
    return picture, framed_template(framing, scene, rng), None


def without_a_part(critter: Critter, rng: np.random.Generator) -> tuple[Critter, str]:
    """The critter without one of the parts that not all have, and how one asks for that; as it is,
    where without it it would be a held-out combination."""
    worn = [name for name in ATTACHED if getattr(critter, name) != "none"]
    worn = [name for name in worn if not is_held_out(replace(critter, **{name: "none"}))]
    if not worn:
        return critter, "S"
    name = str(rng.choice(worn))
    asked = f"S with {phrase_of(getattr(critter, name))}"
    fewer = replace(critter, **{name: "none"})
    numbers = {"top": "ears", "tail": "tail_numbers"}
    if name in numbers:
        fewer = replace(fewer, **{numbers[name]: None})
    return fewer if has_trim(fewer) else replace(fewer, trim=None), asked


def _render_chunk(pool: str, side: int, seed: int, count: int) -> tuple[np.ndarray, list[dict]]:
    rng = np.random.default_rng(seed)
    views = np.empty((count, 2, side, side, 4), np.uint8)
    records = []
    for i in range(count):
        critter = random_critter(rng, pool)
        other, concept = critter, "S"
        if pool == "trained" and rng.random() < EDITED:
            other, concept = without_a_part(critter, rng)
        both = (critter, other)
        scenes = [str(name) for name in rng.choice(list(SCENES), 2, replace=False)]
        shown: list[dict] = []
        for seen, scene, framings in zip(both, scenes, (FRAMINGS, SECOND_FRAMINGS), strict=True):
            framing = str(rng.choice(list(framings), p=list(framings.values())))
            view = np.dstack(draw(seen, scene, rng, 2 * side))
            views[i, len(shown)], template, visible = framed(view, scene, framing, rng, side)
            shown.append({"framing": framing, "template": template, "scene": visible})
        noun = random_noun(critter, rng)
        records.append(
            {
                "template": shown[0]["template"],
                "noun": noun,
                "concept": concept,
                "caption": fill(shown[0]["template"], noun),
                "framings": [view["framing"] for view in shown],
                "labels": [
                    labels(seen, view["scene"]) for seen, view in zip(both, shown, strict=True)
                ],
                "profile": profile(critter.numbers),
            }
        )
    return views, records


def render_samples(
    folder: Path, count: int, pool: str, seed: int = 0, workers: int = 2, side: int = SIDE
) -> None:
    """Writes `views.npy` (count, 2, side, side, 4: RGB and mask) and `records.json` of critters of
    the pool; does nothing where they exist.

    Raises:
        ValueError: there are more or fewer, or of another side.
    """
    shape = (count, 2, side, side, 4)
    if (folder / "records.json").exists():
        if (found := load_samples(folder)[0].shape) != shape:
            raise ValueError(
                f"{folder}: {found[0]} samples of {found[2]} px; expected {count} of {side} px; "
                "remove the folder, or choose another one"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    views = np.lib.format.open_memmap(folder / "views.npy", mode="w+", dtype=np.uint8, shape=shape)
    records: list[dict] = []
    sizes = [min(CHUNK, count - start) for start in range(0, count, CHUNK)]
    seeds = range(seed * 1_000_000, seed * 1_000_000 + len(sizes))
    with worker_pool(workers) as executor:
        work = executor.map(partial(_render_chunk, pool, side), seeds, sizes)
        for pictures, described in tqdm(work, "render", len(sizes), unit="chunk"):
            views[len(records) : len(records) + len(pictures)] = pictures
            records += described
    views.flush()
    write_text(folder / "records.json", json.dumps(records))


def load_samples(folder: Path) -> tuple[np.ndarray, list[dict]]:
    """The memory-mapped views and the records."""
    return np.load(folder / "views.npy", mmap_mode="r"), json.loads(
        (folder / "records.json").read_text(encoding="utf-8")
    )


def small_pixels(view: np.ndarray) -> Tensor:
    """A view (64, 64, 4) as the base model sees it: (3, 32, 32) in [-1, 1]; of another side,
    half of it."""
    return F.avg_pool2d(to_pixels(view[..., :3]), 2)
