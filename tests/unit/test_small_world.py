"""Small world: what is held out, what is said, what is drawn."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import cv2
import numpy as np
import pytest

from elite.open_images import PHOTO_TEMPLATES
from small_world import render
from small_world.bodies import DIRECTIONS, outline, profile
from small_world.captions import (
    BARE,
    CLASS_WORD,
    describe,
    fill,
    place,
    random_noun,
    random_template,
    with_article,
)
from small_world.render import CREAM, LEAF, LINE, WHEEL, Pose, draw, draw_scene
from small_world.tokenizer import MAX_LENGTH, build_tokenizer, world_words
from small_world.world import (
    ATTACHED,
    ATTRIBUTES,
    COLOURS,
    EAR_RANGES,
    FAMILIES,
    HELD_OUT_INTERVALS,
    HELD_OUT_KINDS,
    LIMITS,
    PARTS,
    POOLS,
    SCENES,
    TAIL_RANGES,
    UNNAMED,
    Body,
    Critter,
    Ears,
    Tail,
    _within,
    has_trim,
    is_held_out,
    labels,
    random_critter,
    unseen_kinds,
)

PLAIN = Critter(
    body="round",
    numbers=Body(aspect=1.1),
    pattern="dotted",
    angle=0.0,
    colour="red",
    second="white",
    trim="blue",
    head="none",
    top="cat ears",
    eyes="two eyes",
    mouth="smile",
    side="arms",
    bottom="two legs",
    tail="long tail",
)
POSE = Pose(0.5, 0.5, 0.4, 5, mirrored=True)


@pytest.fixture(scope="module")
def critters() -> dict[str, list[Critter]]:
    """A thousand of each pool."""
    found = {}
    for number, pool in enumerate(POOLS):
        rng = np.random.default_rng(number)
        found[pool] = [random_critter(rng, pool) for _ in range(1000)]
    return found


# --- what is held out -----------------------------------------------------------------------------


def inside(value: float, interval: str) -> bool:
    low, high = HELD_OUT_INTERVALS[interval]
    return low <= value <= high


def test_nothing_held_out_is_trained(critters):
    for critter in critters["trained"]:
        assert not is_held_out(critter) and not unseen_kinds(critter)
        assert not inside(critter.angle % 90, "angle")
        assert critter.body is None or not inside(critter.numbers.aspect, "aspect")


def test_the_intervals_are_drawn_where_they_may_be(critters):
    """So that the test above has something to miss."""
    for pool in ("combinations", "kinds", "any"):
        assert any(inside(critter.angle % 90, "angle") for critter in critters[pool])
        assert any(inside(critter.numbers.aspect, "aspect") for critter in critters[pool])


def test_one_combination_in_six_is_held_out(critters):
    known = [critter for critter in critters["any"] if not unseen_kinds(critter)]
    # 3.7 points are three deviations of these few; the hash itself gives 17.
    assert 0.13 < np.mean([is_held_out(critter) for critter in known]) < 0.21
    assert all(is_held_out(critter) for critter in critters["combinations"])
    assert not any(unseen_kinds(critter) for critter in critters["combinations"])


def test_every_trained_kind_appears_and_no_other(critters):
    for pool in ("trained", "combinations"):
        for name, kinds in ATTRIBUTES.items():
            if name != "scene":
                named = set(kinds) - set(HELD_OUT_KINDS.get(name, ()))
                between = {UNNAMED[name][1]} if name in UNNAMED and pool == "trained" else set()
                seen = {getattr(critter, name) for critter in critters[pool]}
                assert seen - {None} == (named | between) - {None}, (pool, name)


def test_new_kinds_come_one_at_a_time_and_all_of_them(critters):
    found = Counter()
    for critter in critters["kinds"]:
        (name,) = unseen_kinds(critter)
        found[name, getattr(critter, name)] += 1
    assert found.keys() == {
        (name, kind) for name, kinds in HELD_OUT_KINDS.items() for kind in kinds
    }
    assert min(found.values()) > 60
    rng = np.random.default_rng(0)
    asked = [random_critter(rng, "kinds", "tail") for _ in range(20)]
    assert {critter.tail for critter in asked} == set(HELD_OUT_KINDS["tail"])


def test_any_kind_may_be_judged(critters):
    for name, kinds in ATTRIBUTES.items():
        if name != "scene":
            assert {getattr(critter, name) for critter in critters["any"]} >= set(kinds), name


def test_bodies_of_new_kinds_have_the_numbers_of_their_family(critters):
    for critter in critters["kinds"]:
        assert (critter.numbers.exponent < 1.2) == (critter.body == "diamond")
        assert (critter.numbers.waist > 0.4) == (critter.body == "peanut")


def test_training_shows_its_share_of_what_has_no_name(critters):
    trained = critters["trained"]
    for name, (share, word) in UNNAMED.items():
        there = [c for c in trained if getattr(c, name) not in ("none", "solid")]
        found = np.mean([getattr(critter, name) == word for critter in there])
        assert abs(found - share) < 0.05, name  # three deviations of the few that wear a tail: 0.07
    for critter in trained:
        assert (critter.patterns is not None) == (critter.pattern == "mixed")
        assert (critter.ears is not None) == (critter.top == "ears")
        assert (critter.tail_numbers is not None) == (critter.tail == "tail")


def test_only_training_shows_what_has_no_name(critters):
    for critter in (c for pool in POOLS if pool != "trained" for c in critters[pool]):
        assert critter.body and critter.patterns is critter.ears is critter.tail_numbers is None


def test_bodies_without_a_name_never_look_like_a_held_out_one(critters):
    """A diamond has an exponent of 1 or four middling lobes, a peanut a waist."""
    blends = [critter.numbers for critter in critters["trained"] if critter.body is None]
    for name, (low, high) in LIMITS.items():
        found = [getattr(numbers, name) for numbers in blends]
        assert low <= min(found) < max(found) <= high, name
    for family in HELD_OUT_KINDS["body"]:
        ranges = FAMILIES[family]
        assert any(high < LIMITS[n][0] or low > LIMITS[n][1] for n, (low, high) in ranges.items())


def test_parts_without_a_name_never_look_like_a_held_out_one(critters):
    """Droopy ears hang, a checked body is stripes of two directions at once."""
    worn = [critter.ears for critter in critters["trained"] if critter.ears]
    assert len(worn) > 80 and max(ears.lean for ears in worn) <= 90
    mixed = {critter.patterns for critter in critters["trained"] if critter.patterns}
    assert len(mixed) == 12 and all(first != second for first, second in mixed)
    assert not any(kind in pair for pair in mixed for kind in HELD_OUT_KINDS["pattern"])


def test_what_lies_between_is_no_copy_of_a_kind(monkeypatch):
    """Each of its numbers changes what is drawn."""
    on_magenta(monkeypatch)
    rng = np.random.default_rng(3)

    def drawn(critter: Critter) -> bytes:
        return draw(critter, "grass", np.random.default_rng(2), 64, POSE)[0].tobytes()

    for _ in range(5):
        ears = Ears(**{name: rng.uniform(*bounds) for name, bounds in EAR_RANGES.items()})
        tail = Tail(**{name: rng.uniform(*bounds) for name, bounds in TAIL_RANGES.items()})
        worn = replace(PLAIN, top="ears", ears=ears, tail="tail", tail_numbers=tail)
        for name, (low, high) in EAR_RANGES.items():
            ends = (drawn(replace(worn, ears=replace(ears, **{name: x}))) for x in (low, high))
            assert len({*ends}) == 2, name
        for name, (low, high) in TAIL_RANGES.items():
            ends = [replace(worn, tail_numbers=replace(tail, **{name: x})) for x in (low, high)]
            assert drawn(ends[0]) != drawn(ends[1]), name
    pairs = (("striped", "dipped"), ("striped", "dotted"), ("patched", "dipped"))
    mixed = [replace(PLAIN, pattern="mixed", patterns=pair) for pair in pairs]
    assert len({*map(drawn, [PLAIN, replace(PLAIN, pattern="striped"), *mixed])}) == 5


# --- silhouettes ----------------------------------------------------------------------------------


def test_a_profile_is_how_far_the_outline_reaches():
    circle = profile(Body())
    assert len(circle) == len(DIRECTIONS) and np.allclose(circle, 1, atol=0.01)
    flat = profile(Body(aspect=0.5))
    assert flat[0] == pytest.approx(0.5, abs=0.01) and max(flat) == pytest.approx(1, abs=0.01)
    assert flat[-1] == pytest.approx(0.5, abs=0.01) and flat[6] == pytest.approx(1, abs=0.01)
    pointed, turned = profile(Body(tip=0.9)), profile(Body(tip=-0.9))
    assert pointed[2] < pointed[-3] and np.allclose(pointed, turned[::-1], atol=0.05)
    leaning = [profile(Body(aspect=1.3, skew=skew)) for skew in (0.1, -0.1)]
    assert np.allclose(*leaning, atol=0.03), "mirrored, it is the same"


def test_clouds_lie_flat(critters):
    clouds = [c.numbers for c in critters["any"] if c.body == "cloud"]
    for numbers in clouds[:50]:
        polygon = outline(numbers)
        low = polygon[:, 1].max()
        below = polygon[polygon[:, 1] > low - 0.01]
        assert np.ptp(below[:, 0]) > 1.0, "half of its width"
        assert np.ptp(polygon[:, 1]) < 0.8 * np.ptp(polygon[:, 0])


def test_unknown_pool_is_named():
    with pytest.raises(ValueError, match="pool 'test': expected one of trained, combinations"):
        random_critter(np.random.default_rng(0), "test")


# --- labels ---------------------------------------------------------------------------------------


def test_labels_number_the_kinds(critters):
    for critter in critters["any"][:200]:
        numbers = labels(critter, "moon")
        for (name, kinds), number in zip(ATTRIBUTES.items(), numbers, strict=True):
            kind = "moon" if name == "scene" else getattr(critter, name)
            assert number == -1 if kind is None else kinds[number] == kind


def test_labels_are_minus_one_where_there_is_nothing_to_see_or_name():
    def nothing(critter: Critter, scene: str | None) -> set[str]:
        return {n for n, x in zip(ATTRIBUTES, labels(critter, scene), strict=True) if x == -1}

    assert nothing(PLAIN, "snow") == set()
    assert nothing(PLAIN, None) == {"scene"}
    bare = replace(PLAIN, body=None, pattern="solid", second=None, trim=None)
    assert nothing(bare, "snow") == {"body", "second", "trim"}
    between = replace(PLAIN, pattern="mixed", patterns=("striped", "dipped"), top="ears")
    assert nothing(replace(between, tail="tail"), "snow") == {"pattern", "top", "tail"}


def test_solid_critters_have_no_second_colour(critters):
    for critter in critters["any"]:
        assert (critter.second is None) == (critter.pattern == "solid")
        colours = [c for c in (critter.colour, critter.second, critter.trim) if c is not None]
        assert len(set(colours)) == len(colours)


# --- what is said ---------------------------------------------------------------------------------


def phrases(noun: str) -> tuple[list[str], list[str]]:
    """The words up to 'critter', and the parts without articles."""
    before, _, after = noun.partition(f"{CLASS_WORD} with ")
    listed = after.replace(" and ", ", ").split(", ") if after else []
    words = before.removesuffix(CLASS_WORD).replace(" and ", " ").split()
    return words, [phrase.removeprefix("a ").removeprefix("an ") for phrase in listed]


def without_trim(phrase: str, critter: Critter) -> str:
    return " ".join(word for word in phrase.split() if word != critter.trim)


def test_a_description_names_every_part_and_no_other(critters):
    for critter in critters["any"]:
        words, parts = phrases(describe(critter))
        adjectives = [critter.colour, critter.second, critter.pattern, critter.body]
        assert words == [w for w in adjectives if w not in (None, "solid", "mixed")]
        shown = [getattr(critter, name) for name in PARTS if getattr(critter, name) != "none"]
        assert [without_trim(phrase, critter) for phrase in parts] == shown
        coloured = [phrase for phrase in parts if critter.trim in phrase.split()]
        assert len(coloured) == (critter.trim is not None)


def test_descriptions():
    assert describe(PLAIN) == (
        "red and white dotted round critter with blue cat ears, two eyes, a smile, arms, two legs "
        "and a long tail"
    )
    other = replace(PLAIN, body=None, pattern="solid", second=None, trim="green", head="round head")
    other = replace(other, top="leaf", eyes="one eye", mouth="open mouth", side="none")
    other = replace(other, bottom="four legs", tail="none")
    assert describe(other) == (
        "red critter with a round head, a leaf, one eye, an open mouth and four green legs"
    )


def test_what_has_no_name_is_not_named():
    numbers = _within(EAR_RANGES, np.random.default_rng(0))
    between = replace(PLAIN, pattern="mixed", patterns=("striped", "dipped"), tail="tail")
    assert describe(replace(between, body=None, top="ears", ears=Ears(**numbers))) == (
        "red and white critter with blue ears, two eyes, a smile, arms, two legs and a tail"
    )


def test_random_nouns_never_name_what_is_not_there(critters):
    rng = np.random.default_rng(0)
    for critter in critters["any"]:
        words, parts = phrases(random_noun(critter, rng))
        assert set(words) <= {critter.colour, critter.second, critter.pattern, critter.body}
        there = [getattr(critter, name) for name in PARTS]
        assert {without_trim(phrase, critter) for phrase in parts} <= set(there) - {"none"}
        shown = len(there) - there.count("none")
        assert len(parts) < 3 or len(parts) == shown, "three parts are complete"


def test_random_nouns_vary_in_detail_and_order():
    rng = np.random.default_rng(0)
    nouns = [random_noun(PLAIN, rng) for _ in range(1000)]
    counts = Counter(nouns)
    assert BARE - 0.03 < counts[CLASS_WORD] / 1000 < BARE + 0.05  # some come to no more by chance
    assert len(counts) > 300
    assert {len(phrases(noun)[1]) for noun in nouns} == {0, 2, 6}
    assert {len(phrases(noun)[0]) for noun in nouns} == {0, 1, 2, 3, 4}


def test_articles():
    assert with_article("red critter") == "a red critter"
    assert with_article("orange critter") == "an orange critter"
    assert fill("a {}", "orange critter") == "an orange critter"
    assert fill("a photo of the {} at night", "orange critter") == (
        "a photo of the orange critter at night"
    )
    assert fill("a photo of a {}", "orange critter") == "a photo of an orange critter"


def test_templates_hold_the_noun_once():
    rng = np.random.default_rng(0)
    templates = {random_template(rng) for _ in range(500)}
    assert "a {}" in templates and len(templates) > 20
    assert all(text.count("{}") == 1 for text in templates)
    assert place(None) == "" and {place(scene) for scene in SCENES} == {
        f" {words}" for words in SCENES.values()
    }


def test_every_word_of_the_world_is_one_token(critters):
    tokenizer = build_tokenizer()
    for word in [*world_words(), "S", ","]:
        assert len(tokenizer(word).input_ids) == 3, word  # start, word, end
    said = {word for critter in critters["trained"] for word in describe(critter).split()}
    assert {word.strip(",") for word in said} <= set(world_words())


def test_words_of_held_out_kinds_are_no_words_of_the_world():
    words = set(world_words())
    for name, kinds in HELD_OUT_KINDS.items():
        trained = {w for kind in ATTRIBUTES[name] if kind not in kinds for w in kind.split()}
        for kind in kinds:
            own = set(kind.split()) - trained
            assert own and not own & words, kind


def test_the_longest_caption_is_read_whole(critters):
    tokenizer = build_tokenizer()

    def longest(texts) -> str:
        return max(texts, key=lambda text: len(tokenizer(text).input_ids))

    noun = longest(describe(critter) for critter in critters["trained"])
    templates = [*PHOTO_TEMPLATES, "a far away photo of a {}", "close up photo of a {}"]
    caption = fill(longest(templates), noun) + longest(map(place, SCENES))
    assert 40 < len(tokenizer(caption).input_ids) <= MAX_LENGTH, caption


# --- drawing --------------------------------------------------------------------------------------


def on_magenta(monkeypatch) -> None:
    magenta = np.array((255, 0, 255), np.uint8)
    monkeypatch.setattr(
        render, "draw_scene", lambda scene, rng, size: np.tile(magenta, (size, size, 1))
    )


def test_mask_covers_all_that_differs_from_the_scene(critters, monkeypatch):
    on_magenta(monkeypatch)
    for number, critter in enumerate(critters["any"][:60]):
        image, mask = draw(critter, "grass", np.random.default_rng(number), 96)
        changed = np.abs(image.astype(int) - (255, 0, 255)).max(axis=2) > 10
        edge = cv2.dilate(mask, np.ones((3, 3), np.uint8))  # half covered pixels are mixed
        assert set(np.unique(mask)) == {0, 255} and mask.mean() > 255 * 0.08
        assert not changed[edge == 0].any()
        assert changed[mask > 0].all()


def test_critters_lie_inside_the_picture(critters, monkeypatch):
    """Each at half its size in the middle of a larger picture, where nothing is cut off: no more
    than its outline leaves the frame."""
    on_magenta(monkeypatch)
    size = 128
    line = round(size * LINE)
    middle = slice(size // 4 - line - 1, 3 * size // 4 + line + 1)
    for number, critter in enumerate(critters["any"][:60]):
        pose = Pose.random(np.random.default_rng(number))
        assert 0.62 <= 2 * pose.half <= 0.95
        smaller = replace(pose, x=0.25 + pose.x / 2, y=0.25 + pose.y / 2, half=pose.half / 2)
        _, mask = draw(critter, "grass", np.random.default_rng(number), size, smaller)
        assert mask.any() and mask[middle, middle].sum() == mask.sum()


def test_the_longer_side_is_that_of_the_pose():
    for half in (0.3, 0.45):
        _, mask = draw(PLAIN, "grass", np.random.default_rng(0), 200, replace(POSE, half=half))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        longer = max(np.ptp(rows), np.ptp(columns)) + 1
        assert longer == pytest.approx(2 * half * 200, abs=3 * 200 * LINE)


@pytest.mark.parametrize(("pattern", "second"), [("solid", None), ("striped", "white")])
def test_colours_are_those_of_the_critter(pattern, second):
    critter = replace(PLAIN, pattern=pattern, second=second, trim="green")
    image, mask = draw(critter, "road", np.random.default_rng(0), 128, POSE)
    inner = image[mask > 0].astype(int)
    for name, colour in COLOURS.items():
        near = (np.abs(inner - colour).max(axis=1) <= 35).mean()  # shades, and light from above
        if name in ("red", "green", second):
            assert near > 0.05, name
        elif name not in ("white", "brown"):  # of the eyes; of edges between red and ink
            assert near < 0.02, name


def test_trim_shows_where_it_is_named(critters):
    """Another trim changes the picture of exactly those critters that have one."""
    seen = set()
    for critter in critters["any"][:150]:
        trims = [colour for colour in COLOURS if colour != critter.colour][:2]
        one, other = (
            draw(replace(critter, trim=trim), "snow", np.random.default_rng(1), 64, POSE)[0]
            for trim in trims
        )
        assert (one != other).any() == has_trim(critter) == (critter.trim is not None)
        seen.add(has_trim(critter))
    assert seen == {True, False}


def middling(family: str) -> Body:
    return Body(**{name: (low + high) / 2 for name, (low, high) in FAMILIES[family].items()})


@pytest.mark.parametrize("name", [name for name in ATTRIBUTES if name != "scene"])
def test_every_kind_looks_different(name):
    critter = replace(PLAIN, colour="purple", second="yellow")
    pictures = {}
    for kind in ATTRIBUTES[name]:
        numbers = {"numbers": middling(kind)} if name == "body" else {}
        drawn = replace(critter, **{name: kind}, **numbers)
        pictures[kind] = draw(drawn, "grass", np.random.default_rng(2), 64, POSE)[0].astype(int)
    for one, other in combinations(pictures, 2):
        differing = np.abs(pictures[one] - pictures[other]).max(axis=2) > 30
        assert differing.sum() > 20, (one, other)


PARTLESS = replace(
    PLAIN, pattern="solid", second=None, top="none", side="none", bottom="none", tail="none"
)
OWN_COLOURS = {"horns": CREAM, "leaf": LEAF, "wheels": WHEEL}


@pytest.mark.parametrize("head", ATTRIBUTES["head"])
@pytest.mark.parametrize("body", ATTRIBUTES["body"])
def test_every_part_shows_on_every_body_and_head(body, head, monkeypatch):
    on_magenta(monkeypatch)
    bare = replace(PARTLESS, body=body, numbers=middling(body), head=head, trim="green")
    for name in ATTACHED:
        for kind in ATTRIBUTES[name][1:]:
            worn = replace(bare, **{name: kind})
            image, _ = draw(worn, "grass", np.random.default_rng(2), 64, POSE)
            wanted = OWN_COLOURS.get(kind, COLOURS["green"])
            near = np.abs(image.astype(int) - wanted).max(axis=2) <= 35
            assert near.sum() >= 12, kind  # three pixels at 32 px, where fins on stars are smallest


def test_drawing_depends_on_the_seed_alone():
    first, again, other = (
        draw(PLAIN, "snow", np.random.default_rng(seed), 64) for seed in (1, 1, 2)
    )
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != other[0]).any() and (first[1] != other[1]).any()


def test_every_scene_is_another_one():
    for seed in range(3):
        pictures = [draw_scene(scene, np.random.default_rng(seed), 32) for scene in SCENES]
        assert all(picture.shape == (32, 32, 3) for picture in pictures)
        assert len({picture.tobytes() for picture in pictures}) == len(SCENES) == 12


def test_unknown_scene_is_named():
    with pytest.raises(ValueError, match="'teapot'"):
        draw_scene("teapot", np.random.default_rng(0), 32)
