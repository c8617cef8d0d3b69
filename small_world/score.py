"""Scores the small world's models: draws pictures, asks the judge what they show, counts.

Beside the attributes, two things are asked of a picture: is it the same critter (`identity`: among
100, their own renders in other scenes and poses, the nearest to the picture is its own), and, where
the critter has a kind that nothing was trained on, is that kind there (`new kind`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from elite.encoding import batches
from elite.hardware import pick_device
from elite.loading import load_stable_diffusion, make_scheduler
from elite.markdown import percent, table
from elite.pipeline import ElitePipeline
from elite.wording import note
from small_world.attributes import judged, right_ones
from small_world.captions import CLASS_WORD, describe, phrase_of, place, with_article
from small_world.claims import interval, share_right
from small_world.classifier import Judge
from small_world.pretrain import base_pipeline
from small_world.render import draw
from small_world.samples import SIDE, small_pixels, whole_view
from small_world.world import (
    ATTACHED,
    ATTRIBUTES,
    HELD_OUT_KINDS,
    PARTS,
    SCENES,
    Critter,
    labels,
    random_critter,
    unseen_kinds,
)

FRESH = 7  # random stream of the judged cases, apart from every training render
CONCEPT_SIDE = 256  # of the picture a concept is read from
LAMBDAS = (0.8, 0.6)
PICTURES = (2, 4)  # of one object
KINDS = {"trained": "trained", "held out": "combinations", "new kinds": "kinds"}  # to the pool
GALLERY = 100  # critters among which a picture has to find its own
GALLERY_VIEWS = 4  # renders of each of them
RENDERS = "renders of held-out critters"
NEW_RENDERS = "renders of critters of new kinds"
COLUMNS = ("body", "pattern", "colour", "second", "trim", "parts", "scene", "identity", "new kind")


# --- what is asked --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task(ABC):
    """One picture to draw: the scene asked for, and the scene in which the thing's concept is
    read. `picture` draws the thing."""

    scene: str
    source_scene: str
    seed: int

    @abstractmethod
    def picture(
        self, scene: str, rng: np.random.Generator, size: int = 2 * SIDE
    ) -> tuple[np.ndarray, np.ndarray]:
        """A fresh picture of the thing, with its mask."""

    @property
    def concept_prompt(self) -> str:
        return f"a S{place(self.scene)}"

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng((FRESH, self.seed))

    @cached_property
    def source(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture and mask that a concept is read from."""
        return self.picture(self.source_scene, self.rng, CONCEPT_SIDE)

    def sources(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The source, and further pictures of the thing in scenes that are not asked for."""
        rng = np.random.default_rng((FRESH + 3, self.seed))
        scenes = [scene for scene in SCENES if scene not in (self.scene, self.source_scene)]
        chosen = rng.choice(scenes, count - 1, replace=False)
        return [self.source, *(self.picture(str(name), rng, CONCEPT_SIDE) for name in chosen)]

    @property
    def views(self) -> Tensor:
        """Pictures of the thing in other scenes than the one asked for, (GALLERY_VIEWS, 3, 32,
        32)."""
        rng = np.random.default_rng((FRESH + 1, self.seed))
        scenes = [scene for scene in SCENES if scene != self.scene]
        chosen = rng.choice(scenes, GALLERY_VIEWS, replace=False)
        return torch.stack(
            [small_pixels(whole_view(*self.picture(str(scene), rng))) for scene in chosen]
        )


@dataclass(frozen=True)
class Edit:
    """A part that the critter lacks and that the prompt adds to it."""

    part: str
    kind: str


@dataclass(frozen=True)
class Case(Task):
    """The task of a critter, which has a description too."""

    critter: Critter
    edit: Edit | None = None

    def picture(
        self, scene: str, rng: np.random.Generator, size: int = 2 * SIDE
    ) -> tuple[np.ndarray, np.ndarray]:
        return draw(self.critter, scene, rng, size)

    @property
    def wanted_critter(self) -> Critter:
        """As the prompt wants it."""
        edited = {self.edit.part: self.edit.kind} if self.edit else {}
        return replace(self.critter, **edited)

    @property
    def prompt(self) -> str:
        """'a red heart critter with two eyes and a smile on the grass'."""
        return with_article(describe(self.wanted_critter)) + place(self.scene)

    @property
    def class_prompt(self) -> str:
        """'a critter on the grass', 'a critter with wings on the grass'."""
        return with_article(CLASS_WORD) + self._request

    @property
    def concept_prompt(self) -> str:
        """'a S on the grass', 'a S with wings on the grass'."""
        return "a S" + self._request

    @property
    def _request(self) -> str:
        added = f" with {phrase_of(self.edit.kind)}" if self.edit else ""
        return added + place(self.scene)

    @property
    def wanted(self) -> list[int]:
        return labels(self.wanted_critter, self.scene)


def make_cases(count: int, kind: str, seed: int) -> list[Case]:
    """Fresh critters of one of KINDS, each in a scene other than that of its source picture."""
    # Numbers that end in 0 seed as they do without it, which may be the seed of training renders.
    rng = np.random.default_rng((FRESH, seed, 1 + list(KINDS).index(kind)))
    cases = []
    for _ in range(count):
        critter = random_critter(rng, KINDS[kind])
        scene, source = (str(name) for name in rng.choice(list(SCENES), size=2, replace=False))
        cases.append(Case(scene, source, int(rng.integers(2**31)), critter))
    return cases


def with_edits(cases: Sequence[Case]) -> list[Case]:
    """The same cases, of which every prompt adds a part that its critter lacks, where it lacks
    one."""
    return [replace(case, edit=_edit(case)) for case in cases]


def _edit(case: Case) -> Edit | None:
    rng = np.random.default_rng((FRESH + 4, case.seed))
    free = [part for part in ATTACHED if getattr(case.critter, part) == "none"]
    if not free:
        return None
    part = str(rng.choice(free))
    unseen = HELD_OUT_KINDS.get(part, ())
    kinds = [kind for kind in ATTRIBUTES[part] if kind not in ("none", *unseen)]
    return Edit(part, str(rng.choice(kinds)))


def same_colours(case: Case) -> Case:
    """Another critter, of which nothing but the colours is the case's."""
    other = random_critter(np.random.default_rng((FRESH + 2, case.seed)), "any")
    colours = {"colour": case.critter.colour}
    if other.second is not None and case.critter.second is not None:
        colours["second"] = case.critter.second
    if other.trim is not None and case.critter.trim is not None:
        colours["trim"] = case.critter.trim
    return replace(case, critter=replace(other, **colours))


# --- who draws: cases to pixels (B, 3, 32, 32) in [-1, 1] -----------------------------------------

T = TypeVar("T", bound=Task)


def draw_renders(
    tasks: Sequence[T], shown_for: Callable[[T], Task] = lambda task: task, side: int = SIDE
) -> Tensor:
    """The renderer itself, of each thing or of another shown for it; pictures of half the side."""
    pictures = [shown_for(task).picture(task.scene, task.rng, 2 * side) for task in tasks]
    return torch.stack([small_pixels(whole_view(*picture, side)) for picture in pictures])


def draw_through_vae(pipe: StableDiffusionPipeline, tasks: Sequence[Task]) -> Tensor:
    """Renders, encoded and decoded: the best that any picture of the model can be."""
    pixels = draw_renders(tasks, side=2 * pipe.vae.config.sample_size).to(pipe.device)
    return pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample


def draw_prompts(
    pipe: StableDiffusionPipeline, prompt_of: Callable[[Case], str], cases: list[Case], **options
) -> Tensor:
    """The plain Stable Diffusion."""
    generators = [torch.Generator().manual_seed(case.seed) for case in cases]
    prompts = [prompt_of(case) for case in cases]
    return 2 * pipe(prompts, generator=generators, output_type="pt", **options).images - 1


def draw_concepts(
    pipe: ElitePipeline,
    lambda_: float,
    tasks: Sequence[Task],
    pictures: int = 1,
    masked: bool = True,
    **options,
) -> Tensor:
    """ELITE, with each concept read from one render in another scene, or from several; without
    masks, everything in them is the object."""
    read = [list(map(list, zip(*task.sources(pictures), strict=True))) for task in tasks]
    if not masked:
        read = [[images, [np.full_like(x, 255) for x in masks]] for images, masks in read]
    out = pipe(
        [task.concept_prompt for task in tasks],
        concept=[pipe.encode_concept(*pairs) for pairs in read],
        lambda_=lambda_,
        seed=[task.seed for task in tasks],
        output_type="pt",
        **options,
    )
    return 2 * out.images - 1


@dataclass(frozen=True)
class Row(Generic[T]):
    """A line of the report."""

    name: str
    tasks: list[T]
    draw: Callable[[list[T]], Tensor]


def base_rows(
    pipe: StableDiffusionPipeline, known: list[Case], held_out: list[Case], **options
) -> list[Row[Case]]:
    """What needs no mapper."""
    by_text = partial(draw_prompts, pipe, lambda case: case.prompt, **options)
    by_class = partial(draw_prompts, pipe, lambda case: case.class_prompt, **options)
    return [
        Row(RENDERS, held_out, draw_renders),
        Row("the same through the VAE", held_out, partial(draw_through_vae, pipe)),
        Row("its colours alone", held_out, partial(draw_renders, shown_for=same_colours)),
        Row("base model, description of trained critters", known, by_text),
        Row("base model, description of held-out critters", held_out, by_text),
        Row("base model, class word", held_out, by_class),
    ]


def elite_rows(
    pipe: ElitePipeline, held_out: list[Case], new_kinds: list[Case], **options
) -> list[Row[Case]]:
    """Where things are lost on held-out critters: all words, w0, the local branch; and kinds that
    the whole model has never seen."""
    concepts = partial(draw_concepts, pipe, **options)
    rows = [
        Row("ELITE, all words", held_out, partial(concepts, 0.0, words="all")),
        Row("ELITE, w0", held_out, partial(concepts, 0.0)),
        *(Row(f"ELITE, lambda {x}", held_out, partial(concepts, x)) for x in LAMBDAS),
    ]
    faithful = partial(concepts, LAMBDAS[0])
    rows += [
        Row(f"ELITE, lambda {LAMBDAS[0]}, of {n} pictures", held_out, partial(faithful, pictures=n))
        for n in PICTURES
    ]
    rows.append(
        Row(f"ELITE, lambda {LAMBDAS[0]}, no masks", held_out, partial(faithful, masked=False))
    )
    return [*rows, Row(f"ELITE, new kinds, lambda {LAMBDAS[0]}", new_kinds, faithful)]


# --- the score ------------------------------------------------------------------------------------


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share."""
    if total == 0:
        return 0.0, 1.0
    found = binomtest(right, total).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def judge_pictures(
    judge: Judge, cases: Sequence[Case], pixels: Tensor, known: Tensor
) -> dict[str, Tensor]:
    """What is right of one picture per case: by attribute, `identity` and `new kind`, (N,) each of
    1, 0 or -1 where there is nothing to be right about.

    Args:
        cases: what was asked for, N of them.
        pixels: (N, 3, H, W) in [-1, 1].
        known: the `gallery` of these cases, and perhaps of more.

    A part that the prompt adds counts as `edit`, not as one of the critter's own.
    """
    logits, directions = judged(judge, pixels)
    found = right_ones(logits, torch.tensor([case.wanted for case in cases]))
    found["edit"] = torch.full((len(cases),), -1)
    for i, case in enumerate(cases):
        if case.edit:
            found["edit"][i] = found[case.edit.part][i]
            found[case.edit.part][i] = -1
    found["identity"] = same_critter(directions.cpu(), known)
    found["new kind"] = torch.tensor(
        [
            min((int(found[name][i]) for name in unseen_kinds(case.critter)), default=-1)
            for i, case in enumerate(cases)
        ]
    )
    return found


def gallery(judge: Judge, tasks: Sequence[Task]) -> Tensor:
    """The direction in which the judge sees each thing, over some renders, (N, 64)."""
    if len(tasks) < GALLERY:
        note(f"identity: among {len(tasks)}, not {GALLERY}; with fewer samples it is easier")
    return mean_directions([judged(judge, task.views)[1] for task in tasks])


def mean_directions(seen: Sequence[Tensor]) -> Tensor:
    """Directions of the views of each of N critters, (views, 64), to one each, (N, 64)."""
    return F.normalize(torch.stack([views.mean(0) for views in seen]), dim=-1).cpu()


def same_critter(directions: Tensor, known: Tensor) -> Tensor:
    """Whether picture i is nearer to critter i than to the GALLERY - 1 that follow it among those
    known (in a circle; all others where there are fewer): 1 or 0, (N,)."""
    own = (directions * known[: len(directions)]).sum(1)
    others = torch.arange(1, min(GALLERY, len(known)))
    rivals = (torch.arange(len(directions))[:, None] + others) % len(known)  # (N, GALLERY - 1)
    likeness = directions @ known.T
    return (own[:, None] > likeness.gather(1, rivals)).all(1).long()


def columns(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns of a table: attributes, all parts of a case together, identity, new kind. Values
    that count are 0 or 1, of the parts shares."""
    parts = share_right({name: found[name].numpy() for name in PARTS}, PARTS)
    by_name = {**found, "parts": torch.from_numpy(parts)}
    return {name: by_name[name][by_name[name] >= 0] for name in COLUMNS}


@torch.no_grad()
def draw_row(row: Row[T], batch_size: int, progress: tqdm) -> Tensor:
    """The row's pictures, (N, 3, H, W)."""
    drawn = []
    for tasks in batches(iter(row.tasks), batch_size):
        drawn.append(row.draw(tasks).cpu())
        progress.update(len(tasks))
    return torch.cat(drawn)


def score_row(
    judge: Judge, row: Row[Case], known: Tensor, batch_size: int, progress: tqdm
) -> dict[str, dict]:
    """Shares that are right over the row's cases, whose `gallery` is known, by column and
    attribute."""
    drawn = draw_row(row, batch_size, progress)
    found = judge_pictures(judge, row.tasks, drawn, known)
    counted = columns(found) | {name: found[name][found[name] >= 0] for name in PARTS}
    return {name: share(values) for name, values in counted.items()}


def share(values: Tensor) -> dict:
    """The mean with its interval: Wilson's of 0 and 1, a bootstrap's of shares, one per case."""
    right, total = values.sum().item(), len(values)
    if values.is_floating_point():
        _, *limits = interval(values.numpy())
    else:
        limits = list(wilson(right, total))
    return {
        "accuracy": right / total if total else None,
        "interval": limits,
        "right": right,
        "total": total,
    }


def score_rows(judge: Judge, rows: list[Row[Case]], batch_size: int) -> dict[str, dict]:
    scores, galleries = {}, {}
    with tqdm(total=sum(len(row.tasks) for row in rows), unit="picture") as progress:
        for row in rows:
            progress.set_description(row.name)
            key = id(row.tasks)  # rows share their cases
            if key not in galleries:
                galleries[key] = gallery(judge, row.tasks)
            scores[row.name] = score_row(judge, row, galleries[key], batch_size, progress)
    return scores


def markdown(scores: dict[str, dict], names: Sequence[str] = COLUMNS) -> str:
    """'| ELITE, lambda 0.8 | 93.2 (90.7-95.1) | ...': per cent, with the interval."""
    rows = [[row, *(cell(by_name[name]) for name in names)] for row, by_name in scores.items()]
    return table(["% right (95 % interval)", *names], rows)


def cell(score: dict) -> str:
    return percent(score["accuracy"], *score["interval"]) if score["total"] else "-"


def load_base(model: Path) -> StableDiffusionPipeline:
    """The stock pipeline."""
    return _ready(base_pipeline(**load_stable_diffusion(model)))


def load_elite(
    model: Path, global_mapper: str | None = None, local_mapper: str | None = None
) -> ElitePipeline:
    """ELITE with models of its own. Raises ValueError where the model has no mappers and none are
    given."""
    elite = ElitePipeline.from_stable_diffusion(
        model, global_mapper=global_mapper, local_mapper=local_mapper
    )
    elite.scheduler = make_scheduler("dpm++", elite.scheduler.config)
    return _ready(elite)


def _ready(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(pick_device(None))


def score_model(
    judge: Judge,
    base: StableDiffusionPipeline,
    elite: ElitePipeline | None,
    *,
    samples: int,  # pictures a row
    seed: int,
    batch_size: int,
    **options,  # of every drawing call
) -> dict[str, dict]:
    """Every row of the report."""
    known, held_out, new_kinds = (make_cases(samples, kind, seed) for kind in KINDS)
    rows = base_rows(base, known, held_out, **options)
    rows.append(Row(NEW_RENDERS, new_kinds, draw_renders))
    if elite is not None:
        rows += elite_rows(elite, held_out, new_kinds, **options)
    return score_rows(judge.to(base.device), rows, batch_size)


def score_judge(judge: Judge, samples: int) -> dict[str, dict]:
    """The judge alone, on fresh renders."""
    rows = [
        Row(name, make_cases(samples, kind, seed=0), draw_renders)
        for name, kind in ((RENDERS, "held out"), (NEW_RENDERS, "new kinds"))
    ]
    return score_rows(judge, rows, batch_size=100)
