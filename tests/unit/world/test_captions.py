"""What is said of critters."""

from collections import Counter
from dataclasses import replace

import numpy as np

from elite.open_images import PHOTO_TEMPLATES
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
from small_world.tokenizer import MAX_LENGTH, build_tokenizer, world_words
from small_world.world import (
    ATTRIBUTES,
    EAR_RANGES,
    HELD_OUT_KINDS,
    PARTS,
    SCENES,
    Critter,
    Ears,
    _within,
)
from tests.critters import DRESSED


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
    assert describe(DRESSED) == (
        "red and white dotted round critter with blue cat ears, two eyes, a smile, arms, two legs "
        "and a long tail"
    )
    other = replace(
        DRESSED, body=None, pattern="solid", second=None, trim="green", head="round head"
    )
    other = replace(other, top="leaf", eyes="one eye", mouth="open mouth", side="none")
    other = replace(other, bottom="four legs", tail="none")
    assert describe(other) == (
        "red critter with a round head, a leaf, one eye, an open mouth and four green legs"
    )


def test_what_has_no_name_is_not_named():
    numbers = _within(EAR_RANGES, np.random.default_rng(0))
    between = replace(DRESSED, pattern="mixed", patterns=("striped", "dipped"), tail="tail")
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
    nouns = [random_noun(DRESSED, rng) for _ in range(1000)]
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
