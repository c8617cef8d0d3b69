"""Draws a critter on a scene, with its mask: flat colours with a little light, inside an outline.

Parts live in unit coordinates, x to the right and y down, the body in [-1, 1]; `parts_of` lists
them from back to front, `draw` fits them all into the pose.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from small_world.bodies import half_width, outline, point_at
from small_world.scenes import draw_scene, shade
from small_world.world import COLOURS, Body, Critter, Ears, Tail

INK = (45, 40, 50)
CREAM = (245, 228, 180)
LEAF = (85, 175, 60)
BEAK = (250, 170, 40)
MOUTH = (120, 25, 45)
WHEEL = (70, 70, 78)
LINE = 0.016  # width of the outline, a fraction of the picture
SHIFT = 4  # bits behind the point of OpenCV's coordinates
NECK = 0.15  # how far a body reaches into the head on it, at least
PAINT = "paint"  # the fill of what shows the pattern

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Part:
    """A polygon, or with `width` a stroke along its points, and its fill."""

    points: np.ndarray  # (N, 2)
    fill: Colour | str
    width: float = 0.0
    lined: bool = True  # has an outline of its own


@dataclass(frozen=True)
class Pose:
    """Where a critter goes: centre and half the longer side in fractions of the picture, turn in
    degrees."""

    x: float
    y: float
    half: float
    turn: float
    mirrored: bool

    @staticmethod
    def random(rng: np.random.Generator, smallest: float = 0.62, largest: float = 0.95) -> "Pose":
        half = rng.triangular(smallest, largest, largest) / 2
        slack = max(0.5 - half, 0.02)
        x, y = rng.uniform(0.5 - slack, 0.5 + slack, size=2)
        return Pose(x, y, half, rng.uniform(-12, 12), bool(rng.integers(2)))


# --- shapes ---------------------------------------------------------------------------------------


def _ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    points = np.stack([rx * np.cos(t), ry * np.sin(t)], axis=1)
    angle = np.radians(turn)
    spin = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return points @ spin + (x, y)


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> np.ndarray:
    t = np.radians(np.linspace(start, end, 16))
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], axis=1)


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=np.float64)


def _both(points: np.ndarray, fill: Colour, width: float = 0.0) -> list[Part]:
    """The part and its mirror image."""
    return [Part(points, fill, width), Part(points * (-1, 1), fill, width)]


# --- the critter ----------------------------------------------------------------------------------


def parts_of(critter: Critter, trim: Colour) -> list[Part]:
    """Everything a critter is made of, from back to front."""
    body = outline(critter.numbers)
    if critter.head == "none":
        skull, face_y = body, _face_height(body)
        eye_room = half_width(body, face_y)
    else:
        skull = _ellipse(0, -0.62, 0.62, 0.52)
        body = body * (0.85, 0.75)
        body[:, 1] += min(0.35, skull[:, 1].max() - NECK - body[:, 1].min())
        face_y, eye_room = -0.66, 0.6
    behind = [*_tail(critter, body, trim), *_bottom(critter, body, trim)]
    sides, handle_behind = _sides(critter, body, trim)
    tops, tops_in_front = _top(critter, skull, trim)
    parts = [*behind, *sides, *([] if tops_in_front else tops), Part(body, PAINT)]
    if critter.bottom == "wheels":
        parts += _wheels(body)
    if critter.head != "none":
        parts.append(Part(skull, COLOURS[critter.colour]))
    parts += [*_face(critter, face_y, eye_room), *handle_behind]
    return parts + (tops if tops_in_front else [])


def _face_height(body: np.ndarray) -> float:
    """The height of the eyes: as high as the body is wide enough for them."""
    top = float(body[:, 1].min())
    for y in np.arange(max(-0.35, top + 0.3), 0.25, 0.05):
        if half_width(body, y) > 0.5:
            return float(y)
    return 0.1


def _top(critter: Critter, skull: np.ndarray, trim: Colour) -> tuple[list[Part], bool]:
    """What it wears on top, and whether that lies in front of the body."""
    x, y = point_at(skull, 38)
    x, high = abs(float(x)), float(y)
    crown = point_at(skull, 0)
    kind = critter.top
    if critter.ears is not None:
        return _both(_ear(critter.ears, skull), trim), False
    if kind == "cat ears":
        ear = _polygon((x - 0.34, high), (x + 0.2, high + 0.25), (x + 0.22, high - 0.5))
        return _both(ear, trim), False
    if kind == "bunny ears":
        return _both(_ellipse(x * 0.75, high - 0.34, 0.18, 0.54, 12), trim), False
    if kind == "bear ears":
        return _both(_ellipse(x + 0.04, high - 0.08, 0.29, 0.29), trim), False
    if kind == "horns":
        horn = _polygon(
            (x - 0.18, high + 0.1), (x + 0.16, high + 0.12), (x + 0.44, high - 0.2),
            (x + 0.4, high - 0.62), (x + 0.2, high - 0.3),
        )  # fmt: skip
        return _both(horn, CREAM), False
    if kind == "antennae":
        stalk = _polygon((0.12, float(crown[1]) + 0.2), (0.3, float(crown[1]) - 0.45))
        ball = _ellipse(0.34, float(crown[1]) - 0.55, 0.17, 0.17)
        return [*_both(stalk, INK, 0.07), *_both(ball, trim)], False
    if kind == "leaf":
        cx, cy = float(crown[0]), float(crown[1])
        stem = Part(_polygon((cx, cy + 0.15), (cx, cy - 0.3)), LEAF, 0.1)
        blade = _ellipse(cx + 0.36, cy - 0.42, 0.42, 0.2, -25)
        return [stem, Part(blade, LEAF)], False
    if kind == "droopy ears":
        return _both(_ellipse(x + 0.3, high + 0.42, 0.2, 0.5, -18), trim), True
    return [], False


def _ear(ears: Ears, skull: np.ndarray) -> np.ndarray:
    """The right one of these ears."""
    shape = outline(Body(aspect=ears.length / ears.width, tip=ears.tip))
    shape = shape * max(ears.width, ears.length) - (0, 0.6 * ears.length)
    angle = np.radians(ears.lean)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    root = point_at(skull, ears.place)
    return shape @ turn + (abs(float(root[0])), float(root[1]))


def _face(critter: Critter, y: float, room: float) -> list[Part]:
    """Eyes, the third above the other two, and the mouth below them."""
    radius, places = EYE_PLACES[critter.eyes]
    spread = min(1.0, room * 0.8 / radius)
    parts = []
    for across, up in places:
        x, height = across * spread * radius, y - up * radius
        parts.append(Part(_ellipse(x, height, radius, radius), (255, 255, 255)))
        pupil = _ellipse(x, height + 0.02, radius * 0.5, radius * 0.55)
        parts.append(Part(pupil, INK, lined=False))
    low = y + radius + 0.2
    if critter.mouth == "smile":
        parts.append(Part(_arc(0, low - 0.12, 0.3, 0.22, 15, 165), INK, 0.09, lined=False))
    elif critter.mouth == "open mouth":
        parts.append(Part(_ellipse(0, low + 0.02, 0.24, 0.17), MOUTH))
    else:
        beak = _polygon((-0.26, low - 0.14), (0.26, low - 0.14), (0.0, low + 0.24))
        parts.append(Part(beak, BEAK))
    return parts


# Radius, and the places in radii: across, and up from the face's height.
EYE_PLACES: dict[str, tuple[float, tuple[tuple[float, float], ...]]] = {
    "one eye": (0.34, ((0, 0),)),
    "two eyes": (0.25, ((-1.1, 0), (1.1, 0))),
    "three eyes": (0.22, ((-1.15, -0.2), (1.15, -0.2), (0, 1.45))),
}


def _sides(critter: Critter, body: np.ndarray, trim: Colour) -> tuple[list[Part], list[Part]]:
    """What is at both sides, behind and in front of the body."""
    x, y = (float(v) for v in point_at(body, 95))
    x = max(x, 0.35)
    kind = critter.side
    if kind == "arms":
        arm = _polygon((x - 0.2, y), (x + 0.18, y + 0.04), (x + 0.3, y - 0.3))
        return [*_both(arm, trim, 0.2), *_both(_ellipse(x + 0.31, y - 0.4, 0.2, 0.2), trim)], []
    if kind == "wings":
        wing = _polygon(
            (x - 0.3, y + 0.2), (x + 0.2, y + 0.26), (x + 0.46, y - 0.02), (x + 0.58, y - 0.42),
            (x + 0.52, y - 0.72), (x + 0.2, y - 0.52), (x - 0.2, y - 0.2),
        )  # fmt: skip
        return _both(wing, trim), []
    if kind == "fins":
        x = max(x, half_width(body, y + 0.4))
        fin = _polygon((x - 0.4, y - 0.25), (x + 0.5, y + 0.46), (x - 0.3, y + 0.42))
        return _both(fin, trim), []
    if kind == "handle":
        return [Part(_ellipse(-x - 0.04, y + 0.05, 0.36, 0.4), trim, 0.19)], []
    return [], []


def _bottom(critter: Critter, body: np.ndarray, trim: Colour) -> list[Part]:
    low = float(body[:, 1].max())
    places = {"two legs": (0.36,), "four legs": (0.22, 0.62)}.get(critter.bottom, ())
    legs = []
    for place in places:
        width = 0.3 if len(places) == 1 else 0.2
        leg = _polygon((place, low - 0.7), (place, low + 0.3))
        foot = _ellipse(place + 0.06, low + 0.34, width * 0.85, 0.13)
        legs += [*_both(leg, trim, width), *_both(foot, trim)]
    return legs


def _wheels(body: np.ndarray) -> list[Part]:
    low = float(body[:, 1].max())
    wheels = _both(_ellipse(0.48, low + 0.06, 0.31, 0.31), WHEEL)
    return wheels + _both(_ellipse(0.48, low + 0.06, 0.12, 0.12), (205, 205, 210))


def _tail(critter: Critter, body: np.ndarray, trim: Colour) -> list[Part]:
    x, y = (float(v) for v in point_at(body, 122))
    kind = critter.tail
    if critter.tail_numbers is not None:
        return [Part(_curve(critter.tail_numbers) - (0.15 - x, -y), trim)]
    if kind == "long tail":
        line = _polygon(
            (x - 0.25, y), (x + 0.24, y + 0.06), (x + 0.5, y - 0.12), (x + 0.5, y - 0.5)
        )
        return [Part(line, trim, 0.17), Part(_ellipse(x + 0.5, y - 0.56, 0.18, 0.18), trim)]
    if kind == "fluffy tail":
        return [Part(_ellipse(x + 0.3, y - 0.04, 0.46, 0.3, 28), trim)]
    if kind == "fan tail":
        fan = _polygon((x - 0.2, y), (x + 0.6, y - 0.42), (x + 0.44, y), (x + 0.6, y + 0.42))
        return [Part(fan, trim)]
    if kind == "zigzag tail":
        zigzag = _polygon(
            (x - 0.2, y + 0.05), (x + 0.26, y + 0.05), (x + 0.16, y - 0.22),
            (x + 0.72, y - 0.62), (x + 0.5, y - 0.3), (x + 0.62, y - 0.02), (x + 0.1, y + 0.3),
        )  # fmt: skip
        return [Part(zigzag, trim)]
    return []


def _curve(tail: Tail) -> np.ndarray:
    """The outline of this tail, its root at (0, 0)."""
    s = np.linspace(0, 1, 16)
    angles = np.radians(tail.lift + tail.curl * s)
    across = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    steps = np.stack([np.cos(angles), -np.sin(angles)], axis=1) * (tail.length + 0.15) / len(s)
    middle = np.cumsum(steps, axis=0)
    width = np.interp(s, (0, 0.5, 1), (tail.root, tail.middle, tail.end))[:, None]
    return np.concatenate([middle + across * width, (middle - across * width)[::-1]])


# --- on the picture -------------------------------------------------------------------------------


class _Frame:
    """Unit coordinates to pixels: the whole critter at the pose."""

    def __init__(self, parts: list[Part], pose: Pose, size: int) -> None:
        angle = np.radians(pose.turn)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        flip = np.diag([-1.0 if pose.mirrored else 1.0, 1.0])
        reach = [(part.points @ flip @ turn, part.width / 2) for part in parts]
        low = np.min([points.min(0) - width for points, width in reach], axis=0)
        high = np.max([points.max(0) + width for points, width in reach], axis=0)
        self.pixels_per_unit = 2 * pose.half * size / float((high - low).max())
        self.matrix = flip @ turn * self.pixels_per_unit
        self.origin = np.array([pose.x, pose.y]) * size - (low + high) / 2 * self.pixels_per_unit

    def place(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) in units to OpenCV's fixed-point pixels."""
        placed = points @ self.matrix + self.origin
        return np.round(placed * 2**SHIFT).astype(np.int32)

    def units(self, size: int) -> np.ndarray:
        """The unit coordinates of every pixel, (size, size, 2)."""
        grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1) + 0.5
        return ((grid - self.origin) @ np.linalg.inv(self.matrix)).astype(np.float32)


def _fill(canvas: np.ndarray, part: Part, frame: _Frame, colour: object, grow: int) -> None:
    """The part in one colour, `grow` pixels wider on every side."""
    points = frame.place(part.points)
    if part.width:
        width = max(1, round(part.width * frame.pixels_per_unit)) + 2 * grow
        cv2.polylines(canvas, [points], False, colour, width, cv2.LINE_AA, SHIFT)
        return
    cv2.fillPoly(canvas, [points], colour, cv2.LINE_AA, SHIFT)
    if grow:
        cv2.polylines(canvas, [points], True, colour, 2 * grow, cv2.LINE_AA, SHIFT)


def _shows_second(pattern: str, angle: float, units: np.ndarray) -> np.ndarray:
    """Where a pattern has the second colour, bool (H, W)."""
    x, y = units[..., 0], units[..., 1]
    if pattern == "striped":
        turn = np.radians(angle)
        return (x * np.cos(turn) + y * np.sin(turn)) / 0.95 % 1 < 0.42
    if pattern == "dotted":
        row = np.floor(y / 0.72)
        column = (x / 0.9 + 0.5 * (row % 2)) % 1 - 0.5
        return (column * 0.9) ** 2 + (y % 0.72 - 0.36) ** 2 < 0.27**2
    if pattern == "patched":
        return (x + 0.6) ** 2 + (y + 0.15) ** 2 < 0.75**2
    if pattern == "dipped":
        return y > 0.32 + 0.08 * np.sin(7 * x)
    if pattern == "checked":
        return (x % 1 < 0.35) != (y % 1 < 0.35)  # unequal, so that one can tell the main colour
    return np.zeros_like(x, dtype=bool)


def _paint(critter: Critter, units: np.ndarray, main: Colour, second: Colour) -> np.ndarray:
    """Main colour, pattern and light at these unit coordinates (H, W, 2), float (H, W, 3)."""
    kinds = critter.patterns or (critter.pattern,)
    there = np.logical_xor.reduce([_shows_second(kind, critter.angle, units) for kind in kinds])
    light = np.clip(1.0 - 0.16 * units[..., 1:], 0.8, 1.12)  # from above
    colours = np.where(there[..., None], np.float32(second), np.float32(main))
    return np.clip(colours * light, 0, 255)


def draw(
    critter: Critter,
    scene: str,
    rng: np.random.Generator,
    size: int = 256,
    pose: Pose | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One picture and its object mask.

    Args:
        critter: what to draw.
        scene: a key of `world.SCENES`.
        rng: source of pose, shades and scene details.
        size: side in pixels.
        pose: None draws one at random.

    Returns:
        image, uint8 (size, size, 3), and mask, uint8 (size, size) of 0 and 255.
    """
    pose = pose or Pose.random(rng)
    main = shade(COLOURS[critter.colour], rng)
    second = shade(COLOURS[critter.second or critter.colour], rng)
    trim = shade(COLOURS[critter.trim or critter.colour], rng)
    parts = parts_of(critter, trim)
    frame = _Frame(parts, pose, size)
    image = draw_scene(scene, rng, size)
    line = max(1, round(size * LINE))
    mask = np.zeros((size, size), np.uint8)
    paint = _paint(critter, frame.units(size), main, second)
    for part in parts:
        _fill(mask, part, frame, 255, line if part.lined else 0)
        if part.lined:
            _fill(image, part, frame, INK, line)
        if part.fill == PAINT:
            cover = np.zeros((size, size), np.uint8)
            _fill(cover, part, frame, 255, 0)
            share = cover[..., None] / 255
            image[:] = np.round(paint * share + image * (1 - share)).astype(np.uint8)
        else:
            _fill(image, part, frame, part.fill, 0)
    return image, np.where(mask > 127, 255, 0).astype(np.uint8)
