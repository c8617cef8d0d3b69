"""Critters and a pose to begin from."""

from dataclasses import replace

from small_world.render import Pose
from small_world.world import Body, Critter

CRITTER = Critter(
    body="round",
    numbers=Body(),
    pattern="solid",
    angle=0.0,
    colour="purple",
    second=None,
    trim=None,
    head="none",
    top="none",
    eyes="two eyes",
    mouth="smile",
    side="none",
    bottom="none",
    tail="none",
)
DRESSED = replace(
    CRITTER,
    numbers=Body(aspect=1.1),
    pattern="dotted",
    colour="red",
    second="white",
    trim="blue",
    top="cat ears",
    side="arms",
    bottom="two legs",
    tail="long tail",
)
POSE = Pose(0.5, 0.5, 0.4, 5, mirrored=True)
