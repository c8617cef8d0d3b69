"""Ways of drawing the same cases, their pictures in a folder, and what the judge says of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from elite.files import write_atomically
from elite.images import from_pixels, to_pixels
from small_world.claims import Verdicts
from small_world.classifier import Judge
from small_world.score import Case, Row, draw_row, judge_pictures


@dataclass(frozen=True)
class Method(Row[Case]):
    """A row whose pictures are kept."""

    cost: str | None = None  # which of the table's seconds a new concept takes; None: nothing

    @property
    def file(self) -> str:
        """'w0 + local, 0.8' as 'w0_local_0.8.npz'."""
        return "_".join(self.name.replace("+", "").replace(",", "").split()) + ".npz"


class Pictures:
    """The pictures of methods, one file each, so that an interrupted run goes on where it stopped.

    Args:
        settings: what they depend on besides the method and its cases; pictures of others are drawn
            anew.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], batch_size: int) -> None:
        self.folder, self.batch_size = folder, batch_size
        self.key = json.dumps(dict(settings))

    def draw(self, methods: Sequence[Method]) -> None:
        """Draws what is not there yet."""
        missing = [method for method in methods if self.find(method) is None]
        with tqdm(total=sum(len(method.tasks) for method in missing), unit="picture") as progress:
            for method in missing:
                progress.set_description(method.name)
                pictures = from_pixels(draw_row(method, self.batch_size, progress))
                self._save(method, pictures)

    def find(self, method: Method) -> np.ndarray | None:
        """The method's pictures, uint8 (N, H, W, 3); None where they are not drawn with these
        settings."""
        path = self.folder / method.file
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as file:
            same = str(file["key"]) == self.key
            pictures = file["pictures"]
        return pictures if same and len(pictures) == len(method.tasks) else None

    def of(self, method: Method) -> np.ndarray:
        """The same, once they are drawn."""
        pictures = self.find(method)
        assert pictures is not None  # `draw` comes first
        return pictures

    def _save(self, method: Method, pictures: np.ndarray) -> None:
        key = np.array(self.key)
        write_atomically(
            self.folder / method.file,
            lambda temporary: np.savez(temporary, pictures=pictures, key=key),
        )


def verdicts(judge: Judge, cases: list[Case], pictures: np.ndarray, known: Tensor) -> Verdicts:
    """What is right of each picture, uint8 (N, H, W, 3), as `judge_pictures` says it."""
    pixels = torch.stack([to_pixels(picture) for picture in pictures])
    found = judge_pictures(judge, cases, pixels, known)
    return {name: values.numpy() for name, values in found.items()}
