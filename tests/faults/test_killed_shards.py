"""Runs on shards of a server that are killed and resumed end as uninterrupted ones, whatever reads
the shards."""

import time
from collections.abc import Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from elite.open_images import OpenImagesMasks
from elite.run_state import checkpoints
from elite.shards import open_source
from tests.faults import runs
from tests.faults.runs import finish, finish_well, metrics, pair_environments, wait_for_step
from tests.faults.toy import train
from tests.open_images import make_open_images
from tests.shards import Server, make_shards, served

STEPS = 14  # three epochs and more, of ten pictures in shards of two


class Brightness:
    """What the toy trains on: the mean colour of objects of shards, after a pause."""

    def __init__(self, url: str, cache: Path) -> None:
        source = open_source(url, cache=cache, window=2)
        self.masks = OpenImagesMasks(source, resolution=32, clip_size=28, latent_size=8)
        self.shards = self.masks.shards

    def __len__(self) -> int:
        return len(self.masks)

    def name(self, index: int) -> str:
        return self.masks.name(index)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        time.sleep(0.02)
        return {"x": self.masks.sample(index, rng)["object_pixels"].mean(dim=(1, 2))}


def live(url: str, cache: Path, folder: Path, options: dict[str, Any]) -> int:
    """A run, or what is left of it."""
    resume = "latest" if checkpoints(folder) else None
    train(folder, Brightness(url, cache), max_steps=STEPS, resume=resume, **options)
    return 0


def start(
    server: Server, folder: Path, environment: Mapping[str, str] | None = None, **options: int
) -> BaseProcess:
    call = live, (server.url, server.folder.parent / "cache", folder, options)
    return runs.start(call, log_of(folder), environment)


def log_of(folder: Path) -> Path:
    return folder.parent / "log"


def outcome(folder: Path) -> tuple[list[dict], bytes, bytes]:
    last = checkpoints(folder)[-1]
    files = (last / "weights.safetensors", folder / "toy.safetensors")
    return metrics(folder), *(path.read_bytes() for path in files)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("data")
    make_open_images(folder / "open_images", n=10)
    make_shards(folder / "open_images", folder / "shards")
    with served(folder / "shards") as server:
        yield server


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish_well(start(server, folder), log_of(folder))
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_run_ends_in_the_bits_of_an_uninterrupted_one(workers, server, whole, tmp_path):
    """In mid-window, in mid-epoch, with a loader process that changes nothing."""
    folder = tmp_path / "run"
    for step in (4, 9):
        process = start(server, folder, num_workers=workers)
        wait_for_step(folder, step)
        process.kill()
        process.join()
        assert step <= len(metrics(folder)) < STEPS
    finish_well(start(server, folder, num_workers=workers), log_of(folder))
    assert outcome(folder) == outcome(whole)


def test_two_processes_of_which_one_is_killed_are_resumed_by_one(server, whole, tmp_path):
    folder = tmp_path / "run"
    pair = [start(server, folder, each, batch_size=2) for each in pair_environments()]
    wait_for_step(folder, 5)
    pair[1].kill()
    assert finish(pair[0]) != 0, "the other ends, too"
    assert 5 <= len(metrics(folder)) < STEPS
    finish_well(start(server, folder, num_workers=1), log_of(folder))
    for found, expected in zip(metrics(folder), metrics(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)  # sums in another order
    one, other = (load_file(run / "toy.safetensors") for run in (folder, whole))
    assert all((one[key] - other[key]).abs().max() < 1e-6 for key in one)
