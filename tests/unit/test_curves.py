"""Learning curves from metrics.jsonl."""

import json

import numpy as np
import pytest
from PIL import Image

from small_world.curves import main, parse_curve, read_metric, windows


@pytest.fixture
def run_folder(tmp_path):
    rows = [{"step": step, "mse": 1 / step} for step in range(1, 11)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "metrics.jsonl").write_text(text)
    return tmp_path / "local"


def test_reads_steps_and_values(run_folder):
    steps, values = read_metric(run_folder, "mse")
    assert steps.tolist() == list(range(1, 11)) and values[3] == 0.25


def test_a_line_that_was_cut_off_is_passed_over(run_folder):
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "ms')
    assert read_metric(run_folder, "mse")[0].tolist() == list(range(1, 11))


def test_windows_by_hand():
    means, errors = windows(np.array([1.0, 3.0, 5.0, 5.0]), 2)
    assert means.tolist() == [2.0, 5.0]
    assert errors == pytest.approx([1.96 * 2**0.5 / 2**0.5, 0.0])
    assert windows(np.array([1.0, 2.0]), 20)[0].tolist() == [1.0, 2.0]


def test_picture_is_written(run_folder, tmp_path):
    assert (
        main([f"{run_folder}:mse", f"{run_folder}:mse", "--output", str(tmp_path / "c.png")]) == 0
    )
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 2 * picture.height


@pytest.mark.parametrize("text", ["local", ":mse"])
def test_what_is_no_curve(text):
    with pytest.raises(ValueError, match="expected FOLDER:METRIC"):
        parse_curve(text)


def test_missing_run_and_metric(run_folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl"):
        read_metric(tmp_path, "mse")
    with pytest.raises(ValueError, match="logs no 'psnr'; choose one of: mse"):
        read_metric(run_folder, "psnr")
