"""Masks by Segment Anything: what the model is asked, what becomes of its answer, and what is no
such model."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamModel, SamProcessor

from elite.masks import Box
from elite.sam import Sam, prompt_of
from tests.tiny import save_sam_folder

TALL, WIDE = (90, 40), (30, 100)  # height, width; neither is the 64 that the model reads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_sam_folder(tmp_path_factory.mktemp("sam"))


@pytest.fixture
def sam(folder):
    return Sam(folder)


def picture(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def answer_with(sam: Sam, monkeypatch: pytest.MonkeyPatch, scores, logits) -> list[dict]:
    """Puts this answer in the model's place; returns what the model is asked."""
    asked = []

    def forward(multimask_output, **inputs):
        asked.append({**inputs, "multimask_output": multimask_output})
        return sam.answer

    sam.answer = type("Answer", (), {"iou_scores": scores, "pred_masks": logits})
    sam.model = type("Model", (), {"device": "cpu", "__call__": lambda self, **k: forward(**k)})()
    return asked


def test_prompts_are_pixels_of_the_picture():
    assert prompt_of(20, 60, None) == {"input_points": [[[30, 10]]]}
    assert prompt_of(20, 60, Box(0, 19, 0, 19)) == {"input_points": [[[0.5, 19.5]]]}
    assert prompt_of(20, 60, Box(0, 2, 60, 20)) == {"input_boxes": [[[0, 2, 60, 20]]]}


@pytest.mark.parametrize("box", [(0, 20, 0, 20), (-1, 3, -1, 3), (5, 5, 5, 9), (0, 0, 61, 20)])
def test_clicks_and_boxes_outside_are_refused(box):
    with pytest.raises(ValueError, match="is empty or outside the picture of 60 x 20"):
        prompt_of(20, 60, Box(*box))


@pytest.mark.parametrize("size", [TALL, WIDE], ids=["tall", "wide"])
@pytest.mark.parametrize("box", [None, Box(3, 5, 21, 28)], ids=["middle", "box"])
def test_the_mask_is_the_models_best_by_the_papers_own_steps(sam, folder, size, box):
    """Against SAM's resize, normalise, pad and their inverse in plain torch."""
    image, (height, width) = picture(*size), size
    scale = 64 / max(size)
    inner = int(height * scale + 0.5), int(width * scale + 0.5)
    small = Image.fromarray(image).resize(inner[::-1], Image.Resampling.BILINEAR)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    pixels = (torch.from_numpy(np.array(small)) / 255 - mean) / deviation
    padded = torch.zeros(1, 3, 64, 64)
    padded[0, :, : inner[0], : inner[1]] = pixels.permute(2, 0, 1)
    to_inner = torch.tensor([inner[1] / width, inner[0] / height])
    if box is None:
        prompt = {
            "input_points": torch.tensor([width / 2, height / 2]).mul(to_inner)[None, None, None]
        }
    else:
        corners = torch.tensor([[box.left, box.top], [box.right, box.bottom]])
        prompt = {"input_boxes": (corners * to_inner).reshape(1, 1, 4)}
    model = SamModel.from_pretrained(folder).eval()
    with torch.no_grad():
        answer = model(padded, **prompt, multimask_output=box is None)
    grow = partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=False)
    logits = grow(grow(answer.pred_masks[0], (64, 64))[..., : inner[0], : inner[1]], size)[0]
    expected = logits[answer.iou_scores.flatten().argmax()] > 0
    assert 0.01 < expected.float().mean() < 0.99
    found = sam(image, box)
    assert found.shape == size and found.dtype == bool
    # Rounding of the processor's float64 may turn pixels whose logit is all but 0.
    assert (found != expected.numpy()).mean() < 1e-3


def test_the_processors_own_steps_give_the_same_mask(sam, folder):
    processor, model = SamProcessor.from_pretrained(folder), SamModel.from_pretrained(folder).eval()
    image, box = Image.fromarray(picture(*TALL)), [[[3.0, 5.0, 21.0, 28.0]]]
    inputs = processor(image, input_boxes=box, return_tensors="pt")
    inputs["input_boxes"] = inputs["input_boxes"].float()
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    with torch.no_grad():
        answer = model(
            **{k: inputs[k] for k in ("pixel_values", "input_boxes")}, multimask_output=False
        )
    expected = processor.post_process_masks(answer.pred_masks, *sizes)[0][0, 0].numpy()
    assert np.array_equal(sam(picture(*TALL), Box(3, 5, 21, 28)), expected)


def test_a_click_takes_the_best_rated_of_three_and_a_box_the_one(sam, monkeypatch):
    logits = torch.full((1, 1, 3, 16, 16), -1.0)
    logits[0, 0, 1, :, :8] = 1  # the left half, which is rated best
    logits[0, 0, 2] = 1
    asked = answer_with(sam, monkeypatch, torch.tensor([[[0.3, 0.9, 0.5]]]), logits)
    mask = sam(picture(64, 64))
    assert mask[:, :31].all() and not mask[:, 33:].any()
    sam(picture(64, 64), Box(1, 1, 30, 30))
    assert [one["multimask_output"] for one in asked] == [True, False]


def test_no_object_is_an_error(sam, monkeypatch):
    answer_with(sam, monkeypatch, torch.ones(1, 1, 1), torch.full((1, 1, 1, 16, 16), -1.0))
    with pytest.raises(ValueError, match="Segment Anything found no object; give it a box"):
        sam(picture(*TALL))


def test_pictures_of_three_rows_are_pictures(sam):
    assert sam(picture(3, 50), Box(1, 0, 40, 2)).shape == (3, 50)


# --- what is no Segment Anything ------------------------------------------------------------------


def test_a_missing_folder_is_one_line_with_the_remedy(tmp_path):
    with pytest.raises(ValueError) as caught:
        Sam(tmp_path / "none")
    assert "expected a Segment Anything folder or hub name, as facebook/sam" in str(caught.value)
    assert "\n" not in str(caught.value) and str(tmp_path / "none") in str(caught.value)


def test_another_model_is_refused_by_its_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="is a model of clip; expected a Segment Anything"):
        Sam(tmp_path)


def test_missing_weights_are_never_random(tmp_path):
    save_sam_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    config["vision_config"]["global_attn_indexes"] = [1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no weights for vision_encoder.layers.2"):
        Sam(tmp_path)


def test_a_folder_without_its_processor_names_what_is_missing(tmp_path):
    save_sam_folder(tmp_path)
    for path in tmp_path.glob("*processor*"):
        path.unlink()
    with pytest.raises(ValueError, match="cannot load SamProcessor"):
        Sam(tmp_path)
