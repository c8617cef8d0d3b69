"""Silhouettes from numbers: a superellipse, lobed, tapered, pinched and bent."""

import numpy as np

from small_world.world import Body

POINTS = 160
DIRECTIONS = range(0, 181, 15)  # of a profile, degrees from above


def outline(body: Body) -> np.ndarray:
    """The polygon (POINTS, 2) of a body, x to the right and y down, in [-1, 1] with the longer side
    at full length."""
    t = np.linspace(0, 2 * np.pi, POINTS, endpoint=False) - np.pi / 2  # from the top, clockwise
    cos, sin = np.cos(t), np.sin(t)
    power = 2 / body.exponent
    x = np.sign(cos) * np.abs(cos) ** power
    y = np.sign(sin) * np.abs(sin) ** power
    if body.lobes:
        turn = body.lobes * (t + np.pi / 2) / (2 * np.pi)
        pointed = np.abs(2 * (turn % 1) - 1)  # 1 on the lobe, 0 in between
        rounded = np.abs(np.cos(np.pi * turn))
        wave = body.sharpness * pointed + (1 - body.sharpness) * rounded
        radius = 1 - body.depth * (1 - wave)
        x, y = x * radius, y * radius
    y = np.minimum(y, 1 - body.flat)
    x = x * (1 + body.taper * y) * (1 - body.waist * np.exp(-((y / 0.4) ** 2)))
    towards_tip = np.clip(-np.sign(body.tip) * y, 0, 1)
    x = x * (1 - abs(body.tip) * towards_tip)
    y = y + body.notch * np.exp(-((x / 0.35) ** 2)) * (y < 0)
    x = x + body.skew * y
    xy = np.stack([x, y], axis=1)
    low, high = xy.min(0), xy.max(0)
    xy = (2 * xy - low - high) / (high - low)  # the box [-1, 1]
    sides = np.array([1.0, body.aspect])
    return xy * sides / sides.max()


def point_at(polygon: np.ndarray, degrees: float) -> np.ndarray:
    """The outline's point in a direction from the middle of its box: 0 is up, 90 to the right."""
    middle = (polygon.min(0) + polygon.max(0)) / 2
    angle = np.radians(degrees)
    direction = np.array([np.sin(angle), -np.cos(angle)])
    along = (polygon - middle) @ direction
    across = np.abs((polygon - middle) @ np.array([direction[1], -direction[0]]))
    return polygon[np.argmin(np.where(along > 0, across, np.inf))]


def half_width(polygon: np.ndarray, y: float) -> float:
    """How far the outline reaches to both sides at this height."""
    near = polygon[np.abs(polygon[:, 1] - y) < 0.12]
    if not len(near):
        return 0.0
    return float(max(0.0, min(near[:, 0].max(), -near[:, 0].min())))


def profile(body: Body) -> list[float]:
    """How far the outline reaches from the middle of its box in DIRECTIONS, the mean of both sides,
    since pictures may be mirrored."""
    polygon = outline(body)
    reach = [
        np.linalg.norm(point_at(polygon, degrees)) + np.linalg.norm(point_at(polygon, -degrees))
        for degrees in DIRECTIONS
    ]
    return [round(float(both) / 2, 4) for both in reach]
