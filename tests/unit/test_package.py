"""`pip install .` gives a package that works away from the checkout."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless", "yaml": "pyyaml"}
TAKEN_IF_THERE = {"pillow_heif"}
IMPORTED_BY_OTHERS = {"scipy", "tensorboard"}  # diffusers' LMS, torch's SummaryWriter


def versions(lines: list[str], comparison: str) -> dict[str, tuple[int, ...]]:
    pairs = [line.split(";")[0].split(comparison) for line in lines if comparison in line]
    return {name: tuple(map(int, version.split("."))) for name, version in pairs}


def requirements(name: str) -> dict[str, tuple[int, ...]]:
    return versions((REPOSITORY / name).read_text(encoding="utf-8").split("\n"), "==")


def imported_by_elite() -> set[str]:
    """Distributions that the modules of elite/ import."""
    imported = set()
    for path in (REPOSITORY / "elite").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    imported -= {*sys.stdlib_module_names, "elite"}
    return {DISTRIBUTIONS.get(name, name) for name in imported}


def test_dependencies_are_what_the_package_imports():
    needed = versions(PROJECT["dependencies"], ">=").keys()
    assert imported_by_elite() | IMPORTED_BY_OTHERS == needed | TAKEN_IF_THERE


def test_the_tested_versions_are_allowed():
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    tested = requirements("requirements.txt") | requirements("requirements-dev.txt")
    for name, lowest in versions([*PROJECT["dependencies"], *extras], ">=").items():
        assert tested[name] >= lowest, name


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel, built offline from what it needs alone, and unpacked."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "elite", source / "elite")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    pip = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(folder), str(source)]
    subprocess.run(pip, check=True, timeout=300, cwd=folder)
    (wheel,) = folder.glob("elite_diffusion-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*.py")}
    assert files == {f"elite/{path.name}" for path in (REPOSITORY / "elite").glob("*.py")}
    (about,) = installed.glob("*.dist-info/METADATA")
    text = about.read_text(encoding="utf-8")
    assert f"Version: {PROJECT['version']}\n" in text and "License-Expression: Apache-2.0" in text
    needed = re.findall(r"Requires-Dist: (?!aiohttp|peft|pillow-heif|gradio)", text)
    assert len(needed) == len(PROJECT["dependencies"])


def test_the_wheel_draws_away_from_the_checkout(installed, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import elite\n"
        "assert elite.__file__.startswith(sys.argv[1]), elite.__file__\n"
        "pipe = elite.ElitePipeline.from_stable_diffusion(sys.argv[2])\n"
        "print(pipe('a critter', num_inference_steps=1, seed=0).images[0].size)\n"
    )
    model = REPOSITORY / "checkpoints" / "small_world"
    run = [sys.executable, "-c", code, str(installed), str(model)]
    answer = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert answer.stdout.strip() == "(32, 32)", answer.stderr[-2000:]
