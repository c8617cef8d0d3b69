"""A critter and a pose to begin from."""

from small_world.render import Pose
from small_world.world import Body, Critter

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
