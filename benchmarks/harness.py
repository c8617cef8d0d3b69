"""What all benchmarks share: alternating rounds, ratios with their spread, and the file of results.

Machines drift while they measure. So the cases of a row take turns (A B A B ...), a ratio compares
two figures of the same round, and what is reported is the median over the rounds with its middle
half.
"""

import argparse
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from elite import markdown
from elite.console import OK, script_parser
from elite.files import check_writable_file, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")
SIZES = ("tiny", "full")
WITH_SDXL = (*SIZES, "tiny_xl", "xl")
JUDGED_ROUNDS = 5  # of times; fewer are within what two equal runs differ by
TIMES = ("s", "1/s")
MAY_BE_NONE = ("memory_rounds", "workers")  # flags of which 0 means none

T = TypeVar("T")
Measure = Callable[[], float]
Spread = tuple[float, float, float]  # median, and the ends of the middle half

# --- measuring ------------------------------------------------------------------------------------


def alternate(
    cases: Mapping[str, Callable[[], T]], rounds: int, title: str = ""
) -> dict[str, list[T]]:
    """What each case measures, `rounds` times, the cases taking turns."""
    figures: dict[str, list[T]] = {name: [] for name in cases}
    with tqdm(total=rounds * len(cases), desc=title, unit="run") as progress:
        for _ in range(rounds):
            for name, measure in cases.items():
                figures[name].append(measure())
                progress.update()
    return figures


def timed(
    work: Callable[[], object],
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Measure:
    """Measures the seconds that `work` takes, on a GPU until its last kernel is done."""

    def measure() -> float:
        synchronize(device)
        start = clock()
        work()
        synchronize(device)
        return clock() - start

    return measure


def synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = (float(x) for x in np.percentile(list(values), (25, 50, 75)))
    return median, low, high


# --- results --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What one case of a table should reach in every row."""

    case: str
    limit: float
    at: Literal["most", "least"] = "most"
    of: Literal["ratio", "median"] = "ratio"

    def met(self, row: "Row") -> bool:
        value = row.ratios[self.case][0] if self.of == "ratio" else row.medians[self.case]
        return value <= self.limit if self.at == "most" else value >= self.limit


@dataclass(frozen=True)
class Row:
    """The rounds of each case under one setting; the first case is the baseline."""

    name: str
    rounds: dict[str, list[float]]

    @cached_property
    def medians(self) -> dict[str, float]:
        return {case: spread(values)[0] for case, values in self.rounds.items()}

    @cached_property
    def ratios(self) -> dict[str, Spread]:
        """Of every other case to the baseline, round by round."""
        base, *others = self.rounds
        return {
            case: spread(np.divide(self.rounds[case], self.rounds[base]).tolist())
            for case in others
        }

    def to_dict(self, goal: Goal | None) -> dict[str, Any]:
        figures = {"name": self.name, "rounds": self.rounds, "medians": self.medians}
        verdict = {} if goal is None else {"met": goal.met(self)}
        return {**figures, "ratios": self.ratios, **verdict}


@dataclass
class Table:
    """Rows that have unit and cases in common."""

    title: str
    unit: str
    goal: Goal | None = None
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        goal = None if self.goal is None else vars(self.goal)
        rows = [row.to_dict(self.goal) for row in self.rows]
        return {"title": self.title, "unit": self.unit, "goal": goal, "rows": rows}


def finish(args: argparse.Namespace, tables: list[Table], name: str, **more: Any) -> int:
    """Writes the tables with all that was behind them, and prints them. Returns the exit status."""
    shown = [table.to_dict() for table in tables if table.rows]
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "command")}
    result = {
        "benchmark": name,
        "command": args.command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "settings": settings,
        "tables": shown,
        **more,
    }
    write_json(args.output, result)
    for table in shown:
        print("\n".join(table_lines(table)) + "\n")
    print(f"results in {args.output}")
    return OK


def default_output(name: str, size: str) -> Path:
    """Where results go; what a tiny model measures never reaches docs/BENCHMARKS.md."""
    folder = RESULTS / "tiny" if size.startswith("tiny") else RESULTS
    return folder / (f"{name}_xl.json" if size.endswith("xl") else f"{name}.json")


# --- as Markdown ----------------------------------------------------------------------------------


def table_lines(table: dict[str, Any]) -> list[str]:
    """A title and a Markdown table; medians, and in brackets the ratio to the first column with its
    middle half."""
    goal, rows = table["goal"], table["rows"]
    cases = list(dict.fromkeys(case for row in rows for case in row["medians"]))
    head = ["", *cases, *(["goal", "met"] if goal else [])]
    lines = []
    for row in rows:
        judged = [goal_text(goal), verdict(row, table["unit"])] if goal else []
        lines.append([row["name"], *(cell(row, case) for case in cases), *judged])
    title = f"**{table['title']}** ({table['unit']})"
    return [title, "", *markdown.table(head, lines).splitlines()]


def verdict(row: dict[str, Any], unit: str) -> str:
    """Whether a row meets its goal, as far as its rounds can tell."""
    if unit in TIMES and min(map(len, row["rounds"].values())) < JUDGED_ROUNDS:
        return "too few rounds"
    return "met" if row["met"] else "**not met**"


def cell(row: dict[str, Any], case: str) -> str:
    if case not in row["medians"]:
        return ""
    figure = number(row["medians"][case])
    if case not in row["ratios"]:
        return figure
    median, low, high = row["ratios"][case]
    return f"{figure} (x {median:.3f}, {low:.3f} to {high:.3f})"


def goal_text(goal: dict[str, Any]) -> str:
    """'ELITE at most x 1.02', 'boxes at least 10'."""
    times = "x " if goal["of"] == "ratio" else ""
    return f"{goal['case']} at {goal['at']} {times}{goal['limit']:g}"


def number(value: float) -> str:
    """Four significant digits, without an exponent where four digits will do."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# --- where it ran ---------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit measured, with a plus where files under version control differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"


# --- the command line -----------------------------------------------------------------------------


def make_parser(
    doc: str | None, name: str, sizes: Sequence[str] = SIZES
) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = script_parser(doc)
    parser.add_argument(
        "--size", choices=sizes, default="tiny", help="of the models or data (default tiny)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every case (default 3)")
    parser.add_argument("--threads", type=int, help="of torch on a CPU (default torch's own)")
    parser.add_argument(
        "--output", type=Path, help=f"JSON file (default benchmarks/results/[tiny/]{name}.json)"
    )
    return parser


def parse(parser: argparse.ArgumentParser, name: str, argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked: every number is 1 or more, or 0 where that means none.

    Args:
        argv: None means the command line's.

    Raises:
        ValueError: a number is out of range, or the results cannot be written.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.output = args.output or default_output(name, args.size)
    check_writable_file(args.output)
    for key, value in vars(args).items():
        least = 0 if key in MAY_BE_NONE else 1
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and number < least:  # a switch is a bool
                raise ValueError(f"--{key} {number}: expected {least} or more")
    args.command = shlex.join(["python", "-m", f"benchmarks.{name}", *argv])
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args
