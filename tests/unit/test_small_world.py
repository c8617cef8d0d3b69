"""Small world: what is held out, what is drawn, what the data writer leaves, how judging counts."""

import csv
import json
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data_scripts import make_small_world as writer
from elite.data import PairFolder
from elite.images import read_image, read_mask
from elite.open_images import OpenImagesBoxes, OpenImagesMasks, load_mask_boxes
from small_world.classifier import JUDGED, Judge, JudgeObjective, disturbed, load_judge
from small_world.models import build_clip
from small_world.objectives import ImageEncoderObjective
from small_world.pretrain import recoloured, token_ids
from small_world.render import Pose, draw, draw_scene
from small_world.samples import labels
from small_world.score import (
    KINDS,
    Row,
    draw_concepts,
    draw_prompts,
    draw_renders,
    load_pipelines,
    make_cases,
    markdown,
    score_model,
    score_rows,
    verdicts,
    wilson,
)
from small_world.tokenizer import build_tokenizer, world_words
from small_world.world import (
    ALL_SHAPES,
    COLOURS,
    SCENES,
    SHAPES,
    UNSEEN_SHAPES,
    Thing,
    held_out,
    things,
    unseen_things,
)
from tests.tiny import save_mappers, save_model_folder

ROOT = Path(__file__).resolve().parents[2]
SHIPPED_JUDGE = ROOT / "checkpoints" / "small_world_judge"


# --- the world ------------------------------------------------------------------------------------


def test_every_thing_is_either_trained_or_held_out():
    trained, kept = things(held_out_only=False), things(held_out_only=True)
    combinations = 8 * 8 + 2 * 8 * 8 * 7
    assert len({*trained, *kept}) == len(trained) + len(kept) == combinations
    assert not any(map(held_out, trained)) and all(map(held_out, kept))
    assert 0.1 < len(kept) / combinations < 0.25


@pytest.mark.parametrize("held_out_only", [True, False])
def test_each_shape_and_colour_is_in_both_halves(held_out_only):
    pool = things(held_out_only)
    assert {thing.shape for thing in pool} == set(SHAPES)
    assert {thing.colour for thing in pool} == set(COLOURS)


def test_nothing_is_trained_on_unseen_silhouettes():
    pool = unseen_things()
    assert {thing.shape for thing in pool} == set(UNSEEN_SHAPES)
    assert not {*pool} & {*things(False), *things(True)}
    assert not set(UNSEEN_SHAPES) & set(world_words())


def test_words_name_both_colours():
    assert Thing("mug", "solid", "red").words == "red mug"
    assert Thing("mug", "striped", "blue", "yellow").words == "blue and yellow striped mug"


def test_every_word_of_the_world_is_one_token():
    tokenizer = build_tokenizer()
    for word in [*world_words(), "S"]:
        assert len(tokenizer(word).input_ids) == 3, word  # start, word, end


# --- drawing --------------------------------------------------------------------------------------

POSE = Pose(0.5, 0.5, 0.4, 5, mirrored=True)


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_mask_covers_all_that_differs_from_the_scene(shape):
    image, mask = draw(Thing(shape, "solid", "red"), "grass", np.random.default_rng(3), 64, POSE)
    scene = draw_scene("grass", np.random.default_rng(3), 64)
    changed = (image != scene).any(axis=2)
    assert changed.sum() > 300
    assert not changed[mask == 0].any()
    assert changed[mask > 0].mean() > 0.9
    assert set(np.unique(mask)) == {0, 255}


@pytest.mark.parametrize(("pattern", "second"), [("solid", None), ("striped", "white")])
def test_colours_are_those_of_the_thing(pattern, second):
    thing = Thing("star", pattern, "blue", second)
    image, mask = draw(thing, "road", np.random.default_rng(0), 64, POSE)
    for name in COLOURS:
        distance = np.abs(image[mask > 0].astype(int) - COLOURS[name]).max(axis=1)
        assert ((distance <= 10).mean() > 0.1) == (name in (thing.colour, second)), name


def test_drawing_depends_on_the_seed_alone():
    thing = Thing("mug", "dotted", "pink", "green")
    first, again, other = (
        draw(thing, "snow", np.random.default_rng(seed), 64)[0] for seed in (1, 1, 2)
    )
    assert (first == again).all() and (first != other).any()


def test_unknown_scene_is_named():
    with pytest.raises(ValueError, match="'moon'"):
        draw_scene("moon", np.random.default_rng(0), 32)


# --- the data writer ------------------------------------------------------------------------------

COUNT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world") / "open_images"
    writer.make_open_images(root, COUNT, seed=1, size=256, workers=1)
    return root


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_folder_depends_on_the_seed_and_not_on_the_workers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK", 1)
    writer.make_open_images(tmp_path / "two", COUNT, seed=1, size=256, workers=2)
    writer.make_open_images(tmp_path / "other", COUNT, seed=2, size=256, workers=2)
    assert files_of(tmp_path / "two") == files_of(folder)
    assert files_of(tmp_path / "other") != files_of(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "two"]  # nothing temporary


def test_datasets_read_the_folder(folder):
    boxes = OpenImagesBoxes(folder, resolution=32, clip_size=64)
    masks = OpenImagesMasks(folder, resolution=32, clip_size=64, latent_size=8)
    assert 0 < len(boxes) <= COUNT and 0 < len(masks) <= COUNT
    for dataset in (boxes, masks):
        sample = dataset.sample(0, np.random.default_rng(0))
        assert sample["pixels"].shape == (3, 32, 32)


def test_boxes_are_those_of_the_masks(folder):
    with open(folder / "annotations" / "test-annotations-object-segmentation.csv") as file:
        rows = {row["MaskPath"]: row for row in csv.DictReader(file)}
    index = load_mask_boxes(folder / "segs" / "test_bbox_dict.npy")
    assert len(index) == len(rows) == COUNT
    for name, top, bottom, left, right in index:
        mask = read_mask(folder / "segs" / "test" / name)
        assert mask[top:bottom, left:right].sum() == mask.sum() > 0
        row = rows[name]
        box = [float(row[f"Box{side}"]) * 256 for side in ("XMin", "XMax", "YMin", "YMax")]
        assert np.allclose(box, (left, right, top, bottom), atol=1e-3)
        assert read_image(folder / "images" / "test" / f"{row['ImageID']}.jpg").shape[:2] == (
            256,
            256,
        )


def test_only_things_that_may_be_trained_on_are_drawn(tmp_path, monkeypatch):
    drawn = []

    def noting(thing, *args):
        drawn.append(thing)
        return draw(thing, *args)

    monkeypatch.setattr(writer, "draw", noting)
    for folder in ("images/test", "segs/test"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(30):
        writer.write_picture(tmp_path, 1, 32, number)
    assert len(drawn) == 30 and not any(map(held_out, drawn))


def test_finished_folder_is_not_overwritten(folder):
    before = files_of(folder)
    with pytest.raises(ValueError, match="is there already; remove it"):
        writer.main([str(folder), "--count", "2"])
    assert files_of(folder) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "nothing to make"), (["x", "--count", "0"], "--count 0: expected 1 or more")],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        writer.main(arguments)


# --- the test objects -----------------------------------------------------------------------------


def test_test_objects_are_held_out_and_varied():
    concepts = [thing for thing, _ in writer.TEST_OBJECTS]
    assert len(set(concepts)) == 12 and all(map(held_out, concepts))
    assert {thing.shape for thing in concepts} == set(SHAPES)
    assert {thing.pattern for thing in concepts} == {"solid", "striped", "dotted"}
    assert {scene for _, scene in writer.TEST_OBJECTS} == set(SCENES)


def test_shipped_test_objects_are_what_the_script_draws(tmp_path):
    writer.make_test_datasets(tmp_path, 256)
    made, shipped = PairFolder(tmp_path), PairFolder(ROOT / "test_datasets")
    names = [pair.name for pair in made.pairs]
    assert [pair.name for pair in shipped.pairs] == names and len(names) == 12
    for number in range(12):
        (image, mask), (own_image, own_mask) = made.read(number), shipped.read(number)
        assert (mask == own_mask).all()
        assert cv2.absdiff(image, own_image).max() < 24  # other JPEG libraries round otherwise
        assert 0.1 < mask.mean() < 0.6


# --- the judge ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "total", "interval"),
    [(8, 10, (0.4902, 0.9433)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0))],
)
def test_wilson_interval_against_published_values(right, total, interval):
    assert wilson(right, total) == pytest.approx(interval, abs=1e-4)


def test_wilson_interval_of_nothing_says_nothing():
    assert wilson(0, 0) == (0, 1)


def test_labels_of_a_solid_thing_have_no_second_colour():
    assert labels(Thing("fish", "solid", "yellow"), None) == [2, 0, 2, -1, -1]
    assert labels(Thing("fish", "dotted", "red", "blue"), "snow") == [2, 2, 0, 4, 2]


def test_labels_of_minus_one_carry_no_loss():
    torch.manual_seed(0)
    objective = JudgeObjective(Judge(widths=(8, 8)))
    pixels = torch.randn(2, 3, 32, 32)
    seen = torch.tensor([[0, 1, 2, 3, 4], [1, 1, 1, -1, -1]])
    objective({"pixels": pixels, "labels": seen})["loss"].backward()
    gradient = objective.judge.heads["scene"].weight.grad.clone()
    objective.zero_grad()
    unseen = seen.clone()
    unseen[0, 4] = -1
    out = objective({"pixels": pixels, "labels": unseen})
    out["loss"].backward()
    assert gradient.abs().sum() > 0
    assert objective.judge.heads["scene"].weight.grad.abs().sum() == 0
    assert torch.isfinite(out["loss"])


def test_disturbing_keeps_range_and_shape_and_follows_the_seed():
    pixels = torch.rand(3, 32, 32) * 2 - 1
    first, again, other = (disturbed(pixels, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == pixels.shape and first.abs().max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_cases_change_the_scene_and_keep_to_their_kind():
    for kind in KINDS:
        cases = make_cases(50, kind, seed=0)
        shapes = UNSEEN_SHAPES if kind == "unseen" else SHAPES
        assert all(case.thing.shape in shapes for case in cases)
        if kind != "unseen":
            assert all(held_out(case.thing) == (kind == "held out") for case in cases)
        assert all(case.scene != case.source_scene for case in cases)
        assert cases == make_cases(50, kind, seed=0) != make_cases(50, kind, 1)


def test_prompts_of_a_case():
    case = make_cases(1, "held out", 0)[0].__class__(
        Thing("car", "striped", "orange", "blue"), "snow", "grass", 0
    )
    assert case.prompt == "an orange and blue striped car in the snow"
    assert case.class_prompt == "a car in the snow"
    assert case.concept_prompt == "a S in the snow"


class Oracle(torch.nn.Module):
    """Says of every picture that it shows one certain thing in one certain scene."""

    def __init__(self, answer: list[int]) -> None:
        super().__init__()
        self.answer = torch.nn.Parameter(torch.tensor(answer, dtype=torch.float32))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            name: torch.eye(count)[int(value)].expand(len(pixels), count)
            for (name, count), value in zip(JUDGED.items(), self.answer, strict=True)
        }


def test_rows_count_what_is_right():
    cases = make_cases(40, "held out", 0)
    first = next(case for case in cases if case.thing.second is not None)
    judge = Oracle(labels(first.thing, first.scene))
    blank = Row("blank", cases, lambda some: torch.zeros(len(some), 3, 32, 32))
    scores = score_rows(judge, [blank], batch_size=7)["blank"]
    shapes = sum(case.thing.shape == first.thing.shape for case in cases)
    assert (scores["shape"]["right"], scores["shape"]["total"]) == (shapes, 40)
    assert scores["second"]["total"] == sum(case.thing.second is not None for case in cases) < 40
    wanted = torch.tensor([labels(first.thing, first.scene)])
    one = verdicts(judge, torch.zeros(1, 3, 64, 64), wanted)  # any size
    assert all(int(verdict) == 1 for verdict in one.values())
    assert f"{100 * shapes / 40:.1f} (" in markdown({"blank": scores})


def test_renders_that_are_judged_are_repeatable():
    cases = make_cases(3, "held out", 0)
    assert torch.equal(draw_renders(cases), draw_renders(cases))
    assert draw_renders(cases).shape == (3, 3, 32, 32)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    folder = save_model_folder(tmp_path_factory.mktemp("tiny"))
    save_mappers(folder, folder)
    return folder


def test_score_of_a_tiny_model_has_every_row(tiny_model):
    judge = Judge(widths=(8, 8)).eval()
    options = {"guidance_scale": 5.0, "num_inference_steps": 1}
    scores = score_model(
        judge, *load_pipelines(tiny_model), samples=2, seed=0, batch_size=2, **options
    )
    assert len(scores) == 8
    assert all(row["shape"]["total"] == 2 for row in scores.values())
    assert json.loads(json.dumps(scores)) == scores


def test_pictures_do_not_depend_on_the_batch(tiny_model):
    base, elite = load_pipelines(tiny_model)
    cases = make_cases(2, "held out", 0)
    for draw_cases in (
        partial(draw_prompts, base, lambda case: case.prompt, num_inference_steps=1),
        partial(draw_concepts, elite, 0.8, num_inference_steps=1),
    ):
        together = draw_cases(cases)
        assert together.shape == (2, 3, 32, 32) and not torch.equal(together[0], together[1])
        assert torch.allclose(together[1:], draw_cases(cases[1:]), atol=1e-4)


def test_model_without_mappers_has_no_elite(tiny_model):
    (tiny_model / "global_mapper").rename(tiny_model / "kept")
    try:
        assert load_pipelines(tiny_model)[1] is None
    finally:
        (tiny_model / "kept").rename(tiny_model / "global_mapper")


def test_judge_keeps_its_verdicts_through_its_file(tmp_path):
    torch.manual_seed(0)
    judge = Judge(widths=(8, 8)).eval()
    judge.save_pretrained(tmp_path / "judge")
    pixels = torch.randn(2, 3, 32, 32)
    loaded = load_judge(tmp_path / "judge")(pixels)
    assert all(torch.equal(logits, loaded[name]) for name, logits in judge(pixels).items())
    with pytest.raises(ValueError, match=r"no judge .*; make it with python"):
        load_judge(tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["held out", "unseen"])
def test_shipped_judge_is_right_on_fresh_renders_and_small(kind):
    judge = load_judge(SHIPPED_JUDGE)
    row = Row("renders", make_cases(300, kind, seed=5), draw_renders)
    scores = score_rows(judge, [row], batch_size=100)["renders"]
    assert all(scores[name]["accuracy"] > 0.95 for name in ("shape", "pattern", "colour", "scene"))
    assert sum(path.stat().st_size for path in SHIPPED_JUDGE.iterdir()) < 3_000_000


def test_recoloured_pictures_keep_shape_and_pattern_alone():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    labels = torch.tensor([3, 1, 5, 2, 7])
    found = [recoloured(image, labels, np.random.default_rng(i)) for i in range(40)]
    assert all(kept.tolist() == [3, 1, -1, -1, -1] for _, kept in found)
    channels = {x[..., i].tobytes() for x, _ in found for i in range(3)}
    assert channels == {
        picture[..., i].tobytes() for picture in (image, 255 - image) for i in range(3)
    }


def test_captions_of_recoloured_pictures_play_no_part():
    """The contrastive loss sees only pictures that still have their colour."""
    torch.manual_seed(0)
    objective = ImageEncoderObjective(build_clip(build_tokenizer())).eval()
    batch = {
        "clip_pixels": torch.randn(3, 3, 64, 64),
        "labels": torch.tensor([[0, 1, 2, 3, 4], [1, 0, 3, -1, 2], [2, 2, -1, -1, -1]]),
        "input_ids": token_ids(build_tokenizer(), ["a red mug", "a car", "a fish"]),
    }
    with torch.no_grad():
        first = objective(batch)["contrastive"]
        batch["input_ids"][2] = batch["input_ids"][0]
        assert objective(batch)["contrastive"] == first
        batch["input_ids"][1] = batch["input_ids"][0]
        assert objective(batch)["contrastive"] != first
