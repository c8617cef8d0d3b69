"""Compares two runs of evaluate.py picture by picture.

    python -m evaluation.compare outputs/lambda_0.6 outputs/lambda_0.8

Pictures of the same subject, prompt and seed are paired; the 95 % interval of their mean
difference is from a bootstrap over subjects. Runs that were measured otherwise are refused (exit
code 2).
"""

import argparse
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elite.console import OK, run, script_parser
from elite.files import read_text
from elite.markdown import table
from elite.wording import brief
from evaluation.cases import KEYS
from evaluation.metrics import bootstrap
from evaluation.rate import MOST, RUN_REMEDY, read_ratings

# What of the settings decides how a picture is measured, where no protocol says it.
MEASURED_BY = ("clip_name_or_path", "dino_name_or_path", "judge_path", "crop_references")

# For a verdict: in simulated runs without any difference 11 % were told apart by 8, 25 % by 3.
FEWEST_SUBJECTS = 8


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        measured_by: what its scores depend on besides the pictures.
        references: class word and references of each subject; none in runs of earlier versions.
        weights: a digest of those of each metric; none in runs of earlier versions.
        rated_by: the command of its ratings, where there are some.
        rows: scores by subject, prompt and seed; by metric, where it has a value.
    """

    folder: Path
    measured_by: Mapping[str, Any]
    references: Mapping[str, str]
    weights: Mapping[str, str]
    rated_by: list[str]
    rows: Mapping[tuple[str, ...], Mapping[str, float]]


def read_run(folder: Path) -> Run:
    """Raises ValueError where it is none."""
    texts = {
        name: read_text(folder / name, RUN_REMEDY, MOST) for name in ("results.json", "results.csv")
    }
    try:
        results = json.loads(texts["results.json"])
        settings, protocol = results["settings"], results.get("protocol")
        measured_by = protocol or {name: settings[name] for name in MEASURED_BY}
        references = dict(results.get("references") or {})
        weights = dict(results.get("weights") or {})
        rows = {
            tuple(row.pop(key) for key in KEYS): {k: float(v) for k, v in row.items() if v}
            for row in csv.DictReader(io.StringIO(texts["results.csv"], newline=""))
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: damaged results ({error!r}); {RUN_REMEDY}") from None
    rated_by, ratings = read_ratings(folder)
    for rated in ratings:
        rating = dict(rated.row)
        key = tuple(str(rating.pop(name)) for name in KEYS)
        rows.get(key, {}).update(rating)
    return Run(folder, measured_by, references, weights, rated_by, rows)


def check_comparable(one: Run, other: Run) -> None:
    """Raises ValueError where the runs were measured otherwise."""
    measures = [dict(run.measured_by) for run in (one, other)]
    for what in ("references", "weights"):
        parts = getattr(one, what), getattr(other, what)
        for name in parts[0].keys() & parts[1].keys():
            for measure, part in zip(measures, parts, strict=True):
                measure[f"{what} of {name}"] = part[name]
    for name in {**measures[0], **measures[1]}:
        values = [measured_by.get(name, "nothing") for measured_by in measures]
        if values[0] != values[1]:
            raise ValueError(
                f"{other.folder}: {name} is {values[1]}, but {values[0]} in {one.folder}; measure "
                "both alike"
            )
    if one.rated_by and other.rated_by and one.rated_by != other.rated_by:
        raise ValueError(
            f"{other.folder}: is rated by {brief(other.rated_by)}, but {one.folder} by "
            f"{brief(one.rated_by)}; rate both alike"
        )


def compare(one: Run, other: Run) -> list[dict]:
    """A row for each metric: both means, the mean difference with its interval, and how many
    pictures and subjects it is from.

    Raises:
        ValueError: no picture is in both.
    """
    both = [key for key in one.rows if key in other.rows]
    rows = []
    for metric in dict.fromkeys(name for key in both for name in one.rows[key]):
        keys = [key for key in both if metric in one.rows[key] and metric in other.rows[key]]
        if not keys:
            continue
        pairs = [(one.rows[key][metric], other.rows[key][metric]) for key in keys]
        subjects = [key[0] for key in keys]
        mean, low, high = bootstrap([b - a for a, b in pairs], subjects)
        means = [sum(values) / len(keys) for values in zip(*pairs, strict=True)]
        rows.append(
            {
                "metric": metric,
                "means": means,
                "difference": mean,
                "interval": (low, high),
                "pictures": len(keys),
                "subjects": len(set(subjects)),
            }
        )
    if both and not rows:
        raise ValueError(f"{other.folder}: has no metric of {one.folder}; rate both by the same")
    if not rows:
        raise ValueError(
            f"{other.folder}: shares no picture with {one.folder}; draw the same objects, prompts "
            "and seeds"
        )
    return rows


def verdict(interval: tuple[float, float], subjects: int) -> str:
    """What the interval says, where there are enough subjects for it."""
    if subjects < FEWEST_SUBJECTS:
        return "too few subjects"
    if interval[0] <= 0 <= interval[1]:
        return "not told apart"
    return "second higher" if interval[0] > 0 else "first higher"


def markdown(rows: Sequence[Mapping]) -> str:
    head = "metric", "first", "second", "difference", "95 % interval", "pictures", "subjects", ""
    lines = []
    for row in rows:
        means = [f"{mean:.4f}" for mean in row["means"]]
        difference = f"{row['difference']:+.4f}", "{:+.4f} to {:+.4f}".format(*row["interval"])
        counts = str(row["pictures"]), str(row["subjects"])
        said = verdict(row["interval"], row["subjects"])
        lines.append([row["metric"], *means, *difference, *counts, said])
    return table(head, lines)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("first", type=Path, help="--output_dir of a run of evaluate.py")
    parser.add_argument("second", type=Path, help="that of another one")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    one, other = read_run(args.first), read_run(args.second)
    check_comparable(one, other)
    print(markdown(compare(one, other)))
    alone = [len(one.rows.keys() - other.rows.keys()), len(other.rows.keys() - one.rows.keys())]
    if any(alone):
        print(f"left out: {alone[0]} pictures of the first alone, {alone[1]} of the second")
    return OK


if __name__ == "__main__":
    run(main)
