"""What goes wrong while a run trains: losses that are not finite, samples that cannot be read,
previews that fail. Counts are exact, over interruptions too."""

import os
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from elite.run_state import checkpoints
from elite.stream import Failure
from tests.faults import toy
from tests.faults.runs import finish, metrics, outcome, start
from tests.faults.toy import Numbers, Toy, train, train_to_a_mistake


def text_of(capfd) -> str:
    captured = capfd.readouterr()
    return captured.out + captured.err


# --- losses ---------------------------------------------------------------------------------------


def test_step_that_is_not_finite_is_skipped_counted_and_named(tmp_path, capfd):
    wild = Numbers(100, wild={7})
    toy = train(tmp_path / "wild", wild, max_steps=25)  # one epoch
    said = text_of(capfd)
    (line,) = re.findall(r"step (\d+): loss is \w+; skipped \(1 so far\), samples (.*)", said)
    assert "7.jpg" in line[1].split(", ") and len(line[1].split(", ")) == 4
    assert "by step 25 1 steps were skipped, loss or gradient not finite" in said
    assert all(parameter.isfinite().all() for parameter in toy.parameters())
    lines = {each["step"]: each for each in metrics(tmp_path / "wild")}
    step = int(line[0])
    assert len(lines) == 25 and "loss" not in lines[step] and lines[step]["skipped"] == 1
    assert all("loss" in each for number, each in lines.items() if number != step)
    assert "skipped" not in lines[step - 1] if step > 1 else True


def test_micro_batch_at_fault_is_named_alone(tmp_path, capfd):
    train(tmp_path, Numbers(100, wild={7}), accumulation=5, batch_size=2, max_steps=10)
    (named,) = re.findall(r"skipped \(1 so far\), samples (.*)", text_of(capfd))
    assert len(named.split(", ")) == 2 and "7.jpg" in named


def test_too_many_steps_in_a_row_stop_the_run_with_advice(tmp_path):
    with pytest.raises(ValueError, match=r"in 10 steps in a row; lower --learning_rate") as caught:
        train(tmp_path, Numbers(100, wild=range(100)), max_steps=50)
    assert "at step 10" in str(caught.value) and "\n" not in str(caught.value)
    assert not checkpoints(tmp_path), "a diverged state was saved"


def test_steps_now_and_then_do_not_stop_the_run(tmp_path):
    train(tmp_path, Numbers(100, wild=range(15)), max_steps=50, batch_size=1, save_steps=0)
    assert max(line.get("skipped", 0) for line in metrics(tmp_path)) > 5


# --- samples --------------------------------------------------------------------------------------


def spoilt(size: int, share: float) -> Numbers:
    rng = np.random.default_rng(1)
    return Numbers(size, bad=rng.permutation(size)[: round(size * share)].tolist())


@pytest.mark.parametrize("share", [0.01, 0.03, 0.05])
def test_up_to_five_percent_of_bad_samples_train_on_with_exact_counts(share, tmp_path, capfd):
    dataset = spoilt(200, share)
    train(tmp_path, dataset, max_steps=150, save_steps=0)  # three epochs
    said = text_of(capfd)
    skipped = re.findall(r"skipped: (\d+)\.jpg: (no such file|not a readable image)", said)
    assert {int(number) for number, _ in skipped} == dataset.bad
    assert len(skipped) >= 3 * len(dataset.bad)
    counts = Counter(reason for _, reason in skipped)
    reasons = ", ".join(f"{counts[reason]} x {reason}" for reason in sorted(counts))
    assert (
        f"by step 150 {len(dataset.bad)} samples were unreadable and replaced, "
        f"{len(skipped)} times in all: {reasons}\n"
    ) in said
    assert metrics(tmp_path)[-1]["unreadable"] == len(skipped)


def test_more_than_that_stop_the_run_and_are_listed(tmp_path):
    dataset = spoilt(200, 0.055)
    with pytest.raises(ValueError, match="11 of 200 samples could not be read") as caught:
        train(tmp_path, dataset, max_steps=150)
    assert "over 5%" in str(caught.value) and "\n" not in str(caught.value)
    listed = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert {int(line.split(".jpg: ")[0]) for line in listed} == dataset.bad
    assert all(line in str(caught.value) for line in listed)


def test_hopeless_data_stop_long_before_the_epoch_ends(tmp_path):
    with pytest.raises(ValueError, match=r"of the \d+ samples tried could not be read"):
        train(tmp_path, spoilt(100_000, 0.3), max_steps=1000, save_steps=0)
    assert len(metrics(tmp_path)) < 200


def test_the_limit_that_was_crossed_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"samples tried could not be read .* is over 10%"):
        train(tmp_path, spoilt(100_000, 0.3), max_steps=1000, save_steps=0)


def test_counts_are_those_of_an_uninterrupted_run(tmp_path):
    dataset = Numbers(200, bad=spoilt(200, 0.05).bad, wild={3, 50})
    train(tmp_path / "whole", dataset, max_steps=60, save_steps=7)
    train(tmp_path / "parts", dataset, max_steps=30, save_steps=7)
    train(tmp_path / "parts", dataset, max_steps=60, save_steps=7, resume="checkpoint-21")
    whole, parts = (outcome(tmp_path / run) for run in ("whole", "parts"))
    assert (whole["state"], whole["metrics"]) == (parts["state"], parts["metrics"])
    assert metrics(tmp_path / "whole")[-1]["unreadable"] > 9


def test_loader_processes_report_the_same_failures(tmp_path):
    for workers in (0, 1):
        train(tmp_path / str(workers), spoilt(200, 0.05), max_steps=30, num_workers=workers)
    assert outcome(tmp_path / "0") == outcome(tmp_path / "1")


def test_failure_in_a_loader_process_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="10 samples in a row could not be read") as caught:
        train(tmp_path, Numbers(100, bad=range(100)), num_workers=1)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_loader_process_that_is_killed_is_one_line(tmp_path):
    class Deadly(Numbers):
        def sample(self, index, rng):
            os._exit(1)

    with pytest.raises(ValueError, match="a loader process has ended") as caught:
        train(tmp_path, Deadly(100), num_workers=1)
    assert "\n" not in str(caught.value)


def test_a_run_that_ends_with_an_error_leaves_no_loader_process_behind(tmp_path):
    """They ignore SIGTERM, with which Python would end them before it waits for them."""
    process = start((train_to_a_mistake, (str(tmp_path / "run"),)), tmp_path / "log")
    assert finish(process) == 2
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("a/b.jpg: no such file; expected an image", "no such file"),
        ("b.jpg: not a readable image (cannot identify 7); save it", "not a readable image"),
        ("b.png: mask is 20 x 30, its image 40 x 50; draw", "mask is N x N, its image N x N"),
        ("strange", "strange"),
    ],
)
def test_reasons_do_not_name_the_file(message, reason):
    assert Failure(0, message).reason == reason


# --- previews -------------------------------------------------------------------------------------


def test_preview_that_fails_does_not_stop_the_run(tmp_path, capfd):
    def preview():
        torch.rand(3)
        raise RuntimeError("out of memory")

    train(tmp_path / "plain")
    train(tmp_path / "previewed", preview=preview, validation_steps=2)
    assert outcome(tmp_path / "plain") == outcome(tmp_path / "previewed")
    assert "preview of step 4 failed (RuntimeError: out of memory)" in text_of(capfd)


def test_previews_are_of_what_is_exported(tmp_path, monkeypatch):
    models, shown = [], []

    class Watched(Toy):
        def __init__(self) -> None:
            super().__init__()
            models.append(self)

    def preview():
        shown.append(models[-1].linear.weight.detach().clone())
        return Image.new("RGB", (1, 1))

    train(tmp_path / "plain", ema_decay=0.9)
    monkeypatch.setattr(toy, "Toy", Watched)
    train(tmp_path / "previewed", ema_decay=0.9, preview=preview, validation_steps=2)
    assert outcome(tmp_path / "plain") == outcome(tmp_path / "previewed")
    exported = load_file(tmp_path / "previewed" / "toy.safetensors")["linear.weight"]
    assert len(shown) == 3 and torch.equal(shown[-1], exported)
    learned = load_file(tmp_path / "previewed/checkpoint-6/weights.safetensors")["linear.weight"]
    assert not torch.equal(learned, exported)
