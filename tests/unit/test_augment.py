"""Augmentations: what moves, what stays, and that picture and mask move together."""

import re

import numpy as np
import pytest

from elite.augment import (
    CLOSE,
    FAR,
    PLAIN,
    blur,
    clip_view,
    elastic,
    inner_cells,
    object_view,
    scaled_target,
)
from elite.images import cut_out, resize

MANY = 200  # draws: a choice of p .3 is missed with probability 1e-31


@pytest.fixture
def crop() -> np.ndarray:
    """A smooth gradient, darkest at the left, (48, 64, 3)."""
    rows, columns = np.mgrid[:48, :64]
    return np.stack([40 + columns * 3, 50 + rows * 2, 60 + columns], axis=2).astype(np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((48, 64), dtype=bool)
    mask[8:40, 8:56] = True
    return mask


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


class Draws:
    """A generator with its choices written down: `random` and `uniform` give these, in turn."""

    def __init__(self, random: list[float], uniform: list[object] | None = None, integers: int = 0):
        self._random, self._uniform, self._integers = iter(random), iter(uniform or []), integers
        self.ranges: list[tuple[float, float]] = []  # asked of `uniform`

    def random(self) -> float:
        return next(self._random)

    def uniform(self, low: float, high: float, size: int | None = None) -> object:
        value = next(self._uniform)
        self.ranges.append((low, high))
        return value

    def integers(self, low: int, high: int | None = None, size: int | None = None) -> object:
        low, high = (0, low) if high is None else (low, high)
        value = max(low, min(self._integers, high - 1))
        return value if size is None else np.full(size, value)


# --- stage 1 --------------------------------------------------------------------------------------


def test_clip_view_without_a_draw_is_the_plain_crop(crop):
    np.testing.assert_array_equal(
        clip_view(crop, 32, Draws([0.5, 0.5, 0.3, 0.3])), resize(crop, 32, 32)
    )


def test_flip_mirrors(crop):
    view = clip_view(crop, 32, Draws([0.49, 1, 1, 1]))
    np.testing.assert_array_equal(view, resize(crop, 32, 32)[:, ::-1])


def test_rotation_turns_about_the_centre(crop):
    draws = Draws([1, 0, 1, 1], uniform=[20.0])
    view = clip_view(crop, 33, draws).astype(int)
    assert draws.ranges == [(-20, 20)]
    plain = resize(crop, 33, 33).astype(int)
    np.testing.assert_array_equal(view[16, 16], plain[16, 16])
    # Counter-clockwise: what stood to the right of the centre now stands above, by sin 20.
    assert view[4, 16, 0] > plain[4, 16, 0] + 8 and view[28, 16, 0] < plain[28, 16, 0] - 8


def test_blur_smooths_and_elastic_moves(crop):
    checks = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)
    checks = np.repeat(checks[..., None], 3, axis=2).astype(np.uint8)
    assert blur(checks, generator(0)).std() < checks.std() / 2
    plain = resize(crop, 64, 64)
    moved = elastic(plain, generator(0)).astype(int)
    assert 0.5 < np.abs(moved - plain).mean() < 20
    flat = np.full((64, 64, 3), 90, np.uint8)
    np.testing.assert_array_equal(elastic(flat, generator(0)), flat)  # no black comes in


def test_clip_view_is_varied_and_repeats_from_its_seed(crop):
    views = [clip_view(crop, 32, generator(seed)) for seed in range(MANY)]
    plain = sum(np.array_equal(view, resize(crop, 32, 32)) for view in views)
    assert 0.06 < plain / MANY < 0.2  # 0.5 * 0.5 * 0.7 * 0.7 = 0.12
    np.testing.assert_array_equal(views[7], clip_view(crop, 32, generator(7)))
    assert all(view.shape == (32, 32, 3) and view.dtype == np.uint8 for view in views)


# --- stage 2, object view -------------------------------------------------------------------------


def test_object_view_without_a_draw_is_the_plain_cut_out(crop, mask):
    view, view_mask = object_view(crop, mask, 32, Draws([0.5] * 3))
    np.testing.assert_array_equal(view, resize(cut_out(crop, mask), 32, 32))
    assert view_mask.dtype == bool and view_mask.mean() == pytest.approx(mask.mean(), abs=0.05)


def test_shift_moves_picture_and_mask_by_the_same_pixels(crop, mask):
    shift = np.array([4 / 32, -2 / 32])
    draws = Draws([1, 1, 0], uniform=[shift])
    view, view_mask = object_view(crop, mask, 32, draws)
    assert draws.ranges == [(-60 / 224, 60 / 224)]
    plain, plain_mask = object_view(crop, mask, 32, Draws([1, 1, 1]))
    np.testing.assert_array_equal(view[:-2, 4:], plain[2:, :-4])
    np.testing.assert_array_equal(view_mask[:-2, 4:], plain_mask[2:, :-4])
    assert not view[:, :4].any() and not view_mask[-2:].any()  # black comes in


def test_object_turns_about_the_centre(crop):
    bar = np.zeros((48, 64), dtype=bool)
    bar[20:28] = True  # a level bar through the centre
    draws = Draws([1, 0, 1], uniform=[30.0])
    _, view_mask = object_view(crop, bar, 32, draws)
    assert draws.ranges == [(-30, 30)]
    middles = [np.flatnonzero(view_mask[:, column]).mean() for column in (4, 16, 27)]
    # Counter-clockwise: the right end rises, by tan 30 of the way.
    assert np.diff(middles) == pytest.approx([-12 * 0.577, -11 * 0.577], abs=1.5)
    assert middles[1] == pytest.approx(15.5, abs=1)


def test_resize_crop_is_a_part_of_a_larger_view(crop, mask):
    # Draws gives the largest of everything: side 36 of 32, then the last offset, 4.
    view, view_mask = object_view(crop, mask, 32, Draws([0, 1, 1], integers=36))
    larger = resize(cut_out(crop, mask), 36, 36)
    np.testing.assert_array_equal(view, larger[4:, 4:])
    assert view_mask.mean() > mask.mean()


def test_object_lies_inside_its_mask_under_every_draw(crop, mask):
    for seed in range(MANY):
        view, view_mask = object_view(crop, mask, 56, generator(seed))
        bright = view.min(axis=2) > 30  # half-way into the object's darkest pixels
        overlap = (bright & view_mask).sum() / (bright | view_mask).sum()
        assert overlap > 0.9, seed  # an edge of one pixel on a 42 x 37 object


def test_mask_is_never_lost(crop):
    corners = np.zeros((48, 64), dtype=bool)
    corners[:3, -3:] = corners[-3:, :3] = True  # a shift down and right takes both out
    shift = np.array([0.2, 0.2])
    _, view_mask = object_view(crop, corners, 32, Draws([1, 1, 0], uniform=[shift]))
    _, plain_mask = object_view(crop, corners, 32, Draws([1, 1, 1]))
    np.testing.assert_array_equal(view_mask, plain_mask)


# --- stage 2, target ------------------------------------------------------------------------------


@pytest.mark.parametrize(("resolution", "latent_size"), [(96, 12), (64, 16), (32, 8)])
def test_small_targets_are_pasted_on_black_and_the_mask_lies_inside(crop, resolution, latent_size):
    cell = resolution // latent_size
    sides = []
    for seed in range(MANY):
        target = scaled_target(crop, resolution, latent_size, generator(seed))
        assert target.image.shape == (resolution, resolution, 3)
        assert target.valid.shape == (latent_size, latent_size) and target.valid.any()
        if target.phrase in FAR:
            pasted = target.image.any(axis=2)
            rows, columns = (np.flatnonzero(pasted.any(axis=axis)) for axis in (1, 0))
            side = rows[-1] - rows[0] + 1
            assert side == columns[-1] - columns[0] + 1 and pasted.sum() == side**2
            assert pasted[target.valid.repeat(cell, axis=0).repeat(cell, axis=1)].all()
            sides.append(side / resolution)
        else:
            assert target.valid.all() and target.image.any(axis=2).all()
    assert 0.3 < min(sides) < 0.4 and 0.55 < max(sides) < 0.6


def test_mask_is_the_pasted_area_less_a_cell_on_each_side(crop):
    # 0.5 * 96 = 48 px at (16, 16): cells 2 to 7 of 12, so 3 to 6.
    target = scaled_target(crop, 96, 12, Draws([0.6], uniform=[0.5], integers=16))
    expected = np.zeros((12, 12), dtype=bool)
    expected[3:7, 3:7] = True
    np.testing.assert_array_equal(target.valid, expected)
    np.testing.assert_array_equal(target.image[16:64, 16:64], resize(crop, 48, 48))


def test_middle_targets_are_the_plain_crop(crop):
    target = scaled_target(crop, 96, 12, Draws([0.6], uniform=[0.7]))
    np.testing.assert_array_equal(target.image, resize(crop, 96, 96))
    assert target.phrase == PLAIN and target.valid.all()


def test_large_targets_are_a_part_of_the_enlarged_crop(crop):
    target = scaled_target(crop, 96, 12, Draws([0.7], uniform=[1.25], integers=10))
    np.testing.assert_array_equal(target.image, resize(crop, 120, 120)[10:106, 10:106])
    assert target.phrase in CLOSE and target.valid.all()


def test_framings_come_as_often_as_they_should(crop):
    phrases = [scaled_target(crop, 32, 8, generator(seed)).phrase for seed in range(3 * MANY)]
    shares = {
        kind: sum(p in kind for p in phrases) / len(phrases) for kind in (FAR, CLOSE, (PLAIN,))
    }
    # 2/3 * 0.4 far, 2/3 * 0.6 plain, 1/3 close; four standard deviations of 600 draws are 0.08
    assert shares[FAR] == pytest.approx(2 / 3 * 0.4, abs=0.08)
    assert shares[CLOSE] == pytest.approx(1 / 3, abs=0.08)
    assert set(phrases) == {*FAR, *CLOSE, PLAIN}


@pytest.mark.parametrize(
    ("span", "cells"),
    [
        ((0, 64), (1, 7)),
        ((4, 60), (1, 6)),
        ((24, 40), (4, 5)),
        ((30, 34), (4, 5)),
        ((0, 8), (0, 1)),
    ],
)
def test_inner_cells(span, cells):
    """Cells of 8 px; where none is left, the middle one."""
    assert inner_cells(*span, 64, 8) == slice(*cells)


def test_phrases_carry_no_template():
    assert all(re.fullmatch(r"[a-z ]+", phrase) for phrase in (*FAR, *CLOSE, PLAIN))
