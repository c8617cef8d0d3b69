"""Ways of drawing the same cases, their pictures in a folder, and what the judge says of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    """A row whose pictures are kept.

    Args:
        cost: which of the table's seconds a new concept takes; None: nothing.
        way: what its pictures depend on besides the cases and the settings of all methods.
    """

    cost: str | None = None
    way: Mapping[str, object] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """'w0 + local, 0.8' as 'w0_local_0.8.npz'."""
        return "_".join(self.name.replace("+", "").replace(",", "").split()) + ".npz"


class Pictures:
    """The pictures of methods, one file each, so that an interrupted run goes on where it stopped.

    Args:
        settings: what they depend on besides the method's cases and way; pictures of others are
            drawn anew.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], batch_size: int) -> None:
        self.folder, self.batch_size, self.settings = folder, batch_size, dict(settings)

    def key_of(self, method: Method) -> str:
        """What the method's pictures depend on."""
        return json.dumps({**self.settings, **method.way, "cases": digest_cases(method.tasks)})

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
            same = str(file["key"]) == self.key_of(method)
            return file["pictures"] if same else None

    def of(self, method: Method) -> np.ndarray:
        """The same, once they are drawn."""
        pictures = self.find(method)
        assert pictures is not None  # `draw` comes first
        return pictures

    def _save(self, method: Method, pictures: np.ndarray) -> None:
        key = np.array(self.key_of(method))
        write_atomically(
            self.folder / method.file,
            lambda temporary: np.savez(temporary, pictures=pictures, key=key),
        )


def digest_cases(cases: Sequence[Case]) -> str:
    """A short name for what is asked and for the pictures that concepts are read from."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.prompt}\n{case.concept_prompt}\n{case.seed}\n".encode())
        for part in case.source:
            digest.update(part.tobytes())
    return digest.hexdigest()[:16]


def verdicts(judge: Judge, cases: list[Case], pictures: np.ndarray, known: Tensor) -> Verdicts:
    """What is right of each picture, uint8 (N, H, W, 3), as `judge_pictures` says it."""
    pixels = torch.stack([to_pixels(picture) for picture in pictures])
    found = judge_pictures(judge, cases, pixels, known)
    return {name: values.numpy() for name, values in found.items()}
