"""Several pictures of one object: added, turned to, removed, and drawn together."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from app.handlers import THUMB_SIDE, data_url, dimmed
from app.marking import MAX_LENGTH, Shown
from app.several import CONTROLS, MAX_SEVERAL, MAX_SHOWN, NEW, Several, read_several
from elite.concept import Concept
from tests.app.test_app_handlers import last, silent

STROKE = '{"strokes": [{"points": [[0.5, 0.5]], "width": 0.5}]}'


@pytest.fixture
def files(pairs) -> list[str]:
    return [str(pairs / f"pair{number}.png") for number in range(3)]


def wish(values: dict, **wanted) -> dict:
    """What the page holds, with something wanted."""
    return {**values, "several": replace(values["several"], wanted=wanted)}


def answered(values: dict, answer: dict) -> dict:
    """What the page holds after an answer of `rearrange`."""
    shown = {name: answer[name] for name in CONTROLS if name in answer}
    return {**values, **shown, "several": read_several(answer["several"])}


@pytest.fixture
def arranged(handlers):
    """What the page holds once what is wanted is done."""

    def arrange(values: dict, **wanted) -> dict:
        answer = handlers.rearrange(wish(values, **wanted))
        assert answer["several_message"] == ""
        return answered(values, answer)

    return arrange


def order(values: dict) -> list[str]:
    return [one["picture"] for one in values["several"].pictures(values)]


def test_two_pictures_are_read_as_the_library_reads_them(
    handlers, values, arranged, files, tmp_path
):
    both = {**arranged(values, add=files[1:2]), "method": "whole"}
    path = last(handlers.save_concept(both, tmp_path))["saved"]
    pictures = [np.asarray(Image.open(one)) for one in order(both)]
    masks = [np.ones(picture.shape[:2], bool) for picture in pictures]
    expected = handlers.studio.pipe.encode_concept(pictures, masks)
    concept = Concept.load(path)
    assert concept.num_tokens == expected.num_tokens == 2 * handlers.studio.pipe.grid**2
    for name, tensor in expected.tensors.items():  # rounded in batches of other sizes
        torch.testing.assert_close(concept.tensors[name], tensor, atol=1e-5, rtol=1e-5)


def test_drawings_say_of_how_many_pictures(handlers, values, arranged, files, tmp_path):
    def drawn(values: dict) -> tuple[list[str], dict]:
        tiles = last(handlers.draw(values, tmp_path, silent))["gallery"]
        with Image.open(tiles[-1][0]) as picture:
            return [caption for _, caption in tiles[:-1]], picture.text

    both = {**arranged(values, add=files[1:2]), "method": "whole"}
    captions, text = drawn(both)
    assert captions == ["your object, picture 1", "your object, picture 2"]
    assert text["pictures of S"] == "2"
    captions, text = drawn(arranged(both, remove=""))
    assert captions == ["your object"] and "pictures of S" not in text


def test_every_picture_keeps_its_own_mask(handlers, values, arranged, files):
    first = {**values, "method": "brush", "marks": STROKE, "position": 0.2}
    both = arranged(first, add=files[1:2])
    assert {name: both[name] for name in CONTROLS[1:]} == {name: NEW[name] for name in CONTROLS[1:]}
    assert order(both) == files[:2] and both["several"].at == 1
    back = arranged(both, turn=files[0])
    assert {name: back[name] for name in CONTROLS} == {name: first[name] for name in CONTROLS}
    assert order(back) == files[:2] and back["several"].at == 0
    assert "marks" not in handlers.new_picture(back)  # as marked before
    assert handlers.new_picture({**back, "picture": files[2]})["marks"] == ""


def test_pictures_come_and_go_in_order(values, arranged, files):
    three = arranged(values, add=files)  # the first is there already
    assert order(three) == files and three["picture"] == files[1]
    assert order(arranged(three, remove=files[2])) == files[:2]
    assert arranged(three, remove=files[2])["picture"] == files[1]
    assert arranged(three, remove=files[0])["picture"] == files[1]
    assert arranged(three, remove="")["picture"] == files[2]
    two = arranged(arranged(three, turn=files[2]), remove="")
    assert (order(two), two["picture"]) == (files[:2], files[1])
    cleared = {**three, "picture": None}  # by the control itself
    assert order(cleared) == [files[0], files[2]]
    assert order(arranged(cleared, turn=files[2])) == [files[0], files[2]]
    none = arranged(arranged(two, remove=""), remove="")
    assert none["picture"] is None and order(none) == [] and none["several"] == Several()


def test_a_picture_that_is_there_twice_counts_once(handlers, values, arranged, files):
    both = arranged(values, add=files[1:2])
    again = {**both, "picture": files[0]}  # put into the control itself
    assert order(again) == files[:1]
    answer = handlers.new_picture(again)
    assert "pair0.png: among the pictures of the object already" in answer["several_message"]
    assert read_several(answer["several"]).others == ()
    assert order(arranged(again, add=files[2:])) == [files[0], files[2]]
    other = both["several"].others
    forged = {**both, "several": replace(both["several"], others=other * 2, at=2)}
    assert order(forged) == files[:2] and arranged(forged, remove=files[0])["picture"] == files[1]
    assert "several" not in handlers.new_picture(both)


def test_dropped_on_an_empty_page(values, arranged, files):
    all_three = arranged({**values, "picture": None}, add=files)
    assert order(all_three) == files and all_three["picture"] == files[0]


def test_new_pictures_are_glanced_at(handlers, values, arranged, files, tmp_path):
    Image.new("RGB", (30, 30), "grey").save(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no picture")
    y, x = np.mgrid[:40, :40]
    disc = np.where(np.hypot(x - 20, y - 20) < 10, 220, 60).astype(np.uint8)
    Image.fromarray(np.stack([disc, 255 - disc, disc], axis=2)).save(tmp_path / "disc.png")
    good = str(tmp_path / "disc.png")
    bad = [str(tmp_path / name) for name in ("empty.png", "text.png")]
    seen = {**values, "several": Several(thumb="data:,seen")}
    answer = handlers.glance(arranged(seen, add=[files[1], good, *bad]))
    thumbs = answer["several"]["thumbs"]
    one = Shown(good)
    picture = one.read_picture()
    assert list(thumbs) == [good, *bad]  # but for those of which there is one, and that shown
    assert thumbs[good] == data_url(dimmed(picture, one.read_mask(picture)), THUMB_SIDE)
    assert thumbs[bad[0]].startswith("data:image/jpeg") and thumbs[bad[1]] == ""
    assert "picture 4: GrabCut found no object" in answer["several_message"]
    assert "picture 5: text.png: not a readable image" in answer["several_message"]


def test_the_shown_picture_has_its_thumbnail_by_the_look(handlers, values):
    one = handlers.look(values)["several"]
    assert one["here"] and one["now"] == data_url(Shown(values["picture"]).read_picture(), 128)
    none = handlers.look({**values, "picture": None})["several"]
    assert not none["here"] and none["now"] == ""


def test_an_example_is_another_object(handlers):
    assert handlers.pick_example(0)["several"] == ""


def test_mistakes_with_several_pictures_come_back_as_messages(
    handlers, values, arranged, files, tmp_path, capsys
):
    copies = []
    for number in range(MAX_SHOWN):
        copies.append(str(tmp_path / f"{number}.png"))
        Image.open(files[0]).save(copies[-1])
    for wanted, said in (
        ({"add": copies}, f"{MAX_SHOWN + 1} pictures; show at most {MAX_SHOWN} of one object"),
        ({"add": [files[0]]}, "pair0.png: among the pictures of the object already"),
        ({"turn": files[2]}, "no such picture of the object"),
    ):
        answer = handlers.rearrange(wish(values, **wanted))
        assert said in answer["several_message"] and 'role="alert"' in answer["several_message"]
        assert not set(answer) & set(CONTROLS)
    full = arranged(values, add=copies[1:])
    assert len(order(full)) == MAX_SHOWN
    more = tuple({**NEW, "picture": f"{number}.png"} for number in range(MAX_SHOWN))
    forged = replace(full["several"], others=more)
    answer = last(handlers.draw({**full, "several": forged}, tmp_path, silent))
    assert "show at most 8 of one object" in answer["status"]
    both = arranged(values, add=files[1:2])
    answer = last(handlers.draw({**both, "method": "brush"}, tmp_path, silent))
    assert "picture 2: nothing is marked as object" in answer["status"]
    assert capsys.readouterr().err == ""


def content(**change) -> dict:
    """What the page holds of two pictures."""
    one = {**NEW, "picture": "a.png", **change.pop("one", {})}
    return {"others": [one], "at": 1, "given": "b.png", "thumb": "", **change}


@pytest.mark.parametrize(
    "given",
    [
        "no JSON",
        "[1]",
        "{}",
        "[" * 100_000,
        json.dumps(content(at=2)),
        json.dumps(content(at="0")),
        json.dumps(content(thumb=None)),
        json.dumps(content(one={"picture": None})),
        json.dumps(content(one={"mask": 3})),
        json.dumps(content(one={"position": float("nan")})),
        json.dumps(content(one={"method": ["box"]})),
        json.dumps(content(wanted={"add": [1]})),
        json.dumps(content(wanted={"add": 1})),
        json.dumps(content(wanted={"sell": "a.png"})),
        json.dumps(content(wanted={"turn": "a.png", "remove": "a.png"})),
    ],
    ids=lambda text: text[:90],
)
def test_texts_of_another_kind_are_refused(given):
    with pytest.raises(ValueError, match="cannot be read; reload the page"):
        read_several(given)


def test_texts_are_read_as_they_were_written():
    read = read_several(json.dumps(content(wanted={"add": ["c.png"]})))
    assert read.files == ["a.png", "c.png"] and read.wanted == {"add": ["c.png"]}
    assert read_several(read.text) == replace(read, wanted={})
    marks = json.dumps(content(one={"marks": "x" * 2 * MAX_LENGTH}))
    assert len(marks) > MAX_SEVERAL
    with pytest.raises(ValueError, match="clear some of the marks"):
        read_several(marks)


# --- as a client speaks it ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["picture", "mask", "add"])
@pytest.mark.parametrize("event", [("draw", "click", True), ("several", "input")])
def test_no_other_file_is_read(client, pairs, tmp_path, where, event):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "private.png")
    outside = str(tmp_path / "private.png")
    up = client.upload(pairs / "pair0.png")
    other = client.upload(pairs / "pair1.png")["path"]
    one = {"picture": other, "method": "file", "mask": other}
    if where == "add":
        held = content(one=one, wanted={"add": [outside]})
    else:
        held = content(one={**one, where: outside}, wanted={"turn": other})
    with pytest.raises(RuntimeError, match="this is no uploaded file"):
        client.call(client.dependency(*event), picture=up, several=json.dumps(held))


def test_pictures_are_added_and_drawn_without_a_trace_on_the_server(client, pairs):
    first, second = (client.upload(pairs / f"pair{number}.png") for number in (0, 1))
    held = {**content(wanted={"add": [second["path"]]}), "others": [], "at": 0}
    rearrange = client.dependency("several", "input")
    answer = client.call(rearrange, picture=first, several=json.dumps(held))
    assert answer["picture"]["path"] == second["path"]
    drawn = client.call(
        client.dependency("draw", "click", then=True), picture=second, several=answer["several"]
    )
    assert [tile["caption"] for tile in drawn["gallery"][:2]] == [
        "your object, picture 1",
        "your object, picture 2",
    ]
    alone = client.call(client.dependency("draw", "click", then=True), picture=second)
    assert alone["gallery"][0]["caption"] == "your object"
