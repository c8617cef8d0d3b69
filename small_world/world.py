"""What exists in the small world: critters, their attributes, and what nothing is ever trained on.

A `Critter` is one concept: a kind of each attribute and the continuous numbers of its body. The
last kinds of some tuples are held out (`HELD_OUT_KINDS`); so are one in six combinations
(`is_held_out`) and intervals of continuous numbers (`HELD_OUT_INTERVALS`). Everything that renders
training data asks `random_critter(rng, "trained")`; critters of judge and tests are drawn afresh by
their seeds. Training alone shows what lies between the kinds, too, without a name (`UNNAMED`).
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
TOPS = ("none", "cat ears", "bunny ears", "bear ears", "horns", "antennae", "leaf", "droopy ears")
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
        flat: how much of its lower half is cut off straight (0 to 1).
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
    flat: float = 0.0
    skew: float = 0.0


@dataclass(frozen=True)
class Ears:
    """Ears of no named kind: half `width`, half `length`, `tip` (0 round to 1 pointed), `lean`
    (degrees to the outside) and `place` on the skull (degrees from its crown)."""

    width: float
    length: float
    tip: float
    lean: float
    place: float


@dataclass(frozen=True)
class Tail:
    """A tail of no named kind: half its width at the `root`, in the `middle` and at the `end`, its
    `length`, the direction in which it leaves (`lift`, degrees above the horizontal) and how far it
    turns on its way (`curl`, degrees)."""

    root: float
    middle: float
    end: float
    length: float
    lift: float
    curl: float


# Ranges of the numbers by family; what is not named stays at its default.
FAMILIES: dict[str, dict[str, tuple[float, float]]] = {
    "round": {"aspect": (0.85, 1.15), "exponent": (1.9, 2.4)},
    "square": {"aspect": (0.85, 1.15), "exponent": (6.0, 10.0)},
    "drop": {"aspect": (1.1, 1.4), "tip": (0.8, 1.0)},
    "pear": {"aspect": (1.2, 1.45), "taper": (0.4, 0.5), "waist": (0.26, 0.34)},
    "cloud": {
        "aspect": (0.58, 0.74),
        "lobes": (5, 7),
        "depth": (0.3, 0.4),
        "sharpness": (0.0, 0.1),
        "flat": (0.5, 0.6),
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

# Between the named kinds, for training alone: the share of each, and what stands for its name. A
# body lies between two families or a little beyond one, a mixed pattern is two at once.
UNNAMED = {
    "body": (0.3, None),
    "pattern": (0.15, "mixed"),
    "top": (0.2, "ears"),
    "tail": (0.25, "tail"),
}
BEYOND = 0.15
# What keeps bodies of no name from those that are held out (a diamond has an exponent of 1, or four
# middling lobes; a peanut a waist), and every number where it means something.
LIMITS = {
    "aspect": (0.55, 1.5),
    "exponent": (1.5, 10.0),
    "taper": (0.0, 0.9),
    "waist": (0.0, 0.36),
    "tip": (-1.0, 1.0),
    "notch": (0.0, 0.7),
    "lobes": (5.0, 7.0),
    "depth": (0.0, 0.58),
    "sharpness": (0.0, 1.0),
    "flat": (0.0, 0.65),
    "skew": (-SKEW, SKEW),
}
# Droopy ears hang, a zigzag tail turns back; these do not.
EAR_RANGES = {
    "width": (0.15, 0.34),
    "length": (0.26, 0.6),
    "tip": (0.0, 1.0),
    "lean": (-20.0, 90.0),
    "place": (20.0, 60.0),
}
TAIL_RANGES = {
    "root": (0.08, 0.2),
    "middle": (0.08, 0.32),
    "end": (0.06, 0.4),
    "length": (0.5, 0.95),
    "lift": (-30.0, 50.0),
    "curl": (-70.0, 70.0),
}


@dataclass(frozen=True)
class Critter:
    """One concept. `body` is None for one of no named family, `second` for a solid one, `trim`
    (the colour of its parts) where no part has it. `patterns`, `ears` and `tail_numbers` are those
    of kinds without a name."""

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
    patterns: tuple[str, str] | None = None
    ears: Ears | None = None
    tail_numbers: Tail | None = None


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
    """A number per attribute, in the order of ATTRIBUTES; -1 where there is none to see or name."""
    values = [*(getattr(critter, name) for name in ATTRIBUTES if name != "scene"), scene]
    return [
        kinds.index(value) if value in kinds else -1
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
    body = kind("body")
    angle = rng.uniform(0, 180)
    low, high = HELD_OUT_INTERVALS["angle"]
    while pool == "trained" and low <= angle % 90 <= high:
        angle = rng.uniform(0, 180)
    critter = Critter(
        body=body,
        numbers=_numbers(body, rng, pool),
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
    if pool == "trained":
        critter = _between(critter, rng)
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
        drawn = _within(ranges, rng)
        if "lobes" in drawn:
            drawn["lobes"] = float(rng.integers(ranges["lobes"][0], ranges["lobes"][1] + 1))
        drawn["skew"] = float(rng.uniform(-SKEW, SKEW))
        if pool != "trained" or not low <= drawn["aspect"] <= high:
            return Body(**drawn)


def _between(critter: Critter, rng: np.random.Generator) -> Critter:
    """The critter with a share of its kinds, as UNNAMED has them, between the named ones."""
    unnamed = {name for name, (share, _) in UNNAMED.items() if rng.random() < share}
    if "body" in unnamed:
        critter = replace(critter, body=None, numbers=_blend(rng))
    if "pattern" in unnamed and critter.pattern != "solid":
        trained = [kind for kind in PATTERNS if kind not in ("solid", *HELD_OUT_KINDS["pattern"])]
        first, second = (str(kind) for kind in rng.choice(trained, 2, replace=False))
        critter = replace(critter, pattern="mixed", patterns=(first, second))
    if "top" in unnamed and critter.top != "none":
        critter = replace(critter, top="ears", ears=Ears(**_within(EAR_RANGES, rng)))
    if "tail" in unnamed and critter.tail != "none":
        critter = replace(critter, tail="tail", tail_numbers=Tail(**_within(TAIL_RANGES, rng)))
    return critter


def _within(ranges: dict[str, tuple[float, float]], rng: np.random.Generator) -> dict[str, float]:
    return {name: float(rng.uniform(*bounds)) for name, bounds in ranges.items()}


def _blend(rng: np.random.Generator) -> Body:
    """Between two trained families or a little beyond, every number by a share of its own."""
    trained = [name for name in FAMILIES if name not in HELD_OUT_KINDS["body"]]
    names = rng.choice(trained, 2, replace=False)
    first, second = (vars(_numbers(str(name), rng, "trained")) for name in names)
    shares = rng.uniform(-BEYOND, 1 + BEYOND, len(first))
    mixed = {
        name: float(np.clip(share * first[name] + (1 - share) * second[name], *LIMITS[name]))
        for name, share in zip(first, shares, strict=True)
    }
    return Body(**{**mixed, "lobes": max(first["lobes"], second["lobes"], LIMITS["lobes"][0])})
