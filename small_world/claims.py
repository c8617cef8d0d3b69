"""What the numbers say of the paper's claims: paired differences, intervals, verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics import bootstrap
from small_world.world import ATTRIBUTES

FIDELITY = tuple(name for name in ATTRIBUTES if name != "scene")
MARGIN = 0.05  # a difference of no more than this counts as none

Interval = tuple[float, float, float]  # mean, low, high of 95 %
Verdicts = Mapping[str, np.ndarray]  # attribute to 1, 0 or -1 per case


def share_right(verdicts: Verdicts, names: Sequence[str]) -> np.ndarray:
    """Share of these attributes that is right, per case: a picture's depend on each other."""
    found = np.stack([verdicts[name] for name in names])
    return (found == 1).sum(0) / (found >= 0).sum(0)


def fidelity(verdicts: Verdicts) -> np.ndarray:
    """Share of the critter's own attributes that is right, per case."""
    return share_right(verdicts, FIDELITY)


def editability(verdicts: Verdicts) -> np.ndarray:
    """Share of what the prompt asks for that is there, its scene and its edit, per case."""
    return share_right(verdicts, ("scene", "edit"))


def interval(values: np.ndarray, lowest: float = 0.0) -> Interval:
    """Mean with its bootstrap interval; every case is a concept of its own. Where all cases are
    equal, which a bootstrap takes for certainty, the rule of three bounds how rare others may be
    (Hanley and Lippman-Hand 1983).

    Args:
        values: shares, or with -1 as the lowest differences of shares.
    """
    mean, low, high = bootstrap(list(values), [str(i) for i in range(len(values))])
    rare = 3 / len(values) if low == high else 0.0
    return mean, max(low - rare, lowest), min(high + rare, 1.0)


@dataclass(frozen=True)
class Condition:
    """A difference that has to be above a bound."""

    text: str
    difference: Interval
    bound: float = 0.0

    @property
    def verdict(self) -> str:
        """Of a difference that has to be above 0, surely less than MARGIN either way is none."""
        _, low, high = self.difference
        if low > self.bound:
            return "reproduced"
        is_none = low > -MARGIN and high < MARGIN
        return "not reproduced" if high < self.bound or is_none else "undecided"

    def __str__(self) -> str:
        mean, low, high = (100 * value for value in self.difference)
        above = f", bound {100 * self.bound:+.0f}" if self.bound else ""
        return f"{self.text} {mean:+.1f} ({low:+.1f} to {high:+.1f}{above})"


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims; it holds where all its conditions do."""

    text: str
    conditions: Sequence[Condition]

    @property
    def verdict(self) -> str:
        found = {condition.verdict for condition in self.conditions}
        for verdict in ("not reproduced", "undecided"):
            if verdict in found:
                return verdict
        return "reproduced"


def judge_claims(rows: Mapping[str, Verdicts], lambdas: Sequence[float]) -> list[Claim]:
    """The four claims, from rows named as in `reproduce`.

    Differences are paired: the same critters, scenes and seeds in both rows.
    """
    low, high = (f"w0 + local, {x}" for x in (min(lambdas), max(lambdas)))

    def more(measure, name: str, a: str, b: str, bound: float = 0.0) -> Condition:
        x, y = measure(rows[a]), measure(rows[b])
        count = min(len(x), len(y))  # textual inversion has the first cases only
        return Condition(f"{name}, {a} minus {b}:", interval(x[:count] - y[:count], -1.0), bound)

    claims = [
        Claim(
            "w0 is more editable than all words",
            [more(editability, "editability", "w0", "all words")],
        ),
        Claim(
            "the local branch adds fidelity without costing editability",
            [
                more(fidelity, "fidelity", "w0 + local, 0.6", "w0"),
                more(editability, "editability", "w0 + local, 0.6", "w0", -MARGIN),
            ],
        ),
        Claim(
            "lambda trades editability for fidelity",
            [more(fidelity, "fidelity", high, low), more(editability, "editability", low, high)],
        ),
    ]
    inverted = [name for name in rows if name.startswith("textual inversion")]
    if inverted:
        claims.append(
            Claim(
                "one forward pass reaches what textual inversion needs its steps for",
                [more(fidelity, "fidelity", "w0 + local, 0.8", inverted[-1], -MARGIN)],
            )
        )
    return claims
