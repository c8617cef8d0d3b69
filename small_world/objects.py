"""The objects of `test_datasets/`: critters by number, the same on every machine, unpicked.

The first twelve are held-out combinations of kinds that training shows, the last four each have one
kind that nothing has ever shown.
"""

import numpy as np

from small_world.world import HELD_OUT_KINDS, SCENES, Critter, random_critter

NUM_COMBINATIONS = 12
NUM_OBJECTS = NUM_COMBINATIONS + len(HELD_OUT_KINDS)
# Random stream of the test objects. Number 0 seeds as 16 alone does, which a chunk of training
# renders does, too; in those nothing is held out.
STREAM = 16


def object_rng(number: int) -> np.random.Generator:
    """The source of everything random about an object's picture."""
    return np.random.default_rng((STREAM, number))


def test_object(number: int) -> tuple[Critter, str]:
    """An object and the scene of its picture; scenes in turn."""
    rng, scenes = object_rng(number), list(SCENES)
    if number < NUM_COMBINATIONS:
        critter = random_critter(rng, "combinations")
    else:
        unseen = list(HELD_OUT_KINDS)[number - NUM_COMBINATIONS]
        critter = random_critter(rng, "kinds", unseen)
    return critter, scenes[number % len(scenes)]


def name_of(number: int) -> str:
    """'07_blue_pink_striped_pear', '03_red_solid_heart'."""
    critter, _ = test_object(number)
    words = (critter.colour, critter.second, critter.pattern, critter.body)
    return "_".join([f"{number:02}", *(word for word in words if word)])


def critter_of(name: str) -> Critter:
    """The test object of that name. Raises ValueError for any other name."""
    number = int(name[:2]) if name[:2].isdecimal() else NUM_OBJECTS
    if number >= NUM_OBJECTS or name != name_of(number):
        raise ValueError(
            f"{name}: no object of the small world; expected a name such as {name_of(0)}, or other "
            "--metrics"
        )
    return test_object(number)[0]
