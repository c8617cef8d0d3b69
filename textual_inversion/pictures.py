"""A folder of pictures of one concept, with captions, for textual inversion."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elite.data import pictures_in
from elite.files import read_text
from elite.images import read_image, resize, to_pixels
from elite.open_images import PHOTO_TEMPLATES
from elite.wording import brief

MOST_NARROW = 20  # times; scaled to the square's side, others would fill the memory
TEMPLATES = {
    "object": PHOTO_TEMPLATES,
    "style": tuple(
        f"{what} in the style of {{}}"
        for what in (
            "a painting",
            "a picture",
            "a rendering",
            "a drawing",
            "a detail of a painting",
            "a small painting",
            "a large painting",
            "a dark painting",
            "a bright painting",
        )
    ),
    "face": tuple(
        f"{what} of {{}}"
        for what in (
            "a photo",
            "a portrait",
            "a close-up photo",
            "a photo of the face",
            "a cropped photo of the face",
            "a bright photo",
            "a dark photo",
            "a good photo",
        )
    ),
}


def read_templates(path: Path | str) -> tuple[str, ...]:
    """The captions of a text file, one a line, blank lines left out.

    Raises:
        ValueError: no readable text, or a line without {}.
    """
    lines = read_text(path, "expected captions, one a line").splitlines()
    templates = tuple(line.strip() for line in lines if line.strip())
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        line = wrong[0] if wrong else "nothing"
        raise ValueError(
            f"{path}: holds {brief(line)}; expected captions with {{}} for the new word"
        )
    return templates


class PictureFolder:
    """The pictures of a folder as squares, with a caption drawn for each.

    Args:
        root: folder of pictures; masks NAME_bg.png are left out.
        resolution: side of the squares in pixels.
        placeholder: the word that takes the place of {}.
        templates: captions to draw from.
        center_crop: the middle of a picture, not a random square of it.

    Raises:
        ValueError: no such folder, or no picture in it.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        resolution: int,
        placeholder: str,
        templates: tuple[str, ...] = PHOTO_TEMPLATES,
        center_crop: bool = False,
    ) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; expected pictures of the concept in it")
        self.paths = pictures_in(folder)
        if not self.paths:
            raise ValueError(f"{folder}: no picture in it; expected files such as jpg, png or webp")
        self.resolution, self.placeholder = resolution, placeholder
        self.templates, self.center_crop = templates, center_crop

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The file of a picture."""
        return str(self.paths[index])

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor | str]:
        """A square, mirrored half of the time, and its caption.

        Returns:
            pixels: float32 (3, resolution, resolution) in [-1, 1].
            caption: e.g. "a photo of a <cat>".
            size_and_crop: float32 (6,), what SDXL is told: height and width of the picture, top
                and left of the crop, height and width of the square; of a mirrored one, in the
                mirrored picture.

        Raises:
            ValueError: the picture cannot be read; the message names it.
        """
        image, side = read_image(self.paths[index]), self.resolution
        height, width = image.shape[:2]
        if max(height, width) > MOST_NARROW * min(height, width):
            raise ValueError(
                f"{self.paths[index]}: {width} x {height} is more than {MOST_NARROW} times as long "
                "as wide; crop it"
            )
        scale = side / min(height, width)
        image = resize(image, max(side, round(width * scale)), max(side, round(height * scale)))
        room = (image.shape[0] - side, image.shape[1] - side)
        if self.center_crop:
            top, left = (space // 2 for space in room)
        else:
            top, left = (int(rng.integers(space + 1)) for space in room)
        square = image[top : top + side, left : left + side]
        if rng.random() < 0.5:
            square, left = np.ascontiguousarray(square[:, ::-1]), room[1] - left
        caption = self.templates[rng.integers(len(self.templates))]
        return {
            "pixels": to_pixels(square),
            "caption": caption.replace("{}", self.placeholder),
            "size_and_crop": torch.tensor([height, width, top, left, side, side]).float(),
        }
