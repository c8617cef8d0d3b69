"""The table of the paper's claims at a reduced size, on the shipped small world."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from small_world import inversion, methods, reproduce, score
from small_world.flags import MODEL
from small_world.methods import Pictures
from small_world.table import LAMBDAS, NEW_KINDS, Table

SMALL = ["--samples", "3", "--inversions", "2", "--inversion_steps", "1", "3"]
SMALL += ["--num_inference_steps", "2", "--batch_size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    assert reproduce.main([*SMALL, "--output_dir", str(folder)]) == 0
    return folder


def test_every_method_has_its_row(folder):
    table, claims = (folder / "results.md").read_text().strip().split("\n\n")
    names = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert names == [
        "class word",
        "full description",
        "all words",
        "w0",
        *(f"w0 + local, {x}" for x in LAMBDAS),
        NEW_KINDS,
        "textual inversion, 1 steps",
        "textual inversion, 3 steps",
    ]
    assert len(claims.splitlines()) == 2 + 4
    results = json.loads((folder / "results.json").read_text())
    assert results["scores"].keys() == set(names)
    assert results["settings"]["samples"] == 3 and results["settings"]["inversions"] == 2
    ratio = results["seconds"]["3"] / results["seconds"]["encode"]
    assert f"({ratio:.0f} x)" in table
    for picture in ("grid.png", "grid_new_kinds.png", "curve.png"):
        with Image.open(folder / picture) as sheet:
            assert sheet.width >= 320


def test_words_were_learned_further(folder):
    words = sorted((folder / "inversion").glob("*/*/learned_embeds.safetensors"))
    assert [path.parent.name for path in words] == ["1", "3"] * 2
    assert len({path.read_bytes() for path in words}) == 4


def test_a_second_run_draws_nothing_anew(folder, monkeypatch):
    results = (folder / "results.md").read_text()
    monkeypatch.setattr(methods, "draw_row", lambda *_: pytest.fail("drawn again"))
    assert reproduce.main([*SMALL, "--output_dir", str(folder)]) == 0
    again = (folder / "results.md").read_text()
    assert [line.split("|")[1:11] for line in again.splitlines()] == [
        line.split("|")[1:11] for line in results.splitlines()
    ]


def test_other_settings_draw_anew(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        methods, "draw_row", lambda row, *_: drawn.append(row.name) or torch.zeros(1, 3, 32, 32)
    )
    monkeypatch.setattr(Pictures, "_save", lambda *_: None)
    monkeypatch.setattr(Table, "report", lambda *_: "")
    arguments = [*SMALL, "--output_dir", str(folder)]
    reproduce.main([*arguments, "--guidance_scale", "4"])
    assert len(drawn) == 13
    drawn.clear()
    lost = folder / "drawn" / "w0.npz"
    content = lost.read_bytes()
    lost.unlink()
    reproduce.main(arguments)
    lost.write_bytes(content)
    assert drawn == ["w0"]
    drawn.clear()
    monkeypatch.setattr(inversion, "LEARNING_RATE", 1e-4)
    monkeypatch.setattr(inversion, "invert", lambda *_: {1: 1.0, 3: 3.0})
    reproduce.main(arguments)
    assert drawn == ["textual inversion, 1 steps", "textual inversion, 3 steps"]
    drawn.clear()
    monkeypatch.setattr(score, "FRESH", 8)  # other critters of the same number
    reproduce.main(arguments)
    assert len(drawn) == 13


def test_words_of_another_model_are_learned_anew(folder, tmp_path):
    """Those that are there would be drawn and judged as this model's."""
    copy, model = tmp_path / "reproduce", tmp_path / "model"
    shutil.copytree(folder, copy)
    shutil.copytree(MODEL, model)
    weights = model / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: 0.9 * value for name, value in tensors.items()}, weights, {"format": "pt"})
    learned = sorted((copy / "inversion").glob("*/*/learned_embeds.safetensors"))
    before = [path.read_bytes() for path in learned]
    reproduce.main([*SMALL, "--output_dir", str(copy), "--model", str(model)])
    assert all(path.read_bytes() != old for path, old in zip(learned, before, strict=True))


def test_every_lambda_draws_another_picture(folder):
    pictures = {path.stem: np.load(path)["pictures"] for path in (folder / "drawn").glob("w0*.npz")}
    assert len(pictures) == 1 + len(LAMBDAS)
    assert len({values.tobytes() for values in pictures.values()}) == len(pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "--samples 0: expected 1 or more"),
        (["--inversions", "9", "--samples", "3"], "--inversions 9: expected 0 to --samples 3"),
        (["--inversion_steps", "5", "2"], "each above the last"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        reproduce.main(arguments)
