"""Drawing a folder: reading ahead, encoding together, writing behind."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageChops

from elite import ElitePipeline
from elite import drawing as drawing_module
from elite.concept import Concept, ConceptFolder
from elite.data import PairFolder
from elite.drawing import Drawing, draw_folder, write_picture, write_png
from elite.encoding import ahead
from elite.speed import RUNGS, Speed
from elite.wording import Note
from tests import tiny

QUICK = Drawing(num_inference_steps=2)


def draw(pipe, pairs, output_dir, **options) -> list[str]:
    options = {"prompt": "a S", "seeds": [1, 2], "drawing": QUICK, **options}
    return draw_folder(pipe, PairFolder(pairs), output_dir, **options)


def test_ahead_keeps_the_order_and_begins_no_more_than_asked():
    begun: list[int] = []
    gate = threading.Event()

    def slow(item: int) -> int:
        begun.append(item)
        gate.wait(10)
        return item * item

    with ThreadPoolExecutor(8) as pool:
        results = ahead(pool, slow, range(10), 3)
        first = next(results)
        assert len(begun) <= 4
        gate.set()
        assert [first.result(), *(future.result() for future in results)] == [
            item * item for item in range(10)
        ]


def test_ahead_raises_where_the_item_is_asked_for():
    def fails_at_2(item: int) -> int:
        if item == 2:
            raise ValueError("no 2")
        return item

    with ThreadPoolExecutor(1) as pool:
        futures = list(ahead(pool, fails_at_2, range(4), 2))
        assert [futures[i].result() for i in (0, 1, 3)] == [0, 1, 3]
        with pytest.raises(ValueError, match="no 2"):
            futures[2].result()


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batch_size_changes_no_picture(pipe, tmp_path, batch_size):
    pairs = tiny.save_pairs(tmp_path / "pairs", count=3)
    assert draw(pipe, pairs, tmp_path / "one") == []
    assert draw(pipe, pairs, tmp_path / "many", batch_size=batch_size) == []
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "many").iterdir())
    assert len(names) == 3 * 2 * 2 + 1
    for name in names:
        if name.endswith(".png") and name != "grid.png":
            a, b = (
                torch.frombuffer(bytearray(Image.open(folder / name).tobytes()), dtype=torch.uint8)
                for folder in (tmp_path / "one", tmp_path / "many")
            )
            assert (a.int() - b.int()).abs().max() <= 1, name


def test_pairs_are_encoded_once_and_together(pipe, tmp_path, monkeypatch):
    pairs = tiny.save_pairs(tmp_path / "pairs", count=3)
    encoded: list[int] = []
    encode = pipe.encode_views

    def counting(**views: torch.Tensor) -> Concept:
        encoded.append(len(views["clip_pixels"]))
        return encode(**views)

    monkeypatch.setattr(pipe, "encode_views", counting)
    draw(pipe, pairs, tmp_path / "out", batch_size=2)
    assert encoded == [2, 1]


def test_a_folder_of_pictures_is_drawn_as_one_object(pipe, tmp_path):
    """Also beside objects of one picture, in batches that take both."""
    pairs, out = tiny.save_pairs(tmp_path / "pairs", count=4), tmp_path / "out"
    (pairs / "pair1_and_2").mkdir()
    for path in sorted(pairs.glob("pair[12]*.png")):
        path.rename(pairs / "pair1_and_2" / path.name)
    assert draw(pipe, pairs, out, batch_size=3) == []
    pictures = [PairFolder(pairs).read_all(index) for index in range(3)]
    assert [len(views) for views in pictures] == [1, 2, 1]
    for index, views in enumerate(pictures):
        concept = pipe.encode_concept(*map(list, zip(*views, strict=True)))
        for seed in (1, 2):
            (expected,) = QUICK(pipe, ["a S"], [concept], [seed])
            with Image.open(out / f"{index:05d}_{seed:05d}.png") as found:
                difference = ImageChops.difference(found, expected)
            assert max(high for _, high in difference.getextrema()) <= 1


def test_a_picture_that_cannot_be_written_stops_the_run(pipe, tmp_path, monkeypatch):
    def disk_full(*_: object) -> None:
        raise ValueError("disk full")

    monkeypatch.setattr(drawing_module, "write_picture", disk_full)
    pairs = tiny.save_pairs(tmp_path / "pairs")
    with pytest.raises(ValueError, match="disk full"):
        draw(pipe, pairs, tmp_path / "out")


def test_metadata_names_all_that_a_picture_depends_on(pipe, tmp_path):
    pairs = tiny.save_pairs(tmp_path / "pairs", count=1)
    draw(pipe, pairs, tmp_path / "out", seeds=[5], metadata={"scheduler": "lms"})
    with Image.open(tmp_path / "out" / "00000_00005.png") as picture:
        text = picture.text
    expected = {"prompt": "a S", "seed": "5", "lambda": "0.8", "words": "0", "scheduler": "lms"}
    expected |= {"num_inference_steps": "2", "guidance_scale": "5.0", "resolution": "32"}
    assert expected.items() <= text.items()
    assert text["fingerprint"] == pipe.fingerprint and text["torch"] == torch.__version__
    assert "speed" not in text  # as in pictures of versions that knew none


def test_metadata_says_what_a_speed_does(pipe):
    """Not its name: what that means may change."""
    exact = QUICK.metadata(pipe)
    fast = replace(QUICK, speed=Speed(0.5, 3)).metadata(pipe)
    assert fast == {**exact, "speed": "guidance_stop 0.5, deep_every 3"}


def test_metadata_tells_an_empty_negative_prompt_from_none(pipe):
    """Which SDXL draws as zeros."""
    assert replace(QUICK, negative_prompt="").metadata(pipe)["negative_prompt"] == ""
    assert "negative_prompt" not in QUICK.metadata(pipe)


# --- a run that goes on ---------------------------------------------------------------------------


def go_on(pipe, pairs, output_dir, **options) -> set[str]:
    """Draws what is missing into a folder; returns the names of the files that were written."""
    before = {path.name: path.stat().st_mtime_ns for path in output_dir.iterdir()}
    draw(pipe, pairs, output_dir, **{"skip_existing": True, **options})
    after = {path.name: path.stat().st_mtime_ns for path in output_dir.iterdir()}
    return {name for name, time in after.items() if time != before.get(name)} - {"grid.png"}


def both(*stems: str) -> set[str]:
    return {f"{stem}.{kind}" for stem in stems for kind in ("jpg", "png")}


@pytest.fixture
def drawn(pipe, tmp_path):
    """Two pairs, and a folder of their pictures with the seeds 1 and 2."""
    pairs, output_dir = tiny.save_pairs(tmp_path / "pairs"), tmp_path / "out"
    draw(pipe, pairs, output_dir)
    return pairs, output_dir


def test_what_is_there_is_kept_and_what_is_missing_drawn(pipe, drawn):
    pairs, output_dir = drawn
    assert go_on(pipe, pairs, output_dir) == set()
    content = (output_dir / "00001_00002.png").read_bytes()
    (output_dir / "00001_00002.png").unlink()
    assert go_on(pipe, pairs, output_dir, seeds=[1, 2, 3]) == both(
        "00001_00002", "00000_00003", "00001_00003"
    )
    assert (output_dir / "00001_00002.png").read_bytes() == content


def test_pictures_of_another_prompt_are_replaced_and_that_is_said(pipe, drawn):
    pairs, output_dir = drawn
    in_snow = {"prompt": "a S in the snow", "skip_existing": True}
    with pytest.warns(Note, match=r"pictures of another prompt .*\(4\); give another --suffix"):
        draw(pipe, pairs, output_dir, **in_snow)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        draw(pipe, pairs, output_dir, seeds=[1, 2, 3], **in_snow)


def test_pictures_of_other_objects_are_told(pipe, pairs, drawn, tmp_path):
    """They stay among those of a smaller folder."""
    one = tmp_path / "one"
    one.mkdir()
    for name in ("pair0.png", "pair0_bg.png"):
        (one / name).write_bytes((pairs / name).read_bytes())
    with pytest.warns(Note, match="2 pictures of other objects stay there, but not in grid"):
        draw(pipe, one, drawn[1], skip_existing=True)


def test_without_skip_existing_all_is_drawn_anew(pipe, drawn):
    pairs, output_dir = drawn
    assert len(go_on(pipe, pairs, output_dir, skip_existing=False)) == 8


def test_nothing_is_read_or_drawn_for_a_finished_folder(pipe, drawn, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("encoded again")

    pairs, output_dir = drawn
    (output_dir / "grid.png").unlink()
    monkeypatch.setattr(pipe, "encode_views", never)
    assert go_on(pipe, pairs, output_dir) == set()
    assert (output_dir / "grid.png").exists()


OTHER_SETTINGS = [
    {"prompt": "the S"},
    {"prompt": "a S \N{SNOWMAN}"},
    {"metadata": {"model": "another"}},
    {"drawing": replace(QUICK, lambda_=0.7)},
    {"drawing": replace(QUICK, num_inference_steps=3)},
    {"drawing": replace(QUICK, guidance_scale=4.0)},
    {"drawing": replace(QUICK, words="all")},
    {"drawing": replace(QUICK, resolution=40)},
    {"drawing": QUICK},
    {"drawing": replace(QUICK, speed=RUNGS["fast"])},
    {"drawing": replace(QUICK, speed=RUNGS["balanced"])},
    {"drawing": QUICK},
    {"prompt": "S a"},
    {"prompt": "S a", "drawing": replace(QUICK, placeholder_token="a")},
]


def test_other_settings_are_drawn_anew_once(pipe, drawn):
    pairs, output_dir = drawn
    for change in OTHER_SETTINGS:  # each differs from the one before
        one_pair = {"indices": [0], "seeds": [1], **change}
        assert go_on(pipe, pairs, output_dir, **one_pair) == both("00000_00001"), change
        assert go_on(pipe, pairs, output_dir, **one_pair) == set(), change


def test_other_mappers_draw_anew(pipe, drawn):
    pairs, output_dir = drawn
    with torch.no_grad():
        for parameter in pipe.local_mapper.parameters():
            parameter.mul_(1.01)
    other = ElitePipeline(**{**pipe.components, "local_mapper": pipe.local_mapper})
    other.set_progress_bar_config(disable=True)
    assert other.fingerprint != pipe.fingerprint
    assert go_on(other, pairs, output_dir, seeds=[1]) == both("00000_00001", "00001_00001")


def test_changed_input_is_drawn_anew(pipe, drawn):
    pairs, output_dir = drawn
    for name in ("pair0.png", "pair0_bg.png"):
        Image.new("L", (40, 40), 255).save(pairs / name)
        assert go_on(pipe, pairs, output_dir) == both("00000_00001", "00000_00002"), name


def test_pairs_with_and_without_masks_are_different_inputs(pipe, drawn):
    pairs, output_dir = drawn
    (pairs / "pair1_bg.png").write_bytes(b"not read")
    for drawn_now in (both("00000_00001", "00001_00001"), set()):
        before = {path.name: path.stat().st_mtime_ns for path in output_dir.iterdir()}
        whole = PairFolder(pairs, whole=True)
        draw_folder(pipe, whole, output_dir, QUICK, prompt="a S", seeds=[1], skip_existing=True)
        after = {path.name: path.stat().st_mtime_ns for path in output_dir.iterdir()}
        assert {n for n in after if after[n] != before[n]} - {"grid.png"} == drawn_now


def test_changed_concept_is_drawn_anew(pipe, concept, tmp_path):
    path, output_dir = tmp_path / "it.safetensors", tmp_path / "out"
    drawn = []
    for one in (concept, concept, Concept(concept.words * 1.1, None, concept.fingerprint)):
        one.save(path)
        options = {"prompt": "a S", "seeds": [1], "skip_existing": True}
        draw_folder(pipe, ConceptFolder(path), output_dir, QUICK, **options)
        drawn.append((output_dir / "00000_00001.png").stat().st_mtime_ns)
    assert drawn[0] == drawn[1] < drawn[2]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def without_end(content: bytes) -> bytes:
    return content[:-1]


def flipped(content: bytes) -> bytes:
    return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


def nothing(content: bytes) -> bytes:
    return b""


def test_damaged_picture_is_drawn_anew(pipe, drawn):
    pairs, output_dir = drawn
    path = output_dir / "00001_00001.png"
    whole = path.read_bytes()
    for damage in (cut, without_end, flipped, nothing):
        path.write_bytes(damage(whole))
        assert go_on(pipe, pairs, output_dir) == both("00001_00001"), damage
        assert path.read_bytes() == whole


def test_a_jpeg_that_is_gone_is_made_again(pipe, drawn):
    pairs, output_dir = drawn
    (output_dir / "00001_00001.jpg").unlink()
    assert go_on(pipe, pairs, output_dir) == both("00001_00001")


def test_pictures_of_another_run_are_told(pipe, drawn, monkeypatch):
    """Of two runs into one folder both ended well, one of them without its pictures."""
    pairs, output_dir = drawn
    ours = {path.name: path.read_bytes() for path in output_dir.glob("*_00001.png")}

    def of_another_run(folder, job, picture, image):
        write_picture(folder, job, picture, image)
        (folder / "00000_00001.png").write_bytes(ours["00000_00001.png"])

    monkeypatch.setattr(drawing_module, "write_picture", of_another_run)
    (failure,) = draw(pipe, pairs, output_dir, prompt="a red S")
    assert failure.startswith(f"{output_dir}: another run has replaced 1 of these pictures")


def test_keywords_are_as_png_has_them(tmp_path):
    """Latin-1, at most 79 bytes; texts may be any."""
    path = tmp_path / "it.png"
    write_png(path, Image.new("RGB", (1, 1)), {"concept Ä": "Ä", "ж": "ж", "x" * 90: "long"})
    with Image.open(path) as picture:
        assert picture.text == {"concept Ä": "Ä", "\\u0436": "ж", "x" * 79: "long"}


def test_png_is_written_last(pipe, drawn, monkeypatch):
    """Where there is a PNG, an interrupted run left its JPEG too."""
    written: list[str] = []
    monkeypatch.setattr(drawing_module, "write_atomically", lambda path, _: written.append(path))
    pairs, output_dir = drawn
    draw(pipe, pairs, output_dir, indices=[0], seeds=[1])
    assert [path.suffix for path in written] == [".jpg", ".png", ".png"]  # the last is the sheet


def test_the_sheet_shows_no_older_picture_of_what_failed(pipe, concept, tmp_path):
    """It stood there under the new prompt."""
    (tmp_path / "concepts").mkdir()
    for name in ("a", "b"):
        concept.save(tmp_path / "concepts" / f"{name}.safetensors")

    def sheet(name: str, prompt: str) -> bytes:
        folder = ConceptFolder(tmp_path / "concepts")
        draw_folder(pipe, folder, tmp_path / name, QUICK, prompt=prompt, seeds=[1])
        return (tmp_path / name / "grid.png").read_bytes()

    sheet("out", "a S")
    replace(concept, fingerprint="another").save(tmp_path / "concepts" / "b.safetensors")
    assert sheet("out", "a S at night") == sheet("fresh", "a S at night")
