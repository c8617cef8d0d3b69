"""CLIP-I, CLIP-T, DINO-I on cases small enough to reckon by hand, and the intervals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, ViTModel

from elite.data import pair_of
from elite.images import CLIP_MEAN, CLIP_STD, read_image
from evaluation import subjects as subjects_module
from evaluation.cases import (
    Case,
    ClipScores,
    DinoScores,
    markdown,
    references,
    score_cases,
    summarise,
)
from evaluation.metrics import Clip, Dino, bootstrap, centre_square, mean_cosine
from evaluation.subjects import Subject
from small_world.tokenizer import build_tokenizer
from tests.tiny import save_clip_folder, save_vit_folder


class ByColour:
    """Stands in for CLIP or DINO: a vector for each colour, and one for each text."""

    VECTORS = {"red": (1.0, 0.0), "green": (0.6, 0.8), "blue": (0.0, 1.0)}  # noqa: RUF012
    COLOURS = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}  # noqa: RUF012

    def images(self, pictures):
        names = [self.COLOURS[picture.getpixel((0, 0))] for picture in pictures]
        return torch.tensor([self.VECTORS[name] for name in names])

    def texts(self, texts):
        return torch.tensor([self.VECTORS[text.split()[1]] for text in texts])


def plain(colour, size=(4, 4)):
    return Image.new("RGB", size, colour)


@pytest.fixture
def subject(tmp_path):
    """Two references, red and blue; the first has a mask over its right half, which is green."""
    first = Image.new("RGB", (4, 4), "red")
    first.paste("green", (2, 0, 4, 4))
    first.save(tmp_path / "0.png")
    plain("blue").save(tmp_path / "1.png")
    mask = Image.new("L", (4, 4), 0)
    mask.paste(255, (2, 0, 4, 4))
    mask.save(tmp_path / "0_bg.png")
    paths = (tmp_path / "0.png", tmp_path / "1.png")
    return Subject("critter", "green", pair_of(paths[0]), paths)


# --- cosines by hand ------------------------------------------------------------------------------


def test_image_scores_are_mean_cosines_with_all_references(subject):
    case = Case(subject, 0, "a {} in the snow", 1)
    pictures = [plain("red"), plain("green")]
    # references red (1, 0) and blue (0, 1)
    expected = [(1 + 0) / 2, (0.6 + 0.8) / 2]
    scores = ClipScores(ByColour(), references(cropped=False))(pictures, [case, case])
    assert scores["clip_i"] == pytest.approx(expected, abs=1e-7)
    scores = DinoScores(ByColour(), references(cropped=False))(pictures, [case, case])
    assert scores["dino_i"] == pytest.approx(expected, abs=1e-7)


def test_text_score_is_the_cosine_with_the_class_prompt(subject):
    """The placeholder is replaced by the class word, which is 'green' here: (0.6, 0.8)."""
    case = Case(subject, 0, "a {} in the snow", 1)
    assert case.class_prompt == "a green in the snow"
    metric = ClipScores(ByColour(), references(cropped=False))
    scores = metric([plain("red"), plain("blue")], [case, case])
    assert scores["clip_t"] == pytest.approx([0.6, 0.8], abs=1e-7)


def test_references_may_be_cropped_by_their_mask(subject):
    """The box of the mask is green alone; the reference without a mask stays whole."""
    case = Case(subject, 0, "a {}", 1)
    metric = ClipScores(ByColour(), references(cropped=True))
    (score,) = metric([plain("green")], [case])["clip_i"]
    assert score == pytest.approx((1 + 0.8) / 2, abs=1e-7)


def test_references_are_read_once_for_all_metrics(subject, tmp_path, monkeypatch):
    read: list[Path] = []

    def reading(path: Path) -> np.ndarray:
        read.append(path)
        return read_image(path)

    monkeypatch.setattr(subjects_module, "read_image", reading)
    made = [
        Case(one, number, "a {}", 1)
        for one in (subject, replace(subject, name="other"))
        for number in range(20)  # more than a batch
    ]
    for case in made:
        (tmp_path / case.path).parent.mkdir(exist_ok=True)
        plain("red").save(tmp_path / case.path)
    shared = references(cropped=False)
    metrics = [ClipScores(ByColour(), shared), DinoScores(ByColour(), shared)]
    rows, failures = score_cases(made, tmp_path, metrics)
    assert [row["subject"] for row in rows] == [case.subject.name for case in made]
    assert not failures
    assert read == 2 * list(subject.reference_paths)


def test_mean_cosine():
    assert mean_cosine(torch.tensor([1.0, 0]), torch.tensor([[1.0, 0], [0, 1], [-1, 0]])) == 0
    assert mean_cosine(torch.tensor([0.6, 0.8]), torch.tensor([[1.0, 0]])) == pytest.approx(0.6)


# --- the models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    return save_vit_folder(tmp_path_factory.mktemp("dino"))


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@torch.no_grad()
def test_clip_cosines_are_those_of_the_model_itself(clip_folder):
    """logits_per_image of transformers' CLIPModel are the cosines times its temperature."""
    clip, picture, text = Clip(clip_folder), noise(32, 32), "a red critter on the grass"
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = torch.tensor(np.asarray(picture) / 255, dtype=torch.float32).permute(2, 0, 1)
    pixels = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[
        :, None, None
    ]
    tokens = build_tokenizer()(text, return_tensors="pt")
    out = model(pixel_values=pixels[None], **tokens)
    expected = float(out.logits_per_image / model.logit_scale.exp())
    found = float((clip.images([picture]) * clip.texts([text])).sum())
    assert found == pytest.approx(expected, abs=1e-6)


def test_texts_of_a_batch_are_those_of_single_calls(clip_folder):
    clip, texts = Clip(clip_folder), ["a critter", "a blue and yellow striped critter on the grass"]
    alone = torch.cat([clip.texts([text]) for text in texts])
    assert torch.allclose(clip.texts(texts), alone, atol=1e-6)
    assert clip.texts(["a critter " * 40]).shape == (1, 8)  # longer texts are cut


@torch.no_grad()
def test_dino_is_the_cls_token(dino_folder):
    picture = noise(50, 40)
    square = centre_square(picture, 28, 32)
    pixels = torch.tensor(square / 255, dtype=torch.float32).permute(2, 0, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    hidden = ViTModel.from_pretrained(dino_folder).eval()(pixels[None]).last_hidden_state[0, 0]
    found = Dino(dino_folder).images([picture])[0]
    assert torch.allclose(found, hidden / hidden.norm(), atol=1e-6)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (40, 40), (10, 500)])
def test_the_middle_is_taken(size):
    picture = Image.new("RGB", size, "red")
    picture.paste("blue", (0, 0, size[0], size[1] // 2))
    square = centre_square(picture, 28, 32)
    assert square.shape == (28, 28, 3)
    assert tuple(square[0, 0]) == (0, 0, 255) and tuple(square[-1, -1]) == (255, 0, 0)
    assert tuple(square[10, 14]) == (0, 0, 255) and tuple(square[17, 14]) == (255, 0, 0)


@pytest.mark.parametrize("kind", [Clip, Dino])
def test_missing_models_are_one_line(kind, tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder; expected a") as caught:
        kind(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


# --- intervals ------------------------------------------------------------------------------------


def test_a_model_of_another_kind_is_no_dino(model_folder):
    with pytest.raises(ValueError, match="text_encoder: no vision transformer; expected one such"):
        Dino(model_folder / "text_encoder")


def test_interval_of_one_value_is_the_value():
    assert bootstrap([0.5] * 6, list("aabbcc")) == (0.5, 0.5, 0.5)


def test_interval_knows_that_pictures_of_a_subject_are_alike():
    """Ten subjects, each with ten equal values: as uncertain as ten values, not as a hundred."""
    means = np.random.default_rng(0).normal(size=10)
    values = np.repeat(means, 10)
    groups = [str(i // 10) for i in range(100)]
    mean, low, high = bootstrap(list(values), groups)
    assert mean == pytest.approx(means.mean())
    spread = 1.96 * means.std() / 10**0.5
    assert high - low == pytest.approx(2 * spread, rel=0.1)
    _, low, high = bootstrap(list(values), [str(i) for i in range(100)])
    assert high - low == pytest.approx(2 * spread / 10**0.5, rel=0.15)


def test_subjects_with_more_pictures_weigh_more():
    assert bootstrap([0.0, 1.0, 1.0, 1.0], list("abbb"))[0] == 0.75


def test_summary_leaves_out_what_does_not_apply():
    rows = [
        {"subject": "a", "prompt": "a {}", "seed": 1, "body": 1.0, "second": None},
        {"subject": "b", "prompt": "a {}", "seed": 1, "body": 0.0, "second": 1.0},
    ]
    summary = summarise(rows)
    assert summary["body"]["mean"] == 0.5 and summary["body"]["pictures"] == 2
    assert summary["second"] == {"mean": 1.0, "interval": [1.0, 1.0], "pictures": 1, "subjects": 1}
    assert "| second | 1.0000 | 1.0000 to 1.0000 | 1 | 1 |" in markdown(summary)
    assert summarise([]) == {}
