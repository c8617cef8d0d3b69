"""Learning curves of training runs as a picture:

    python -m small_world.curves runs/small_world/vae_decoder:psnr runs/small_world/local:mse \\
        --output docs/learning_curves.png

Each argument is FOLDER:METRIC, where the folder holds the metrics.jsonl of a run. Drawn are means
over windows of steps, each with its 95 % interval.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np

from elite.console import check_least, run, script_parser
from elite.files import check_writable_file, read_rows, write_atomically


def read_metric(folder: Path, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values. Raises ValueError where there are none."""
    try:
        rows = [json.loads(line) for line in read_rows(folder / "metrics.jsonl")]
    except FileNotFoundError:
        raise ValueError(f"{folder}: has no metrics.jsonl; expected the folder of a run") from None
    known = [(row["step"], row[metric]) for row in rows if metric in row]
    if not known:
        names = ", ".join(rows[0].keys() - {"step"}) if rows else "none"
        raise ValueError(f"{folder}: logs no {metric!r}; choose one of: {names}")
    steps, values = zip(*known, strict=True)
    return np.array(steps), np.array(values, dtype=np.float64)


def windows(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each of `count` windows, and half the width of its 95 % interval."""
    parts = np.array_split(values, min(count, len(values)))
    means = np.array([part.mean() for part in parts])
    errors = [1.96 * part.std(ddof=1) / len(part) ** 0.5 if len(part) > 1 else 0 for part in parts]
    return means, np.array(errors)


def plot(curves: list[tuple[Path, str]], count: int, path: Path) -> None:
    """One diagram per run, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(curves), 3.5), dpi=110)
    all_axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for (folder, metric), axes in zip(curves, all_axes, strict=True):
        steps, values = read_metric(folder, metric)
        means, errors = windows(values, count)
        middles, _ = windows(steps, count)
        axes.errorbar(middles, means, yerr=errors, fmt="o-", markersize=3, capsize=2)
        axes.set(title=folder.name, xlabel="step", ylabel=metric)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    write_atomically(path, partial(figure.savefig, format="png"))


def parse_curve(text: str) -> tuple[Path, str]:
    folder, separator, metric = text.rpartition(":")
    if not separator or not folder:
        raise ValueError(f"{text!r}: expected FOLDER:METRIC, such as runs/small_world/local:mse")
    return Path(folder), metric


def main(arguments: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("curves", nargs="+", metavar="FOLDER:METRIC")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    args = parser.parse_args(arguments)
    check_least(args, windows=1)
    check_writable_file(args.output)
    plot([parse_curve(text) for text in args.curves], args.windows, args.output)
    print(f"curves in {args.output}")
    return 0


if __name__ == "__main__":
    run(main)
