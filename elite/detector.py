"""Boxes of things named in words, by a zero-shot detector: OWLv2 (Minderer et al. 2023), Grounding
DINO (Liu et al. 2023) and what else `transformers` loads as one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from elite.hardware import pick_device
from elite.loading import load_model, load_part
from elite.masks import Box, Found
from elite.wording import brief, first_line

HUB_DETECTOR = "google/owlv2-base-patch16-ensemble"


class Detector:
    """A zero-shot detector of `transformers`, asked for the same words in every picture.

    Args:
        name_or_path: folder or hub name of a model of `AutoModelForZeroShotObjectDetection` and its
            processor.
        words: what to look for.

    Raises:
        ValueError: nothing there, no such detector, weights are missing, or it cannot read the
            words.
    """

    def __init__(self, name_or_path: str | Path, words: Sequence[str]) -> None:
        remedy = f"expected a zero-shot detector's folder or hub name, as {HUB_DETECTOR}"
        self.processor = load_part(AutoProcessor, name_or_path, remedy=remedy)
        self.model = load_model(
            AutoModelForZeroShotObjectDetection, name_or_path, remedy=remedy
        ).to(pick_device(None))
        self.words = list(words)
        try:
            self(np.full((64, 64, 3), 128, dtype=np.uint8), 0.5)
        except Exception as error:  # the model's own, of a text that is too long for it
            raise ValueError(
                f"{name_or_path}: cannot look for {brief(self.words)} ({first_line(error)}); "
                "expected a few words for each thing, without a full stop"
            ) from None

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, least: float) -> list[Found]:
        """What is found in an image, uint8 (H, W, 3), best first; boxes end at its border.

        Args:
            least: score of what is returned, above 0.
        """
        height, width = image.shape[:2]
        inputs = self.processor(
            images=[Image.fromarray(image)], text=[self.words], return_tensors="pt"
        ).to(self.model.device)
        (answer,) = self.processor.post_process_grounded_object_detection(
            self.model(**inputs),
            threshold=least,
            target_sizes=[(height, width)],
            text_labels=[self.words],
        )
        rows = zip(
            answer["text_labels"], answer["scores"].tolist(), answer["boxes"].tolist(), strict=True
        )
        found = [Found(word, score, within(box, height, width)) for word, score, box in rows]
        inside = [one for one in found if one.box.area > 0]
        return sorted(inside, key=lambda one: -one.score)


def within(box: Sequence[float], height: int, width: int) -> Box:
    """A box left, top, right, bottom in pixels, rounded and cut off at the picture's border."""
    left, right = (round(min(max(x, 0), width)) for x in box[::2])
    top, bottom = (round(min(max(y, 0), height)) for y in box[1::2])
    return Box(left, top, right, bottom)
