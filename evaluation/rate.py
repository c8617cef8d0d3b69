"""Rates the pictures of a finished run of evaluate.py by a program of your own, such as a local
vision-language model.

    python -m evaluation.rate outputs/evaluation python my_judge.py --some_flag

The program is started once, in the working directory. For each picture it reads a line of JSON,
{"picture": FILE, "reference": FILE, "prompt": TEXT}, and answers with one: numbers by name, such as
{"concept_preservation": 3, "prompt_following": 4}, the same names each time. The answers lie in
ratings.jsonl of the run; an interrupted call goes on from there, and `evaluation.compare` reads it.
Those of pictures that were drawn anew since count no more.
"""

import argparse
import json
import math
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elite.console import OK, run, script_parser
from elite.files import digest_files, is_file, read_text, write_text
from elite.wording import brief
from evaluation.cases import KEYS, Case, markdown, summarise
from evaluation.subjects import read_subjects

RATINGS = "ratings.jsonl"
# What a row of it says besides keys and numbers: the picture's file, a digest of it, and the
# prompt that the program was given.
OF = ("picture", "digest", "asked")
MOST = 2**28  # bytes of it
RUN_REMEDY = "expected the --output_dir of a finished run of evaluate.py"
ANEW = "run evaluate.py again"


class Program:
    """A program that answers a line of JSON with one.

    Args:
        taken: names that its ratings may not have, besides those of KEYS and OF.

    Raises:
        ValueError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], taken: Iterable[str] = ()) -> None:
        self.taken = (*KEYS, *OF, *taken)
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, encoding="utf-8", errors="replace"
            )
        except OSError as error:
            raise ValueError(
                f"{command[0]}: cannot be started ({error.strerror}); expected a program"
            ) from None

    def __call__(self, case: Case, picture: Path) -> dict[str, float]:
        """The ratings of a picture. Raises ValueError where it answers with none."""
        question = {
            "picture": str(picture),
            "reference": str(case.subject.pair.image_path),
            "prompt": case.class_prompt,
        }
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):  # it has ended, and so answers nothing
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        ratings = numbers_of(line)
        if not ratings or not ratings.keys().isdisjoint(self.taken):
            raise ValueError(
                f"{picture}: the program answered {brief(line)}; expected a line of JSON, numbers "
                f'by name as {{"concept_preservation": 3}}, none named {", ".join(self.taken)}'
            )
        return ratings

    def close(self) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def numbers_of(line: str) -> dict[str, float]:
    """Numbers by name of a line of JSON; none where it is something else."""
    try:
        found = json.loads(line)
        numbers = {name: float(value) for name, value in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}
    given = all(type(value) in (int, float) for value in found.values())
    return numbers if given and all(map(math.isfinite, numbers.values())) else {}


# --- what is written ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rated:
    """A picture that was rated."""

    row: dict[str, Any]  # of KEYS and numbers
    of: dict[str, str]  # by the names in OF; nothing in files of earlier versions

    @property
    def key(self) -> tuple:
        return tuple(self.row[name] for name in KEYS)

    def is_of(self, folder: Path) -> bool:
        """Whether the picture is still the one that was rated, as far as is known."""
        path = folder / self.of.get("picture", "")
        return not self.of or (is_file(path) and digest_files(path) == self.of["digest"])


def read_ratings(folder: Path) -> tuple[list[str], list[Rated]]:
    """The command that rated a run, and what it rated; nothing where nothing did. A line that was
    cut off is left out, and what was drawn anew since.

    Raises:
        ValueError: the file is something else.
    """
    path = folder / RATINGS
    if not is_file(path):
        return [], []
    lines = read_text(path, "remove it", MOST).splitlines(keepends=True)
    try:
        head, *rows = [json.loads(line) for line in lines if line.endswith("\n")]
        command, rated = head["command"], []
        for row in rows:
            of = {name: str(row.pop(name)) for name in OF if name in row}
            rated.append(Rated({name: row[name] for name in KEYS} | row, of))
        return command, [one for one in rated if one.is_of(folder)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: no ratings of a run; remove it") from None


def results_of(folder: Path) -> dict[str, Any]:
    """What a run has found. Raises ValueError where it is none."""
    text = read_text(folder / "results.json", RUN_REMEDY, MOST)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{folder}: damaged results.json ({error}); {RUN_REMEDY}") from None


def cases_of(folder: Path, results: Mapping[str, Any]) -> list[Case]:
    """What a run has scored, of which the picture is still there. Raises ValueError where it is no
    run, or where pictures or objects are others since."""
    try:
        settings, references = results["settings"], results["references"]
        data, cropped = settings["test_data_dir"], settings["crop_references"]
        scored = [
            (entry["file"], entry["digest"], [entry[name] for name in KEYS])
            for entry in results["scored"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: damaged results.json ({error!r}); {RUN_REMEDY}") from None
    subjects = {one.name: one for one in read_subjects(data, {}, settings["class_word"])}
    cases = []
    for file, digest, (name, template, seed) in scored:
        measured_with = str(references.get(name))
        class_word, _, _ = measured_with.rpartition(", ")
        subject = subjects.get(name) and replace(subjects[name], class_word=class_word)
        if subject is None or subject.measured_with(cropped) != measured_with:
            raise ValueError(f"{data}: {name} is not what {folder} was measured with; {ANEW}")
        if is_file(folder / file):
            if digest_files(folder / file) != digest:
                raise ValueError(f"{folder / file}: was drawn anew since it was scored; {ANEW}")
            cases.append(Case(subject, int(Path(file).name.partition("_")[0]), template, seed))
    return cases


def rate(folder: Path, command: Sequence[str]) -> list[dict]:
    """Rates what is not rated yet. Returns all rows.

    Raises:
        ValueError: there is nothing to rate, another command rated it before, or the program does
            not answer.
    """
    results = results_of(folder)
    cases, (before, before_rated) = cases_of(folder, results), read_ratings(folder)
    if not cases:
        raise ValueError(f"{folder}: none of its pictures is there; {RUN_REMEDY}")
    if before_rated and before != list(command):
        raise ValueError(f"{folder / RATINGS}: is by {brief(before)}; remove it")
    asked = {tuple(case.key.values()): case.class_prompt for case in cases}
    kept = [
        one
        for one in before_rated
        if one.key not in asked or one.of.get("asked") in (None, asked[one.key])
    ]
    lines = [{"command": list(command)}, *(one.row | one.of for one in kept)]
    write_text(folder / RATINGS, "".join(json.dumps(line) + "\n" for line in lines))
    rows = [one.row for one in kept if one.key in asked]
    rated = {one.key for one in kept}
    todo = [case for case in cases if tuple(case.key.values()) not in rated]
    program = Program(command, taken=results.get("scores", ()))
    bar = tqdm(todo, "rate", len(cases), initial=len(rows), unit="picture")
    try:
        with open(folder / RATINGS, "a", encoding="utf-8") as file:
            for case in bar:
                row = case.key | program(case, folder / case.path)
                if rows and row.keys() != rows[0].keys():
                    raise ValueError(
                        f"{folder / case.path}: rated by {brief(sorted(row))}, others by "
                        f"{brief(sorted(rows[0]))}; expected the same names each time"
                    )
                rows.append(row)
                of = case.path, digest_files(folder / case.path), case.class_prompt
                file.write(json.dumps(row | dict(zip(OF, of, strict=True))) + "\n")
                file.flush()
            os.fsync(file.fileno())
    finally:
        program.close()
    return rows


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, help="--output_dir of a run of evaluate.py")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="program and its arguments")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    if not args.command:
        raise ValueError("no program; expected one after the run, as python my_judge.py")
    rows = rate(args.run, args.command)
    print(markdown(summarise(rows)))
    return OK


if __name__ == "__main__":
    run(main)
