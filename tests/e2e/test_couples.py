"""Two concepts in one picture of the small world: whose colour is where."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from small_world.classifier import load_judge
from small_world.couples import (
    NAMES,
    OUTCOMES,
    colours_seen,
    halves,
    halves_of,
    make_couples,
    markdown,
)
from small_world.flags import JUDGE
from small_world.judge import main
from small_world.score import draw_renders


def test_couples_differ_in_colour_and_are_always_the_same():
    made = make_couples(30, seed=0)
    assert all(couple.left.critter.colour != couple.right.critter.colour for couple in made)
    assert made == make_couples(30, seed=0) != make_couples(30, seed=1)
    assert made[0].prompt.startswith("a S1 next to a S2 ")


def test_halves():
    regions = halves(2, 4)
    assert regions["S1"].tolist() == [[True, True, False, False]] * 2
    assert (regions["S1"] ^ regions["S2"]).all() and tuple(regions) == NAMES


@pytest.fixture(scope="module")
def judge():
    return load_judge(JUDGE)


def test_outcomes_of_renders(judge):
    """Renders side by side: as they are, exchanged, and black ones."""
    made = make_couples(12, seed=0)
    left, right = (
        draw_renders([getattr(couple, side) for couple in made]) for side in ("left", "right")
    )
    own = colours_seen(judge, torch.cat([left, right], dim=3), made)
    others = colours_seen(judge, torch.cat([right, left], dim=3), made)
    assert (own == OUTCOMES.index("own")).float().mean() > 0.9
    assert (others == OUTCOMES.index("other's")).float().mean() > 0.9
    third = colours_seen(judge, torch.zeros(12, 3, 32, 64), made)
    assert (third == OUTCOMES.index("third")).float().mean() > 0.5


def test_shares_add_up():
    seen = {"with regions": torch.tensor([[0, 0]] * 8 + [[1, 2]] * 2)}
    assert halves_of(seen) == {"with regions": {"own": 16, "other's": 2, "third": 2}}
    assert "| with regions | 80.0 (50.0-100.0) | 10.0 (0.0-25.0) | 10.0 (0.0-25.0) |" in markdown(
        seen
    )


def test_halves_of_a_picture_are_no_independent_ones():
    seen = torch.tensor([[0, 0]] * 50 + [[1, 1]] * 50)
    (row,) = [line for line in markdown({"alike": seen}).splitlines() if "alike" in line]
    low, high = map(float, re.search(r"50.0 \((.+?)-(.+?)\)", row).groups())
    assert high - low > 18  # points, of 100 couples; 200 halves would have 14


def test_regions_keep_colours_apart(tmp_path, capsys):
    flags = ["--samples", "16", "--num_inference_steps", "10", "--batch_size", "8"]
    assert main(["couples", *flags, "--output_dir", str(tmp_path)]) == 0
    counts = json.loads((tmp_path / "couples.json").read_text())["halves"]
    without, within = counts["without regions"], counts["with regions"]
    assert sum(without.values()) == sum(within.values()) == 32
    assert within["own"] > without["own"]
    assert within["other's"] <= 3 < without["other's"]  # 23 % of 120 with one reading for all
    assert (tmp_path / "couples.md").read_text() in capsys.readouterr().out
    with Image.open(tmp_path / "grid.png") as sheet:
        assert np.asarray(sheet).std() > 10


def test_bad_numbers():
    with pytest.raises(ValueError, match="--samples 0: expected 1 or more"):
        main(["couples", "--samples", "0"])
