"""Imports point one way, within `elite` and among the packages, and users find the public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import elite

REPOSITORY = Path(__file__).resolve().parents[2]

# A module of elite/ imports only from lines above its own.
LAYERS = (
    ("defaults", "kinds", "markdown", "noise", "wording", "workers"),
    ("adapters", "files"),
    ("annotations", "cards", "deep_features", "run_state", "shard_cache", "speed", "text"),
    (
        "augment",
        "console",
        "families",
        "images",
        "loading",
        "mappers",
        "settings",
        "sheets",
        "stream",
    ),
    ("attention", "checkpoint", "concept", "config", "data", "hardware", "masks", "open_images"),
    ("compat", "detector", "named_concepts", "run_folder", "sam", "shards"),
    ("conditioning",),
    ("latents", "objectives", "pipeline", "training"),
    ("encoding", "lora", "modular", "previews"),
    ("drawing", "gallery"),
    ("inference", "stages"),
)
LAYER = {module: number for number, modules in enumerate(LAYERS) for module in modules}
SAME_LAYER = {("augment", "images"), ("loading", "families")}  # a leaf that uses another

# What each package beside elite/ may import of the repository, besides itself.
PACKAGES = {
    "elite": set(),
    "app": {"elite"},
    "evaluation": {"elite"},
    "textual_inversion": {"elite"},
    "small_world": {"elite", "evaluation", "textual_inversion"},
    "benchmarks": {"elite", "data_scripts", "small_world"},
}
NODES = "integrations/comfyui"  # of another program, which imports it from a folder of its own
OURS = {path.stem for path in REPOSITORY.glob("*.py")} | {
    path.parent.name for path in REPOSITORY.glob("*/*.py")
}


def imported_from(path: Path) -> set[str]:
    """Dotted names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def elite_modules(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("elite.")} & set(LAYER)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "elite").glob("[!_]*.py")), ids=lambda p: p.stem
)
def test_imports_point_one_way(path):
    assert path.stem in LAYER, f"give {path.name} a place in LAYERS"
    wrong = {
        name
        for name in elite_modules(imported_from(path))
        if LAYER[name] >= LAYER[path.stem] and (path.stem, name) not in SAME_LAYER
    }
    assert not wrong, f"{path.stem} must not import {wrong}"


@pytest.mark.parametrize("package", [*PACKAGES, NODES])
def test_packages_import_towards_elite(package):
    for path in (REPOSITORY / package).glob("*.py"):
        imported = {name.split(".")[0] for name in imported_from(path)} & OURS
        wrong = imported - PACKAGES.get(package, {"elite"}) - {package}
        assert not wrong, f"{path.name} imports {wrong}"


def test_every_package_has_its_place():
    without = {"data_scripts", "docs", "tests"}  # scripts, which nobody but tests imports
    assert {path.parent.name for path in REPOSITORY.glob("*/*.py")} == PACKAGES.keys() | without


@pytest.mark.parametrize("name", elite.__all__)
def test_public_names_are_there(name):
    assert getattr(elite, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Elit'"):
        elite.Elit  # noqa: B018


def test_settings_need_no_model_code():
    """A mistyped flag is answered at once."""
    code = (
        "import sys, elite.config, elite.console;"
        "print(bool({'torch', 'diffusers'} & sys.modules.keys()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert answer.stdout.strip() == "False", answer.stderr
