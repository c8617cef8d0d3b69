"""`data_scripts/cal_bbox_by_seg.py`: boxes of masks, in parallel, from any working directory."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_scripts.cal_bbox_by_seg import even_span, main, tight_box
from elite.annotations import load_mask_boxes, mask_boxes_path
from elite.console import run
from elite.open_images import OpenImagesMasks
from tests.open_images import make_open_images

SCRIPT = Path(__file__).resolve().parents[2] / "data_scripts" / "cal_bbox_by_seg.py"


def write_mask(root: Path, name: str, rows: slice, columns: slice, shape=(40, 50)) -> None:
    mask = np.zeros(shape, dtype=bool)
    mask[rows, columns] = True
    (root / "segs" / "test").mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(root / "segs" / "test" / name)


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    write_mask(tmp_path, "even.png", slice(4, 14), slice(6, 26))
    write_mask(tmp_path, "odd.png", slice(4, 13), slice(6, 25))
    write_mask(tmp_path, "edge.png", slice(31, 40), slice(0, 50))
    write_mask(tmp_path, "full.png", slice(None), slice(None), shape=(41, 51))
    write_mask(tmp_path, "line.png", slice(3, 4), slice(0, 30))
    write_mask(tmp_path, "empty.png", slice(0), slice(0))
    return tmp_path


EXPECTED = {
    "even.png": (4, 14, 6, 26),
    "odd.png": (4, 14, 6, 26),  # grown by one
    "edge.png": (30, 40, 0, 50),  # no room below: grown above
    "full.png": (0, 41, 0, 51),  # no room at all: stays odd
}


def boxes_of(root: Path) -> dict[str, tuple[int, ...]]:
    return {
        str(name): tuple(map(int, box)) for name, *box in load_mask_boxes(mask_boxes_path(root))
    }


def test_script_runs_from_anywhere_in_parallel(masks, tmp_path_factory):
    run = subprocess.run(
        [sys.executable, SCRIPT, masks, "--workers", "2"],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert boxes_of(masks) == EXPECTED
    assert "4 boxes of 6 masks" in run.stdout and "6/6" in run.stderr  # progress bar


@pytest.mark.parametrize("place", [".", "segs", "segs/test"])
def test_root_segs_and_set_folder_are_understood(masks, place):
    assert main([str(masks / place), "--workers", "1"]) == 0
    assert boxes_of(masks) == EXPECTED


def test_unreadable_masks_are_listed_and_the_rest_is_written(masks, capsys):
    (masks / "segs" / "test" / "broken.png").write_bytes(b"\x89PNG")
    assert main([str(masks), "--workers", "1"]) == 3
    assert boxes_of(masks) == EXPECTED
    error = capsys.readouterr().err
    assert "1 masks could not be read" in error and "broken.png: not a readable image" in error


def test_an_index_stays_where_no_mask_can_be_read(masks, capsys):
    assert main([str(masks), "--workers", "1"]) == 0
    for path in (masks / "segs" / "test").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of 6 masks has a box; nothing was written"):
        main([str(masks), "--workers", "1"])
    assert "6 masks could not be read" in capsys.readouterr().err
    assert boxes_of(masks) == EXPECTED


def test_the_index_of_a_linked_folder_lies_beside_the_link(masks, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk") / "masks"
    (masks / "segs" / "test").rename(elsewhere)
    (masks / "segs" / "test").symlink_to(elsewhere)
    assert main([str(masks / "segs" / "test"), "--workers", "1"]) == 0
    assert boxes_of(masks) == EXPECTED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "no masks (*.png)"), (["--workers", "0"], "--workers 0: expected 1 or more")],
)
def test_hopeless_calls_give_one_line_and_2(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        run(partial(main, [str(tmp_path), *arguments]))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


def test_a_set_that_is_not_there_is_no_other(masks, capsys):
    for place in (".", "segs"):
        with pytest.raises(ValueError, match=r"no masks .* with segs/train/"):
            main([str(masks / place), "--set_name", "train", "--workers", "1"])


def test_scattered_object_has_one_box():
    mask = np.zeros((30, 40), dtype=bool)
    mask[2, 5] = mask[20, 30] = mask[10, 35] = True
    assert tight_box(mask) == (2, 22, 5, 37)


@pytest.mark.parametrize(
    ("span", "expected"),
    [((0, 4), (0, 4)), ((0, 3), (0, 4)), ((7, 10), (6, 10)), ((1, 10), (0, 10))],
)
def test_even_span(span, expected):
    assert even_span(*span, 10) == expected


def test_index_feeds_the_dataset(tmp_path):
    root = make_open_images(tmp_path, n=3)
    before = load_mask_boxes(mask_boxes_path(root))
    mask_boxes_path(root).unlink()
    assert main([str(root), "--workers", "1"]) == 0
    np.testing.assert_array_equal(load_mask_boxes(mask_boxes_path(root)), before)
    assert len(OpenImagesMasks(root)) == 3
