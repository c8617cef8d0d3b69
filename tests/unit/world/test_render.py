"""How critters are drawn."""

from dataclasses import replace
from itertools import combinations

import cv2
import numpy as np
import pytest

from small_world.render import CREAM, LEAF, LINE, WHEEL, Pose, draw, draw_scene
from small_world.world import ATTACHED, ATTRIBUTES, COLOURS, FAMILIES, SCENES, Body, has_trim
from tests.critters import DRESSED, POSE


def test_mask_covers_all_that_differs_from_the_scene(critters, on_magenta):
    for number, critter in enumerate(critters["any"][:60]):
        image, mask = draw(critter, "grass", np.random.default_rng(number), 96)
        changed = np.abs(image.astype(int) - (255, 0, 255)).max(axis=2) > 10
        edge = cv2.dilate(mask, np.ones((3, 3), np.uint8))  # half covered pixels are mixed
        assert set(np.unique(mask)) == {0, 255} and mask.mean() > 255 * 0.08
        assert not changed[edge == 0].any()
        assert changed[mask > 0].all()


def test_critters_lie_inside_the_picture(critters, on_magenta):
    """Each at half its size in the middle of a larger picture, where nothing is cut off: no more
    than its outline leaves the frame."""
    size = 128
    line = round(size * LINE)
    middle = slice(size // 4 - line - 1, 3 * size // 4 + line + 1)
    for number, critter in enumerate(critters["any"][:60]):
        pose = Pose.random(np.random.default_rng(number))
        assert 0.62 <= 2 * pose.half <= 0.95
        smaller = replace(pose, x=0.25 + pose.x / 2, y=0.25 + pose.y / 2, half=pose.half / 2)
        _, mask = draw(critter, "grass", np.random.default_rng(number), size, smaller)
        assert mask.any() and mask[middle, middle].sum() == mask.sum()


def test_the_longer_side_is_that_of_the_pose():
    for half in (0.3, 0.45):
        _, mask = draw(DRESSED, "grass", np.random.default_rng(0), 200, replace(POSE, half=half))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        longer = max(np.ptp(rows), np.ptp(columns)) + 1
        assert longer == pytest.approx(2 * half * 200, abs=3 * 200 * LINE)


@pytest.mark.parametrize(("pattern", "second"), [("solid", None), ("striped", "white")])
def test_colours_are_those_of_the_critter(pattern, second):
    critter = replace(DRESSED, pattern=pattern, second=second, trim="green")
    image, mask = draw(critter, "road", np.random.default_rng(0), 128, POSE)
    inner = image[mask > 0].astype(int)
    for name, colour in COLOURS.items():
        near = (np.abs(inner - colour).max(axis=1) <= 35).mean()  # shades, and light from above
        if name in ("red", "green", second):
            assert near > 0.05, name
        elif name not in ("white", "brown"):  # of the eyes; of edges between red and ink
            assert near < 0.02, name


def test_trim_shows_where_it_is_named(critters):
    """Another trim changes the picture of exactly those critters that have one."""
    seen = set()
    for critter in critters["any"][:150]:
        trims = [colour for colour in COLOURS if colour != critter.colour][:2]
        one, other = (
            draw(replace(critter, trim=trim), "snow", np.random.default_rng(1), 64, POSE)[0]
            for trim in trims
        )
        assert (one != other).any() == has_trim(critter) == (critter.trim is not None)
        seen.add(has_trim(critter))
    assert seen == {True, False}


def middling(family: str) -> Body:
    return Body(**{name: (low + high) / 2 for name, (low, high) in FAMILIES[family].items()})


@pytest.mark.parametrize("name", [name for name in ATTRIBUTES if name != "scene"])
def test_every_kind_looks_different(name):
    critter = replace(DRESSED, colour="purple", second="yellow")
    pictures = {}
    for kind in ATTRIBUTES[name]:
        numbers = {"numbers": middling(kind)} if name == "body" else {}
        drawn = replace(critter, **{name: kind}, **numbers)
        pictures[kind] = draw(drawn, "grass", np.random.default_rng(2), 64, POSE)[0].astype(int)
    for one, other in combinations(pictures, 2):
        differing = np.abs(pictures[one] - pictures[other]).max(axis=2) > 30
        assert differing.sum() > 20, (one, other)


PARTLESS = replace(
    DRESSED, pattern="solid", second=None, top="none", side="none", bottom="none", tail="none"
)
OWN_COLOURS = {"horns": CREAM, "leaf": LEAF, "wheels": WHEEL}


@pytest.mark.parametrize("head", ATTRIBUTES["head"])
@pytest.mark.parametrize("body", ATTRIBUTES["body"])
def test_every_part_shows_on_every_body_and_head(body, head, on_magenta):
    bare = replace(PARTLESS, body=body, numbers=middling(body), head=head, trim="green")
    for name in ATTACHED:
        for kind in ATTRIBUTES[name][1:]:
            worn = replace(bare, **{name: kind})
            image, _ = draw(worn, "grass", np.random.default_rng(2), 64, POSE)
            wanted = OWN_COLOURS.get(kind, COLOURS["green"])
            near = np.abs(image.astype(int) - wanted).max(axis=2) <= 35
            assert near.sum() >= 12, kind  # three pixels at 32 px, where fins on stars are smallest


def test_drawing_depends_on_the_seed_alone():
    first, again, other = (
        draw(DRESSED, "snow", np.random.default_rng(seed), 64) for seed in (1, 1, 2)
    )
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != other[0]).any() and (first[1] != other[1]).any()


def test_every_scene_is_another_one():
    for seed in range(3):
        pictures = [draw_scene(scene, np.random.default_rng(seed), 32) for scene in SCENES]
        assert all(picture.shape == (32, 32, 3) for picture in pictures)
        assert len({picture.tobytes() for picture in pictures}) == len(SCENES) == 12


def test_unknown_scene_is_named():
    with pytest.raises(ValueError, match="'teapot'"):
        draw_scene("teapot", np.random.default_rng(0), 32)
