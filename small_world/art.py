"""Things that the small world is not: pictures of other people, put into its scenes.

    python data_scripts/fetch_art.py ART
    python -m small_world.judge art ART/fluent [--held_out]

Each thing (a PNG with transparency) is read by ELITE in one scene and drawn in another. The judge
has no words for it, so right is what it sees in pictures of the thing itself: main colour and
pattern, beside the scene asked for, and that among 100 things a picture is nearest to its own
(`identity`).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from elite.pipeline import ElitePipeline
from elite.sheets import tile_rows
from small_world.attributes import judged, right_ones
from small_world.classifier import Judge
from small_world.pretrain import to_image
from small_world.samples import SIDE
from small_world.score import (
    FRESH,
    LAMBDAS,
    Row,
    Task,
    draw_concepts,
    draw_renders,
    draw_row,
    draw_through_vae,
    mean_directions,
    same_critter,
    share,
)
from small_world.things import composite, find_things, read_thing
from small_world.world import ATTRIBUTES, SCENES

ASKED = ("colour", "pattern", "scene", "identity")
SHOWN = 12  # things on the sheet


@dataclass(frozen=True)
class ArtTask(Task):
    """The task of a thing that somebody drew: a PNG with transparency."""

    file: Path

    def picture(
        self, scene: str, rng: np.random.Generator, size: int = 2 * SIDE
    ) -> tuple[np.ndarray, np.ndarray]:
        return composite(read_thing(self.file), scene, rng, size)


def make_art_tasks(
    folder: Path, count: int, seed: int, held_out: bool | None = None
) -> list[ArtTask]:
    """Things as `find_things` finds them, in a random order, each in a scene other than that of its
    source.

    Raises:
        ValueError: as `find_things`.
    """
    files = find_things(folder, held_out)
    rng = np.random.default_rng((FRESH, seed))
    tasks = []
    for i in rng.permutation(len(files))[:count]:
        scene, source = (str(name) for name in rng.choice(list(SCENES), size=2, replace=False))
        tasks.append(ArtTask(scene, source, int(rng.integers(2**31)), files[i]))
    return tasks


def seen_labels(logits: dict[str, Tensor], scene: str) -> list[int]:
    """What the judge sees in a thing, on average over pictures of it; the scene is the one asked
    for."""
    seen = {name: int(logits[name].softmax(1).mean(0).argmax()) for name in ATTRIBUTES}
    return [*list(seen.values())[:-1], list(SCENES).index(scene)]


def score_art(
    judge: Judge, rows: list[Row[ArtTask]], tasks: list[ArtTask], batch_size: int
) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """Shares that are right by row, and each row's pictures (N, 3, 32, 32)."""
    seen = [judged(judge, task.views) for task in tasks]
    known = mean_directions([directions for _, directions in seen])
    wanted = torch.tensor(
        [seen_labels(logits, task.scene) for (logits, _), task in zip(seen, tasks, strict=True)]
    )
    scores, pictures = {}, {}
    with tqdm(total=len(rows) * len(tasks), unit="picture") as progress:
        for row in rows:
            pictures[row.name] = draw_row(row, batch_size, progress)
            logits, directions = judged(judge, pictures[row.name])
            found = right_ones(logits, wanted)
            found["identity"] = same_critter(directions.cpu(), known)
            scores[row.name] = {name: share(found[name]) for name in ASKED}
    return scores, pictures


def sheet(tasks: list[ArtTask], pictures: dict[str, Tensor]) -> Image.Image:
    """The first things: what was read, and every row's picture of it."""
    rows = [
        [Image.fromarray(task.source[0]), *(to_image(drawn[i]) for drawn in pictures.values())]
        for i, task in enumerate(tasks[:SHOWN])
    ]
    return tile_rows(rows, ["read", *pictures], "read in one scene, drawn in another")


def art_rows(
    base: StableDiffusionPipeline, elite: ElitePipeline, tasks: list[ArtTask], **options
) -> list[Row[ArtTask]]:
    """The thing itself in the scene, through the VAE, another thing in its place, and ELITE."""
    other = {task: tasks[(i + 1) % len(tasks)] for i, task in enumerate(tasks)}
    rows = [
        Row("the thing itself", tasks, draw_renders),
        Row("the same through the VAE", tasks, partial(draw_through_vae, base)),
        Row("another thing", tasks, partial(draw_renders, shown_for=other.__getitem__)),
    ]
    draw = partial(draw_concepts, elite, **options)
    rows.append(Row("ELITE, all words", tasks, partial(draw, 0.0, words="all")))
    return rows + [Row(f"ELITE, lambda {x}", tasks, partial(draw, x)) for x in LAMBDAS]
