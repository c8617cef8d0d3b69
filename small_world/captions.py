"""What a person would say of a critter: nouns in varying detail, and the sentences around them.

A caption is a template with one `{}` and the noun that goes there, so that a placeholder can stand
in the noun's place.
"""

import numpy as np

from elite.open_images import PHOTO_TEMPLATES
from small_world.world import ATTACHED, PARTS, SCENES, UNNAMED, Critter

CLASS_WORD = "critter"
ADJECTIVES = ("colours", "pattern", "body")
# Share of captions that name all parts, none, or one or two; a caption of three parts is complete,
# so that what it leaves out is not there.
ALL_PARTS, NO_PARTS = 0.62, 0.23
COUNTS = ("one", "two", "three", "four")
BARE = 0.12  # share of captions that say "critter" and no more


def with_article(words: str) -> str:
    """'red critter' -> 'a red critter', 'orange critter' -> 'an orange critter'."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe(critter: Critter) -> str:
    """Everything there is to say, in a fixed order: 'red and blue dotted pear critter with yellow
    bunny ears, two eyes, a beak, four legs and a fluffy tail'."""
    return _noun(critter, ADJECTIVES, PARTS)


def phrase_of(kind: str) -> str:
    """A part as one says it: 'bunny ears', 'two legs', 'a long tail'."""
    plural = _is_counted(kind) or kind.endswith(("s", "ae"))
    return kind if plural else with_article(kind)


def place(scene: str | None) -> str:
    """' on the beach'; nothing without a scene."""
    return "" if scene is None else f" {SCENES[scene]}"


def random_noun(critter: Critter, rng: np.random.Generator) -> str:
    """The critter in varying detail and order."""
    if rng.random() < BARE:
        return CLASS_WORD
    detailed = rng.random() < 0.6
    adjectives = [word for word in ADJECTIVES if detailed or rng.random() < 0.6]
    parts = [str(name) for name in rng.permutation(PARTS) if getattr(critter, name) != "none"]
    share = rng.random()
    if share > ALL_PARTS:
        parts = parts[: 0 if share < ALL_PARTS + NO_PARTS else 1 + int(len(parts) > 3)]
    return _noun(critter, adjectives, parts)


def random_template(rng: np.random.Generator) -> str:
    """'a {}', or one of the photo templates."""
    return "a {}" if rng.random() < 0.4 else str(rng.choice(PHOTO_TEMPLATES))


def fill(template: str, noun: str) -> str:
    """The caption: the noun in the template's place, with the right article."""
    return template.replace("a {}", with_article(noun)).format(noun)


def _noun(critter: Critter, adjectives: tuple | list, parts: tuple | list) -> str:
    words = []
    if "colours" in adjectives:
        words.append(critter.colour)
        if critter.second is not None and "pattern" in adjectives:
            words += ["and", critter.second]
    if "pattern" in adjectives and critter.pattern not in ("solid", UNNAMED["pattern"][1]):
        words.append(critter.pattern)
    if "body" in adjectives and critter.body is not None:
        words.append(critter.body)
    words.append(CLASS_WORD)
    shown = [name for name in parts if getattr(critter, name) != "none"]
    phrases, trim = [], critter.trim
    for name in shown:
        phrase = getattr(critter, name)
        if trim is not None and _shows_trim(name, phrase):
            first, rest = phrase.split() if _is_counted(phrase) else ("", phrase)
            phrase = f"{first} {trim} {rest}".strip()
            trim = None  # once is enough: all parts share it
        phrases.append(phrase_of(phrase))
    if not phrases:
        return " ".join(words)
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    return f"{' '.join(words)} with {listed}"


def _is_counted(kind: str) -> bool:
    return kind.split()[0] in COUNTS


def _shows_trim(name: str, kind: str) -> bool:
    return name in ATTACHED and kind not in ("horns", "leaf", "wheels")
