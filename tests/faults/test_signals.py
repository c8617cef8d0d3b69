"""SIGTERM and SIGINT: the step is finished and saved; a second signal ends at once."""

import os
import re
import shlex
import signal

import pytest

from elite.run_state import checkpoints, fault
from tests.faults.runs import (
    SCRIPTS,
    World,
    finish,
    finish_well,
    leftovers,
    outcome,
    output_dir,
    start,
    steps_done,
    wait_for_step,
)
from tests.faults.toy import train_on, train_until_stuck
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("signals") / "world", steps=8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_a_whole_step_and_the_run_goes_on(number, world, tmp_path):
    """The signal reaches the loader process, too, as from a terminal or a launcher."""
    kind = "stage 1" if number == signal.SIGTERM else "textual inversion"
    whole, stopped = (output_dir(kind, tmp_path / name) for name in ("whole", "stopped"))
    logs = [tmp_path / f"{i}.log" for i in range(3)]
    others = start(world.call(kind, whole), logs[0])
    process = start(world.call(kind, stopped), logs[1])
    wait_for_step(stopped, 1)
    os.killpg(process.pid, number)
    assert finish(process) == 0, logs[1].read_text()[-3000:]
    said = logs[1].read_text()
    assert f"{number.name}: ends after this step" in said and "Traceback" not in said
    (command,) = re.findall(r"^resume with: (.*)$", said, re.MULTILINE)
    assert shlex.split(command)[-2:] == ["--resume_from_checkpoint", "latest"]
    done = steps_done(stopped)
    assert done < world.steps and checkpoints(stopped)[-1].name == f"checkpoint-{done}"
    assert not list(stopped.glob("*mapper")) and not leftovers(stopped)
    finish_well(others, logs[0])
    finish_well(start(world.call(kind, stopped), logs[2]), logs[2])
    assert outcome(stopped) == outcome(whole)
    assert SCRIPTS[kind] in world.call(kind, whole)[1][0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_leaves_a_usable_folder(number, tmp_path):
    """The step after the first signal would take minutes."""
    folder, log = tmp_path / "run", tmp_path / "run.log"
    process = start((train_until_stuck, (str(folder), 3)), log)
    wait_for_step(folder, 3)
    wait_until((folder / "checkpoint-3").exists, "the checkpoint")
    os.kill(process.pid, signal.SIGTERM)
    wait_until(lambda: "SIGTERM: ends after this step" in log.read_text(), "the note")
    assert process.is_alive()
    os.kill(process.pid, number)
    assert finish(process) == -number
    assert [fault(checkpoint) for checkpoint in checkpoints(folder)] == [None] * 3
    again = start((train_on, (str(folder), 5)), log)
    finish_well(again, log)
    assert steps_done(folder) == 5
