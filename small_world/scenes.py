"""The backgrounds of the small world, drawn in uint8 RGB at the size asked for."""

import cv2
import numpy as np


def shade(colour: tuple, rng: np.random.Generator, amount: int = 10) -> tuple:
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
    canvas = _gradient(shade((120, 185, 240), rng), shade((205, 228, 245), rng), size).copy()
    if scene == "grass":
        canvas[horizon:] = shade((95, 180, 75), rng)
        for _ in range(40):
            x, y = int(rng.integers(size)), int(rng.integers(horizon, size))
            cv2.line(canvas, (x, y), (x, y - int(1.6 * unit)), (60, 140, 50), max(1, int(unit / 2)))
    elif scene == "beach":
        canvas[horizon - int(5 * unit) : horizon] = shade((45, 150, 190), rng)
        canvas[horizon:] = shade((235, 210, 150), rng)
        cv2.circle(
            canvas,
            (int(rng.uniform(0.1, 0.9) * size), int(4 * unit)),
            int(2.5 * unit),
            (255, 240, 160),
            -1,
        )
    elif scene == "snow":
        canvas[:] = _gradient(shade((165, 180, 200), rng), shade((200, 210, 222), rng), size)
        canvas[horizon:] = shade((240, 244, 250), rng, 5)
        for _ in range(25):
            centre = (int(rng.integers(size)), int(rng.integers(horizon)))
            cv2.circle(canvas, centre, max(1, int(unit / 2)), (250, 250, 255), -1)
    elif scene == "table":
        canvas[:] = shade((180, 130, 80), rng)
        _rows(
            canvas,
            int(rng.integers(0, int(6 * unit))),
            int(7 * unit),
            max(1, int(unit)),
            (140, 95, 55),
        )
    elif scene == "bricks":
        canvas[:] = shade((165, 85, 65), rng)
        course, joint = int(5 * unit), max(1, int(unit))
        start = int(rng.integers(0, course))
        _rows(canvas, start, course, joint, (205, 190, 175))
        for row, y in enumerate(range(start - course, size, course)):
            for x in range(int(4 * unit) * (row % 2), size, int(8 * unit)):
                canvas[max(y, 0) : max(y + course, 0), x : x + joint] = (205, 190, 175)
    elif scene == "night":
        canvas[:] = _gradient(shade((15, 18, 50), rng, 6), shade((40, 40, 85), rng, 6), size)
        for _ in range(22):
            centre = tuple(int(v) for v in rng.integers(0, size, 2))
            cv2.circle(canvas, centre, max(1, int(unit / 2.5)), (240, 240, 200), -1)
    elif scene == "water":
        canvas[:] = shade((50, 125, 200), rng)
        for y in range(int(rng.integers(0, int(4 * unit))), size, int(5 * unit)):
            xs = np.arange(0, size + 1, max(1, int(unit)))
            wave = y + unit * np.sin(xs / unit * 0.9 + y)
            points = np.stack([xs, wave], axis=1).astype(np.int32)
            cv2.polylines(canvas, [points], False, (150, 200, 240), max(1, int(unit)))
    elif scene == "road":
        canvas[:] = shade((105, 105, 110), rng)
        middle = int(size * rng.uniform(0.6, 0.85))
        for x in range(int(rng.integers(0, int(8 * unit))) - int(8 * unit), size, int(10 * unit)):
            canvas[middle : middle + int(2 * unit), max(x, 0) : max(x + int(6 * unit), 0)] = (
                230,
                225,
                200,
            )
    elif scene == "forest":
        canvas[:] = _gradient(shade((35, 85, 60), rng, 6), shade((60, 120, 70), rng, 6), size)
        for x in np.arange(rng.uniform(-4, 2), 34, 6.5):
            left, width = int((x + rng.uniform(-1, 1)) * unit), int(rng.uniform(2, 3) * unit)
            cv2.rectangle(canvas, (left, 0), (left + width, size), shade((72, 50, 38), rng, 8), -1)
        canvas[int(size * rng.uniform(0.8, 0.9)) :] = shade((48, 70, 40), rng, 6)
    elif scene == "moon":
        canvas[:] = shade((12, 12, 20), rng, 6)
        canvas[horizon:] = shade((170, 168, 175), rng, 8)
        for _ in range(7):
            centre = (int(rng.integers(size)), int(rng.integers(horizon + int(2 * unit), size)))
            axes = (int(rng.uniform(2, 4) * unit), int(rng.uniform(1, 1.6) * unit))
            cv2.ellipse(canvas, centre, axes, 0, 0, 360, (125, 124, 132), -1)
    elif scene == "curtain":
        canvas[:] = shade((170, 30, 45), rng, 8)
        for x in np.arange(rng.uniform(-3, 1), 33, 4):
            left, width = int(x * unit), int(1.6 * unit)
            cv2.rectangle(canvas, (left, 0), (left + width, size), shade((115, 15, 32), rng, 5), -1)
    elif scene == "tiles":
        canvas[:] = shade((225, 225, 220), rng, 8)
        side, dark = 6 * unit, shade((150, 165, 180), rng, 8)
        left, top = rng.uniform(-6, 0, 2) * unit
        for row in range(8):
            for column in range(row % 2, 8, 2):
                x, y = int(left + column * side), int(top + row * side)
                cv2.rectangle(canvas, (x, y), (int(x + side), int(y + side)), dark, -1)
    else:
        raise ValueError(f"unknown scene {scene!r}")
    return canvas
