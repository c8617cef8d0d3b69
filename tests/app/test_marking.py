"""Squares and masks from what a person shows by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from app.marking import MAX_POINTS, Marks, Shown, Stroke, make_square, paint, read_marks
from elite.masks import Box, centred_prior, grab_cut, prior_of_box

DOT = Stroke(((0.5, 0.5),), 0.2)


@pytest.fixture
def disc(tmp_path):
    """A red disc on green, 60 x 40, right of the middle, with its mask."""
    y, x = np.mgrid[:40, :60]
    inside = np.hypot(x - 35, y - 20) < 12
    picture = np.where(inside[..., None], np.uint8((200, 30, 30)), np.uint8((30, 160, 40)))
    noise = np.random.default_rng(0).integers(0, 12, picture.shape, dtype=np.uint8)
    Image.fromarray(picture + noise).save(tmp_path / "disc.png")
    Image.fromarray(inside).save(tmp_path / "mask.png")
    return tmp_path


def test_a_crop_keeps_the_asked_part():
    wide = np.arange(5)[None, :, None].repeat(3, 0).repeat(3, 2).astype(np.uint8)
    assert make_square(wide, "crop", 0)[0, :, 0].tolist() == [0, 1, 2]
    assert make_square(wide, "crop", 0.5)[0, :, 0].tolist() == [1, 2, 3]
    assert make_square(wide, "crop", 1)[0, :, 0].tolist() == [2, 3, 4]
    tall = wide.transpose(1, 0, 2)
    assert make_square(tall, "crop", 1)[:, 0, 0].tolist() == [2, 3, 4]


def test_padding_is_white_and_no_object():
    wide = np.zeros((2, 4, 3), np.uint8)
    padded = make_square(wide, "pad", 0)
    assert padded.shape == (4, 4, 3) and padded[:2].max() == 0 and padded[2:].min() == 255
    mask = make_square(np.ones((2, 4), bool), "pad", 1)
    assert not mask[:2].any() and mask[2:].all()


def test_a_square_picture_stays_as_it_is():
    square = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    for squaring in ("crop", "pad"):
        assert np.array_equal(make_square(square, squaring, 0.3), square)


@pytest.mark.parametrize(("squaring", "position"), [("squash", 0.5), ("crop", 2), ("pad", -0.1)])
def test_unknown_squaring(squaring, position):
    with pytest.raises(ValueError, match="expected crop or pad, at 0 to 1"):
        make_square(np.zeros((2, 3, 3), np.uint8), squaring, position)


def test_strokes_paint_and_erase_in_their_order():
    empty = np.zeros((100, 100), bool)
    line = Stroke(((0.2, 0.5), (0.8, 0.5)), 0.2)
    painted = paint(empty, (line,))
    assert painted[50, 20:80].all() and not painted[20].any() and not painted[:, 5].any()
    assert 18 <= painted[:, 50].sum() <= 22  # the width, to the pixel at each edge
    hole = paint(empty, (line, Stroke(((0.5, 0.5),), 0.2, erase=True)))
    assert not hole[50, 50] and hole[50, 25] and hole.sum() < painted.sum()
    assert paint(empty, (Stroke(((0.5, 0.5),), 0.2, erase=True), line))[50, 50]
    assert not empty.any()


def test_marks_come_back_from_their_text():
    text = {"box": [0, 0.25, 1, 0.5], "strokes": [{"points": [[0.5, 0.5]], "width": 0.2}]}
    assert read_marks(json.dumps(text)) == Marks((0, 0.25, 1, 0.5), (DOT,))
    assert read_marks("") == read_marks(None) == read_marks("{}") == Marks()


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"box": [0, 0, 1]}',
        '{"box": [0, 0, 1, 1.5]}',
        '{"box": [0, 0, NaN, 1]}',
        '{"strokes": [{"points": [], "width": 0.1}]}',
        '{"strokes": [{"points": [[0.5]], "width": 0.1}]}',
        '{"strokes": [{"points": [["a", "b"]], "width": 0.1}]}',
        '{"strokes": [{"points": [[0.5, 0.5]], "width": 1e9}]}',
        '{"strokes": 3}',
        "[" * 100_000,
        7,
        json.dumps({"strokes": [{"points": [[0, 0]] * (MAX_POINTS + 1), "width": 0.1}]}),
    ],
    ids=lambda text: str(text)[:40],
)
def test_marks_that_are_none(text):
    with pytest.raises(ValueError, match=r"^marks cannot be read"):
        read_marks(text)


def shown(folder, **options) -> np.ndarray:
    """The mask of the disc."""
    one = Shown(folder / "disc.png", **options)
    return one.read_mask(one.read_picture())


def test_methods_are_the_librarys(disc):
    picture = Shown(disc / "disc.png")
    square = picture.square(picture.read_picture())
    assert square.shape == (40, 40, 3)
    assert np.array_equal(shown(disc), grab_cut(square, centred_prior(40, 40)))
    box = Marks(box=(0.2, 0.1, 0.95, 0.9))
    expected = grab_cut(square, prior_of_box(40, 40, Box(8, 4, 38, 36)))
    assert np.array_equal(shown(disc, method="box", marks=box), expected)
    assert shown(disc, method="whole").all()


def test_a_finder_is_asked_for_the_middle_the_box_and_the_click(disc):
    asked = []

    def find(square, box):
        asked.append((square.shape, box))
        return np.ones(square.shape[:2], bool)

    for method, box in (
        ("centre", None),
        ("box", (0.2, 0.1, 0.95, 0.9)),
        ("box", (0.5, 0.25, 0.5, 0.25)),
        ("box", (1, 1, 1, 1)),  # at the very corner: its last pixel
    ):
        assert shown(disc, method=method, marks=Marks(box=box), find=find).all()
    boxes = [None, Box(8, 4, 38, 36), Box(20, 10, 20, 10), Box(39, 39, 39, 39)]
    assert asked == [((40, 40, 3), box) for box in boxes]


def test_a_mask_file_is_cut_as_its_picture(disc):
    mask = shown(disc, method="file", mask=disc / "mask.png", position=0.5)
    assert np.array_equal(mask, np.asarray(Image.open(disc / "mask.png"))[:, 10:50])
    padded = shown(disc, method="file", mask=disc / "mask.png", squaring="pad")
    assert padded.shape == (60, 60) and not padded[:10].any() and padded[30, 35]


def test_the_brush_goes_over_every_method(disc):
    assert shown(disc, method="brush", marks=Marks(strokes=(DOT,))).sum() < 100
    erased = Marks(strokes=(Stroke(((0.5, 0.5),), 0.2, erase=True),))
    assert not shown(disc, method="whole", marks=erased)[20, 20]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "brush"}, "nothing is marked as object"),
        ({"method": "box"}, "no box yet"),
        ({"method": "file"}, "no mask yet"),
        ({"method": "magic"}, "way to mark 'magic'; expected one of centre, box"),
        ({"method": "box", "marks": Marks(box=(0, 0, 1, 1))}, "is the whole picture"),
        ({"method": "box", "marks": Marks(box=(0.5, 0, 0.5, 1))}, "is empty"),
    ],
    ids=str,
)
def test_what_is_missing_is_said(disc, options, said):
    with pytest.raises(ValueError, match=said):
        shown(disc, **options)


def test_files_are_called_by_their_name_alone(disc):
    (disc / "text.png").write_text("no picture")
    for one, said in (
        (Shown(disc / "text.png"), "^text.png: not a readable image"),
        (Shown(disc / "disc.png", max_pixels=2000), "^disc.png: 60 x 40 is more than 0.002 mill"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            one.read_picture()
        assert str(disc) not in str(error.value)
    with pytest.raises(ValueError, match=r"^text\.png: not a readable image"):
        shown(disc, method="file", mask=disc / "text.png")
    with pytest.raises(ValueError, match=r"^no picture yet"):
        Shown(None).read_picture()
