"""Evaluates an ELITE pipeline on a folder of concepts: draws every prompt, scores the pictures,
reports with confidence intervals.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from elite.concept import Concept
from elite.defaults import PLACEHOLDER
from elite.drawing import Drawing, is_drawn, write_png
from elite.encoding import batches, progress_bar
from elite.files import digest_files, write_atomically, write_json, write_text
from elite.images import cut_out, read_image
from elite.markdown import table
from elite.pipeline import Elite
from elite.sheets import tile_rows
from evaluation.metrics import Clip, Dino, bootstrap, mean_cosine
from evaluation.subjects import Prompts, Subject

SHEET_SUBJECTS, SHEET_PROMPTS = 12, 8  # of one contact sheet
KEYS = ("subject", "prompt", "seed")  # what tells a row of scores from others


@dataclass(frozen=True)
class Case:
    """One picture to draw and score."""

    subject: Subject
    number: int  # of the prompt
    template: str
    seed: int

    @property
    def path(self) -> str:
        """'NAME/03_00042.png': prompt number and seed."""
        return f"{self.subject.name}/{self.number:02d}_{self.seed:05d}.png"

    @property
    def key(self) -> dict[str, Any]:
        """What identifies it in rows of scores and ratings."""
        return dict(zip(KEYS, (self.subject.name, self.template, self.seed), strict=True))

    @property
    def class_prompt(self) -> str:
        """The prompt with the class word, which CLIP-T compares with: the placeholder is no word
        to CLIP."""
        return self.template.replace("{}", self.subject.class_word)


class Metric(Protocol):
    """Scores pictures: {column: one value per picture, None where it does not apply}."""

    name: str

    @property
    def network(self) -> nn.Module:
        """Whose weights decide the scores."""

    def __call__(
        self, pictures: Sequence[Image.Image], cases: Sequence[Case]
    ) -> Mapping[str, Sequence[float | None]]: ...


def of_subject(case: Case) -> Subject:
    """Cases come subject by subject, and are grouped by this."""
    return case.subject


def make_cases(subjects: Sequence[Subject], prompts: Prompts, seeds: Sequence[int]) -> list[Case]:
    """Every subject with every prompt, its own or those of its kind, and every seed."""
    return [
        Case(subject, number, template, seed)
        for subject in subjects
        for number, template in enumerate(subject.templates or prompts.of(subject.class_word))
        for seed in seeds
    ]


# --- metrics --------------------------------------------------------------------------------------


References = Callable[[Subject], list[Image.Image]]


def references(cropped: bool) -> References:
    """Reads the references of a subject, once for the metrics that share this."""
    return lru_cache(maxsize=1)(partial(Subject.references, cropped=cropped))


class ImageScores:
    """The mean cosine of a picture with the references of its subject.

    Args:
        read: as `references` gives it.
    """

    name: str

    def __init__(self, model: Clip | Dino, read: References) -> None:
        self.model = model
        self.references = lru_cache(lambda subject: model.images(read(subject)))

    @property
    def network(self) -> nn.Module:
        return self.model.model

    def cosines(self, images: Tensor, cases: Sequence[Case]) -> list[float | None]:
        """Of the embeddings of pictures, (B, D)."""
        pairs = zip(images, cases, strict=True)
        return [mean_cosine(image, self.references(case.subject)) for image, case in pairs]


class ClipScores(ImageScores):
    """CLIP-I, the mean cosine with the references, and CLIP-T, the cosine with the class prompt."""

    name = "clip"
    model: Clip

    def __call__(
        self, pictures: Sequence[Image.Image], cases: Sequence[Case]
    ) -> dict[str, list[float | None]]:
        images = self.model.images(pictures)
        texts = self.model.texts([case.class_prompt for case in cases])
        cosines: list[float | None] = [float(cosine) for cosine in (images * texts).sum(-1)]
        return {"clip_i": self.cosines(images, cases), "clip_t": cosines}


class DinoScores(ImageScores):
    """DINO-I, the mean cosine with the references."""

    name = "dino"
    model: Dino

    def __call__(
        self, pictures: Sequence[Image.Image], cases: Sequence[Case]
    ) -> dict[str, list[float | None]]:
        return {"dino_i": self.cosines(self.model.images(pictures), cases)}


# --- drawing --------------------------------------------------------------------------------------


def draw_cases(
    pipe: Elite,
    cases: Sequence[Case],
    output_dir: Path,
    drawing: Drawing,
    *,
    batch_size: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Draws what is not there yet. Returns why, by the names of subjects that could not be read; of
    these older pictures may be there.

    Args:
        metadata: what else a picture depends on; with the drawing's own it is kept in the PNGs, and
            pictures of other settings are drawn anew.
    """
    settings = {**drawing.metadata(pipe), **(metadata or {})}
    failures: dict[str, str] = {}

    @lru_cache(maxsize=1)  # cases come subject by subject
    def concept_of(subject: Subject) -> Concept:
        image, mask = subject.pair.read()
        return pipe.encode_views(**pipe.concept_views(image, mask))

    def metadata_of(case: Case) -> dict[str, str]:
        return {**settings, "prompt": case.template, "source": case.subject.pair.digest}

    missing = [case for case in cases if not is_drawn(output_dir / case.path, metadata_of(case))]
    with progress_bar("draw", "picture", len(cases), len(missing)) as progress:
        for start in range(0, len(missing), batch_size):
            batch, concepts = [], []
            for case in missing[start : start + batch_size]:
                if case.subject.name in failures:
                    continue
                try:
                    concepts.append(concept_of(case.subject))
                    batch.append(case)
                except ValueError as error:
                    failures[case.subject.name] = str(error)
            if batch:
                prompts = [case.template.replace("{}", drawing.placeholder_token) for case in batch]
                pictures = drawing(pipe, prompts, concepts, [case.seed for case in batch])
                for case, picture in zip(batch, pictures, strict=True):
                    write_png(output_dir / case.path, picture, metadata_of(case))
            progress.update(len(missing[start : start + batch_size]))
    return failures


# --- scoring --------------------------------------------------------------------------------------


def score_cases(
    cases: Sequence[Case], output_dir: Path, metrics: Sequence[Metric], batch_size: int = 16
) -> tuple[list[dict], dict[str, str]]:
    """One row per picture: subject, prompt, seed, and the metrics' columns. And why, by the names
    of subjects whose references or drawn pictures could not be read; these have no rows."""
    rows: list[dict] = []
    failures: dict[str, str] = {}
    disable = not PartialState().is_main_process
    with tqdm(total=len(cases), desc="score", unit="picture", disable=disable) as progress:
        for subject, its_cases in groupby(cases, of_subject):
            of_it: list[dict] = []
            try:
                for batch in batches(its_cases, batch_size):
                    paths = [output_dir / case.path for case in batch]
                    pictures = [Image.fromarray(read_image(path)) for path in paths]
                    of_it += score_batch(pictures, batch, metrics)
                    progress.update(len(batch))
                rows += of_it
            except ValueError as error:
                failures[subject.name] = str(error)
    return rows, failures


def score_batch(
    pictures: Sequence[Image.Image], cases: Sequence[Case], metrics: Sequence[Metric]
) -> list[dict]:
    """The rows of these pictures."""
    columns: dict[str, Sequence[float | None]] = {}
    for metric in metrics:
        columns |= metric(pictures, cases)
    return [
        case.key | {name: values[i] for name, values in columns.items()}
        for i, case in enumerate(cases)
    ]


def summarise(rows: Sequence[Mapping]) -> dict[str, dict]:
    """Per column mean and 95 % interval (bootstrap over subjects), and how many pictures and
    subjects count."""
    summary = {}
    for name in rows[0].keys() - set(KEYS) if rows else ():
        known = [row for row in rows if row[name] is not None]
        if known:
            subjects = [row["subject"] for row in known]
            mean, low, high = bootstrap([row[name] for row in known], subjects)
            counts = {"pictures": len(known), "subjects": len(set(subjects))}
            summary[name] = {"mean": mean, "interval": [low, high], **counts}
    return dict(sorted(summary.items()))


# --- the whole ------------------------------------------------------------------------------------


def my_share(cases: Sequence[Case]) -> Sequence[Case]:
    """The cases of this process of `accelerate launch`: equal shares of consecutive ones, so that
    few subjects are encoded by two processes."""
    state = PartialState()
    size = -(-len(cases) // state.num_processes)
    return cases[state.process_index * size : (state.process_index + 1) * size]


def report(
    cases: Sequence[Case],
    rows: Sequence[dict],
    output_dir: Path,
    settings: Mapping,
    more: Mapping | None = None,
    text_below: str = "",
) -> str:
    """Writes results.json, results.csv, results.md and contact sheets. Returns results.md.

    Args:
        more: what else belongs into results.json.
        text_below: what else belongs into results.md.
    """
    summary = summarise(rows)
    counts = {"subjects": len({row["subject"] for row in rows}), "pictures": len(rows)}
    scored = {tuple(row[name] for name in KEYS) for row in rows}
    pictures = [
        {**case.key, "file": case.path, "digest": digest_files(output_dir / case.path)}
        for case in cases
        if tuple(case.key.values()) in scored
    ]
    scores = {"settings": dict(settings), **counts, "scores": summary, **(more or {})}
    scores["scored"] = pictures
    write_json(output_dir / "results.json", scores)
    write_atomically(output_dir / "results.csv", partial(_write_csv, rows))
    text = markdown(summary) + text_below
    write_text(output_dir / "results.md", text + "\n")
    sheets = contact_sheets(cases, output_dir)
    for number, sheet in enumerate(sheets):
        write_atomically(output_dir / f"grid_{number:02d}.png", sheet.save)
    for old in sorted(output_dir.glob("grid_[0-9][0-9].png"))[len(sheets) :]:
        old.unlink()  # of more objects
    return text


def _write_csv(rows: Sequence[dict], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def markdown(summary: Mapping[str, Mapping]) -> str:
    """A table: metric, mean, interval, pictures, subjects."""
    rows = []
    for name, score in summary.items():
        low, high = score["interval"]
        counts = str(score["pictures"]), str(score["subjects"])
        rows.append([name, f"{score['mean']:.4f}", f"{low:.4f} to {high:.4f}", *counts])
    return table(["metric", "mean", "95 % interval", "pictures", "subjects"], rows)


def contact_sheets(cases: Sequence[Case], output_dir: Path) -> list[Image.Image]:
    """Input, object and the first seed of the first prompts, twelve subjects a sheet."""
    first = (case for case in cases if case.seed == cases[0].seed)
    subjects = (list(mine)[:SHEET_PROMPTS] for _, mine in groupby(first, of_subject))
    return [_sheet(some, output_dir) for some in batches(subjects, SHEET_SUBJECTS)]


def _sheet(subjects: Sequence[Sequence[Case]], output_dir: Path) -> Image.Image:
    """A row for each subject; above those that share their prompts stand these."""
    parts = []
    for prompts, group in groupby(subjects, lambda cases: [case.template for case in cases]):
        names = [prompt.replace("{}", PLACEHOLDER) for prompt in prompts]
        rows = [_row(cases, output_dir) for cases in group]
        parts.append(tile_rows(rows, ["input", "object", *names]))
    size = max(part.width for part in parts), sum(part.height for part in parts)
    sheet, top = Image.new("RGB", size, "white"), 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _row(cases: Sequence[Case], output_dir: Path) -> list[Image.Image]:
    image, mask = cases[0].subject.pair.read()
    drawn = [read_image(output_dir / case.path) for case in cases]
    return [Image.fromarray(picture) for picture in (image, cut_out(image, mask), *drawn)]
