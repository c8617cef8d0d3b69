"""Typed settings: dataclass defaults < `--config` YAML < flags; an unknown name is an error.

The dataclasses are in `elite/settings.py`. A script reads one and hands plain arguments on, or lets
`inference.py` and `stages.py`, which scripts share, do so.
"""

import argparse
import math
import operator
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from elite.console import Parser
from elite.files import check_writable, read_text, write_text
from elite.wording import brief, nearest, one_line

REPOSITORY = Path(__file__).resolve().parents[1]

# The limits of a setting: how they are called in messages, and what has to hold.
LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "at_least": ("at least", operator.ge),
    "at_most": ("at most", operator.le),
    "above": ("more than", operator.gt),
    "below": ("less than", operator.lt),
    "multiple_of": ("a multiple of", lambda value, of: value % of == 0),
}

Config = TypeVar("Config")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which no name stands twice, and all but true, false and null is text until a
    setting makes it a number: YAML 1.1 reads `no` as false and `2026_11_29` as 20261129."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.YAMLError(f"{twice} is given twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.endswith(":null")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The settings of a script: defaults, then the `--config` file, then flags.

    A mistake ends the script with one line on stderr and exit status 2. `argv` None means the
    command line's.
    """
    parser = build_parser(config_class)
    try:
        flags = _parse_flags(parser, argv)
        path = flags.pop("config", None)
        preset = _read_layer(config_class, read_yaml(path), f"{path}: ") if path is not None else {}
        config = build_config(config_class, preset, _read_layer(config_class, flags, "--"))
        if hasattr(config, "output_dir"):
            check_writable(config.output_dir)
        return config
    except ValueError as error:
        print(f"{parser.prog}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def build_parser(config_class: type[Any]) -> argparse.ArgumentParser:
    """A command line with one flag per field, plus `--config`; values stay text."""
    parser = Parser(description=config_class.__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", help="YAML file of these settings; flags win over it.")
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        parser.add_argument(f"--{item.name}", help=_help(item), **_flag_options(hints[item.name]))
    return parser


def build_config(config_class: type[Config], *layers: Mapping[str, Any]) -> Config:
    """The dataclass from its defaults and `layers`, later ones winning.

    Raises ValueError for an unknown name, a value of a wrong type or range, a missing setting.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values.update(_read_layer(config_class, layer))
    for item in fields(config_class):  # type: ignore[arg-type]
        if item.name in values:
            continue
        if default_of(item) is MISSING:
            name = item.name
            raise ValueError(f"{name}: not given; add --{name} or put it into the --config file")
        if item.metadata.get("shipped"):
            values[item.name] = shipped(str(item.default))
    return config_class(**values)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The settings in a YAML file. Raises ValueError where it is no readable mapping."""
    text = read_text(path, "--config expects a YAML file")
    try:
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not YAML ({reason}); write lines of name: value") from None
    if not isinstance(content or {}, dict):
        raise ValueError(f"{path}: got {type(content).__name__}; write lines of name: value")
    return content or {}


def split_named(values: Sequence[str], flag: str) -> dict[str, str]:
    """The values of a flag that takes several NAME=VALUE. Raises ValueError where a name comes
    twice."""
    named: dict[str, str] = {}
    for value in values:
        name, _, rest = value.partition("=")
        if name in named:
            raise ValueError(f"{flag} {value}: {name} is given twice; leave one of them out")
        named[name] = rest
    return named


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain values, secrets left out; `build_config` reads it back."""
    secret = {item.name for item in fields(config) if item.metadata.get("secret")}
    return {name: value for name, value in asdict(config).items() if name not in secret}


def print_config(config: Any) -> None:
    """The settings on stdout, one aligned line each; * marks what differs from the default."""
    values = to_dict(config)
    width = max(map(len, values))
    for item in fields(config):
        if item.name in values:
            mark = " " if values[item.name] == default_of(item) else "*"
            print(f"{mark} {item.name:{width}}  {values[item.name]}")


def save_config(settings: Mapping[str, Any], path: Path | str) -> None:
    """Writes what `to_dict` gives as a YAML file for `--config`, whole or not at all."""
    text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    write_text(path, text)


def shipped(path: str) -> str:
    """`path`, or where it does not exist, the same path inside the repository if that exists."""
    inside = REPOSITORY / path
    return str(inside) if not Path(path).exists() and inside.exists() else path


def _parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            raise ValueError(f"{name}: unexpected; every setting is a flag, --help lists them")
        raise ValueError(f"{name}: unknown flag{_nearest(name, parser._option_string_actions)}")
    return vars(parsed)


def _flag_options(hint: Any) -> dict[str, Any]:
    """What argparse must know of a field's type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"nargs": "+"} if get_origin(hint) is list else {}


def _help(item: Field[Any]) -> str:
    choices = item.metadata.get("choices")
    listed = f" One of {', '.join(choices)}." if choices else ""
    default = default_of(item)
    ending = "Required." if default is MISSING else f"Default: {default}."
    return f"{item.metadata['help']}{listed} {ending}".replace("%", "%%")


def default_of(item: Field[Any]) -> Any:
    """A field's default; MISSING where it is required."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def _nearest(name: str, known: Iterable[str]) -> str:
    return nearest(name, known) or "; --help lists what there is"


def _read_layer(
    config_class: type[Any], layer: Mapping[str, Any], source: str = ""
) -> dict[str, Any]:
    """The values of one layer, typed and checked; an error begins with `source`."""
    known = {item.name: item for item in fields(config_class)}
    hints = get_type_hints(config_class)
    values: dict[str, Any] = {}
    for name, value in layer.items():
        if name not in known:
            raise ValueError(f"{source}{name}: unknown setting{_nearest(str(name), known)}")
        if value == [] == default_of(known[name]):  # otherwise a list has at least one part
            values[name] = []
            continue
        try:
            values[name] = _read(value, hints[name], known[name].metadata)
        except ValueError as error:
            raise ValueError(f"{source}{name}: {error}") from None
    return values


def _read(value: Any, hint: Any, checks: Mapping[str, Any]) -> Any:
    """A value from YAML or the command line in its field's type and range."""
    try:
        result = _convert(value, hint)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"got {brief(value)}, expected {describe(hint)}") from None
    for part in result if isinstance(result, list) else [result]:
        expected = None if part is None else _violation(part, checks)
        if expected:
            raise ValueError(f"got {brief(part)}, expected {expected}")
    return result


def _convert(value: Any, hint: Any) -> Any:
    """`value` as `hint`; TypeError, ValueError or OverflowError where it is none."""
    if get_origin(hint) is list:
        if not isinstance(value, list | tuple) or not value:
            raise TypeError
        return [_convert(part, get_args(hint)[0]) for part in value]
    if isinstance(hint, types.UnionType):
        return None if value in (None, "none", "None") else _convert(value, get_args(hint)[0])
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, str | int | float):
        raise TypeError
    if (hint is int and isinstance(value, float)) or "\0" in str(value):
        raise TypeError
    str(value).encode()  # fails for half of a surrogate pair, which no file and no tokenizer takes
    result = hint(value)
    if isinstance(result, float) and not math.isfinite(result):
        raise ValueError
    return result


def describe(hint: Any) -> str:
    """What a field of this type takes, in words."""
    if isinstance(hint, types.UnionType):
        return f"{describe(get_args(hint)[0])} or none"
    if get_origin(hint) is list:
        return "a list of " + {int: "whole numbers", str: "texts"}[get_args(hint)[0]]
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]


def _violation(value: Any, checks: Mapping[str, Any]) -> str | None:
    """What was expected, where `value` fails a check; None where it passes."""
    if value == "" and not checks.get("may_be_empty"):
        return "a text that is not empty; leave it out for the default"
    if "choices" in checks and value not in checks["choices"]:
        return f"one of {', '.join(checks['choices'])}"
    for name, (words, holds) in LIMITS.items():
        if name in checks and not holds(value, checks[name]):
            return f"{words} {checks[name]}"
    if "pattern" in checks and not re.fullmatch(checks["pattern"], value):
        return str(checks["expected"])
    return None
