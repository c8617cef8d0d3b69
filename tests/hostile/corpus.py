"""All bad inputs."""

from collections.abc import Iterator

from tests.hostile import pictures, tables, weights, words
from tests.hostile.harness import Case, World


def all_cases(world: World) -> Iterator[Case]:
    for part in (pictures, tables, weights, words):
        yield from part.cases(world)
