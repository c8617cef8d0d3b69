"""Writes what was measured into the pages:

    python -m benchmarks.table

Between the markers `<!-- results: NAME -->` and `<!-- end: NAME -->` of a page stand the tables of
benchmarks/results/NAME.json, or the table NAME.md as it is, of which `<!-- results: NAME, rows:
REGEX -->` shows some rows, those whose first cell matches. The prose around them stays. A file of
results without markers in any page gets a section at the end of docs/BENCHMARKS.md.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY, RESULTS, table_lines
from elite.console import OK, run, script_parser
from elite.files import check_writable_file, write_text

PAGES = ("docs/BENCHMARKS.md", "docs/RESULTS.md", "README.md", "small_world/README.md")
SECTION = re.compile(
    r"<!-- results: (?P<name>[^,\s]+)(?:, rows: (?P<rows>.+?))? -->\n.*?<!-- end: (?P=name) -->",
    re.DOTALL,
)


def render(page: str, results: dict[str, list[str]]) -> str:
    """The page with the results between its markers; sections without results become empty.

    Args:
        page: its text.
        results: lines of the files of results, by name.
    """

    def section(match: re.Match[str]) -> str:
        first, last = match[0].splitlines()[0], f"<!-- end: {match['name']} -->"
        lines = results.get(match["name"], [])
        if match["rows"]:
            lines = [*lines[:2], *(line for line in lines[2:] if shows(line, match["rows"]))]
        return "\n".join([first, *(["", *lines, ""] if lines else []), last])

    return SECTION.sub(section, page)


def shows(line: str, rows: str) -> bool:
    """Whether a table's line, '| ELITE, w0 | 72.0 |', is one of the rows."""
    return re.fullmatch(rows, line.split("|")[1].strip()) is not None


def with_sections(page: str, names: Iterable[str]) -> str:
    """The page with a section at its end for each of these results."""
    for name in names:
        page = f"{page.rstrip()}\n\n## {name}\n\n<!-- results: {name} -->\n<!-- end: {name} -->\n"
    return page


def result_lines(result: dict[str, Any]) -> list[str]:
    """The tables of one file, and at last where they come from."""
    lines = []
    for table in result["tables"]:
        lines += [*table_lines(table), ""]
    return [*lines, *origin(result)]


def origin(result: dict[str, Any]) -> list[str]:
    """Command, machine, libraries, commit and date."""
    machine = result["machine"]
    where = [machine["cpu"], f"{machine['cores']} cores", f"{machine['threads']} threads"]
    where += [machine["gpu"]] if machine["gpu"] else []
    libraries = [f"{name} {version}" for name, version in result["libraries"].items()]
    commit = f"commit {result['commit']}"
    facts = "; ".join([", ".join(where), ", ".join(libraries), commit, result["date"]])
    return [f"`{result['command']}`", "", f"{facts}."]


def read_results(folder: Path) -> dict[str, list[str]]:
    """The lines of the files of results, by name. Raises ValueError where one is damaged, or there
    is none."""
    paths = sorted([*folder.glob("*.json"), *folder.glob("*.md")])
    if not paths:  # with which every section of the pages would be emptied
        raise ValueError(f"{folder}: no results in it; expected benchmarks/results, or measure")
    results = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            results[path.stem] = text.strip().splitlines()
            continue
        try:
            results[path.stem] = result_lines(json.loads(text))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: not a file of results ({reason}); measure again") from None
    return results


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of their files")
    parser.add_argument(
        "--pages", type=Path, nargs="+", default=[REPOSITORY / page for page in PAGES]
    )
    args = parser.parse_args(argv)
    for page in args.pages:
        if not page.exists():
            raise ValueError(f"{page}: no such file; expected a page with markers for results")
        check_writable_file(page)
    results = read_results(args.results)
    texts = [page.read_text(encoding="utf-8") for page in args.pages]
    shown = {match["name"] for text in texts for match in SECTION.finditer(text)}
    texts[0] = with_sections(texts[0], sorted(results.keys() - shown))
    for page, text in zip(args.pages, texts, strict=True):
        write_text(page, render(text, results))
    print(f"{len(results)} files of results in {', '.join(map(str, args.pages))}")
    return OK


if __name__ == "__main__":
    run(main)
