"""A training run of milliseconds: a linear model on numbers, of which some cannot be read and some
give a loss that is not finite."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from elite.console import run
from elite.files import write_atomically
from elite.training import fit, make_accelerator
from tests.conftest import forget_accelerate


class Numbers:
    """Samples of which those in `bad` cannot be read and those in `wild` are infinite."""

    def __init__(self, size: int, bad=(), wild=()) -> None:
        self.size, self.bad, self.wild = size, set(bad), set(wild)

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"{index}.jpg"

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        x = torch.from_numpy(rng.standard_normal(3, dtype=np.float32))
        if index in self.bad:
            wrong = "no such file" if index % 2 else f"not a readable image (at byte {index})"
            raise ValueError(f"{index}.jpg: {wrong}; download it again")
        return {"x": x * torch.inf if index in self.wild else x}


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 200)

    def forward(self, batch) -> dict[str, Tensor]:
        return {"loss": (self.linear(batch["x"]) - 1).square().mean()}

    def save_pretrained(self, folder: Path) -> None:
        weights = {key: value.detach() for key, value in self.state_dict().items()}
        write_atomically(folder / "toy.safetensors", lambda path: save_file(weights, path))


def train(
    output_dir: Path, dataset: Numbers | None = None, accumulation: int = 1, **options
) -> Toy:
    """A run of 6 steps of 4 samples out of 100, with a checkpoint at each."""
    forget_accelerate()
    toy, usual = Toy(), {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "save_steps": 1}
    accelerator = make_accelerator("no", accumulation, cpu=True)
    data = dataset or Numbers(100)
    fit(toy, data, accelerator, output_dir=output_dir, **{**usual, **options})
    return toy


class Stuck(Numbers):
    """Numbers that come for a while only."""

    def __init__(self, size: int, calls: int) -> None:
        super().__init__(size)
        self.calls = calls

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        self.calls -= 1
        if self.calls < 0:
            time.sleep(3600)
        return super().sample(index, rng)


def train_until_stuck(folder: str, steps: int) -> int:
    """For a process of its own: a run whose loader gives nothing more after some steps."""
    train(Path(folder), Stuck(100, 4 * steps), max_steps=100)
    return 0


def train_on(folder: str, steps: int) -> int:
    """For a process of its own: resumes such a run."""
    train(Path(folder), max_steps=steps, resume="latest")
    return 0


def train_in_shares(folder: str, steps: int, shard_optimizer: bool) -> int:
    """For processes of their own: starts a run, or goes on with it."""
    resume = "latest" if Path(folder).exists() else None
    train(Path(folder), max_steps=steps, resume=resume, shard_optimizer=shard_optimizer)
    return 0


def count_moments(call: Callable[..., int], *arguments: Any) -> int:
    """Runs a call that trains, and prints how many of Adam's first moments this process holds."""
    prepare, prepared = Accelerator.prepare_optimizer, []

    def keep(self: Accelerator, optimizer: Any, *args: Any, **options: Any) -> Any:
        prepared.append(getattr(optimizer, "optim", optimizer))  # a sharded one wraps its own
        return prepare(self, optimizer, *args, **options)

    with mock.patch.object(Accelerator, "prepare_optimizer", keep):
        status = call(*arguments)
    states = prepared[0].state.values()
    print("moments", sum(state["exp_avg"].numel() for state in states))
    return status


def train_until_stopped(folder: str) -> int:
    """For a process of its own: a run that goes on until a signal comes."""
    train(Path(folder), max_steps=100_000, checkpoints_total_limit=2)
    return 0


def resume_nothing(folder: str) -> None:
    """For processes of their own: a run that cannot go on."""
    run(lambda: bool(train(Path(folder), resume="latest")))


def train_with_a_failing_process(folder: str) -> None:
    """For two processes: the second cannot read anything."""
    bad = range(100) if os.environ["RANK"] == "1" else ()
    run(lambda: bool(train(Path(folder), Numbers(100, bad=bad))))


def train_to_a_mistake(folder: str) -> None:
    """For a process of its own: a run with loader processes that ends with an error."""
    wild = Numbers(100, wild=range(100))
    run(lambda: bool(train(Path(folder), wild, max_steps=100, num_workers=2)))
