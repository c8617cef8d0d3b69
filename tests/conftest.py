"""Tiny models that tests share, on the CPU, with one thread so that sums keep one order."""

import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from elite import Concept, Elite, ElitePipeline
from elite.loading import load_parts
from elite.mappers import Mapper
from tests import tiny

REPOSITORY = Path(__file__).resolve().parents[1]

FAST = ("--num_inference_steps", "2", "--mixed_precision", "no", "--device", "cpu")

torch.set_num_threads(1)


def forget_accelerate() -> None:
    """Precision, device and accumulation are state of the process in accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """No test sees the accelerate of another."""
    yield
    forget_accelerate()


def run_script(name: str, *arguments: str | Path) -> int:
    """Runs a top-level script in this process, faster than in a new one; its exit status."""
    forget_accelerate()
    argv = [name, *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as exit:
        runpy.run_path(str(REPOSITORY / name), run_name="__main__")
    return int(exit.value.code or 0)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr."""
    return capsys.readouterr().err.splitlines()[-1]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def same_pictures(a: Path, b: Path) -> bool:
    names = {name for name in files(a) if name.endswith(".png")}
    return names == {name for name in files(b) if name.endswith(".png")} and all(
        np.array_equal(pixels(a / name), pixels(b / name)) for name in names
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion with an image encoder, without mappers. Read only."""
    return tiny.save_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL. Read only."""
    return tiny.save_xl_folder(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="session")
def release_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """`global_mapper.pt` and `local_mapper.pt` for the model folder. Read only."""
    folder = tmp_path_factory.mktemp("release")
    tiny.save_release_mappers(folder, model_folder)
    return folder


@pytest.fixture(scope="session")
def mapper_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """`global_mapper/` and `local_mapper/` for the model folder. Read only."""
    folder = tmp_path_factory.mktemp("mappers")
    tiny.save_mappers(folder, model_folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Two pairs. Read only."""
    return tiny.save_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def whole_model(tmp_path_factory, model_folder, mapper_folder) -> Path:
    """A model folder with both mappers inside. Read only."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    shutil.copytree(model_folder, folder)
    shutil.copytree(mapper_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def mappers(model_folder: Path) -> tuple[Mapper, Mapper]:
    """A global and a local mapper with random weights; the test's own."""
    return tiny.build_mappers(model_folder)


@pytest.fixture
def pipe(model_folder: Path, mapper_folder: Path) -> ElitePipeline:
    """A pipeline of the two folders; the test's own."""
    return make_pipe(model_folder, mapper_folder)


def make_pipe(model_folder: Path, mapper_folder: Path) -> Elite:
    pipe = Elite.from_stable_diffusion(
        model_folder,
        global_mapper=mapper_folder / "global_mapper",
        local_mapper=mapper_folder / "local_mapper",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def concept(pipe) -> Concept:
    return pipe.encode_concept(*tiny.picture(0))


@pytest.fixture
def parts(model_folder: Path) -> dict:
    """What the model folder holds, loaded; the test's own."""
    return load_parts(model_folder)


@pytest.fixture
def concepts(pipe) -> list[Concept]:
    return [pipe.encode_concept(*tiny.picture(seed)) for seed in (1, 2, 3)]
