"""One pipeline for several people: views, prompts, pictures, concept files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from app.studio import MAX_PICTURES, MAX_PROMPTS, UNREAD, Order, Studio, save_strip
from elite.concept import Concept
from elite.drawing import write_png
from elite.images import to_clip_pixels
from elite.loading import make_scheduler
from elite.speed import RUNGS
from tests import tiny
from tests.app.conftest import in_parallel

ORDER = Order(("a photo of a S",), seeds=(3,), num_inference_steps=2, scheduler="ddim")


def quiet(done: int, total: int, seconds: float) -> None:
    pass


def draw(studio, concept, order=ORDER, on_progress=quiet) -> list:
    concepts = concept if isinstance(concept, dict) else {"S": concept}
    return [one for batch in studio.draw(concepts, order, on_progress) for one in batch]


def pixels(drawn) -> list[np.ndarray]:
    return [np.asarray(one.picture) for one in drawn]


@pytest.fixture(scope="module")
def concepts(studio) -> list[Concept]:
    return [studio.encode(*tiny.picture(seed)) for seed in (0, 1)]


def test_the_views_are_those_the_networks_get(studio):
    image, mask = tiny.picture(0)
    picture, cut_out, read = studio.look(image, mask)
    views = studio.pipe.concept_views(image, mask)
    half = 0.51 / 255 / 0.26  # of a grey level, in units of CLIP's deviation
    assert (to_clip_pixels(picture) - views["clip_pixels"][0]).abs().max() < half
    assert (to_clip_pixels(cut_out) - views["object_pixels"][0]).abs().max() < half
    unread = (read == UNREAD).all(axis=2)
    cells = views["patch_mask"][0].reshape(4, 4).numpy() == 0
    assert np.array_equal(unread, cells.repeat(8, 0).repeat(8, 1)) and unread.any()
    assert np.array_equal(read[~unread], cut_out[~unread])


def test_prompts_one_a_line(studio):
    assert studio.check_prompts(" a S\n\nS on grass\na S ") == ("a S", "S on grass")
    for text, said in (
        ("", "0 prompts"),
        ("a photo", "no placeholder 'S'"),
        ("a S\na S and a S", "2 times the placeholder"),
        ("\n".join(f"{i} S" for i in range(MAX_PROMPTS + 1)), f"{MAX_PROMPTS + 1} prompts"),
    ):
        with pytest.raises(ValueError, match=said):
            studio.check_prompts(text)
    assert studio.check_prompts("a S, a S2", others=["S2"]) == ("a S, a S2",)
    for text, said in (("a S", "no placeholder 'S2'"), ("a S2", "no placeholder 'S'")):
        with pytest.raises(ValueError, match=said):
            studio.check_prompts(text, others=["S2"])
    late = "a " * 74 + "S"
    assert studio.check_prompts(late)
    with pytest.raises(ValueError, match="too long"):
        studio.check_prompts(late, "all")


def test_pictures_are_the_pipelines(studio, concepts):
    order = replace(ORDER, prompts=("a S", "S on grass"), seeds=(3, 4), lambdas=(0.0, 1.2))
    drawn = draw(studio, concepts[0], order)
    assert len(drawn) == order.count == 8
    assert [(d.metadata["lambda"], d.prompt, d.seed) for d in drawn[3:6]] == [
        ("0.0", "S on grass", 4),
        ("1.2", "a S", 3),
        ("1.2", "a S", 4),
    ]
    pipe = studio.pipe
    pipe.scheduler = make_scheduler("ddim", pipe.scheduler.config)
    expected = pipe("a S", concept=concepts[0], lambda_=1.2, seed=4, num_inference_steps=2)
    assert np.array_equal(np.asarray(drawn[5].picture), np.asarray(expected.images[0]))
    assert not np.array_equal(*pixels([drawn[1], drawn[5]]))  # lambda matters


def test_speed_reaches_the_pipeline_and_the_metadata(studio, concepts):
    speed = RUNGS["fast"]
    (fast,), (exact,) = (
        draw(studio, concepts[0], replace(ORDER, num_inference_steps=4, speed=name))
        for name in ("fast", "exact")
    )
    expected = studio.pipe(
        "a photo of a S", concept=concepts[0], seed=3, num_inference_steps=4, speed=speed
    )
    assert np.array_equal(np.asarray(fast.picture), np.asarray(expected.images[0]))
    assert not np.array_equal(*pixels([fast, exact]))
    assert fast.metadata == {**exact.metadata, "speed": str(speed)}


def test_heun_takes_two_evaluations_a_step(studio, concepts):
    told = []
    order = replace(ORDER, scheduler="heun", num_inference_steps=3)
    draw(studio, concepts[0], order, lambda done, total, _: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 6)]  # the last step takes one


def test_a_second_object_has_its_own_likeness_and_half(studio, concepts):
    both = dict(zip(("S", "S2"), concepts, strict=True))
    order = replace(ORDER, prompts=("a S, a S2",), others={"S2": 0.6})
    order = replace(order, regions={"S": "above", "S2": "below"}, lambdas=(0.0, 1.2), seeds=(3, 4))
    drawn = draw(Studio(studio.pipe, batch_size=2), both, order)
    above = np.arange(64) < 32
    pipe = studio.pipe
    pipe.scheduler = make_scheduler("ddim", pipe.scheduler.config)
    expected = pipe(
        ["a S, a S2"] * 2,
        concepts=both,
        lambda_={"S": 1.2, "S2": 0.6},
        regions={"S": np.tile(above[:, None], 64), "S2": np.tile(~above[:, None], 64)},
        seed=[3, 4],
        num_inference_steps=2,
    )
    assert all(map(np.array_equal, pixels(drawn)[2:], map(np.asarray, expected.images)))
    for change in (
        {"lambdas": (1.1,)},
        {"others": {"S2": 0.0}},
        {"regions": {}},
        {"regions": {"S": "left", "S2": "right"}},
    ):
        other = draw(studio, both, replace(order, **{"lambdas": (1.2,), "seeds": (3,), **change}))
        assert not np.array_equal(pixels(other)[0], pixels(drawn)[2])
    turned = dict(zip(("S", "S2"), concepts[::-1], strict=True))
    other = draw(studio, turned, replace(order, lambdas=(1.2,), seeds=(3,)))
    assert not np.array_equal(pixels(other)[0], pixels(drawn)[2])
    with pytest.raises(ValueError, match="lambda_ is given for S, S2; expected one for each of S"):
        draw(studio, concepts[0], order)


def test_pictures_of_two_objects_say_both(studio, concepts, tmp_path):
    both = dict(zip(("S", "S2"), concepts, strict=True))
    halves = {"S": "left", "S2": "right"}
    order = replace(ORDER, prompts=("a S, a S2",), lambdas=(0.0, 1.2), others={"S2": 0.6})
    drawn = draw(studio, both, replace(order, regions=halves))
    assert {
        "lambda": "S 1.2, S2 0.6",
        "concept S": concepts[0].digest,
        "concept S2": concepts[1].digest,
        "region of S": "left",
        "region of S2": "right",
    }.items() <= drawn[1].metadata.items()
    save_strip(drawn, None, tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as sheet:
        assert sheet.text["lambda"] == "S 0, S2 0.6; S 1.2, S2 0.6"
        assert sheet.text["region of S2"] == "right" and sheet.width == 2 * 160
    alone = draw(studio, concepts[0])[0].metadata
    assert alone["concept S"] == concepts[0].digest and not any("region" in key for key in alone)


def test_batches_change_no_picture(studio, concepts):
    order = replace(ORDER, seeds=(1, 2, 3))
    together = Studio(studio.pipe, batch_size=2)
    calls: list[tuple[int, int]] = []
    drawn = draw(together, concepts[0], order, lambda done, total, _: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for one, other in zip(pixels(drawn), pixels(draw(studio, concepts[0], order)), strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1  # a batch rounds some the other way


def test_what_progress_raises_ends_the_drawing_and_frees_the_pipeline(studio, concepts):
    def no_more(done: int, total: int, seconds: float) -> None:
        if done == 3:
            raise KeyError("enough")

    drawing = studio.draw({"S": concepts[0]}, replace(ORDER, seeds=(1, 2)), no_more)
    assert len(next(drawing)) == 1
    with pytest.raises(KeyError, match="enough"):
        next(drawing)
    again = draw(studio, concepts[0], ORDER)
    assert np.array_equal(pixels(again)[0], pixels(draw(studio, concepts[0], ORDER))[0])


def test_people_at_once_get_what_they_would_get_alone(studio, concepts):
    orders = [ORDER, replace(ORDER, scheduler="euler", seeds=(5,), lambdas=(0.3,))]
    alone = [
        pixels(draw(studio, concept, order))[0]
        for concept, order in zip(concepts, orders, strict=True)
    ]
    assert not np.array_equal(*alone)
    for _ in range(3):
        at_once = in_parallel(4, lambda i: pixels(draw(studio, concepts[i % 2], orders[i % 2]))[0])
        for number, picture in enumerate(at_once):
            assert np.array_equal(picture, alone[number % 2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": tuple(range(MAX_PICTURES + 1))}, "number of pictures 33: expected 1 to 32"),
        ({"seeds": ()}, "number of pictures 0"),
        (
            {"prompts": ("a S",) * 5, "lambdas": (0.1,) * 7, "seeds": (1,)},
            "5 prompts of 7 pictures; at most 4 do",
        ),
        ({"seeds": (-1,)}, "seed -1"),
        ({"others": {"S2": 2}}, "lambda of S2 2: expected 0 to 1.5"),
        ({"regions": {"S2": "inside"}}, "region 'inside' of S2: expected one of left, right"),
        ({"lambdas": (1.6,)}, "lambda 1.6: expected 0 to 1.5"),
        ({"lambdas": (float("nan"),)}, "lambda nan"),
        ({"num_inference_steps": 1000}, "steps 1000"),
        ({"guidance_scale": "5"}, "guidance '5'"),
    ],
)
def test_orders_have_limits(change, said):
    with pytest.raises(ValueError, match=said):
        replace(ORDER, **change)


def test_saved_pictures_and_strips_say_how_they_were_made(studio, concepts, tmp_path):
    order = replace(ORDER, prompts=("a S", "S on grass"), lambdas=(0.0, 0.5, 1.5))
    drawn = draw(studio, concepts[0], order)
    write_png(tmp_path / "one.png", drawn[1].picture, drawn[1].metadata)
    with Image.open(tmp_path / "one.png") as picture:
        text = picture.text
    expected = {"prompt": "S on grass", "seed": "3", "lambda": "0.0", "scheduler": "ddim"}
    expected |= {"num_inference_steps": "2", "model": "tiny", "torch": torch.__version__}
    assert expected.items() <= text.items()
    save_strip(drawn, tiny.picture(0)[0], tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as sheet:
        assert sheet.width == 4 * 160 and sheet.height > 2 * 160
        assert sheet.text["lambda"] == "0.0; 0.5; 1.5" and sheet.text["prompt"] == "a S\nS on grass"


def test_a_concept_file_is_drawn_as_the_concept(studio, concepts, tmp_path):
    concepts[1].save(tmp_path / "one.safetensors")
    loaded = studio.load_concept(tmp_path / "one.safetensors")
    assert np.array_equal(pixels(draw(studio, loaded))[0], pixels(draw(studio, concepts[1]))[0])


def test_concept_files_that_do_not_fit(studio, concepts, tmp_path):
    one = concepts[0]
    bad = {
        "mappers": (replace(one, fingerprint="other"), r"mappers\.safetensors: concept was"),
        "wide": (replace(one, words=one.words.repeat(1, 1, 2)), "wide.*: words or feature tokens"),
        "long": (replace(one, words=one.words.repeat(1, 2, 1)), "concept of other sizes"),
        "several": (Concept.stack(concepts), "holds 2 objects"),
    }
    for name, (concept, said) in bad.items():
        path = tmp_path / f"{name}.safetensors"
        concept.save(path)
        with pytest.raises(ValueError, match=said) as error:
            studio.load_concept(path)
        assert str(tmp_path) not in str(error.value)
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match=r"^text\.safetensors: not a safetensors file"):
        studio.load_concept(tmp_path / "text.safetensors")
