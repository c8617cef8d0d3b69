"""encode.py, and what is drawn from its files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from elite import Concept, ElitePipeline
from elite.data import PairFolder
from elite.encoding import encode_folder
from tests import tiny
from tests.conftest import FAST, REPOSITORY, files, pixels, run_script, same_pictures


@pytest.fixture
def script(whole_model, pairs, tmp_path):
    """Runs a script on the whole model and the pairs, unless told otherwise."""

    def run(name: str, *arguments: str | Path) -> int:
        given = {"--pretrained_model_name_or_path": whole_model, "--test_data_dir": pairs}
        given |= {"--output_dir": tmp_path / "out", "--device": "cpu"}
        if name.startswith("inference"):
            given["--num_inference_steps"] = 2
        defaults = [
            x for flag, value in given.items() if flag not in arguments for x in (flag, value)
        ]
        return run_script(name, *defaults, *arguments)

    return run


@pytest.fixture
def encode(script, tmp_path):
    """Runs encode.py into tmp_path / "concepts"."""
    return lambda *arguments: script("encode.py", "--output_dir", tmp_path / "concepts", *arguments)


@pytest.fixture
def concepts(encode, tmp_path, capsys) -> Path:
    """The two pairs as concept files."""
    assert encode() == 0
    capsys.readouterr()
    return tmp_path / "concepts"


def errors(capsys) -> list[str]:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return [line for line in text.splitlines() if "error:" in line]


def written(folder: Path) -> dict[str, int]:
    """When each concept was written."""
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def same_concepts(one: Path, other: Path) -> bool:
    names = [path.name for path in sorted(one.glob("*.safetensors"))]
    return names == [path.name for path in sorted(other.glob("*.safetensors"))] and all(
        Concept.load(one / name).digest == Concept.load(other / name).digest for name in names
    )


# --- what is written ------------------------------------------------------------------------------


def test_files_are_what_the_pipeline_encodes(encode, tmp_path, whole_model, pairs, capsys):
    assert encode() == 0
    folder = tmp_path / "concepts"
    assert files(folder) == {"pair0.safetensors", "pair1.safetensors", "grid.png"}
    output = capsys.readouterr()
    assert f"2 concepts in {folder}; look at {folder / 'grid.png'} first" in output.out
    assert "2/2" in output.err and "error" not in output.err
    pipe = ElitePipeline.from_stable_diffusion(whole_model)
    for name in ("pair0", "pair1"):
        image, mask = Image.open(pairs / f"{name}.png"), Image.open(pairs / f"{name}_bg.png")
        concept = Concept.load(folder / f"{name}.safetensors")
        assert concept.digest == pipe.encode_concept(image, mask).digest
        assert concept.fingerprint == pipe.fingerprint


def test_sheet_shows_what_was_read(concepts, pairs):
    sheet = pixels(concepts / "grid.png")
    tile = 160
    assert sheet.shape[1] == 3 * tile
    row = sheet[-tile:]  # of pair1, 40 px: each pixel is 4 x 4 on the sheet
    image, mask = pixels(pairs / "pair1.png"), pixels(pairs / "pair1_bg.png") > 0
    assert (row[2::4, tile + 2 : 2 * tile : 4] == image).all()
    assert (row[2::4, 2 * tile + 2 :: 4] == image * mask).all()


# --- drawing from files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"),
    [("inference_local.py", "object_l0p8"), ("inference_global.py", "object_token0")],
)
def test_pictures_of_files_are_those_of_pairs(script, concepts, tmp_path, name, folder):
    assert script(name, "--num_images", "2", "--output_dir", tmp_path / "pairs") == 0
    arguments = ("--num_images", "2", "--concept_path", concepts)
    assert script(name, *arguments, "--output_dir", tmp_path / "files") == 0
    one, two = tmp_path / "pairs" / folder, tmp_path / "files" / folder
    pictures = {f"0000{index}_0004{seed}.png" for index in (0, 1) for seed in (2, 3)}
    assert files(two) == pictures | {"grid.png"}
    # Without a local mapper pairs are encoded from one view alone, which CLIP may round otherwise.
    for name in pictures:
        assert np.abs(pixels(one / name).astype(int) - pixels(two / name)).max() <= 1
    assert pixels(two / "grid.png").shape[1] == 3 * 160  # name and two seeds


def test_one_file_is_drawn(script, concepts, tmp_path):
    assert script("inference_local.py", "--output_dir", tmp_path / "all") == 0
    assert script("inference_local.py", "--concept_path", concepts / "pair1.safetensors") == 0
    drawn = tmp_path / "out" / "object_l0p8"
    assert files(drawn) == {"00000_00042.png", "grid.png"}
    expected = pixels(tmp_path / "all" / "object_l0p8" / "00001_00042.png")
    assert (pixels(drawn / "00000_00042.png") == expected).all()


def test_files_need_neither_pictures_nor_image_encoder(script, concepts, whole_model, tmp_path):
    model = shutil.copytree(whole_model, tmp_path / "model")
    (model / "image_encoder" / "model.safetensors").unlink()
    arguments = ("--pretrained_model_name_or_path", model, "--test_data_dir", tmp_path / "none")
    assert script("inference_local.py", "--concept_path", concepts, *arguments) == 0


def test_files_of_pairs_leave_no_side_by_side(script, concepts, tmp_path):
    """Pictures of files replace those of pairs, which had JPEGs of another input."""
    assert script("inference_local.py", "--selected_data", "1") == 0
    assert script("inference_local.py", "--concept_path", concepts / "pair1.safetensors") == 0
    assert files(tmp_path / "out" / "object_l0p8") >= {"00001_00042.jpg", "00000_00042.png"}
    assert script("inference_local.py", "--concept_path", concepts, "--selected_data", "1") == 0
    assert "00001_00042.jpg" not in files(tmp_path / "out" / "object_l0p8")


def test_other_mappers_are_refused(script, concepts, model_folder, tmp_path, capsys):
    """All files: nothing is drawn. One of them: the others are."""
    mappers = [
        x
        for name, mapper in zip(
            ("global_mapper", "local_mapper"), tiny.build_mappers(model_folder, 5), strict=True
        )
        if mapper.save_pretrained(tmp_path / name) is None
        for x in (f"--{name}_path", tmp_path / name)
    ]
    path = concepts / "pair0.safetensors"
    assert script("inference_local.py", "--concept_path", concepts, *mappers) == 2
    lines = errors(capsys)
    assert len(lines) == 2
    assert lines[0].startswith(f"error: {path}: concept was made by other mappers")
    assert "encode it again" in lines[0] and not (tmp_path / "out").exists()

    concept = Concept.load(path)
    Concept(concept.words, concept.feature_tokens, "f00d").save(path)
    assert script("inference_local.py", "--concept_path", concepts) == 3
    (line,) = errors(capsys)
    assert "fingerprint f00d" in line
    assert files(tmp_path / "out" / "object_l0p8") == {"00001_00042.png", "grid.png"}


# --- a second run ---------------------------------------------------------------------------------


def test_second_run_encodes_nothing(encode, concepts, capsys):
    before = written(concepts)
    assert encode() == 0
    assert written(concepts) == before and "2 there already" in capsys.readouterr().err
    assert encode("--no-skip_existing") == 0
    assert all(time > before[name] for name, time in written(concepts).items())


def another_mask(concepts: Path, pairs: Path) -> None:
    Image.new("L", (40, 40), 255).save(pairs / "pair0_bg.png")


def another_picture(concepts: Path, pairs: Path) -> None:
    shutil.copy(pairs / "pair1.png", pairs / "pair0.png")


def truncated(concepts: Path, pairs: Path) -> None:
    content = (concepts / "pair0.safetensors").read_bytes()
    (concepts / "pair0.safetensors").write_bytes(content[:-10])


def missing(concepts: Path, pairs: Path) -> None:
    (concepts / "pair0.safetensors").unlink()


def of_other_mappers(concepts: Path, pairs: Path) -> None:
    path = concepts / "pair0.safetensors"
    Concept(torch.zeros(1, 3, 24), None, "f00d").save(path)


@pytest.mark.parametrize(
    "change", [another_mask, another_picture, truncated, missing, of_other_mappers]
)
def test_what_changed_is_encoded_again_and_nothing_else(pipe, tmp_path, change):
    pairs, concepts = tiny.save_pairs(tmp_path / "own"), tmp_path / "concepts"
    encode_folder(pipe, PairFolder(pairs), concepts)
    before = written(concepts)
    change(concepts, pairs)
    encode_folder(pipe, PairFolder(pairs), concepts, skip_existing=True)
    after = written(concepts)
    assert after["pair0"] != before["pair0"] and after["pair1"] == before["pair1"]
    encode_folder(pipe, PairFolder(pairs), tmp_path / "fresh")
    assert same_concepts(concepts, tmp_path / "fresh")


def test_other_number_types_and_encoders_are_encoded_again(encode, concepts, whole_model):
    times = [written(concepts)]
    encoder = ("--image_encoder_name_or_path", whole_model / "image_encoder")
    for arguments in (encoder, (*encoder, "--mixed_precision", "bf16"), ()):
        assert encode(*arguments) == 0
        times.append(written(concepts))
        assert times[-1]["pair0"] != times[-2]["pair0"]


def test_another_encoder_of_the_same_path_is_seen(encode, concepts, whole_model, tmp_path):
    encoder = shutil.copytree(whole_model / "image_encoder", tmp_path / "encoder")
    flags = ("--image_encoder_name_or_path", encoder)
    times = []
    for change in (1.0, 1.0, 1.1):
        file = encoder / "model.safetensors"
        weights = {name: change * x for name, x in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        assert encode(*flags) == 0
        times.append(written(concepts)["pair0"])
    assert times[0] == times[1] != times[2]


@pytest.mark.parametrize("name", ["encode.py", "inference_local.py"])
def test_nothing_is_written_among_the_pictures(script, tmp_path, capsys, name):
    """The next run would take the contact sheet for an object."""
    folder = tiny.save_pairs(tmp_path / "own")
    out = folder / "concepts" if name == "encode.py" else folder
    flags = ("--test_data_dir", folder, "--no_mask", "--output_dir", out)
    assert script(name, *flags) == 2
    (error,) = errors(capsys)
    assert f"lies among the pictures of {folder}; choose another folder" in error
    assert len(list(folder.iterdir())) == 4
    assert script(name, "--test_data_dir", folder, "--output_dir", folder / "deep" / "er") == 0


# --- pictures without masks -----------------------------------------------------------------------


def test_no_mask_takes_the_whole_picture(encode, script, tmp_path, capsys):
    folder = tiny.save_pairs(tmp_path / "own")
    for mask in folder.glob("*_bg.png"):
        Image.new("L", (40, 40), 255).save(mask)
    assert encode("--test_data_dir", folder, "--output_dir", tmp_path / "white") == 0
    assert script("inference_local.py", "--test_data_dir", folder) == 0
    for mask in folder.glob("*_bg.png"):
        mask.write_bytes(b"not read")
    said = capsys.readouterr().err
    assert "--no_mask" not in said
    notes = [line for line in said.splitlines() if "pair1_bg.png" in line]
    assert len(notes) == 2  # once in each run
    assert all(n.startswith("note: ") and "every pixel is object" in n for n in notes)
    assert encode("--test_data_dir", folder, "--no_mask") == 0
    assert "with --no_mask a picture's background becomes part" in capsys.readouterr().err
    assert same_concepts(tmp_path / "white", tmp_path / "concepts")

    whole = ("--no_mask", "--output_dir", tmp_path / "whole")
    assert script("inference_local.py", "--test_data_dir", folder, *whole) == 0
    assert same_pictures(tmp_path / "out" / "object_l0p8", tmp_path / "whole" / "object_l0p8")


# --- bad input ------------------------------------------------------------------------------------


def test_bad_pair_costs_a_line_and_3(encode, tmp_path, capsys):
    folder = tiny.save_pairs(tmp_path / "own")
    (folder / "pair0.png").write_bytes(b"broken")
    assert encode("--test_data_dir", folder) == 3
    (line,) = errors(capsys)
    assert "pair0.png: not a readable image" in line
    assert files(tmp_path / "concepts") == {"pair1.safetensors", "grid.png"}


def test_a_concept_of_a_pair_that_is_broken_now_is_told(encode, tmp_path, capsys):
    """It stayed among those of this run."""
    folder = tiny.save_pairs(tmp_path / "own")
    assert encode("--test_data_dir", folder) == 0
    (folder / "pair0.png").write_bytes(b"broken")
    assert encode("--test_data_dir", folder) == 3
    said = capsys.readouterr().err
    assert "pair0.safetensors: is of an earlier picture or model; remove it" in said
    assert "pair1.safetensors" not in said


def test_nothing_to_encode(encode, tmp_path, capsys):
    folder = tiny.save_pairs(tmp_path / "own", count=1)
    (folder / "pair0_bg.png").unlink()
    assert encode("--test_data_dir", folder) == 2
    (line,) = errors(capsys)
    for words in ("no picture has a mask", "make_masks.py", "--no_mask"):
        assert words in line
    shutil.copy(folder / "pair0.png", folder / "pair0.webp")
    assert encode("--test_data_dir", folder, "--no_mask") == 2
    (line,) = errors(capsys)
    assert "pair0.webp: has the name of pair0.png" in line
    assert not (tmp_path / "concepts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--concept_path", "nowhere"), "nowhere: no such file or folder"),
        (("--concept_path", "configs"), "configs: no concept file (*.safetensors) in it"),
        (("--concept_path", "README.md"), "README.md: not a safetensors file"),
        (("--concept_path", "configs", "--no_mask"), "concept files hold no pictures"),
    ],
)
def test_mistakes_are_one_line_and_2(script, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(REPOSITORY)
    assert script("inference_local.py", *arguments) == 2
    (line,) = errors(capsys)
    assert message in line and not (tmp_path / "out").exists()


def test_selected_concept_that_is_not_there(script, concepts, capsys):
    assert script("inference_local.py", "--concept_path", concepts, "--selected_data", "2") == 2
    (line,) = errors(capsys)
    assert f"{concepts} has 2 concepts; choose 0 to 1, or -1 for all" in line


# --- real processes -------------------------------------------------------------------------------


def test_two_launched_processes_write_the_same_files(script, tmp_path, whole_model):
    """Four pairs, one of them unreadable and one picture there already; then the same folder to
    concepts, one there already; then their pictures."""
    folder = tiny.save_pairs(tmp_path / "own", count=4)
    (folder / "pair1.png").write_bytes(b"not a picture")

    def calls(output_dir: Path) -> list[list[str | Path]]:
        given = ["--pretrained_model_name_or_path", whole_model, "--test_data_dir", folder]
        concepts, drawn = output_dir / "concepts", ["--output_dir", output_dir, *FAST]
        return [
            ["inference_local.py", *given, *drawn],
            ["encode.py", *given, "--device", "cpu", "--output_dir", concepts],
            ["inference_local.py", *given, *drawn, "--concept_path", concepts, "--suffix", "file"],
        ]

    one, two = tmp_path / "one", tmp_path / "two"
    assert [run_script(*call) for call in calls(one)] == [3, 3, 0]
    stem = "object_l0p8/00002_00042"
    names = [f"{stem}.png", f"{stem}.jpg", "concepts/pair2.safetensors"]
    for name in names:
        (two / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(one / name, two / name)
    before = [(two / name).stat().st_mtime_ns for name in names]

    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "configs/cpu_2.json", "tests/run_scripts.py"]
    first, second, third = ([*map(str, call)] for call in calls(two))
    run = subprocess.run(
        [*launch, *first, "--", *second, "--", *third],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert run.stderr.count("error: ") == 2, run.stderr[-3000:]
    assert run.stderr.count("pair1.png: not a readable image") == 2
    for name in ("object_l0p8", "file_l0p8"):
        assert files(one / name) == files(two / name) and same_pictures(one / name, two / name)
    assert same_concepts(one / "concepts", two / "concepts")
    assert [(two / name).stat().st_mtime_ns for name in names] == before


def test_help(capsys):
    assert run_script("encode.py", "--help") == 0
    text = capsys.readouterr().out
    for flag in ("--test_data_dir", "--output_dir", "--no_mask", "--skip_existing"):
        assert flag in text
