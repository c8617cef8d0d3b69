"""A folder run that is killed half way goes on where it stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import tiny
from tests.conftest import FAST, REPOSITORY, files, run_script

PAIRS, SEEDS = 2, 4


def wait_for_pictures(folder: Path, count: int, process: subprocess.Popen) -> None:
    while len(list(folder.glob("0*.png"))) < count:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)


def test_killed_run_goes_on_to_identical_files(tmp_path, whole_model, capsys):
    folder = tiny.save_pairs(tmp_path / "pairs", count=PAIRS)
    command = ["inference_local.py", "--pretrained_model_name_or_path", whole_model, *FAST]
    command += ["--num_inference_steps", "10", "--test_data_dir", folder]
    command += ["--num_images", str(SEEDS)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script(*command, "--output_dir", whole) == 0
    whole, drawn = whole / "object_l0p8", killed / "object_l0p8"

    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--output_dir", str(killed)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    wait_for_pictures(drawn, 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {path.name: path.stat().st_mtime_ns for path in drawn.glob("0*.png")}
    assert 3 <= len(left) < PAIRS * SEEDS and "grid.png" not in files(drawn)
    for name in left:
        assert (drawn / name).read_bytes() == (whole / name).read_bytes()

    capsys.readouterr()
    assert run_script(*command, "--output_dir", killed) == 0
    assert f"{len(left)} there already" in capsys.readouterr().err
    assert left.items() <= {path.name: path.stat().st_mtime_ns for path in drawn.iterdir()}.items()
    assert {name for name in files(drawn) if not name.startswith(".")} == files(whole)
    for name in files(whole):
        assert (drawn / name).read_bytes() == (whole / name).read_bytes(), name
