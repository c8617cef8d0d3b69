"""Boxes by zero-shot detectors: where they lie, in what order, and what is no detector."""

import numpy as np
import pytest

from elite.detector import Detector
from elite.masks import Box
from tests.tiny import save_dino_folder, save_owl_folder, save_sam_folder

WORDS = ("a critter", "tree")


@pytest.fixture(scope="module", params=[save_owl_folder, save_dino_folder], ids=["owl", "dino"])
def folder(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("detector"))


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_what_is_found_lies_inside_best_first(folder):
    detector = Detector(folder, WORDS)
    for height, width in ((90, 40), (30, 100)):
        found = detector(picture(height, width), 0.01)
        assert found
        scores = [one.score for one in found]
        assert scores == sorted(scores, reverse=True) and scores[-1] > 0.01 and scores[0] <= 1
        for box in (one.box for one in found):
            assert 0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height
        least = scores[0] - 1e-6
        assert [one.score for one in detector(picture(height, width), least)] == [
            score for score in scores if score > least
        ]


def test_boxes_are_pixels_of_the_picture(tmp_path):
    """Of OWLv2, which pads a picture to a square at the right and below."""
    detector = Detector(save_owl_folder(tmp_path), WORDS)
    found = detector(picture(60, 90), 1e-12)
    assert {one.word for one in found} <= set(WORDS)
    spans = [(15, 45), (45, 75), (75, 90)], [(15, 45), (45, 60)]  # the rest lies outside
    cells = {Box(left, top, right, bottom) for left, right in spans[0] for top, bottom in spans[1]}
    assert len(found) == 6 and {one.box for one in found} == cells


def test_a_text_that_is_too_long_is_told_before_the_first_photo(tmp_path):
    with pytest.raises(ValueError, match=r"cannot look for \['a critter a .*expected a few words"):
        Detector(save_owl_folder(tmp_path), ["a critter " * 30])


def test_another_model_and_a_missing_folder_are_one_line_with_the_remedy(tmp_path):
    save_sam_folder(tmp_path / "sam")
    for name in ("sam", "none"):
        with pytest.raises(ValueError, match="expected a zero-shot detector's folder") as caught:
            Detector(tmp_path / name, WORDS)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
