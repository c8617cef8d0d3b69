"""What exists in the small world: shapes, patterns, colours, scenes, and the words for them.

A `Thing` is one concept (shape x pattern x colours). `held_out` names, in this one place, the
combinations that nothing is ever trained on; everything that renders training data asks
`things(held_out=False)`.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

SHAPES = ("mug", "star", "fish", "house", "car", "heart", "umbrella", "tree")
UNSEEN_SHAPES = ("boat", "bottle", "moon", "arrow")  # only the judge is ever trained on them
ALL_SHAPES = SHAPES + UNSEEN_SHAPES
PATTERNS = ("solid", "striped", "dotted")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 215, 50),
    "green": (50, 155, 70),
    "blue": (40, 95, 205),
    "purple": (130, 65, 170),
    "pink": (245, 140, 185),
    "white": (245, 245, 240),
}
SCENES = {
    "grass": "on the grass",
    "beach": "on the beach",
    "snow": "in the snow",
    "table": "on a wooden table",
    "bricks": "in front of a brick wall",
    "night": "at night",
    "water": "on the water",
    "road": "on the road",
}


@dataclass(frozen=True)
class Thing:
    """One concept. `second` is the colour of the stripes or dots, None for a solid thing."""

    shape: str
    pattern: str
    colour: str
    second: str | None = None

    @property
    def words(self) -> str:
        """'red mug', 'blue and yellow striped mug'."""
        if self.second is None:
            return f"{self.colour} {self.shape}"
        return f"{self.colour} and {self.second} {self.pattern} {self.shape}"


def held_out(thing: Thing) -> bool:
    """Whether the combination of shape, pattern and main colour (one in six) is kept from all
    training."""
    indices = (
        SHAPES.index(thing.shape),
        PATTERNS.index(thing.pattern),
        list(COLOURS).index(thing.colour),
    )
    return int(np.dot(indices, (1, 2, 5))) % 6 == 0


def things(held_out_only: bool) -> list[Thing]:
    """Every thing of the world that is held out (True) or may be trained on (False)."""
    return [thing for thing in _things(SHAPES) if held_out(thing) == held_out_only]


def unseen_things() -> list[Thing]:
    """Every thing of a silhouette that no part of the model has ever seen."""
    return _things(UNSEEN_SHAPES)


def _things(shapes: tuple[str, ...]) -> list[Thing]:
    return [
        Thing(shape, pattern, colour, second)
        for shape, pattern, colour in product(shapes, PATTERNS, COLOURS)
        for second in ([None] if pattern == "solid" else [c for c in COLOURS if c != colour])
    ]


def random_thing(rng: np.random.Generator, pool: list[Thing]) -> Thing:
    """A thing of the pool, every pattern equally often (solid things are fewer)."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    matching = [thing for thing in pool if thing.pattern == pattern]
    return matching[rng.integers(len(matching))]


def with_article(words: str) -> str:
    """'red mug' -> 'a red mug', 'orange car' -> 'an orange car'."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
