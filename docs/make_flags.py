"""Write docs/flags.md from the settings of the scripts: python docs/make_flags.py"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from elite import markdown, settings
from elite.config import LIMITS, default_of, describe
from elite.console import OK, run
from elite.files import check_writable, write_text

REPOSITORY = Path(__file__).resolve().parents[1]
TARGET = REPOSITORY / "docs/flags.md"
HEAD = """# Every flag

*Made by `python docs/make_flags.py` from `elite/settings.py`; a test fails when it is out of date.*

A flag is also a key of a YAML file that `--config FILE` reads; flags win over the file, the file
over the defaults. `--help` says the same as this page. An unknown name is an error with the nearest
match. Flags of the kind *on or off* have an opposite: `--ema`, `--no-ema`.
"""
OTHERS = """
## Scripts with flags of their own

These are not read from `elite/settings.py`; `--help` explains each.
"""


def scripts() -> dict[str, type]:
    """The settings of every script of the repository's top folder, by its file's name."""
    found = {}
    for path in sorted(REPOSITORY.glob("*.py")):
        match = re.search(r"parse_config\((\w+)\)", path.read_text(encoding="utf-8"))
        if match:
            found[path.name] = getattr(settings, match[1])
    return found


def other_commands() -> Iterator[tuple[str, Path]]:
    """The command and file of every script that reads its own flags."""
    places = {"data_scripts": "", "evaluation": "-m ", "small_world": "-m "}
    for folder, how in places.items():
        for path in sorted(REPOSITORY.glob(f"{folder}/*.py")):
            if "script_parser(__doc__)" in path.read_text(encoding="utf-8"):
                name = f"{folder}.{path.stem}" if how else f"{folder}/{path.name}"
                yield f"python {how}{name}", path


def purpose(path: Path) -> str:
    """The first sentence of a script's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<!al\.)(?<=\.)\s", first)[0].rstrip(":.") + "."


def values_of(hint: Any, checks: Mapping[str, Any]) -> str:
    """What a flag takes: its choices, or its kind and range."""
    if "choices" in checks:
        several = ", one or more" if get_origin(hint) is list else ""
        return ", ".join(f"`{choice}`" for choice in checks["choices"]) + several
    limits = [f"{words} {checks[key]}" for key, (words, _) in LIMITS.items() if key in checks]
    kind = "on or off" if hint is bool else describe(hint)
    return ", ".join([checks.get("expected", kind), *limits])


def default_text(value: Any) -> str:
    """A default as one would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(f"`{part}`" for part in value) or "nothing"
    return "none" if value is None else f"`{value}`"


def table(config_class: type) -> str:
    """One row a flag, in the order of `--help`."""
    hints = get_type_hints(config_class)
    rows = []
    for item in fields(config_class):
        default = default_of(item)
        shown = "**required**" if default is MISSING else default_text(default)
        cells = [f"`--{item.name}`", shown, values_of(hints[item.name], item.metadata)]
        rows.append([*cells, item.metadata["help"].replace("|", "\\|")])
    return markdown.table(["flag", "default", "values", "meaning"], rows)


def page() -> str:
    """The whole of docs/flags.md."""
    parts = [HEAD]
    for name, config_class in scripts().items():
        parts.append(f"\n## {name}\n\n{purpose(REPOSITORY / name)}\n\n{table(config_class)}\n")
    others = [[f"`{command} --help`", purpose(path)] for command, path in other_commands()]
    parts.append(f"{OTHERS}\n{markdown.table(['command', 'what it does'], others)}\n")
    return "".join(parts)


def main() -> int:
    check_writable(TARGET.parent)
    text = page()
    write_text(TARGET, text)
    print(f"{TARGET}: {len(scripts())} scripts")
    return OK


if __name__ == "__main__":
    run(main)
