"""Writes what the benchmarks have found into docs/BENCHMARKS.md:

    python -m benchmarks.table

Between the markers `<!-- results: NAME -->` and `<!-- end: NAME -->` stand the tables of
benchmarks/results/NAME.json; the prose around them stays as it is. A file of results that has no
markers yet gets a section at the end.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY, RESULTS, table_lines
from elite.console import OK, run, script_parser
from elite.files import check_writable, write_text

PAGE = REPOSITORY / "docs" / "BENCHMARKS.md"
SECTION = re.compile(r"<!-- results: (?P<name>\S+) -->\n.*?<!-- end: (?P=name) -->", re.DOTALL)


def render(page: str, results: dict[str, dict[str, Any]]) -> str:
    """The page with the results between its markers; sections without results become empty.

    Args:
        page: text of docs/BENCHMARKS.md.
        results: contents of the files of results, by name.
    """
    present = {match["name"] for match in SECTION.finditer(page)}
    for name in sorted(results.keys() - present):
        page = f"{page.rstrip()}\n\n## {name}\n\n<!-- results: {name} -->\n<!-- end: {name} -->\n"
    return SECTION.sub(lambda match: section(match["name"], results.get(match["name"])), page)


def section(name: str, result: dict[str, Any] | None) -> str:
    """Everything between a pair of markers, and these."""
    lines = [] if result is None else ["", *result_lines(result), ""]
    return "\n".join([f"<!-- results: {name} -->", *lines, f"<!-- end: {name} -->"])


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


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of results by name. Raises ValueError where one is damaged."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a file of results ({error}); measure again") from None
    return results


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    if not args.page.exists():
        raise ValueError(f"{args.page}: no such file; expected a page with markers for results")
    check_writable(args.page.parent)
    results = read_results(args.results)
    page = render(args.page.read_text(encoding="utf-8"), results)
    write_text(args.page, page)
    print(f"{args.page}: {len(results)} files of results")
    return OK


if __name__ == "__main__":
    run(main)
