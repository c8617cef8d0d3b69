"""Masks by Segment Anything (Kirillov et al. 2023) from a box, a click or the middle of the
picture."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import SamModel, SamProcessor

from elite.hardware import pick_device
from elite.loading import load_model, load_part
from elite.masks import Box, check_box

HUB_SAM = "facebook/sam-vit-base"


class Sam:
    """A Segment Anything model of `transformers`; called as `elite.masks.find_object`.

    Args:
        name_or_path: folder or hub name of a `SamModel` and its processor.

    Raises:
        ValueError: nothing there, no Segment Anything, or weights are missing.
    """

    def __init__(self, name_or_path: str | Path) -> None:
        remedy = f"expected a Segment Anything folder or hub name, as {HUB_SAM}"
        config = load_part(
            SamModel.config_class, name_or_path, loader="get_config_dict", remedy=remedy
        )[0]
        if config.get("model_type") != "sam":
            kind = config.get("model_type", "no known kind")
            raise ValueError(f"{name_or_path}: is a model of {kind}; {remedy}")
        self.processor = load_part(SamProcessor, name_or_path, remedy=remedy)
        self.model = load_model(SamModel, name_or_path, remedy=remedy).to(pick_device(None))

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, box: Box | None = None) -> np.ndarray:
        """The object, bool (H, W), of an image uint8 (H, W, 3).

        Args:
            box: around the object; without any extent, a click on it; None clicks on the middle.

        Raises:
            ValueError: no object is found, or the box is outside the picture or has one side only.
        """
        height, width = image.shape[:2]
        picture, prompt = Image.fromarray(image), prompt_of(height, width, box)
        inputs = self.processor(picture, return_tensors="pt", **prompt)
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        inputs = inputs.to(self.model.device, torch.float32)
        # A click may mean a part or the whole: the best rated of three. A box is unambiguous.
        found = self.model(**inputs, multimask_output="input_points" in inputs)
        masks = self.processor.post_process_masks(found.pred_masks.cpu(), *sizes)[0][0]  # (N, H, W)
        mask = masks[found.iou_scores[0, 0].argmax().cpu()].numpy()
        if not mask.any():
            raise ValueError("Segment Anything found no object; give it a box, or paint the mask")
        return mask


def prompt_of(height: int, width: int, box: Box | None) -> dict[str, list]:
    """What `SamProcessor` is asked, in pixels x, y of the picture.

    Raises:
        ValueError: the box is outside the picture, or has one side only.
    """
    if box is None:
        return {"input_points": [[[width / 2, height / 2]]]}
    if box.is_click and 0 <= box.left < width and 0 <= box.top < height:
        return {"input_points": [[[box.left + 0.5, box.top + 0.5]]]}
    check_box(height, width, box)
    return {"input_boxes": [[[float(side) for side in (box.left, box.top, box.right, box.bottom)]]]}
