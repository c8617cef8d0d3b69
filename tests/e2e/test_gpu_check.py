"""What is checked on a GPU, tiny and in few steps on a CPU: that the check itself works."""

from collections.abc import Callable

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Check
from elite.console import BAD_INPUT, OK, PARTLY_FAILED, run

PARTS = ["prepare", "tests", "stage 1", "killed and resumed", "stage 2", "pictures"]


def left_out(name: str) -> Callable[[Check], str]:
    def part(check: Check) -> str:
        return "left out"

    part.__name__ = name
    return part


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(gpu_check, "STEPS", 6)
    monkeypatch.setattr(gpu_check, "KILLED_AT", 3)
    monkeypatch.setattr(gpu_check, "SAVED_EVERY", 2)
    monkeypatch.setattr(Check, "tests", left_out("tests"))


@pytest.mark.timeout(900)
def test_everything_is_checked(capfd):
    assert gpu_check.main([]) == OK
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith(tuple(PARTS))]
    assert [line.split(":")[0] for line in lines] == PARTS
    assert "killed after step 3; last loss 0.0e+00 apart" in lines[3]
    assert "16 pictures" in lines[5]


def test_what_fails_is_named_and_the_rest_goes_on(monkeypatch, capsys):
    def broken(check: Check) -> str:
        check.script("train_global.py", "--no_such_flag", "1")
        return "never"

    for name in ("prepare", "stage_1", "killed_and_resumed", "pictures"):
        monkeypatch.setattr(Check, name, left_out(name))
    broken.__name__ = "stage_2"
    monkeypatch.setattr(Check, "stage_2", broken)
    assert gpu_check.main([]) == PARTLY_FAILED
    told = capsys.readouterr().out.splitlines()
    assert "FAILED: train_global.py ended with 2" in told[4] and len(told) == len(PARTS)


def test_full_size_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        run(lambda: gpu_check.main(["--size", "full"]))
    assert exit.value.code == BAD_INPUT
    assert "no CUDA device here" in capsys.readouterr().err
