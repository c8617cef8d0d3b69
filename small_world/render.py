"""Draws the small world: a silhouette with colours and a pattern, on a scene, with its mask.

All drawing happens in uint8 RGB at the size asked for; silhouettes live in unit coordinates, x and
y in [-1, 1].
"""

from dataclasses import dataclass

import cv2
import numpy as np

from small_world.world import COLOURS, Thing

INK = (45, 40, 50)
GLASS = (200, 228, 240)
BROWN = (120, 78, 45)


def _circle(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> list:
    angles = np.radians(np.linspace(start, end, 40))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1).tolist()


def _box(left: float, top: float, right: float, bottom: float) -> list:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star() -> list:
    angles = np.radians(np.arange(10) * 36 - 90)
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1).tolist()


def _heart() -> list:
    t = np.linspace(0, 2 * np.pi, 60)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return np.stack([x, y - 0.1], axis=1).tolist()


def _umbrella() -> list:
    """The canopy: a half disc whose lower edge has three scallops."""
    scallops = [p for x in (0.667, 0.0, -0.667) for p in _circle(x, 0.0, 0.333, 0.16, 0, -180)]
    return _circle(0, 0.0, 1.0, 0.85, 180, 360) + scallops


# Parts of a silhouette: `body` carries colour and pattern, `holes` are cut out of it,
# `extras` are (polygon, fixed colour) drawn over it; body and extras together are the mask.
SILHOUETTES: dict[str, dict[str, list]] = {
    "mug": {
        "body": [_box(-0.85, -0.85, 0.4, 0.85), _circle(0.45, 0.0, 0.52, 0.55)],
        "holes": [_circle(0.55, 0.0, 0.2, 0.28)],
        "extras": [(_circle(-0.22, -0.82, 0.62, 0.13), INK)],
    },
    "star": {"body": [_star()]},
    "fish": {
        "body": [_circle(-0.2, 0, 0.8, 0.55), [(0.4, 0), (1.0, -0.55), (1.0, 0.55)]],
        "extras": [(_circle(-0.62, -0.12, 0.1, 0.1), INK)],
    },
    "house": {
        "body": [_box(-0.75, -0.1, 0.75, 0.95), [(-1, -0.1), (0, -0.95), (1, -0.1)]],
        "extras": [(_box(-0.2, 0.35, 0.2, 0.95), BROWN), (_box(0.38, 0.15, 0.62, 0.45), GLASS)],
    },
    "car": {
        "body": [
            _box(-1, -0.05, 1, 0.45),
            [(-0.65, -0.05), (-0.4, -0.55), (0.4, -0.55), (0.65, -0.05)],
        ],
        "extras": [
            ([(-0.5, -0.1), (-0.33, -0.43), (-0.05, -0.43), (-0.05, -0.1)], GLASS),
            ([(0.5, -0.1), (0.33, -0.43), (0.05, -0.43), (0.05, -0.1)], GLASS),
            (_circle(-0.55, 0.47, 0.25, 0.25), INK),
            (_circle(0.55, 0.47, 0.25, 0.25), INK),
        ],
    },
    "heart": {"body": [_heart()]},
    "umbrella": {
        "body": [_umbrella()],
        "extras": [(_box(-0.06, -0.05, 0.06, 0.85), INK), (_box(-0.06, 0.75, 0.32, 0.9), INK)],
    },
    "tree": {
        "body": [
            [(0, -1.0), (-0.6, -0.2), (0.6, -0.2)],
            [(0, -0.6), (-0.8, 0.45), (0.8, 0.45)],
        ],
        "extras": [(_box(-0.16, 0.45, 0.16, 0.98), BROWN)],
    },
    "boat": {
        "body": [
            [(-1, 0.35), (1, 0.35), (0.6, 0.85), (-0.6, 0.85)],
            [(0, -1), (0, 0.2), (0.8, 0.2)],
        ],
        "extras": [(_box(-0.08, -1.0, 0.02, 0.36), INK)],
    },
    "bottle": {
        "body": [
            _box(-0.45, -0.2, 0.45, 1.0),
            [(-0.45, -0.2), (-0.17, -0.55), (0.17, -0.55), (0.45, -0.2)],
            _box(-0.17, -0.85, 0.17, -0.5),
        ],
        "extras": [(_box(-0.2, -1.0, 0.2, -0.84), BROWN)],
    },
    "moon": {"body": [_circle(0, 0, 0.95, 0.95)], "holes": [_circle(0.5, -0.1, 0.75, 0.75)]},
    "arrow": {"body": [_box(-1, -0.25, 0.2, 0.25), [(0.1, -0.75), (1, 0), (0.1, 0.75)]]},
}


@dataclass(frozen=True)
class Pose:
    """Where the silhouette goes: centre and half width in fractions of the picture, turn in
    degrees."""

    x: float
    y: float
    half_width: float
    turn: float
    mirrored: bool

    @staticmethod
    def random(rng: np.random.Generator, smallest: float = 0.55, largest: float = 1.0) -> "Pose":
        half = rng.uniform(smallest, largest) / 2
        slack = max(0.5 - half, 0.02)
        x, y = rng.uniform(0.5 - slack, 0.5 + slack, size=2)
        return Pose(x, y, half, rng.uniform(-12, 12), bool(rng.integers(2)))


def _shade(colour: tuple, rng: np.random.Generator, amount: int = 10) -> tuple:
    """The colour, a little different each time."""
    return tuple(
        int(v) for v in np.clip(np.asarray(colour) + rng.integers(-amount, amount + 1), 0, 255)
    )


def _gradient(top: tuple, bottom: tuple, size: int) -> np.ndarray:
    ramp = np.linspace(0, 1, size)[:, None, None]
    column = np.asarray(top) * (1 - ramp) + np.asarray(bottom) * ramp
    return np.broadcast_to(column, (size, size, 3)).astype(np.uint8)


def _rows(canvas: np.ndarray, start: int, step: int, thickness: int, colour: tuple) -> None:
    for y in range(start, len(canvas), step):
        canvas[y : y + thickness] = colour


def draw_scene(scene: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """The background alone, uint8 (size, size, 3)."""
    unit = size / 32
    horizon = int(size * rng.uniform(0.4, 0.6))
    canvas = _gradient(_shade((120, 185, 240), rng), _shade((205, 228, 245), rng), size).copy()
    if scene == "grass":
        canvas[horizon:] = _shade((95, 180, 75), rng)
        for _ in range(40):
            x, y = int(rng.integers(size)), int(rng.integers(horizon, size))
            cv2.line(canvas, (x, y), (x, y - int(1.6 * unit)), (60, 140, 50), max(1, int(unit / 2)))
    elif scene == "beach":
        canvas[horizon - int(5 * unit) : horizon] = _shade((45, 150, 190), rng)
        canvas[horizon:] = _shade((235, 210, 150), rng)
        cv2.circle(
            canvas,
            (int(rng.uniform(0.1, 0.9) * size), int(4 * unit)),
            int(2.5 * unit),
            (255, 240, 160),
            -1,
        )
    elif scene == "snow":
        canvas[:] = _gradient(_shade((165, 180, 200), rng), _shade((200, 210, 222), rng), size)
        canvas[horizon:] = _shade((240, 244, 250), rng, 5)
        for _ in range(25):
            centre = (int(rng.integers(size)), int(rng.integers(horizon)))
            cv2.circle(canvas, centre, max(1, int(unit / 2)), (250, 250, 255), -1)
    elif scene == "table":
        canvas[:] = _shade((180, 130, 80), rng)
        _rows(
            canvas,
            int(rng.integers(0, int(6 * unit))),
            int(7 * unit),
            max(1, int(unit)),
            (140, 95, 55),
        )
    elif scene == "bricks":
        canvas[:] = _shade((165, 85, 65), rng)
        course, joint = int(5 * unit), max(1, int(unit))
        start = int(rng.integers(0, course))
        _rows(canvas, start, course, joint, (205, 190, 175))
        for row, y in enumerate(range(start - course, size, course)):
            for x in range(int(4 * unit) * (row % 2), size, int(8 * unit)):
                canvas[max(y, 0) : max(y + course, 0), x : x + joint] = (205, 190, 175)
    elif scene == "night":
        canvas[:] = _gradient(_shade((15, 18, 50), rng, 6), _shade((40, 40, 85), rng, 6), size)
        for _ in range(22):
            centre = tuple(int(v) for v in rng.integers(0, size, 2))
            cv2.circle(canvas, centre, max(1, int(unit / 2.5)), (240, 240, 200), -1)
    elif scene == "water":
        canvas[:] = _shade((50, 125, 200), rng)
        for y in range(int(rng.integers(0, int(4 * unit))), size, int(5 * unit)):
            xs = np.arange(0, size + 1, max(1, int(unit)))
            wave = y + unit * np.sin(xs / unit * 0.9 + y)
            points = np.stack([xs, wave], axis=1).astype(np.int32)
            cv2.polylines(canvas, [points], False, (150, 200, 240), max(1, int(unit)))
    elif scene == "road":
        canvas[:] = _shade((105, 105, 110), rng)
        middle = int(size * rng.uniform(0.6, 0.85))
        for x in range(int(rng.integers(0, int(8 * unit))) - int(8 * unit), size, int(10 * unit)):
            canvas[middle : middle + int(2 * unit), max(x, 0) : max(x + int(6 * unit), 0)] = (
                230,
                225,
                200,
            )
    else:
        raise ValueError(f"unknown scene {scene!r}")
    return canvas


def _place(points: list, pose: Pose, size: int) -> np.ndarray:
    xy = np.asarray(points, dtype=np.float64)
    if pose.mirrored:
        xy = xy * (-1, 1)
    turn = np.radians(pose.turn)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    placed = xy @ rotation * pose.half_width + (pose.x, pose.y)
    return np.round(placed * size).astype(np.int32)


def _fill(polygons: list, pose: Pose, size: int) -> np.ndarray:
    """Union of the polygons as a uint8 0/255 picture."""
    canvas = np.zeros((size, size), np.uint8)
    for polygon in polygons:
        cv2.fillPoly(canvas, [_place(polygon, pose, size)], 255)
    return canvas


def _paint(thing: Thing, pose: Pose, rng: np.random.Generator, size: int) -> np.ndarray:
    """The body's paint over the whole canvas: main colour, then stripes or dots that turn with the
    object."""
    paint = np.empty((size, size, 3), np.uint8)
    paint[:] = _shade(COLOURS[thing.colour], rng)
    if thing.second is None:
        return paint
    second = _shade(COLOURS[thing.second], rng)
    if thing.pattern == "striped":
        for x in np.arange(-1.2, 1.2, 0.5):
            cv2.fillPoly(paint, [_place(_box(x, -1.5, x + 0.2, 1.5), pose, size)], second)
    else:
        for row, y in enumerate(np.arange(-1.2, 1.3, 0.4)):
            for x in np.arange(-1.2, 1.3, 0.48):
                dot = _circle(x + 0.24 * (row % 2), y, 0.125, 0.125)
                cv2.fillPoly(paint, [_place(dot, pose, size)], second)
    return paint


def draw(
    thing: Thing, scene: str, rng: np.random.Generator, size: int = 256, pose: Pose | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One picture and its object mask.

    Args:
        thing: what to draw.
        scene: a key of `world.SCENES`.
        rng: source of pose, shades and scene details.
        size: side in pixels.
        pose: None draws one at random.

    Returns:
        image, uint8 (size, size, 3), and mask, uint8 (size, size) of 0 and 255.
    """
    pose = pose or Pose.random(rng)
    silhouette = SILHOUETTES[thing.shape]
    extras = silhouette.get("extras", [])
    body = _fill(silhouette["body"], pose, size)
    body[_fill(silhouette.get("holes", []), pose, size) > 0] = 0
    mask = body | _fill([polygon for polygon, _ in extras], pose, size)

    image = draw_scene(scene, rng, size)
    thickness = max(1, round(size * 0.014))
    image[cv2.dilate(mask, np.ones((2 * thickness + 1,) * 2, np.uint8)) > 0] = INK
    image[body > 0] = _paint(thing, pose, rng, size)[body > 0]
    for polygon, colour in extras:
        cv2.fillPoly(image, [_place(polygon, pose, size)], colour)
    mask = cv2.dilate(mask, np.ones((2 * thickness + 1,) * 2, np.uint8))
    return image, mask
