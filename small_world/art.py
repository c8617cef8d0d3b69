"""Things that the small world is not: pictures of other people, put into its scenes.

    python data_scripts/fetch_art.py ART
    python -m small_world.judge art ART/fluent

Each thing (a PNG with transparency) is read by ELITE in one scene and drawn in another. The judge
has no words for it, so right is what it sees in pictures of the thing itself: main colour and
pattern, beside the scene asked for, and that among 100 things a picture is nearest to its own
(`identity`).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
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
from small_world.render import Pose
from small_world.samples import SIDE
from small_world.scenes import draw_scene
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
        with Image.open(self.file) as opened:
            return composite(np.asarray(opened.convert("RGBA")), scene, rng, size)


def composite(
    thing: np.ndarray, scene: str, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A cut-out RGBA (H, W, 4) in a scene, in a pose like a critter's: image (size, size, 3) and
    mask (size, size) of 0 and 255, uint8."""
    pose = Pose.random(rng)
    height, width = thing.shape[:2]
    scale = 2 * pose.half * size / max(height, width)
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), pose.turn, scale)
    matrix[:, 2] += np.array([pose.x, pose.y]) * size - (width / 2, height / 2)
    layer = thing[:, ::-1] if pose.mirrored else thing
    solid = np.dstack([layer[..., :3] * (layer[..., 3:] / 255), layer[..., 3]]).astype(np.float32)
    for _ in range(int(np.floor(np.log2(max(1.0, 1 / scale))))):  # no alias when it gets small
        solid = cv2.pyrDown(solid)
        matrix[:, :2] *= 2
    placed = cv2.warpAffine(solid, matrix, (size, size), flags=cv2.INTER_LINEAR)
    seen = placed[..., 3:] / 255
    image = draw_scene(scene, rng, size) * (1 - seen) + placed[..., :3]
    mask = np.where(placed[..., 3] > 127, 255, 0).astype(np.uint8)
    return image.round().clip(0, 255).astype(np.uint8), mask


def make_art_tasks(folder: Path, count: int, seed: int) -> list[ArtTask]:
    """Things of the folder in a random order, each in a scene other than that of its source.

    Raises:
        ValueError: the folder has fewer than two PNGs.
    """
    files = sorted(folder.glob("*.png"))
    if len(files) < 2:
        raise ValueError(
            f"{folder}: expected a folder of PNGs with transparency; make one with "
            "data_scripts/fetch_art.py"
        )
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


@torch.no_grad()
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
    base: StableDiffusionPipeline, elite: ElitePipeline | None, tasks: list[ArtTask], **options
) -> list[Row[ArtTask]]:
    """The thing itself in the scene, through the VAE, another thing in its place, and ELITE."""
    other = {task: tasks[(i + 1) % len(tasks)] for i, task in enumerate(tasks)}
    rows = [
        Row("the thing itself", tasks, draw_renders),
        Row("the same through the VAE", tasks, partial(draw_through_vae, base)),
        Row("another thing", tasks, partial(draw_renders, shown_for=other.__getitem__)),
    ]
    if elite is not None:
        draw = partial(draw_concepts, elite, **options)
        rows.append(Row("ELITE, all words", tasks, partial(draw, 0.0, words="all")))
        rows += [Row(f"ELITE, lambda {x}", tasks, partial(draw, x)) for x in LAMBDAS]
    return rows
