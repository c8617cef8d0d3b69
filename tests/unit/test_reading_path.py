"""The walks through the code that docs/how_it_works.md lists are short, and lead where they say."""

import ast
import inspect
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elite import attention, data, images, mappers
from tests.conftest import FAST, run_script

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "how_it_works.md"
STEP = re.compile(
    r"^\d+\. \[`(?P<file>[\w/.]+)`\]\((?P<link>[\w/.]+)\): (?P<says>.*)$", re.MULTILINE
)
WALKS = {  # heading to the most modules it may take, and where it ends
    "Reading path: from a picture to the attention": (8, "EliteAttnProcessor"),
    "Reading path: a training step": (6, "EliteAttnProcessor"),
}


def steps(heading: str) -> list[re.Match]:
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    found = list(STEP.finditer(section))
    assert len(found) == len(re.findall(r"^\d+\.", section, re.MULTILINE)), "a step has no link"
    return found


def imported_by(path: Path) -> set[str]:
    """Modules that a file imports, inside functions too, with dots."""
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {str(node.module) for node in tree if isinstance(node, ast.ImportFrom)}


def defined_in(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in tree if isinstance(node, kinds)}


@pytest.mark.parametrize("heading", WALKS)
def test_a_walk_is_short_and_each_module_leads_to_the_next(heading: str) -> None:
    most, end = WALKS[heading]
    walk = steps(heading)
    assert 3 < len(walk) <= most
    seen: set[str] = set()
    for step in walk:
        path = (PAGE.parent / step["link"]).resolve()
        assert path == REPOSITORY / step["file"] and path.is_file()
        module = step["file"].removesuffix(".py").replace("/", ".")
        assert not seen or module in seen, f"nothing before {module} on the walk imports it"
        seen |= imported_by(path)
    assert end in defined_in(path)


@pytest.mark.parametrize("heading", WALKS)
def test_what_a_step_names_is_there(heading: str) -> None:
    for step in steps(heading):
        named = re.findall(r"`(\w+)`", step["says"])
        there = defined_in(REPOSITORY / step["file"])
        assert named and set(named) <= there, f"{step['file']}: {set(named) - there}"


def test_a_picture_takes_the_modules_of_the_walk_and_no_others(
    whole_model, pairs, tmp_path, monkeypatch
):
    """Where it is read, viewed, mapped and attended, all callers that are ours are on the page."""
    taken: set[str] = set()

    def noting(function: Callable) -> Callable:
        def noted(*args: Any, **kwargs: Any) -> Any:
            for frame, _ in traceback.walk_stack(inspect.currentframe()):
                path = Path(frame.f_code.co_filename)
                if path.is_relative_to(REPOSITORY):
                    taken.add(str(path.relative_to(REPOSITORY)))
                if frame.f_code.co_name == "main":  # what calls it is no part of the story
                    break
            return function(*args, **kwargs)

        return noted

    for place, name in (
        (data, "read_image"),
        (images, "patch_mask"),  # of object_views
        (mappers.GlobalMapper, "forward"),
        (mappers.LocalMapper, "forward"),
        (attention, "equation_6"),
    ):
        monkeypatch.setattr(place, name, noting(getattr(place, name)))
    given = ("--pretrained_model_name_or_path", whole_model, "--test_data_dir", pairs)
    assert run_script("inference_local.py", *given, *FAST, "--output_dir", tmp_path) == 0
    on_the_page = {step["file"] for step in steps("Reading path: from a picture to the attention")}
    assert taken - {"tests/unit/test_reading_path.py"} == on_the_page
