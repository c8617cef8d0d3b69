"""What the page's controls do, without a browser."""

import html
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from app.handlers import BROKEN, DIMMED, SWEEP, AppHandlers, Stop, data_url, dimmed, message
from app.marking import Shown
from app.page import PAUSE, build_page, seldom
from app.studio import Order, Studio
from elite import ElitePipeline
from elite.data import PairFolder
from elite.defaults import DEFAULT_SAMPLER, DEFAULT_STEPS
from elite.masks import Box
from elite.previews import Preview
from elite.sam import Sam
from tests.app.conftest import noise_file
from tests.conftest import pixels
from tests.tiny import save_sam_folder


def silent(*_, **__) -> None:
    pass


def last(answers) -> dict:
    """What the page holds after all answers."""
    held: dict = {}
    for answer in answers:
        held |= answer
    return held


def test_look_shows_what_the_library_prepares(handlers, values):
    answer = handlers.look(values)
    one = Shown(values["picture"], method="whole")
    picture = one.read_picture()
    expected = handlers.studio.look(picture, one.read_mask(picture))
    assert [name for _, name in answer["views"]] == ["picture", "object", "patches read"]
    assert all(np.array_equal(a, b) for (a, _), b in zip(answer["views"], expected, strict=True))
    assert answer["marks"]["picture"] == data_url(picture) and answer["object_message"] == ""
    assert not answer["square"]["visible"] and not answer["mask_part"]["visible"]


def test_a_model_that_finds_takes_clicks(handlers, values, tmp_path):
    sam = Sam(save_sam_folder(tmp_path))
    with_sam = AppHandlers(handlers.studio, find=sam)
    picture = np.asarray(Image.open(values["picture"]).convert("RGB"))
    click = Box(picture.shape[1] // 2, len(picture) // 4, picture.shape[1] // 2, len(picture) // 4)
    marked = {**values, "method": "box", "marks": '{"box": [0.5, 0.25, 0.5, 0.25]}'}
    answer = with_sam.look(marked)
    assert answer["marks"]["picture"] == data_url(dimmed(picture, sam(picture, click)))
    assert "is empty or outside" in handlers.look(marked)["object_message"]  # of GrabCut
    for one, word in ((with_sam, "Segment Anything"), (handlers, "GrabCut")):
        parts = {
            part["props"].get("elem_id"): part["props"]
            for part in build_page(one).config["components"]
        }
        labels = [label for label, _ in parts["method"]["choices"]]
        assert [word in label for label in labels[:2]] == [True, True]
        assert parts["marks"]["props"]["clicks"] == one.takes_clicks == (one is with_sam)


def test_what_is_no_object_is_dark(handlers, values, pairs):
    mask = np.asarray(Image.open(pairs / "pair0_bg.png"))
    answer = handlers.look({**values, "method": "file", "mask": str(pairs / "pair0_bg.png")})
    picture = np.asarray(Image.open(values["picture"]))
    shown = dimmed(picture, mask)
    assert answer["marks"]["picture"] == data_url(shown) and answer["mask_part"]["visible"]
    assert np.array_equal(shown[mask], picture[mask])
    assert shown[~mask].max() <= DIMMED[255] < 100


def test_an_inverted_mask_gets_a_hint(handlers, values, tmp_path):
    mask = np.full((40, 40), 255, np.uint8)
    mask[10:30, 10:30] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    answer = handlers.look({**values, "method": "file", "mask": str(tmp_path / "mask.png")})
    assert "if the mask is inverted" in answer["object_message"] and answer["views"]
    assert handlers.look({**values, "method": "whole"})["object_message"] == ""


def test_another_picture_empties_the_marks(handlers, values):
    marked = {**values, "method": "brush", "marks": "not read"}
    assert "cannot be read" in handlers.look(marked)["object_message"]
    assert handlers.new_picture(marked)["marks"] == ""
    answer = handlers.look({**marked, "marks": ""})
    assert "nothing is marked" in answer["object_message"]
    assert answer["marks"]["picture"].startswith("data:image/jpeg")  # to be painted on


def test_another_picture_drops_the_mask_of_the_last(handlers, values, pairs, tmp_path):
    """And says so; what came before any picture, or with an example or a turn, stays."""
    answer = handlers.pick_example(1)
    example = tmp_path / "example.png"
    Image.fromarray(answer["picture"]).save(example)
    mask = str(pairs / "pair1_bg.png")
    picked = {**values, "picture": str(example), "method": "file", "mask": mask}
    own = {**values, "method": "file", "mask": mask}
    given = replace(values["several"], given=values["picture"])
    before = str(pairs / "pair2.png")
    for kept in (
        {**picked, "earlier": before, "example": answer["example"]},
        {**own, "earlier": "", "example": 1},
        {**own, "earlier": own["picture"]},
        {**own, "earlier": before, "several": given},
    ):
        answered = handlers.new_picture(kept)
        assert not {"mask", "method"} & set(answered) and answered["dropped"] == ""
        assert answered["earlier"] == kept["picture"]
    for number in (None, 1, 9):
        dropped = handlers.new_picture({**own, "earlier": before, "example": number})
        assert dropped["mask"] is None and dropped["method"] == "centre"
        assert "your mask was of another picture, and was taken away" in dropped["dropped"]
    removed = handlers.new_picture({**own, "picture": None, "earlier": own["picture"]})
    assert removed["mask"] is None and removed["earlier"] == ""
    assert "method" not in handlers.new_picture({**own, "method": "box", "earlier": before})
    assert handlers.look(own)["saved"] is None


def test_another_part_of_the_picture_has_no_marks_yet(handlers, values):
    answer = handlers.new_square({**values, "marks": "not read"})
    assert answer["marks"] == ""
    cleared = "your marks lay on another part of the picture, and were cleared"
    assert cleared in answer["dropped"]
    assert handlers.new_square(values) == {"marks": gr.skip()}, "so that what was said stays"


def test_white_makes_no_square_of_too_many_pixels(handlers, values, tmp_path):
    narrow = str(noise_file(tmp_path / "narrow.png", 2, 4000))
    answer = handlers.look({**values, "picture": narrow, "squaring": "pad"})
    assert "a square of 4000 x 4000 is more than 0.1 million pixels" in answer["object_message"]
    assert handlers.look({**values, "picture": narrow})["object_message"] == ""


def test_a_file_that_is_drawn_instead_is_said(handlers, values, tmp_path):
    (saved,) = [answer["saved"] for answer in handlers.save_concept(values, tmp_path)]
    answer = handlers.look({**values, "concept_file": saved})
    assert "the object of the file below is drawn, not the picture" in answer["object_message"]
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    junk = handlers.look({**values, "concept_file": str(tmp_path / "junk.safetensors")})
    assert "junk.safetensors" in junk["object_message"]


def test_a_file_is_of_the_object_that_the_page_shows(handlers, values, pairs, tmp_path):
    """It may have waited for somebody's drawing while another picture came."""
    (saved,) = handlers.save_concept(values, tmp_path)
    assert "object_message" not in saved, "what it warns of still holds"
    shown = {**values, **saved}
    assert handlers.check_saved(shown) == {"saved": gr.skip()}
    seen = {"several": replace(values["several"], thumb="data:,seen")}
    assert handlers.check_saved({**shown, **seen}) == {"saved": gr.skip()}
    another = str(pairs / "pair1.png")
    for change in ({"picture": another}, {"method": "box"}, {"concept_file": another}):
        assert handlers.check_saved({**shown, **change}) == {"saved": None}


def test_notes_of_the_library_are_shown(handlers, values, tmp_path, capsys):
    """Each time: of a file without local features, whose pictures do not change with lambda."""
    path = tmp_path / "global.safetensors"
    whole = handlers._concept(values)[0]
    replace(whole, feature_tokens=None).save(path)
    given = {**values, "concept_file": str(path), "second_file": str(path), "prompts": "a S, S2"}
    for _ in range(2):
        shown = [
            handlers.look(given)["object_message"],
            handlers.new_second(given)["second_message"],
            last(handlers.draw(given, tmp_path, silent))["status"],
        ]
        assert ["lambda does nothing" in one for one in shown] == [True] * 3
        assert "global.safetensors: encoded without the local mapper" in shown[0]
    assert "lambda" not in last(handlers.draw(values, tmp_path, silent))["status"]
    assert capsys.readouterr().err == ""


def test_who_closes_the_app_ends_the_drawing(handlers, values, tmp_path, monkeypatch):
    """A thread that draws for nobody would keep the process."""
    steps = []

    def slow(*arguments, **options):
        steps.append(None)
        handlers.close()
        return plain(*arguments, **options)

    plain = handlers.studio.pipe.unet.forward
    monkeypatch.setattr(handlers.studio.pipe.unet, "forward", slow)
    long = {**values, "steps": 20, "count": 3}
    said = last(handlers.draw(long, tmp_path, silent))["status"]
    assert "stopped after 0 pictures" in said and len(steps) < 20


def test_oblong_pictures_offer_squaring(handlers, values, tmp_path):
    wide = str(noise_file(tmp_path / "wide.png", 60, 40))
    answer = handlers.look({**values, "picture": wide})
    assert answer["square"]["visible"] and answer["views"]


def test_without_a_picture_nothing_is_wrong_yet(handlers, values):
    answer = handlers.look({**values, "picture": None})
    assert answer["object_message"] == "" and answer["views"] == []
    said = last(handlers.draw({**values, "picture": None}, None, silent))["status"]
    assert "upload or paste one" in said


def test_pictures_of_too_many_pixels_are_refused(handlers, values, tmp_path):
    large = str(noise_file(tmp_path / "large.png", 400, 300))
    for method in ("whole", "file"):
        answer = handlers.look({**values, "picture": large, "method": method})
        assert "large.png: 400 x 300 is more than 0.1 million pixels" in answer["object_message"]
    answer = handlers.look({**values, "method": "file", "mask": large})
    assert "large.png: 400 x 300 is more than 0.1 million pixels" in answer["object_message"]


def test_examples_bring_their_mask(handlers, pairs):
    answer = handlers.pick_example(1)
    picture, mask = PairFolder(pairs).read(1)
    assert np.array_equal(answer["picture"], picture) and answer["method"] == "file"
    assert np.array_equal(answer["mask"] > 0, mask)
    assert answer["marks"] == "", "strokes of the picture before"
    for index in (3, -1, "1", None):
        assert 'role="alert"' in handlers.pick_example(index)["object_message"]


def test_prompts_are_checked(handlers, values):
    assert handlers.check(values) == {"prompt_message": ""}
    said = handlers.check({**values, "prompts": "a <b>S</b> S"})["prompt_message"]
    assert "2 times the placeholder" in said and "template" not in said
    assert "<b>" not in said and "&lt;b&gt;" in said


def test_a_fast_drawing_does_not_flood_the_page(monkeypatch):
    clock, passed = iter((0, 0.1, 0.1 + PAUSE, 0.2 + PAUSE, 0.25 + PAUSE)), []
    monkeypatch.setattr("app.studio.time.monotonic", lambda: next(clock))
    tell = seldom(lambda at, desc: passed.append((*at, desc)))
    for done in range(1, 6):
        tell((done, 5), desc=f"step {done}")
    assert passed == [(1, 5, "step 1"), (3, 5, "step 3"), (5, 5, "step 5")]


def test_text_that_is_cut_off_is_told(handlers, values):
    answer = handlers.check({**values, "prompts": "a S" + " a" * 73 + " on the beach"})
    assert "leaves out 'on the beach'" in html.unescape(answer["prompt_message"])
    answer = handlers.check({**values, "prompts": "a S", "negative": "a " * 75 + "blur"})
    assert "leaves out 'blur'" in html.unescape(answer["prompt_message"])


def test_drawing_tells_steps_and_gives_files_with_metadata(handlers, values, tmp_path):
    told = []
    wanted = {**values, "prompts": "a S\nS on grass", "count": 2, "seed": 41}
    answer = last(handlers.draw(wanted, tmp_path, lambda at, desc, unit: told.append((*at, desc))))
    tiles = answer["gallery"]
    captions = [caption for _, caption in tiles]
    assert captions[:2] == ["your object", "a S: λ 0.8, seed 41"] and len(tiles) == 5
    assert answer["status"] == message("4 pictures, seeds 41 to 42")
    alone = last(
        handlers.draw({**wanted, "prompts": "a S", "count": 1}, tmp_path, lambda *_, **__: 0)
    )
    assert alone["gallery"][1][1] == "λ 0.8, seed 41", "a caption that is cut off"
    assert [done for done, _, _ in told] == list(range(1, 9)) and told[0][1] == 8
    assert told[-1][2] == "about 0 s left"
    with Image.open(tiles[0][0]) as picture:
        assert Path(tiles[0][0]).name == "object_1.png" and len(picture.text["concept S"]) > 8
    with Image.open(tiles[4][0]) as picture:
        assert picture.text["prompt"] == "S on grass" and picture.text["seed"] == "42"
        assert picture.text["fingerprint"] == handlers.studio.pipe.fingerprint


def test_lambda_changes_the_picture_and_the_seed_repeats_it(handlers, values, tmp_path):
    def pixels(**change) -> bytes:
        answer = last(handlers.draw({**values, **change}, tmp_path, silent))
        return Image.open(answer["gallery"][1][0]).tobytes()

    assert pixels() == pixels()
    assert pixels() != pixels(lambda_=0)
    assert pixels() != pixels(seed=4)
    assert pixels() != pixels(words="all")
    assert pixels() != pixels(negative="red, a mug")
    assert pixels() == pixels(negative=" ")


def test_minus_one_draws_a_seed_and_shows_it(handlers, values, tmp_path):
    said = [last(handlers.draw({**values, "seed": -1}, tmp_path, silent)) for _ in range(2)]
    seeds = [int(one["status"].split("seed ")[1].split("<")[0]) for one in said]
    assert seeds[0] != seeds[1] and min(seeds) >= 0
    assert f"seed {seeds[0]}" in said[0]["gallery"][1][1]


def test_pictures_at_work_are_shown(handlers, values, tmp_path, monkeypatch):
    """As often as the pause allows, none once the drawing is over; pictures stay what they were."""
    expected = last(handlers.draw(values, tmp_path, silent))
    monkeypatch.setattr("app.studio.PREVIEW_PAUSE", 0)
    monkeypatch.setattr(handlers.studio, "preview", Preview(torch.randn(5, 3)))
    (folder := tmp_path / "shown").mkdir()
    answers = list(handlers.draw({**values, "count": 2}, folder, silent))
    shown = [answer["preview"] for answer in answers if "preview" in answer]
    image = '<img alt="what is being drawn, so far" src="data:image/jpeg;base64,'
    assert [text[: len(image)] for text in shown] == [image, image, ""] * 2
    first = folder / "00000_00003.png"
    assert np.array_equal(pixels(first), pixels(Path(expected["gallery"][1][0])))


def test_who_leaves_ends_the_drawing(handlers, values, tmp_path, monkeypatch):
    monkeypatch.setattr("app.studio.PREVIEW_PAUSE", 0)
    monkeypatch.setattr(handlers.studio, "preview", Preview(torch.randn(5, 3)))
    steps = []
    wanted = {**values, "count": 8, "steps": 100}
    answers = handlers.draw(wanted, tmp_path, lambda at, **_: steps.append(at))
    next(answer for answer in answers if "preview" in answer)
    answers.close()
    assert values["stop"].requested and len(steps) < 8 * 100


def test_the_sweep_is_one_strip(handlers, values, tmp_path):
    answer = last(handlers.draw(values, tmp_path, silent, sweep=True))
    assert len(answer["gallery"]) == 1 + len(SWEEP) and answer["strip_part"]["visible"]
    with Image.open(answer["strip"]) as strip:
        assert strip.width == (1 + len(SWEEP)) * 160
        assert strip.text["lambda"] == "0.0; 0.3; 0.6; 0.8; 1.0; 1.2; 1.5"


def test_a_strip_that_cannot_be_written_is_said(handlers, values, tmp_path):
    (tmp_path / "sweep_00003.png").mkdir()  # in its place, as a full disk would be
    answer = last(handlers.draw(values, tmp_path, silent, sweep=True))
    assert "sweep_00003.png: cannot be written" in answer["status"]
    assert len(answer["gallery"]) == 1 + len(SWEEP) and "strip" not in answer


def test_stop_ends_the_drawing_and_keeps_what_is_there(handlers, values, tmp_path):
    def tell(at, **_) -> None:
        values["stop"].requested = at[0] == 3

    answer = last(handlers.draw({**values, "count": 4}, tmp_path, tell))
    assert answer["status"] == message("stopped after 1 pictures")
    assert len(answer["gallery"]) == 2
    early = {**values, "stop": Stop(requested=True)}
    assert "stopped after 0" in last(handlers.draw(early, tmp_path, silent))["status"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": "a photo"}, "no placeholder"),
        ({"prompts": None}, "0 prompts"),
        ({"negative": "\ud83d"}, "none of Unicode"),
        ({"count": 33}, "number of pictures 33"),
        ({"count": 1e300}, "number of pictures 33"),
        ({"count": 1.5}, "number of pictures 1.5: expected a whole number"),
        ({"steps": 10**6}, "steps 1000000"),
        ({"steps": "2"}, "expected a whole number"),
        ({"seed": float("inf")}, "expected a whole number"),
        ({"seed": 2**40}, "seed 1099511627776"),
        ({"seed": None}, "expected a whole number"),
        ({"seed": -5}, "seed -5: expected 0 to 2147483647, or -1"),
        ({"seed": 2**31 - 2, "count": 4}, "seed 2147483646: expected 0 to 2147483644, or -1"),
        ({"lambda_": 9}, "lambda 9"),
        ({"lambda_": None}, "lambda None"),
        ({"guidance": 1e9}, "guidance"),
        ({"scheduler": "magic"}, "unknown scheduler"),
        ({"speed": "magic"}, "choose one of exact, balanced, fast"),
        ({"method": "brush"}, "nothing is marked"),
        ({"squaring": "squash", "picture": "oblong"}, "expected crop or pad"),
    ],
    ids=str,
)
def test_mistakes_come_back_as_messages(handlers, values, tmp_path, capsys, change, said):
    change = {**change}
    if change.get("picture"):
        change["picture"] = str(noise_file(tmp_path / "oblong.png", 30, 20))
    answer = last(handlers.draw({**values, **change}, tmp_path, silent))
    assert said in answer["status"] and 'role="alert"' in answer["status"]
    assert capsys.readouterr().err == ""


def test_what_is_no_mistake_of_the_person_goes_to_the_terminal(
    handlers, values, tmp_path, capsys, monkeypatch
):
    def broken(*_) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(handlers.studio, "encode", broken)
    answer = last(handlers.draw(values, tmp_path, silent))
    assert answer["status"] == message(BROKEN, error=True)
    assert "secret detail" in capsys.readouterr().err


def test_a_saved_object_is_drawn_from_its_file(handlers, values, tmp_path):
    saved = last(handlers.save_concept(values, tmp_path))["saved"]
    there = last(handlers.draw(values, tmp_path, silent))["gallery"][1][0]
    expected = Image.open(there).tobytes()
    loaded = {**values, "picture": None, "concept_file": saved}
    tiles = last(handlers.draw(loaded, tmp_path, silent))["gallery"]
    assert len(tiles) == 1 and Image.open(tiles[0][0]).tobytes() == expected
    swept = last(handlers.draw(loaded, tmp_path, silent, sweep=True))
    assert Image.open(swept["strip"]).width == len(SWEEP) * 160


@pytest.fixture
def couple(handlers, values, pairs, tmp_path) -> dict:
    """What the controls hold with the file of a second object."""
    other = {**values, "picture": str(pairs / "pair1.png")}
    saved = last(handlers.save_concept(other, tmp_path))["saved"]
    return {**values, "second_file": saved, "prompts": "a S next to a S2", "second_lambda": 0.6}


def test_prompts_name_both_objects_once_the_file_is_there(handlers, couple):
    assert handlers.new_second(couple) == {"second_message": "", "prompt_message": ""}
    alone = {**couple, "prompts": "a S"}
    for said in (handlers.new_second(alone), handlers.check(alone)):
        assert "has no placeholder &#x27;S2&#x27;" in said["prompt_message"]
    assert handlers.check({**alone, "second_file": None}) == {"prompt_message": ""}


def test_a_second_word_without_its_object_is_told(handlers, values):
    asked = {**values, "prompts": "a S next to a S2"}
    assert "S2 is read as a plain word until" in handlers.check(asked)["prompt_message"]
    assert handlers.check({**values, "prompts": "a S, S22"})["prompt_message"] == ""


def test_a_second_file_that_is_none_is_said_at_once(handlers, couple, tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    bad = {**couple, "second_file": str(tmp_path / "text.safetensors")}
    for said in (
        handlers.new_second(bad)["second_message"],
        last(handlers.draw(bad, tmp_path, silent))["status"],
    ):
        assert "text.safetensors: not a safetensors file" in said and 'role="alert"' in said


def test_two_objects_in_one_picture(handlers, couple, tmp_path):
    def drawn(**change) -> Image.Image:
        answer = last(handlers.draw({**couple, **change}, tmp_path, silent))
        with Image.open(answer["gallery"][1][0]) as picture:
            picture.load()
        return picture

    first = drawn()
    assert first.text["lambda"] == "S 0.8, S2 0.6" and first.tobytes() == drawn().tobytes()
    apart = drawn(where="right left")
    assert (apart.text["region of S"], apart.text["region of S2"]) == ("right", "left")
    assert drawn(lambda_=0.7).text["lambda"] == "S 0.7, S2 0.6"
    pictures = [first, apart, drawn(where="left right"), drawn(lambda_=0.7), drawn(second_lambda=0)]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    alone = {"second_file": None, "prompts": "a S"}
    plain = drawn(**alone, where="left right")
    assert plain.tobytes() == drawn(**alone).tobytes()
    assert plain.text["lambda"] == "0.8" and "region of S" not in plain.text


def test_the_sweep_keeps_the_second_as_it_is(handlers, couple, tmp_path):
    answer = last(handlers.draw(couple, tmp_path, silent, sweep=True))
    assert answer["gallery"][2][1] == "λ S 0.3, S2 0.6, seed 3"
    with Image.open(answer["strip"]) as strip:
        assert strip.text["lambda"] == "; ".join(f"S {value:g}, S2 0.6" for value in SWEEP)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": "a S"}, "no placeholder &#x27;S2&#x27;"),
        ({"second_lambda": 9}, "lambda of S2 9: expected 0 to 1.5"),
        ({"second_lambda": None}, "lambda of S2 None"),
        ({"where": "inside out"}, "region &#x27;inside&#x27; of S: expected one of left"),
    ],
    ids=str,
)
def test_mistakes_with_two_objects_come_back_as_messages(handlers, couple, tmp_path, change, said):
    answer = last(handlers.draw({**couple, **change}, tmp_path, silent))
    assert said in answer["status"] and 'role="alert"' in answer["status"]


def test_the_page_begins_with_the_default_sampler(served):
    parts = served[0].config["components"]
    begun = {part["props"].get("elem_id"): part["props"].get("value") for part in parts}
    assert (begun["scheduler"], begun["steps"]) == (DEFAULT_SAMPLER, DEFAULT_STEPS)
    order = Order(("a S",))
    assert (order.scheduler, order.num_inference_steps) == (DEFAULT_SAMPLER, DEFAULT_STEPS)


def test_without_local_mapper_there_is_nothing_to_weigh(
    model_folder, mapper_folder, values, tmp_path
):
    pipe = ElitePipeline.from_stable_diffusion(
        model_folder, global_mapper=mapper_folder / "global_mapper", local_mapper=False
    )
    pipe.set_progress_bar_config(disable=True)
    handlers = AppHandlers(Studio(pipe))
    assert "1 pictures" in last(handlers.draw(values, tmp_path, silent))["status"]
    parts = {
        part["props"].get("elem_id"): part for part in build_page(handlers).config["components"]
    }
    for name in ("lambda_", "second_lambda", "sweep"):
        assert not parts[name]["props"]["visible"]
    assert "examples" not in parts
