"""Several concepts in one picture from the command line."""

import numpy as np
import pytest
from PIL import Image

from elite.drawing import Drawing
from tests import tiny
from tests.conftest import FAST, error_of, run_script


@pytest.fixture
def script(whole_model, tmp_path):
    """Runs the script on the whole tiny model."""

    def run(*arguments) -> int:
        given = ("--pretrained_model_name_or_path", whole_model, "--output_dir", tmp_path / "out")
        return run_script("inference_local.py", *FAST, *given, *arguments)

    return run


@pytest.fixture
def concepts(pipe, tmp_path):
    """S1=FILE S2=FILE of two concepts of the tiny model."""
    flags = []
    for number in (1, 2):
        path = tmp_path / f"{number}.safetensors"
        pipe.encode_concept(*tiny.picture(number)).save(path)
        flags.append(f"S{number}={path}")
    return flags


def region(tmp_path):
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(tmp_path / "left.png")
    return f"S1={tmp_path / 'left.png'}"


def drawn(folder, stem="00000_00042"):
    with Image.open(folder / f"{stem}.png") as picture:
        return np.asarray(picture), picture.text


def test_each_flag_changes_the_picture(script, concepts, tmp_path):
    common = ["--template", "a S1 next to a S2", "--concept", *concepts]
    runs = {
        "plain": [],
        "weight": ["--concept_llambda", "S2=0"],
        "region": ["--region", region(tmp_path)],
        "negative": ["--negative_prompt", "red, a mug"],
        "turned": ["--template", "a S2 next to a S1"],
    }
    pictures = {}
    for name, flags in runs.items():
        assert script(*common, *flags, "--suffix", name, "--llambda", "1") == 0
        folder = tmp_path / "out" / f"{name}_concepts_l1p0"
        pictures[name], text = drawn(folder)
        assert text["placeholder_token"] == "S1, S2"
        assert ("region of S1" in text) == (name == "region")
        assert (folder / "grid.png").exists()
    for name in ("weight", "region", "negative", "turned"):
        assert not np.array_equal(pictures[name], pictures["plain"]), name
    assert text["lambda"] == "S1 1, S2 1" and len(text["concept S1"]) == 16


def test_a_template_for_one_object_is_refused(script, concepts, capsys):
    """Its braces were drawn as they are."""
    for template in (["--template", "a S1 {} and S2"], []):
        assert script(*template, "--concept", *concepts) == 2
        assert error_of(capsys).endswith("with --concept, write its words in place of {}")


def test_pictures_that_are_replaced_are_told(script, concepts, capsys):
    for template, told in (("S1 and S2", False), ("S2 and S1", True)):
        assert script("--template", template, "--concept", *concepts) == 0
        assert ("another prompt or setting are replaced (1)" in capsys.readouterr().err) == told


def test_seeds_and_batches(script, concepts, tmp_path):
    flags = ["--template", "S1 and S2", "--concept", *concepts, "--num_images", "3"]
    assert script(*flags, "--batch_size", "2") == 0
    folder = tmp_path / "out" / "object_concepts_l0p8"
    seeds = [drawn(folder, f"00000_0004{last}")[1]["seed"] for last in (2, 3, 4)]
    assert seeds == ["42", "43", "44"]


def test_what_is_drawn_is_kept(script, concepts, tmp_path, monkeypatch):
    drawn_seeds = []
    plain = Drawing.with_concepts

    def counting(self, pipe, concepts, weights, regions, prompts, seeds):
        drawn_seeds.extend(seeds)
        return plain(self, pipe, concepts, weights, regions, prompts, seeds)

    monkeypatch.setattr(Drawing, "with_concepts", counting)
    left = region(tmp_path)
    flags = ["--template", "S1 and S2", "--concept", *concepts, "--region", left]
    for number, expected in ((1, [42]), (2, [43]), (2, [])):
        assert script(*flags, "--num_images", number) == 0
        assert drawn_seeds == expected
        drawn_seeds.clear()
    assert script(*flags, "--no-skip_existing") == 0 and drawn_seeds == [42]
    with Image.open(tmp_path / "left.png") as mask:
        mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "left.png")
    assert script(*flags) == 0 and drawn_seeds == [42, 42]  # the file was painted anew
    drawn_seeds.clear()
    without = flags[:-2]
    assert script(*without) == 0 and drawn_seeds == [42], "the picture with a region was kept"
    assert script(*without) == 0 and drawn_seeds == [42]
    named = [without[2], concepts[0].replace("S1=", "Ж="), concepts[1]]  # no keyword of a PNG
    for _ in range(2):
        assert script("--template", "Ж and S2", *named, "--suffix", "named") == 0
    assert drawn_seeds == [42, 42]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--template", "a S1"), "'a S1' has no placeholder 'S2'"),
        (("--concept_llambda", "S3=0.5"), "--concept_llambda S3=0.5: no such --concept"),
        (("--concept_llambda", "S1=much"), "expected NAME=NUMBER"),
        (("--region", "S3=here"), "no such file"),
        (("--region", "S1=nowhere.png"), "nowhere.png"),
        (("--concept_path", "files"), "--concept and --concept_path are both given"),
        (("--selected_data", "1"), "--concept and --selected_data are both given"),
        (("--no_mask",), "--concept and --no_mask are both given"),
        (("--test_data_dir", "photos"), "--concept and --test_data_dir are both given"),
        (("--placeholder_token", "S1"), "--concept and --placeholder_token are both given"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, tuple) else "",
)
def test_mistakes_are_one_line_and_2(script, concepts, tmp_path, capsys, flags, message):
    assert script("--template", "S1 and S2", "--concept", *concepts, *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.glob("out/*/*.png"))


def test_pictures_of_pairs_stay(script, concepts, pairs, tmp_path):
    assert script("--test_data_dir", pairs) == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("out/*/*")}
    assert script("--template", "S1", "--concept", concepts[0]) == 0
    assert before and all(path.read_bytes() == content for path, content in before.items())


def test_a_folder_of_several_files_is_no_concept(script, concepts, tmp_path, capsys):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("1", "2"):
        (tmp_path / f"{name}.safetensors").rename(folder / f"{name}.safetensors")
    assert script("--template", "S1", "--concept", f"S1={folder}") == 2
    assert f"--concept S1={folder}: holds 2 concept files; name one" in capsys.readouterr().err
    (folder / "2.safetensors").unlink()
    assert script("--template", "S1", "--concept", f"S1={folder}") == 0


def test_a_word_of_any_letters(script, concepts, tmp_path):
    """A PNG's keywords have those of Latin-1 alone."""
    file = concepts[0].partition("=")[2]
    assert script("--template", "a photo of a кот", "--concept", f"кот={file}") == 0
    _, text = drawn(tmp_path / "out" / "object_concepts_l0p8")
    assert text["prompt"] == "a photo of a кот" and text["lambda"] == "кот 0.8"
    assert len(text["concept \\u043a\\u043e\\u0442"]) == 16


def test_twice_the_same_name(script, concepts, capsys):
    assert script("--template", "S1", "--concept", concepts[0], concepts[0]) == 2
    assert "S1 is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [("--region", "S1=a.png"), ("--concept_llambda", "S1=1")])
def test_flags_of_concept_alone(script, capsys, flag):
    assert script(*flag) == 2
    assert "belong to --concept" in capsys.readouterr().err
