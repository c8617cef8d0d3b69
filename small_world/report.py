"""How `reproduce` shows its verdicts: tables, curve, contact sheets."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from elite.files import write_atomically
from elite.markdown import percent, table
from elite.sheets import tile_rows
from small_world.claims import Claim, Verdicts, editability, fidelity, interval, share_right
from small_world.score import Case
from small_world.world import PARTS

SHOWN = ("body", "pattern", "colour", "second", "trim", "parts", "identity", "scene", "edit")


def score_table(rows: Mapping[str, Verdicts], costs: Mapping[str, str]) -> str:
    """A line per method: every attribute, fidelity, editability, what a concept costs."""
    head = ["% (95 % interval)", *SHOWN, "fidelity", "editability", "seconds", "concepts"]
    lines = []
    for name, found in rows.items():
        cells = [_percent(values) for values in _columns(found).values()]
        lines.append([name, *cells, costs[name], str(len(found["scene"]))])
    return table(head, lines)


def _columns(found: Verdicts) -> dict[str, np.ndarray]:
    """The values that count of each column."""
    by_name = {**found, "parts": share_right(found, PARTS)}
    values = {name: by_name[name][by_name[name] >= 0] for name in SHOWN}
    return {**values, "fidelity": fidelity(found), "editability": editability(found)}


def _percent(values: np.ndarray) -> str:
    return percent(*interval(values)) if len(values) else "-"


def claims_table(claims: Sequence[Claim]) -> str:
    rows = [[x.text, x.verdict, "; ".join(map(str, x.conditions))] for x in claims]
    return table(["the paper says", "here", "evidence (points, 95 % interval)"], rows)


def plot_curve(rows: dict[str, Verdicts], path: Path) -> None:
    """Fidelity over editability: a curve over lambda from w0 on, the other methods as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=110)
    axes = figure.subplots()
    curve = [name for name in rows if name == "w0" or name.startswith("w0 +")]
    for group in (curve, *([name] for name in rows if name not in curve)):
        points = [(interval(editability(rows[n])), interval(fidelity(rows[n]))) for n in group]
        mean, low, high = 100 * np.array(points).transpose(2, 1, 0)  # (axes, points) each
        (x, y), errors = mean, np.stack([mean - low, high - mean], axis=1)
        label = "w0 + local over lambda" if group is curve else group[0]
        style = {"fmt": "o-" if group is curve else "s", "capsize": 2, "elinewidth": 0.6}
        axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], label=label, **style)
        if group is curve:
            for place, offset in ((0, (-16, -14)), (-1, (6, 6))):  # all would hide each other
                text, point = group[place].rsplit(" ", 1)[-1], (x[place], y[place])
                axes.annotate(text, point, textcoords="offset points", xytext=offset, fontsize=8)
    axes.set_xlabel("editability: what the prompt asks for that is there, %")
    axes.set_ylabel("fidelity: attributes of the critter that are right, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    write_atomically(path, partial(figure.savefig, format="png"))


def summary(rows: Mapping[str, Verdicts], claims: Sequence[Claim]) -> dict:
    """Means with intervals and the claims, for results.json."""
    scores = {
        name: {key: interval(x) for key, x in _columns(found).items() if len(x)}
        for name, found in rows.items()
    }
    judged = [
        {"claim": c.text, "verdict": c.verdict, "evidence": [str(x) for x in c.conditions]}
        for c in claims
    ]
    return {"scores": scores, "claims": judged}


def contact_sheet(cases: Sequence[Case], pictures: Mapping[str, np.ndarray]) -> Image.Image:
    """A row per case: its input, then each method's picture of it."""
    rows = [
        [Image.fromarray(case.source[0]), *(Image.fromarray(x[i]) for x in pictures.values())]
        for i, case in enumerate(cases)
    ]
    return tile_rows(rows, ["input", *pictures], "each critter in another scene than its input's")
