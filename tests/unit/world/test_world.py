"""Critters: what is held out, their silhouettes and labels."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from small_world.bodies import DIRECTIONS, outline, profile
from small_world.render import draw
from small_world.world import (
    ATTRIBUTES,
    EAR_RANGES,
    FAMILIES,
    HELD_OUT_INTERVALS,
    HELD_OUT_KINDS,
    LIMITS,
    POOLS,
    TAIL_RANGES,
    UNNAMED,
    Body,
    Critter,
    Ears,
    Tail,
    is_held_out,
    labels,
    random_critter,
    unseen_kinds,
)
from tests.critters import DRESSED, POSE

# --- what is held out -----------------------------------------------------------------------------


def inside(value: float, interval: str) -> bool:
    low, high = HELD_OUT_INTERVALS[interval]
    return low <= value <= high


def test_nothing_held_out_is_trained(critters):
    for critter in critters["trained"]:
        assert not is_held_out(critter) and not unseen_kinds(critter)
        assert not inside(critter.angle % 90, "angle")
        assert critter.body is None or not inside(critter.numbers.aspect, "aspect")


def test_the_intervals_are_drawn_where_they_may_be(critters):
    """So that the test above has something to miss."""
    for pool in ("combinations", "kinds", "any"):
        assert any(inside(critter.angle % 90, "angle") for critter in critters[pool])
        assert any(inside(critter.numbers.aspect, "aspect") for critter in critters[pool])


def test_one_combination_in_six_is_held_out(critters):
    known = [critter for critter in critters["any"] if not unseen_kinds(critter)]
    # 3.7 points are three deviations of these few; the hash itself gives 17.
    assert 0.13 < np.mean([is_held_out(critter) for critter in known]) < 0.21
    assert all(is_held_out(critter) for critter in critters["combinations"])
    assert not any(unseen_kinds(critter) for critter in critters["combinations"])


def test_every_trained_kind_appears_and_no_other(critters):
    for pool in ("trained", "combinations"):
        for name, kinds in ATTRIBUTES.items():
            if name != "scene":
                named = set(kinds) - set(HELD_OUT_KINDS.get(name, ()))
                between = {UNNAMED[name][1]} if name in UNNAMED and pool == "trained" else set()
                seen = {getattr(critter, name) for critter in critters[pool]}
                assert seen - {None} == (named | between) - {None}, (pool, name)


def test_new_kinds_come_one_at_a_time_and_all_of_them(critters):
    found = Counter()
    for critter in critters["kinds"]:
        (name,) = unseen_kinds(critter)
        found[name, getattr(critter, name)] += 1
    assert found.keys() == {
        (name, kind) for name, kinds in HELD_OUT_KINDS.items() for kind in kinds
    }
    assert min(found.values()) > 60
    rng = np.random.default_rng(0)
    asked = [random_critter(rng, "kinds", "tail") for _ in range(20)]
    assert {critter.tail for critter in asked} == set(HELD_OUT_KINDS["tail"])


def test_any_kind_may_be_judged(critters):
    for name, kinds in ATTRIBUTES.items():
        if name != "scene":
            assert {getattr(critter, name) for critter in critters["any"]} >= set(kinds), name


def test_bodies_of_new_kinds_have_the_numbers_of_their_family(critters):
    for critter in critters["kinds"]:
        assert (critter.numbers.exponent < 1.2) == (critter.body == "diamond")
        assert (critter.numbers.waist > 0.4) == (critter.body == "peanut")


def test_training_shows_its_share_of_what_has_no_name(critters):
    trained = critters["trained"]
    for name, (share, word) in UNNAMED.items():
        there = [c for c in trained if getattr(c, name) not in ("none", "solid")]
        found = np.mean([getattr(critter, name) == word for critter in there])
        assert abs(found - share) < 0.05, name  # three deviations of the few that wear a tail: 0.07
    for critter in trained:
        assert (critter.patterns is not None) == (critter.pattern == "mixed")
        assert (critter.ears is not None) == (critter.top == "ears")
        assert (critter.tail_numbers is not None) == (critter.tail == "tail")


def test_only_training_shows_what_has_no_name(critters):
    for critter in (c for pool in POOLS if pool != "trained" for c in critters[pool]):
        assert critter.body and critter.patterns is critter.ears is critter.tail_numbers is None


def test_bodies_without_a_name_never_look_like_a_held_out_one(critters):
    """A diamond has an exponent of 1 or four middling lobes, a peanut a waist."""
    blends = [critter.numbers for critter in critters["trained"] if critter.body is None]
    for name, (low, high) in LIMITS.items():
        found = [getattr(numbers, name) for numbers in blends]
        assert low <= min(found) < max(found) <= high, name
    for family in HELD_OUT_KINDS["body"]:
        ranges = FAMILIES[family]
        assert any(high < LIMITS[n][0] or low > LIMITS[n][1] for n, (low, high) in ranges.items())


def test_parts_without_a_name_never_look_like_a_held_out_one(critters):
    """Droopy ears hang, a checked body is stripes of two directions at once."""
    worn = [critter.ears for critter in critters["trained"] if critter.ears]
    assert len(worn) > 80 and max(ears.lean for ears in worn) <= 90
    mixed = {critter.patterns for critter in critters["trained"] if critter.patterns}
    assert len(mixed) == 12 and all(first != second for first, second in mixed)
    assert not any(kind in pair for pair in mixed for kind in HELD_OUT_KINDS["pattern"])


def test_what_lies_between_is_no_copy_of_a_kind(on_magenta):
    """Each of its numbers changes what is drawn."""
    rng = np.random.default_rng(3)

    def drawn(critter: Critter) -> bytes:
        return draw(critter, "grass", np.random.default_rng(2), 64, POSE)[0].tobytes()

    for _ in range(5):
        ears = Ears(**{name: rng.uniform(*bounds) for name, bounds in EAR_RANGES.items()})
        tail = Tail(**{name: rng.uniform(*bounds) for name, bounds in TAIL_RANGES.items()})
        worn = replace(DRESSED, top="ears", ears=ears, tail="tail", tail_numbers=tail)
        for name, (low, high) in EAR_RANGES.items():
            ends = (drawn(replace(worn, ears=replace(ears, **{name: x}))) for x in (low, high))
            assert len({*ends}) == 2, name
        for name, (low, high) in TAIL_RANGES.items():
            ends = [replace(worn, tail_numbers=replace(tail, **{name: x})) for x in (low, high)]
            assert drawn(ends[0]) != drawn(ends[1]), name
    pairs = (("striped", "dipped"), ("striped", "dotted"), ("patched", "dipped"))
    mixed = [replace(DRESSED, pattern="mixed", patterns=pair) for pair in pairs]
    assert len({*map(drawn, [DRESSED, replace(DRESSED, pattern="striped"), *mixed])}) == 5


# --- silhouettes ----------------------------------------------------------------------------------


def test_a_profile_is_how_far_the_outline_reaches():
    circle = profile(Body())
    assert len(circle) == len(DIRECTIONS) and np.allclose(circle, 1, atol=0.01)
    flat = profile(Body(aspect=0.5))
    assert flat[0] == pytest.approx(0.5, abs=0.01) and max(flat) == pytest.approx(1, abs=0.01)
    assert flat[-1] == pytest.approx(0.5, abs=0.01) and flat[6] == pytest.approx(1, abs=0.01)
    pointed, turned = profile(Body(tip=0.9)), profile(Body(tip=-0.9))
    assert pointed[2] < pointed[-3] and np.allclose(pointed, turned[::-1], atol=0.05)
    leaning = [profile(Body(aspect=1.3, skew=skew)) for skew in (0.1, -0.1)]
    assert np.allclose(*leaning, atol=0.03), "mirrored, it is the same"


def test_clouds_lie_flat(critters):
    clouds = [c.numbers for c in critters["any"] if c.body == "cloud"]
    for numbers in clouds[:50]:
        polygon = outline(numbers)
        low = polygon[:, 1].max()
        below = polygon[polygon[:, 1] > low - 0.01]
        assert np.ptp(below[:, 0]) > 1.0, "half of its width"
        assert np.ptp(polygon[:, 1]) < 0.8 * np.ptp(polygon[:, 0])


def test_unknown_pool_is_named():
    with pytest.raises(ValueError, match="pool 'test': expected one of trained, combinations"):
        random_critter(np.random.default_rng(0), "test")


# --- labels ---------------------------------------------------------------------------------------


def test_labels_number_the_kinds(critters):
    for critter in critters["any"][:200]:
        numbers = labels(critter, "moon")
        for (name, kinds), number in zip(ATTRIBUTES.items(), numbers, strict=True):
            kind = "moon" if name == "scene" else getattr(critter, name)
            assert number == -1 if kind is None else kinds[number] == kind


def test_labels_are_minus_one_where_there_is_nothing_to_see_or_name():
    def nothing(critter: Critter, scene: str | None) -> set[str]:
        return {n for n, x in zip(ATTRIBUTES, labels(critter, scene), strict=True) if x == -1}

    assert nothing(DRESSED, "snow") == set()
    assert nothing(DRESSED, None) == {"scene"}
    bare = replace(DRESSED, body=None, pattern="solid", second=None, trim=None)
    assert nothing(bare, "snow") == {"body", "second", "trim"}
    between = replace(DRESSED, pattern="mixed", patterns=("striped", "dipped"), top="ears")
    assert nothing(replace(between, tail="tail"), "snow") == {"pattern", "top", "tail"}


def test_solid_critters_have_no_second_colour(critters):
    for critter in critters["any"]:
        assert (critter.second is None) == (critter.pattern == "solid")
        colours = [c for c in (critter.colour, critter.second, critter.trim) if c is not None]
        assert len(set(colours)) == len(colours)
