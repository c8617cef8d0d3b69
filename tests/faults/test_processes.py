"""Several processes: what they make is what one makes, they stop together, and where one fails the
others end with a message."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from elite.run_state import checkpoints
from small_world.objects import name_of
from tests import run_scripts, tiny
from tests.conftest import run_script
from tests.faults.runs import (
    LOST,
    REPOSITORY,
    World,
    finish,
    finish_pair,
    metrics,
    start_pair,
    steps_done,
    weights_apart,
)
from tests.faults.toy import (
    count_moments,
    resume_nothing,
    train_in_shares,
    train_until_stopped,
    train_with_a_failing_process,
)
from tests.waiting import wait_until

# Objects that the small world's judge knows; what the pictures show does not matter.
SUBJECTS = tuple(name_of(number) for number in range(6))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    world = World(tmp_path_factory.mktemp("processes") / "world", steps=3)
    pairs = tiny.save_pairs(world.folder / "pairs", count=6)
    for number, name in enumerate(SUBJECTS):
        for suffix in ("", "_bg"):
            (pairs / f"pair{number}{suffix}.png").rename(pairs / f"{name}{suffix}.png")
    (world.folder / "prompts.yaml").write_text("prompts: {object: ['a {} on the grass']}\n")
    return world


def everything(world: World, folder, batch_size: int) -> list[list[str]]:
    """Both stages, a folder of pictures and an evaluation, as command lines."""
    model, mappers = world.folder / "model", world.folder / "mappers"
    training = {"train_data_dir": world.folder / "open_images", "train_batch_size": batch_size}
    training |= {"gradient_accumulation_steps": 1, "max_train_steps": 3, "validation_steps": 0}
    training |= {"learning_rate": 1e-4, "global_mapper_path": mappers / "global_mapper"}
    drawing = {"test_data_dir": world.folder / "pairs", "num_inference_steps": 2, "resolution": 32}
    drawing |= {f"{kind}_mapper_path": mappers / f"{kind}_mapper" for kind in ("global", "local")}
    calls = {
        "train_global": training,
        "train_local": {**training, "local_mapper_path": mappers / "local_mapper"},
        "inference_local": drawing,
        "evaluate": {**drawing, "prompts": world.folder / "prompts.yaml"},
    }
    lines = []
    for name, flags in calls.items():
        flags = {"pretrained_model_name_or_path": model, "output_dir": folder / name, **flags}
        words = [str(text) for key, value in flags.items() for text in (f"--{key}", value)]
        lines.append([f"{name}.py", *words])
    return lines


def files(folder) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "tfevents" not in path.name
    )


def test_four_launched_processes_make_what_one_makes(world, tmp_path):
    four, one = tmp_path / "four", tmp_path / "one"
    calls = [word for call in everything(world, four, 1) for word in ("--", *call)][1:]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "4"]
    launch += ["--config_file", "configs/cpu_2.json", "tests/run_scripts.py"]
    run = subprocess.run(
        [*launch, *calls],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-1500:] + run.stderr[-3000:]
    assert run.stdout.count("samples, 4 per step") == 2, "more than the main process speaks"
    for call in everything(world, one, 4):
        assert run_script(*call) == 0
    assert files(four) == files(one)
    for stage in ("train_global", "train_local"):
        for several, alone in zip(metrics(four / stage), metrics(one / stage), strict=True):
            # The same sums in another order, see test_training.py.
            assert several == pytest.approx(alone, rel=1e-5), stage
        a, b = (load_file(checkpoints(x / stage)[-1] / "weights.safetensors") for x in (four, one))
        assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-5
    pictures = [name for name in files(one) if name.endswith(".png")]
    assert len(pictures) >= 2 * 6
    for name in pictures:
        several, alone = (np.asarray(Image.open(x / name)) for x in (four, one))
        assert np.array_equal(several, alone), name
    results = "evaluate/results.csv"
    assert (four / results).read_text() == (one / results).read_text()


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    folder = tmp_path / "run"
    pair = start_pair((train_until_stopped, (str(folder),)), tmp_path)
    wait_until((folder / "checkpoint-2").exists, "a checkpoint")
    os.kill(pair[1].pid, signal.SIGTERM)
    assert [finish(process) for process in pair] == [0, 0], (tmp_path / "0.log").read_text()
    assert checkpoints(folder)[-1].name == f"checkpoint-{steps_done(folder)}"


def test_failure_of_one_process_ends_both_with_its_message(tmp_path):
    pair = start_pair((train_with_a_failing_process, (str(tmp_path / "run"),)), tmp_path)
    assert [finish(process) for process in pair] == [2, 2]
    other, failing = ((tmp_path / f"{rank}.log").read_text() for rank in range(2))
    assert "error: 10 samples in a row could not be read" in failing
    assert LOST.search(other), other[-3000:]
    assert "Traceback" not in other + failing


def test_both_processes_say_that_there_is_nothing_to_resume(tmp_path):
    """The first one alone has looked."""
    pair = start_pair((resume_nothing, (str(tmp_path / "run"),)), tmp_path)
    assert [finish(process) for process in pair] == [2, 2]
    for rank in range(2):
        assert "no checkpoint to resume from" in (tmp_path / f"{rank}.log").read_text()


@pytest.mark.parametrize("script", ["inference_local.py", "evaluate.py"])
def test_a_killed_process_ends_the_drawing_of_a_folder(script, world, tmp_path):
    """The other one draws its own share, then ends, where it would wait for this one's."""
    (call,) = (c for c in everything(world, tmp_path, 1) if c[0] == script)
    pair = start_pair((run_scripts.run, ([*call, "--num_inference_steps", "60"],)), tmp_path)
    wait_until(lambda: list((tmp_path / call[0][:-3]).rglob("*.png")), "a picture")
    pair[1].kill()
    assert finish(pair[0]) == 2
    said = (tmp_path / "0.log").read_text()
    assert LOST.search(said) and "Traceback" not in said, said[-3000:]


def moments(folder: Path) -> list[int]:
    """How many of Adam's moments each of two processes has said it holds."""
    texts = [(folder / f"{rank}.log").read_text() for rank in range(2)]
    return [int(text.split("moments ")[-1]) for text in texts]


def test_a_sharded_optimizer_learns_what_a_whole_one_learns(tmp_path):
    """Also where a run goes on with the other kind."""
    runs = {
        "whole": [(3, False), (6, False)],
        "sharded": [(3, True), (6, True)],
        "then whole": [(3, True), (6, False)],
        "then sharded": [(3, False), (6, True)],
    }
    for name, parts in runs.items():
        for steps, sharded in parts:
            run = str(tmp_path / name / "run")
            call = count_moments, (train_in_shares, run, steps, sharded)
            finish_pair(start_pair(call, tmp_path / name), tmp_path / name)
            assert moments(tmp_path / name) == ([600, 200] if sharded else [800, 800])
    expected, *others = (load_file(tmp_path / name / "run" / "toy.safetensors") for name in runs)
    for found in others:
        for key, value in expected.items():
            assert float((found[key] - value).abs().max()) < 1e-6
    states = [
        torch.load(checkpoints(tmp_path / name / "run")[-1] / "training_state.pt")["optimizer"]
        for name in ("whole", "sharded")
    ]
    assert [list(state["state"]) for state in states] == [[0, 1]] * 2
    for key in ("exp_avg", "exp_avg_sq"):
        for row in range(2):
            one, other = (state["state"][row][key] for state in states)
            assert float((one - other).abs().max()) < 1e-6


def test_stage_1_with_a_sharded_optimizer_is_the_same(tmp_path):
    world = World(tmp_path / "world", steps=3)
    rates = ["--kv_learning_rate", "1e-4"]  # so that there are several groups of parameters
    for name, flags in {"whole": rates, "sharded": [*rates, "--shard_optimizer"]}.items():
        script, (words,) = world.call("stage 1", tmp_path / name / "run")
        call = count_moments, (script, [*words, *flags])
        finish_pair(start_pair(call, tmp_path / name), tmp_path / name)
    shares, (whole, _) = moments(tmp_path / "sharded"), moments(tmp_path / "whole")
    assert sum(shares) == whole and min(shares) > whole / 3
    for several, alone in zip(
        metrics(tmp_path / "sharded/run"), metrics(tmp_path / "whole/run"), strict=True
    ):
        assert several == pytest.approx(alone, rel=1e-5)
    weights_apart(tmp_path / "sharded/run", tmp_path / "whole/run")  # asserts that they are not
