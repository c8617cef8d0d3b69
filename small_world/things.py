"""Things that other people have drawn, PNGs with transparency, in the small world's scenes."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from small_world.render import Pose
from small_world.scenes import draw_scene
from small_world.world import is_one_in_six


def is_held_out_thing(file: Path) -> bool:
    """Whether a thing (one in six, by hash of its name, by whichever hand) is kept from all
    training on things."""
    return is_one_in_six(file.stem)


def find_things(folder: Path, held_out: bool | None = None) -> list[Path]:
    """The folder's PNGs; True leaves those that are held out, False the others.

    Raises:
        ValueError: there are fewer than two.
    """
    files = sorted(folder.glob("*.png"))
    if held_out is not None:
        files = [file for file in files if is_held_out_thing(file) == held_out]
    if len(files) < 2:
        raise ValueError(
            f"{folder}: expected a folder of PNGs with transparency; make one with "
            "data_scripts/fetch_art.py"
        )
    return files


def name_of(file: Path) -> str:
    """'alarm_clock.png' -> 'alarm clock'."""
    return file.stem.replace("_", " ")


def read_thing(file: Path) -> np.ndarray:
    """RGBA, uint8 (H, W, 4). Raises ValueError where it cannot be read."""
    try:
        with Image.open(file) as opened:
            return np.asarray(opened.convert("RGBA"))
    except Exception:  # decoders raise whatever they like
        raise ValueError(
            f"{file}: cannot be read; expected a PNG with transparency, fetch or save it again"
        ) from None


def premultiplied(thing: np.ndarray) -> np.ndarray:
    """RGBA with the colours times alpha, float32 of the same range."""
    return np.dstack([thing[..., :3] * (thing[..., 3:] / 255), thing[..., 3]]).astype(np.float32)


def composite(
    thing: np.ndarray, scene: str, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A cut-out RGBA (H, W, 4) in a scene, in a pose like a critter's: image (size, size, 3) and
    mask (size, size) of 0 and 255, uint8."""
    pose = Pose.random(rng)
    return lay_on(draw_scene(scene, rng, size), thing, pose)


def lay_on(ground: np.ndarray, thing: np.ndarray, pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    """A cut-out RGBA (H, W, 4) on a square picture (size, size, 3), as `composite` gives it."""
    size = len(ground)
    height, width = thing.shape[:2]
    scale = 2 * pose.half * size / max(height, width)
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), pose.turn, scale)
    matrix[:, 2] += np.array([pose.x, pose.y]) * size - (width / 2, height / 2)
    solid = premultiplied(thing[:, ::-1] if pose.mirrored else thing)
    for _ in range(int(np.floor(np.log2(max(1.0, 1 / scale))))):  # no alias when it gets small
        solid = cv2.pyrDown(solid)
        matrix[:, :2] *= 2
    placed = cv2.warpAffine(solid, matrix, (size, size), flags=cv2.INTER_LINEAR)
    seen = placed[..., 3:] / 255
    image = ground * (1 - seen) + placed[..., :3]
    mask = np.where(placed[..., 3] > 127, 255, 0).astype(np.uint8)
    return image.round().clip(0, 255).astype(np.uint8), mask
