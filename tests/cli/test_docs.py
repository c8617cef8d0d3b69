"""README and docs/: commands, flags, links, pictures and names of code are those that exist."""

import re
import runpy
import shlex
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from elite.images import read_image
from elite.speed import RUNGS, Speed

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]
OTHERS = [
    REPOSITORY / name
    for name in (
        "CONTRIBUTING.md",
        "SECURITY.md",
        "small_world/README.md",
        "integrations/comfyui/README.md",
    )
]
HAND_WRITTEN = [page for page in PAGES if page.name != "flags.md"]
make_flags = runpy.run_path(str(REPOSITORY / "docs/make_flags.py"))
make_card = runpy.run_path(str(REPOSITORY / "docs/make_card.py"))
make_teaser = runpy.run_path(str(REPOSITORY / "docs/make_teaser.py"))


def names(pages: list[Path]) -> list[str]:
    return [page.name for page in pages]


def commands(text: str) -> list[list[str]]:
    """The words of every command of the indented and bash blocks."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(
        r"^(?: {4,}|(?=pip ))(.*\b(?:python|bash|accelerate) .*)$", joined, re.MULTILINE
    )
    return [shlex.split(part) for line in lines for part in line.split(" && ")]


def script_of(words: list[str]) -> str | None:
    """The file that a command runs; None where it runs none of this repository's."""
    if "-m" in words and words[0] == "python":
        module = words[words.index("-m") + 1]
        return None if module in ("pytest", "http.server") else module.replace(".", "/") + ".py"
    return next((word for word in words if word.endswith((".py", ".sh"))), None)


def known_flags(script: str) -> set[str]:
    """The flags of a script; of a shell script those of what it starts."""
    source = (REPOSITORY / script).read_text(encoding="utf-8")
    if script.endswith(".sh"):
        return set() if "exec" not in source else known_flags(script.replace(".sh", ".py"))
    if settings := make_flags["scripts"]().get(script):
        return {f"--{item.name}" for item in fields(settings)} | {"--config"}
    if "add_drawing(" in source:
        source += (REPOSITORY / "small_world/flags.py").read_text(encoding="utf-8")
    return set(re.findall(r'"(--\w+)"', source))


def headings(path: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=names(HAND_WRITTEN))
def test_every_file_named_in_a_command_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [script_of(words) for words in commands(text)]
    named += re.findall(
        r"(?:python|bash|--config_file|--config) ([\w/]+\.(?:py|sh|json|yaml))", text
    )
    named += re.findall(r"`((?:configs|data_scripts|elite|small_world)/[\w/]+\.\w+)", text)
    ours = [name for name in named if name is not None and not name.startswith("runs/")]
    assert [name for name in ours if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=names(HAND_WRITTEN))
def test_every_flag_in_a_command_is_known(page: Path) -> None:
    check_flags(commands(page.read_text(encoding="utf-8")))


def check_flags(found: list[list[str]]) -> None:
    for words in found:
        script = script_of(words)
        if script is None:
            continue
        at = next((i for i, word in enumerate(words) if word == script), 0)
        flags = {word.split("=")[0] for word in words[at:] if word.startswith("--")}
        assert flags <= known_flags(script), script


def test_the_measurements_are_commands() -> None:
    """Those of small_world/measure.sh take hours; here they are read alone."""
    text = (REPOSITORY / "small_world/measure.sh").read_text(encoding="utf-8")
    found = commands(re.sub(r"^ *step .\$python. ", "    python ", text, flags=re.MULTILINE))
    scripts = [script_of(words) for words in found]
    assert {"small_world/judge.py", "benchmarks/quality.py", "docs/make_card.py"} <= set(scripts)
    assert [name for name in scripts if name is None or not (REPOSITORY / name).exists()] == []
    check_flags(found)
    shown = re.findall(r"(?:docs|\$results)/[\w./$]+\.(?:png|md)", text)
    pictures = {name for name in shown if name.endswith(".png")}
    assert len(pictures) > 4 and all((REPOSITORY / name).exists() for name in pictures)


def test_commands_are_found() -> None:
    """So that the two tests above have something to look at."""
    found = [script_of(words) for page in PAGES for words in commands(page.read_text("utf-8"))]
    assert len([name for name in found if name]) > 40
    assert {"encode.py", "train_global.sh", "small_world/judge.py", "train_local.py"} <= set(found)


def links(page: Path) -> list[tuple[Path, str]]:
    """File and anchor of each link and picture of a page that stays in the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    parts = [link.partition("#") for link in found if not link.startswith("http")]
    return [((page.parent / name if name else page).resolve(), to) for name, _, to in parts]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=names([*PAGES, *OTHERS]))
def test_every_relative_link_and_picture_resolves(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in headings(target), f"{target}#{anchor}"


def test_the_readme_links_to_every_page() -> None:
    """One click away; the pages of docs/ are what the README leaves out."""
    linked = {target for target, _ in links(REPOSITORY / "README.md")}
    assert [page.name for page in PAGES[1:] if page not in linked] == []


def test_every_module_named_is_there() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    modules = set(re.findall(r"python -m\s+((?:benchmarks|small_world|tests)[\w.]*)", text))
    modules.discard("benchmarks.NAME")
    assert len(modules) > 4
    assert [name for name in modules if find_spec(name) is None] == []


def test_the_page_of_flags_is_current() -> None:
    """`python docs/make_flags.py` brings it up to date."""
    assert make_flags["page"]() == (REPOSITORY / "docs/flags.md").read_text(encoding="utf-8")


def test_the_card_of_the_small_world_has_the_results_of_the_readme() -> None:
    """`python docs/make_card.py` brings it up to date."""
    card = (REPOSITORY / "checkpoints/small_world/README.md").read_text(encoding="utf-8")
    assert make_card["page"]() == card and "| ELITE, lambda 0.8 |" in card


def test_the_page_says_what_the_speeds_stand_for() -> None:
    page = (REPOSITORY / "docs/BENCHMARKS.md").read_text(encoding="utf-8")
    for knob in fields(Speed):
        (row,) = re.findall(rf"^\| `{knob.name}` \|.*$", page, re.MULTILINE)
        values = [f"{getattr(speed, knob.name):g}" for speed in RUNGS.values()]
        assert [cell.strip() for cell in row.split("|")[3:-1]] == values


def test_each_symbol_lives_where_the_page_says() -> None:
    page = (REPOSITORY / "docs/how_it_works.md").read_text(encoding="utf-8")
    places = re.findall(r"\]\(\.\./(elite/\w+\.py)\): (`\w+`(?:, `\w+`)*)", page)
    assert len(places) > 15
    for file, listed in places:
        source = (REPOSITORY / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", listed):
            assert re.search(rf"\b(def|class) {name}\b", source), f"{file}: {name}"


def test_each_name_in_the_diagram_is_in_the_code() -> None:
    diagram = (REPOSITORY / "docs/how_it_works.svg").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in REPOSITORY.glob("elite/*.py"))
    labels = re.findall(r'class="code">(\w+)<', diagram)
    assert len(labels) > 8
    assert [name for name in labels if not re.search(rf"\b{name}\b", sources)] == []


def test_the_first_picture_takes_the_first_eight_objects() -> None:
    rows = make_teaser["draw_rows"](("a S at night",), steps=1)
    assert [len(row) for row in rows] == [8, 8, 8]
    pictures = sorted((REPOSITORY / "test_datasets").glob("*.jpg"))[:8]
    shown = [np.asarray(picture) for picture in rows[0]]
    assert all((read_image(a) == b).all() for a, b in zip(pictures, shown, strict=True))
    sheet = make_teaser["assemble"](rows, ["one", "two", "three"])
    assert sheet.width > sheet.height
    assert (REPOSITORY / "docs/teaser.png").stat().st_size < 300_000
