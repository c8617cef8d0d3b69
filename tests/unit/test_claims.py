"""Claims of the paper from verdicts: paired differences, bounds, and what they decide."""

import numpy as np
import pytest

from small_world.claims import FIDELITY, Condition, editability, fidelity, interval, judge_claims

LAMBDAS = (0.2, 0.6, 0.8, 1.2)


def row(critter, scene, count=200):
    """So many of the cases right in everything, the same ones first; none has a second colour."""
    right = (np.arange(count) < critter * count).astype(int)
    return {
        **dict.fromkeys(FIDELITY, right),
        "second": np.full(count, -1),
        "scene": (np.arange(count) < scene * count).astype(int),
        "edit": np.full(count, -1),
    }


def rows(**changed):
    """Numbers under which every claim holds."""
    found = {
        "class word": row(0.4, 1.0),
        "all words": row(0.8, 0.5),
        "w0": row(0.5, 0.9),
        "w0 + local, 0.2": row(0.6, 0.9),
        "w0 + local, 0.6": row(0.8, 0.9),
        "w0 + local, 0.8": row(0.85, 0.85),
        "w0 + local, 1.2": row(0.9, 0.6),
        "textual inversion, 10 steps": row(0.5, 0.9, 40),
        "textual inversion, 50 steps": row(0.85, 0.9, 40),
    }
    return found | {name.replace("_", " "): value for name, value in changed.items()}


def verdicts(**changed):
    return [claim.verdict for claim in judge_claims(rows(**changed), LAMBDAS)]


def test_fidelity_and_editability_of_a_case():
    """Of twelve attributes, those that are there."""
    assert len(FIDELITY) == 12 and "scene" not in FIDELITY
    found = dict.fromkeys(FIDELITY, np.array([1, 0, 1]))
    found |= {"pattern": np.array([1, 1, 0]), "second": np.array([1, -1, -1])}
    found |= {"trim": np.array([1, 1, -1]), "scene": np.array([0, 1, 1]), "identity": np.zeros(3)}
    found |= {"edit": np.array([1, 0, -1])}
    assert fidelity(found) == pytest.approx([1, 2 / 11, 9 / 10])
    assert editability(found).tolist() == [0.5, 0.5, 1.0]


def test_claims_that_hold():
    assert verdicts() == ["reproduced"] * 4


def test_claims_that_fail():
    assert verdicts(w0=row(0.5, 0.3))[0] == "not reproduced"
    assert verdicts(**{"w0 + local, 0.6": row(0.8, 0.7)})[1] == "not reproduced"  # costs scenes
    assert verdicts(**{"w0 + local, 0.6": row(0.3, 0.9)})[1] == "not reproduced"  # adds nothing
    assert verdicts(**{"w0 + local, 1.2": row(0.9, 1.0)})[2] == "not reproduced"
    better = row(1.0, 0.9)
    assert verdicts(**{"textual inversion, 50 steps": better, "w0 + local, 0.8": row(0.5, 0.9)})[
        3
    ] == ("not reproduced")


def test_surely_no_difference_is_no_reproduction():
    """Every scene right by both: of 200 pictures at most 3 could have told them apart."""
    same = {"w0": row(0.5, 1.0), "all words": row(0.8, 1.0)}
    assert verdicts(**same)[0] == "not reproduced"
    assert interval(np.zeros(200), lowest=-1.0) == (0.0, -0.015, 0.015)
    assert interval(np.ones(200)) == (1.0, 0.985, 1.0)


def test_a_difference_of_few_pictures_decides_nothing():
    few = {name: row(0.5, 1.0, 40) for name in rows()}
    assert judge_claims(few, LAMBDAS)[0].verdict == "undecided"
    small = {name: row(0.5, 0.5, 4) for name in rows()}
    small["w0"] = row(0.5, 0.75, 4)
    assert judge_claims(small, LAMBDAS)[0].verdict == "undecided"


def test_a_small_loss_is_none():
    """Non-inferiority: 2 points less editable, but surely less than 5."""
    losing = row(0.8, 0.9)
    losing["scene"] = losing["scene"].copy()
    losing["scene"][:2] = 0
    assert verdicts(**{"w0 + local, 0.6": losing})[1] == "reproduced"


def test_without_textual_inversion_there_are_three():
    found = {name: value for name, value in rows().items() if "inversion" not in name}
    assert len(judge_claims(found, LAMBDAS)) == 3


def test_differences_are_paired():
    """The same cases differ by exactly one in ten: no spread from the cases themselves."""
    a, b = np.tile([1.0, 0.0], 50), np.tile([1.0, 0.0], 50)
    a[1::20] = 1
    mean, low, high = interval(a - b)
    assert mean == pytest.approx(0.05) and 0 < low < high < 0.12


def test_condition_is_told_in_points():
    condition = Condition("editability:", (0.1, 0.05, 0.2), -0.05)
    assert str(condition) == "editability: +10.0 (+5.0 to +20.0, bound -5)"
    assert condition.verdict == "reproduced"
