"""DreamBench's protocol (Ruiz et al. 2023, section 4.1), written beside each result, and the two
rows between which its scores are read."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from elite.files import digest_weights, sha256_of
from elite.markdown import table
from evaluation.cases import Case, ClipScores, DinoScores, score_batch, summarise
from evaluation.subjects import Subject

METRICS = ("clip", "dino")
CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"
SUBJECTS, IMAGES = 30, 4  # pictures of each prompt
# SHA-256 of the 25 prompts of each kind, in their order, with {} for the subject.
PROMPTS = {"object": "351df13940ddefc3", "living": "4ba00988f0dc5dfb"}
GROUND = 128  # grey that a cut-out is pasted on
CEILING, COPY_PASTE = "ceiling: other real pictures", "copy-paste: cut-out on grey"


@dataclass(frozen=True)
class Setup:
    """What a user chooses of how scores are measured: file of prompts, names of CLIP and DINO,
    whether references are cropped."""

    prompts: str
    clip: str
    dino: str
    cropped: bool


def by_protocol(
    cases: Sequence[Case],
    rows: Sequence[Mapping],
    metrics: Sequence[ClipScores | DinoScores],
    setup: Setup,
) -> tuple[dict, str]:
    """What belongs into results.json and results.md besides the scores.

    Args:
        rows: the scores of these cases.
        metrics: of CLIP and of DINO.
    """
    measured, wrong = describe(cases, metrics, setup), departures(cases, setup)
    found = {"this run": rows, **baselines(cases, metrics)}
    summaries = {name: summarise(each) for name, each in found.items()}
    lines = [f"- {name}: {text}" for name, text in measured.items()]
    lines += [
        f"- **departs from DreamBench, compares with no published score:** {w}" for w in wrong
    ]
    more = {"protocol": measured, "departures": wrong, "rows": summaries}
    return more, "\n\n".join(["", markdown(summaries), "\n".join(lines)])


def describe(
    cases: Sequence[Case], metrics: Sequence[ClipScores | DinoScores], setup: Setup
) -> dict[str, str]:
    """What scores are measured with; those of the same are comparable."""
    seeds = sorted({case.seed for case in cases})
    models: list[Any] = [metric.model for metric in metrics]
    clip, dino = models
    file = Path(setup.prompts)
    own = any(case.subject.templates for case in cases)
    return {
        "protocol": "DreamBench",
        "subjects": str(len(subjects_of(cases))),
        "prompts": "captions of the pictures"
        if own
        else f"{file.name}, SHA-256 {sha256_of(file)[:16]}",
        "pictures": f"{len(seeds)} a prompt, seeds {seeds[0]} to {seeds[-1]}",
        "placeholder": "the model reads its word for '{0} {1}', CLIP-T the class word alone",
        "input": "the first picture of a subject with a mask",
        "references": "all pictures of a subject, "
        + ("cropped to the object where there is a mask" if setup.cropped else "whole")
        + "; mean of the cosines",
        "resize": f"bicubic, shorter side to {clip.side} px and for DINO {dino.shorter_side} px; "
        f"the middle {clip.side} and {dino.side} px",
        "clip": f"{setup.clip}, weights {digest_weights(clip.model.state_dict())[:16]}",
        "dino": f"{setup.dino}, weights {digest_weights(dino.model.state_dict())[:16]}",
    }


def subjects_of(cases: Sequence[Case]) -> list[Subject]:
    return list(dict.fromkeys(case.subject for case in cases))


def departures(cases: Sequence[Case], setup: Setup) -> list[str]:
    """In what a run is not DreamBench's, so that its scores compare with no published ones."""
    subjects, seeds = subjects_of(cases), {case.seed for case in cases}
    prompts = {digest_prompts(cases, subject) for subject in subjects}
    wrong = {
        f"{len(subjects)} subjects, not {SUBJECTS}": len(subjects) != SUBJECTS,
        "not the 25 prompts of prompts_and_classes.txt for each subject": not prompts
        <= set(PROMPTS.values()),
        f"{len(seeds)} pictures a prompt, not {IMAGES}": len(seeds) != IMAGES,
        "subjects of a single picture": any(len(s.reference_paths) == 1 for s in subjects),
        f"CLIP {setup.clip}, not {CLIP}": setup.clip != CLIP,
        f"DINO {setup.dino}, not {DINO}": setup.dino != DINO,
        "cropped references": setup.cropped,
    }
    return [text for text, is_so in wrong.items() if is_so]


def digest_prompts(cases: Sequence[Case], subject: Subject) -> str:
    """The first 16 digits of the SHA-256 of what a subject is drawn with, as PROMPTS has them."""
    texts = {case.number: case.template for case in cases if case.subject == subject}
    joined = "\n".join(texts[number] for number in sorted(texts))
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


# --- the two rows ---------------------------------------------------------------------------------


def baselines(
    cases: Sequence[Case], metrics: Sequence[ClipScores | DinoScores]
) -> dict[str, list[dict]]:
    """Rows of scores as `score_cases` gives them: what real pictures reach, and what pasting the
    object reaches without drawing anything. Subjects of one picture have no ceiling."""
    first = [case for case in cases if case.seed == cases[0].seed]
    found: dict[str, list[dict]] = {CEILING: [], COPY_PASTE: []}
    for subject in subjects_of(cases):
        found[CEILING] += real_rows(subject, metrics)
        mine = [case for case in first if case.subject == subject]
        found[COPY_PASTE] += score_batch([pasted(subject)] * len(mine), mine, metrics)
    return {name: rows for name, rows in found.items() if rows}


def real_rows(subject: Subject, metrics: Sequence[ClipScores | DinoScores]) -> list[dict]:
    """Each real picture of a subject against the others; it was made to no prompt."""
    pictures = subject.references(cropped=False)
    if len(pictures) == 1:
        return []
    columns: dict[str, list[float]] = {}
    for metric in metrics:
        cosines = metric.model.images(pictures) @ metric.references(subject).T
        others = (cosines.sum(1) - cosines.diagonal()) / (len(pictures) - 1)
        columns[f"{metric.name}_i"] = others.tolist()
    return [
        Case(subject, 0, "{}", number).key
        | {name: values[number] for name, values in columns.items()}
        | {"clip_t": None}
        for number in range(len(pictures))
    ]


def pasted(subject: Subject) -> Image.Image:
    """The object of the input on grey, where it was."""
    image, mask = subject.pair.read()
    return Image.fromarray(np.where(mask[..., None], image, np.uint8(GROUND)))


def markdown(summaries: Mapping[str, Mapping[str, Mapping]]) -> str:
    """Rows of means with their intervals, by name."""
    columns = {"clip_i": "CLIP-I", "dino_i": "DINO-I", "clip_t": "CLIP-T"}
    rows = [
        [name, *(_cell(summary[column]) if column in summary else "-" for column in columns)]
        for name, summary in summaries.items()
    ]
    return table(["", *columns.values()], rows)


def _cell(score: Mapping) -> str:
    low, high = score["interval"]
    return f"{score['mean']:.3f} ({low:.3f}-{high:.3f})"
