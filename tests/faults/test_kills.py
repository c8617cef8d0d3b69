"""Runs that are killed at random moments end in the very bits of uninterrupted ones; `make faults`
does the same for longer."""

from pathlib import Path

import pytest

from tests.faults.runs import KINDS, World, compare_killed, compare_pair

# Shards, and what lies in the cache when a run is killed, have test_killed_shards.py.
LONG = ("stage 1 on shards", "stage 2 on shards", "pretraining, vae", "pretraining, base")
CHECKED = [kind for kind in KINDS if kind not in LONG]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("faults") / "world", steps=8)


@pytest.mark.parametrize("kind", CHECKED)
def test_killed_runs_end_as_uninterrupted_ones(kind, world, tmp_path):
    """Loader process, accumulation, EMA, schedule; ten pictures, so a kill is within an epoch."""
    assert compare_killed(world, kind, tmp_path, kills=2, seed=0, timed=False)["kills"] == 2


def test_when_one_of_two_processes_is_killed_the_other_ends_and_both_resume(world, tmp_path: Path):
    assert len(compare_pair(world, "stage 1", tmp_path, kills=1, seed=1)["kills"]) == 1
