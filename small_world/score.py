"""Scores the small world's models: draws pictures, asks the judge what they show, counts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from elite.images import to_pixels
from elite.loading import load_parts, make_scheduler
from elite.pipeline import ElitePipeline
from small_world.attributes import verdicts
from small_world.classifier import Judge
from small_world.objectives import ATTRIBUTES
from small_world.pretrain import base_pipeline
from small_world.render import draw
from small_world.samples import framed, labels
from small_world.world import SCENES, Thing, random_thing, things, unseen_things, with_article

FRESH = 7  # random stream of the judged cases, apart from every training render
CONCEPT_SIDE = 256  # of the picture a concept is read from
LAMBDAS = (0.8, 0.6)
KINDS = ("trained", "held out", "unseen")  # the last: of unseen silhouettes
RENDERS = "renders of held-out things"
UNSEEN_RENDERS = "renders of unseen silhouettes"
Z = 1.959964  # of a 95 % interval


# --- what is asked --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One picture to draw: the thing, the scene asked for, and the scene its concept is read in."""

    thing: Thing
    scene: str
    source_scene: str
    seed: int

    @property
    def prompt(self) -> str:
        """'a red mug on the grass'."""
        return f"{with_article(self.thing.words)} {SCENES[self.scene]}"

    @property
    def class_prompt(self) -> str:
        """'a mug on the grass'."""
        return f"{with_article(self.thing.shape)} {SCENES[self.scene]}"

    @property
    def concept_prompt(self) -> str:
        return f"a S {SCENES[self.scene]}"

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng((FRESH, self.seed))

    @property
    def source(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture and mask that a concept is read from."""
        return draw(self.thing, self.source_scene, self.rng, CONCEPT_SIDE)


def make_cases(count: int, kind: str, seed: int) -> list[Case]:
    """Random things of one of KINDS, each in a scene other than that of its source picture."""
    rng = np.random.default_rng((FRESH, seed, KINDS.index(kind)))
    pool = unseen_things() if kind == "unseen" else things(held_out_only=kind == "held out")
    cases = []
    for _ in range(count):
        thing = random_thing(rng, pool)
        scene, source = (str(name) for name in rng.choice(list(SCENES), size=2, replace=False))
        cases.append(Case(thing, scene, source, int(rng.integers(2**31))))
    return cases


# --- who draws: cases to pixels (B, 3, 32, 32) in [-1, 1] -----------------------------------------

Draw = Callable[[list[Case]], Tensor]


def draw_renders(cases: list[Case]) -> Tensor:
    """The renderer itself."""
    pictures = [framed(case.thing, case.scene, "scene", case.rng)[0] for case in cases]
    return F.avg_pool2d(torch.stack([to_pixels(picture) for picture in pictures]), 2)


def draw_through_vae(pipe: StableDiffusionPipeline, cases: list[Case]) -> Tensor:
    """Renders, encoded and decoded: the best that any picture of the model can be."""
    pixels = draw_renders(cases).to(pipe.device)
    return pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample


def draw_prompts(
    pipe: StableDiffusionPipeline, prompt_of: Callable[[Case], str], cases: list[Case], **options
) -> Tensor:
    """The plain Stable Diffusion."""
    generators = [torch.Generator().manual_seed(case.seed) for case in cases]
    prompts = [prompt_of(case) for case in cases]
    return 2 * pipe(prompts, generator=generators, output_type="pt", **options).images - 1


def draw_concepts(pipe: ElitePipeline, lambda_: float, cases: list[Case], **options) -> Tensor:
    """ELITE, with each concept read from one render in another scene."""
    out = pipe(
        [case.concept_prompt for case in cases],
        concept=[pipe.encode_concept(*case.source) for case in cases],
        lambda_=lambda_,
        seed=[case.seed for case in cases],
        output_type="pt",
        **options,
    )
    return 2 * out.images - 1


@dataclass(frozen=True)
class Row:
    """A line of the report."""

    name: str
    cases: list[Case]
    draw: Draw


def base_rows(
    pipe: StableDiffusionPipeline, known: list[Case], held_out: list[Case], **options
) -> list[Row]:
    """What needs no mapper."""
    by_text = partial(draw_prompts, pipe, lambda case: case.prompt, **options)
    by_class = partial(draw_prompts, pipe, lambda case: case.class_prompt, **options)
    return [
        Row(RENDERS, held_out, draw_renders),
        Row("the same through the VAE", held_out, partial(draw_through_vae, pipe)),
        Row("base model, words of trained things", known, by_text),
        Row("base model, class word of held-out things", held_out, by_class),
    ]


def elite_rows(
    pipe: ElitePipeline, held_out: list[Case], unseen: list[Case], **options
) -> list[Row]:
    """Held-out things over lambda, and silhouettes that the whole model has never seen."""
    return [
        Row(
            f"ELITE, {kind}, lambda {lambda_}",
            cases,
            partial(draw_concepts, pipe, lambda_, **options),
        )
        for kind, cases, lambda_ in (
            *(("held-out things", held_out, x) for x in LAMBDAS),
            ("unseen silhouettes", unseen, LAMBDAS[0]),
        )
    ]


# --- the score ------------------------------------------------------------------------------------


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share."""
    if total == 0:
        return 0.0, 1.0
    share, spread = right / total, Z**2 / total
    middle = share + spread / 2
    half = (share * (1 - share) * spread + (spread / 2) ** 2) ** 0.5
    return max((middle - half) / (1 + spread), 0.0), min((middle + half) / (1 + spread), 1.0)


def batches(cases: list[Case], size: int) -> Iterator[list[Case]]:
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


@torch.no_grad()
def score_row(judge: Judge, row: Row, batch_size: int, progress: tqdm) -> dict[str, dict]:
    """Accuracy of each attribute over the row's cases."""
    parts = []
    for cases in batches(row.cases, batch_size):
        wanted = torch.tensor([labels(case.thing, case.scene) for case in cases])
        parts.append(verdicts(judge, row.draw(cases), wanted))
        progress.update(len(cases))
    scores = {}
    for name in ATTRIBUTES:
        verdict = torch.cat([part[name] for part in parts])
        right, total = int((verdict == 1).sum()), int((verdict >= 0).sum())
        low, high = wilson(right, total)
        scores[name] = {
            "accuracy": right / total if total else None,
            "interval": [low, high],
            "right": right,
            "total": total,
        }
    return scores


def score_rows(judge: Judge, rows: list[Row], batch_size: int) -> dict[str, dict]:
    scores = {}
    with tqdm(total=sum(len(row.cases) for row in rows), unit="picture") as progress:
        for row in rows:
            progress.set_description(row.name)
            scores[row.name] = score_row(judge, row, batch_size, progress)
    return scores


def markdown(scores: dict[str, dict]) -> str:
    """'| ELITE, lambda 0.8 | 93.2 (90.7-95.1) | ...': per cent, with the interval."""
    lines = ["| % right (95 % interval) | " + " | ".join(ATTRIBUTES) + " |"]
    lines.append("|---" * (len(ATTRIBUTES) + 1) + "|")
    for row, by_name in scores.items():
        cells = [_cell(by_name[name]) for name in ATTRIBUTES]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(score: dict) -> str:
    if not score["total"]:
        return "-"
    low, high = (100 * bound for bound in score["interval"])
    return f"{100 * score['accuracy']:.1f} ({low:.1f}-{high:.1f})"


def load_pipelines(
    model: Path, global_mapper: str | None = None, local_mapper: str | None = None
) -> tuple[StableDiffusionPipeline, ElitePipeline | None]:
    """The stock pipeline and ELITE's (None without mappers), each with models of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = load_parts(model)
    base = base_pipeline(parts["vae"], parts["text_encoder"], parts["tokenizer"], parts["unet"])
    base.set_progress_bar_config(disable=True)
    elite = None
    if global_mapper or (model / "global_mapper").is_dir():
        elite = ElitePipeline.from_stable_diffusion(
            model, global_mapper=global_mapper, local_mapper=local_mapper
        )
        elite.scheduler = make_scheduler("dpm++", elite.scheduler.config)
        elite.set_progress_bar_config(disable=True)
        elite.to(device)
    return base.to(device), elite


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
    known, held_out, unseen = (make_cases(samples, kind, seed) for kind in KINDS)
    rows = base_rows(base, known, held_out, **options)
    rows.append(Row(UNSEEN_RENDERS, unseen, draw_renders))
    if elite is not None:
        rows += elite_rows(elite, held_out, unseen, **options)
    return score_rows(judge.to(base.device), rows, batch_size)


def score_judge(judge: Judge, samples: int = 2000) -> dict[str, dict]:
    """The judge alone, on fresh renders."""
    rows = [
        Row(name, make_cases(samples, kind, seed=0), draw_renders)
        for name, kind in ((RENDERS, "held out"), (UNSEEN_RENDERS, "unseen"))
    ]
    return score_rows(judge, rows, batch_size=100)
