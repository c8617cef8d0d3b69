"""What exists in the small world: critters, their attributes, and what nothing is ever trained on.

A `Critter` is one concept: a kind of each attribute and the continuous numbers of its body. Kinds
of a tuple's end are held out (`HELD_OUT_KINDS`); so are one in six combinations (`is_held_out`) and
intervals of continuous numbers (`HELD_OUT_INTERVALS`). Everything that renders training data asks
`random_critter(rng, "trained")`; critters of judge and tests are drawn afresh by their seeds.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 135, 30),
    "yellow": (250, 218, 60),
    "green": (60, 160, 70),
    "turquoise": (60, 200, 200),
    "blue": (45, 85, 205),
    "purple": (125, 60, 170),
    "pink": (245, 140, 185),
    "white": (245, 245, 240),
    "brown": (125, 80, 48),
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
    "forest": "in the forest",
    "moon": "on the moon",
    "curtain": "in front of a red curtain",
    "tiles": "on a tiled floor",
}
BODIES = ("round", "square", "drop", "pear", "cloud", "star", "heart", "cone", "diamond", "peanut")
PATTERNS = ("solid", "striped", "dotted", "patched", "dipped", "checked")
TOPS = (
    "none",
    "cat ears",
    "bunny ears",
    "bear ears",
    "horns",
    "antennae",
    "leaf",
    "droopy ears",
)
SIDES = ("none", "arms", "wings", "fins", "handle")
BOTTOMS = ("none", "two legs", "four legs", "wheels")
TAILS = ("none", "long tail", "fluffy tail", "fan tail", "zigzag tail")
HEADS = ("none", "round head")
EYES = ("one eye", "two eyes", "three eyes")
MOUTHS = ("smile", "open mouth", "beak")

# What a critter is told by, in the order of `labels`, with all kinds of each.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "body": BODIES,
    "pattern": PATTERNS,
    "colour": tuple(COLOURS),
    "second": tuple(COLOURS),
    "trim": tuple(COLOURS),
    "head": HEADS,
    "top": TOPS,
    "eyes": EYES,
    "mouth": MOUTHS,
    "side": SIDES,
    "bottom": BOTTOMS,
    "tail": TAILS,
    "scene": tuple(SCENES),
}
ATTACHED = ("top", "side", "bottom", "tail")  # parts in the trim colour, but for some kinds
PARTS = ("head", "top", "eyes", "mouth", "side", "bottom", "tail")
# How often a critter has the parts that not all have.
PRESENT = {"head": 0.2, "top": 0.7, "side": 0.5, "bottom": 0.65, "tail": 0.35}

# Never drawn for anything but judge and tests.
HELD_OUT_KINDS = {
    "body": ("diamond", "peanut"),
    "pattern": ("checked",),
    "top": ("droopy ears",),
    "tail": ("zigzag tail",),
}
# Of named bodies: a blend of two aspects may fall between.
HELD_OUT_INTERVALS = {"aspect": (1.0, 1.06), "angle": (30.0, 60.0)}
# trained: all that may be trained on; combinations: held-out ones of trained kinds;
# kinds: one or more kinds that are held out; any: without restraint.
POOLS = ("trained", "combinations", "kinds", "any")


@dataclass(frozen=True)
class Body:
    """The numbers of a silhouette: a superellipse, bent. See `bodies.outline`.

    Args:
        aspect: height over width.
        exponent: of the superellipse; 1 a diamond, 2 an ellipse, from 4 on a box.
        taper: how much wider below (0 to 1).
        waist: how much narrower in the middle (0 to 1).
        tip: how far the top (if negative, the bottom) is drawn to a point (-1 to 1).
        notch: depth of the dent in the top's middle.
        lobes, depth, sharpness: lobes around, how deep in between, round (0) to pointed (1).
        skew: sideways shift from top to bottom.
    """

    aspect: float = 1.0
    exponent: float = 2.0
    taper: float = 0.0
    waist: float = 0.0
    tip: float = 0.0
    notch: float = 0.0
    lobes: float = 0.0
    depth: float = 0.0
    sharpness: float = 0.0
    skew: float = 0.0


# Ranges of the numbers by family; what is not named stays at its default.
FAMILIES: dict[str, dict[str, tuple[float, float]]] = {
    "round": {"aspect": (0.85, 1.15), "exponent": (1.9, 2.4)},
    "square": {"aspect": (0.85, 1.15), "exponent": (6.0, 10.0)},
    "drop": {"aspect": (1.1, 1.4), "tip": (0.8, 1.0)},
    "pear": {"aspect": (1.08, 1.35), "taper": (0.42, 0.52), "waist": (0.2, 0.28)},
    "cloud": {
        "aspect": (0.72, 0.98),
        "lobes": (5, 7),
        "depth": (0.3, 0.4),
        "sharpness": (0.0, 0.1),
    },
    "star": {
        "aspect": (0.94, 1.1),
        "lobes": (4, 7),
        "depth": (0.46, 0.56),
        "sharpness": (0.9, 1.0),
    },
    "heart": {"aspect": (0.85, 1.1), "tip": (-0.95, -0.8), "notch": (0.5, 0.65)},
    "cone": {"aspect": (0.95, 1.3), "exponent": (4.0, 6.0), "taper": (0.7, 0.85)},
    "diamond": {"aspect": (0.95, 1.25), "exponent": (0.95, 1.1)},
    "peanut": {"aspect": (1.25, 1.5), "exponent": (2.4, 3.0), "waist": (0.45, 0.58)},
}
SKEW = 0.1
BLENDED = 0.1  # share of the bodies between two trained families; they have no name


@dataclass(frozen=True)
class Critter:
    """One concept. `body` is None for a blend of two families, `second` for a solid one, `trim`
    (the colour of its parts) where no part has it."""

    body: str | None
    numbers: Body
    pattern: str
    angle: float  # of the stripes, in degrees from the vertical
    colour: str
    second: str | None
    trim: str | None
    head: str
    top: str
    eyes: str
    mouth: str
    side: str
    bottom: str
    tail: str


def is_held_out(critter: Critter) -> bool:
    """Whether the combination of body, pattern, main colour and what it wears on top (one in six,
    by hash) is kept from all training."""
    return is_one_in_six(
        "/".join((critter.body or "blend", critter.pattern, critter.colour, critter.top))
    )


def is_one_in_six(name: str) -> bool:
    """Whether the hash of a name picks it, to be kept from training."""
    return zlib.crc32(name.encode()) % 6 == 0


def unseen_kinds(critter: Critter) -> list[str]:
    """The attributes whose kind is held out."""
    return [name for name, kinds in HELD_OUT_KINDS.items() if getattr(critter, name) in kinds]


def labels(critter: Critter, scene: str | None) -> list[int]:
    """A number per attribute, in the order of ATTRIBUTES; -1 where there is none to see."""
    values = [*(getattr(critter, name) for name in ATTRIBUTES if name != "scene"), scene]
    return [
        -1 if value is None else kinds.index(value)
        for kinds, value in zip(ATTRIBUTES.values(), values, strict=True)
    ]


def random_critter(
    rng: np.random.Generator, pool: str = "trained", unseen: str | None = None
) -> Critter:
    """A new critter of one of POOLS; of "kinds", one attribute is of an unseen kind: the one named,
    or any."""
    if pool not in POOLS:
        raise ValueError(f"pool {pool!r}: expected one of {', '.join(POOLS)}")
    while True:
        critter = _draw(rng, pool, unseen)
        if pool not in ("trained", "combinations"):
            return critter
        if is_held_out(critter) == (pool == "combinations"):
            return critter


def _draw(rng: np.random.Generator, pool: str, unseen: str | None) -> Critter:
    def one(values: tuple[str, ...]) -> str:
        return str(values[rng.integers(len(values))])

    def kind(name: str) -> str:
        kept = () if pool == "any" else HELD_OUT_KINDS.get(name, ())
        if name in PRESENT and rng.random() > PRESENT[name]:
            return "none"
        return one(tuple(v for v in ATTRIBUTES[name] if v not in ("none", *kept)))

    colour, second, trim = (str(c) for c in rng.choice(list(COLOURS), 3, replace=False))
    body: str | None = kind("body")
    numbers = _numbers(body, rng, pool)
    if pool == "trained" and rng.random() < BLENDED:
        body, numbers = None, _blend(rng, pool)
    angle = rng.uniform(0, 180)
    low, high = HELD_OUT_INTERVALS["angle"]
    while pool == "trained" and low <= angle % 90 <= high:
        angle = rng.uniform(0, 180)
    critter = Critter(
        body=body,
        numbers=numbers,
        pattern=kind("pattern"),
        angle=float(angle),
        colour=colour,
        second=second,
        trim=trim,
        head=kind("head"),
        top=kind("top"),
        eyes=kind("eyes"),
        mouth=kind("mouth"),
        side=kind("side"),
        bottom=kind("bottom"),
        tail=kind("tail"),
    )
    if pool == "kinds":
        name = unseen or one(tuple(HELD_OUT_KINDS))
        new = one(HELD_OUT_KINDS[name])
        critter = replace(critter, **{name: new})
        if name == "body":
            critter = replace(critter, numbers=_numbers(new, rng, pool))
    if critter.pattern == "solid":
        critter = replace(critter, second=None)
    return critter if has_trim(critter) else replace(critter, trim=None)


def has_trim(critter: Critter) -> bool:
    """Whether any part shows the trim colour: horns, leaves and wheels have their own."""
    own_colour = critter.top in ("none", "horns", "leaf")
    plain = critter.bottom in ("none", "wheels")
    return not (own_colour and plain and critter.side == "none" and critter.tail == "none")


def _numbers(family: str, rng: np.random.Generator, pool: str) -> Body:
    ranges = FAMILIES[family]
    low, high = HELD_OUT_INTERVALS["aspect"]
    while True:
        drawn = {name: float(rng.uniform(*bounds)) for name, bounds in ranges.items()}
        if "lobes" in drawn:
            drawn["lobes"] = float(rng.integers(ranges["lobes"][0], ranges["lobes"][1] + 1))
        drawn["skew"] = float(rng.uniform(-SKEW, SKEW))
        if pool != "trained" or not low <= drawn["aspect"] <= high:
            return Body(**drawn)


def _blend(rng: np.random.Generator, pool: str) -> Body:
    """Between two trained families. Lobes are those of either, five or more: four of middling depth
    would be a diamond."""
    trained = [name for name in FAMILIES if name not in HELD_OUT_KINDS["body"]]
    first, second = (_numbers(str(n), rng, pool) for n in rng.choice(trained, 2, replace=False))
    share = rng.uniform(0.3, 0.7)
    mixed = {
        name: share * value + (1 - share) * getattr(second, name)
        for name, value in vars(first).items()
    }
    return Body(**{**mixed, "lobes": max(first.lobes, second.lobes, 5.0)})
