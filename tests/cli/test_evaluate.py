"""evaluate.py: pictures, scores, reports; what is there is kept, what fails is told."""

import csv
import json
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

from elite.sheets import HEADER, TILE
from evaluation.subjects import read_prompts, read_subjects
from small_world.classifier import Judge
from tests import tiny
from tests.conftest import error_of, run_script

REPOSITORY = Path(__file__).parents[2]
PROMPTS = "prompts: {object: ['a {} on the grass', 'a {} in the snow']}\n"


@pytest.fixture
def subjects(tmp_path):
    """Two objects of the small world by name (the pictures do not matter to a tiny model)."""
    folder = tiny.save_pairs(tmp_path / "subjects", 2)
    for number, name in enumerate(("06_yellow_solid_square", "11_turquoise_red_striped_round")):
        for suffix in ("", "_bg"):
            (folder / f"pair{number}{suffix}.png").rename(folder / f"{name}{suffix}.png")
    return folder


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    """A judge that guesses."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    Judge(widths=(8, 8)).save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(model_folder, mapper_folder, judge_folder, subjects, tmp_path):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(PROMPTS)
    return [
        "evaluate.py",
        *("--pretrained_model_name_or_path", model_folder),
        *("--global_mapper_path", mapper_folder / "global_mapper"),
        *("--local_mapper_path", mapper_folder / "local_mapper"),
        *("--test_data_dir", subjects, "--prompts", prompts, "--judge_path", judge_folder),
        *("--num_inference_steps", "2", "--num_images", "2", "--device", "cpu"),
    ]


def pictures(folder: Path) -> dict[str, bytes]:
    paths = sorted(folder.glob("*/*.png"))
    return {str(path.relative_to(folder)): Image.open(path).tobytes() for path in paths}


def test_everything_is_drawn_scored_and_reported(evaluate, tmp_path):
    out = tmp_path / "out"
    assert run_script(*evaluate, "--output_dir", out) == 0
    stems = [f"{prompt}_{seed}.png" for prompt in ("00", "01") for seed in ("00042", "00043")]
    names = ("06_yellow_solid_square", "11_turquoise_red_striped_round")
    assert list(pictures(out)) == [f"{name}/{stem}" for name in names for stem in stems]
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {row["second"] for row in rows if row["subject"] == names[0]} == {""}
    results = json.loads((out / "results.json").read_text())
    for name in ("body", "pattern", "colour", "scene"):
        right = [float(row[name]) for row in rows]
        assert set(right) <= {0.0, 1.0}
        assert results["scores"][name]["mean"] == pytest.approx(np.mean(right))
        assert f"| {name} | {np.mean(right):.4f} |" in (out / "results.md").read_text()
    assert results["scores"]["second"]["pictures"] == 4
    assert results["settings"]["llambda"] == 0.6
    with Image.open(out / "grid_00.png") as sheet:
        assert sheet.width == 4 * 160  # input, object, two prompts


def scored(out: Path) -> set[str]:
    with open(out / "results.csv", newline="") as file:
        return {row["subject"] for row in csv.DictReader(file)}


def test_pictures_are_those_of_the_inference_script(evaluate, tmp_path):
    """Same prompt, seed and lambda, drawn by inference_local.py."""
    out = tmp_path / "out"
    assert run_script(*evaluate, "--output_dir", out) == 0
    flags = evaluate[1:]
    for name in ("--prompts", "--judge_path"):
        del flags[flags.index(name) : flags.index(name) + 2]
    flags += ["--output_dir", tmp_path / "drawn", "--llambda", "0.6"]
    assert run_script("inference_local.py", *flags, "--template", "a {} in the snow") == 0
    ours = Image.open(out / "11_turquoise_red_striped_round" / "01_00043.png")
    theirs = Image.open(tmp_path / "drawn" / "object_l0p6" / "00001_00043.png")
    assert ours.tobytes() == theirs.tobytes()


def test_a_second_run_draws_what_is_missing(evaluate, tmp_path):
    out = tmp_path / "out"
    assert run_script(*evaluate, "--output_dir", out) == 0
    before, results = pictures(out), (out / "results.json").read_text()
    kept, lost = (out / "06_yellow_solid_square" / f"0{i}_00042.png" for i in (0, 1))
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    assert run_script(*evaluate, "--output_dir", out, "--batch_size", "3") == 0
    assert kept.stat().st_mtime_ns == stamp and lost.exists()
    assert list(pictures(out)) == list(before)
    assert json.loads(results)["scores"] == json.loads((out / "results.json").read_text())["scores"]
    assert run_script(*evaluate, "--output_dir", out, "--llambda", "0") == 0
    assert kept.stat().st_mtime_ns != stamp, "another lambda is another picture"


def test_another_image_encoder_draws_anew(evaluate, model_folder, tmp_path):
    """Concepts depend on it, and no fingerprint of the mappers tells."""
    out = tmp_path / "out"
    picture = out / "06_yellow_solid_square" / "00_00042.png"
    encoder = ("--image_encoder_name_or_path", model_folder / "image_encoder")
    stamps = []
    for options in ((), encoder, encoder):
        assert run_script(*evaluate, "--output_dir", out, *options) == 0
        stamps.append(picture.stat().st_mtime_ns)
    assert stamps[0] < stamps[1] == stamps[2]


def test_another_base_model_of_the_same_path_draws_anew(
    evaluate, model_folder, tmp_path, monkeypatch
):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model_folder, model)
    (out / "grid_01.png").parent.mkdir()
    (out / "grid_01.png").touch()  # of a run of more objects
    command = [model if part == model_folder else part for part in evaluate]
    command += ["--output_dir", out]
    assert run_script(*command) == 0
    assert [path.name for path in out.glob("grid_*")] == ["grid_00.png"]
    before = pictures(out)
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"conv_in.weight": weights["conv_in.weight"] * 1.1}, file)
    assert run_script(*command) == 0
    after = pictures(out)
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())
    config = model / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.1}))
    assert run_script(*command) == 0
    assert not set(pictures(out).values()) & set(after.values()), "of the same weights"


def test_processes_share_the_work(evaluate, tmp_path):
    run_script(*evaluate, "--output_dir", tmp_path / "one")
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "configs/cpu_2.json", *map(str, evaluate)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, "--output_dir", str(tmp_path / "two")],
        cwd=REPOSITORY,
        env=env,
        check=True,
        timeout=300,
        capture_output=True,
    )
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two")
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert one["scores"] == two["scores"] and two["pictures"] == 8


def test_an_unreadable_concept_leaves_the_rest(evaluate, subjects, tmp_path, capsys):
    (subjects / "06_yellow_solid_square.png").write_bytes(b"no picture")
    assert run_script(*evaluate, "--output_dir", tmp_path / "out") == 3
    assert "06_yellow_solid_square.png: not a readable image" in capsys.readouterr().err
    assert len(pictures(tmp_path / "out")) == 4
    (subjects / "11_turquoise_red_striped_round_bg.png").unlink()
    shutil.rmtree(tmp_path / "out")
    assert run_script(*evaluate, "--output_dir", tmp_path / "out") == 2


def test_a_concept_that_broke_since_is_not_scored_by_its_old_pictures(evaluate, subjects, tmp_path):
    out = tmp_path / "out"
    assert run_script(*evaluate, "--output_dir", out) == 0
    (subjects / "06_yellow_solid_square_bg.png").write_bytes(b"no picture")
    assert run_script(*evaluate, "--output_dir", out, "--llambda", "0.1") == 3
    assert scored(out) == {"11_turquoise_red_striped_round"}
    assert json.loads((out / "results.json").read_text())["subjects"] == 1
    with Image.open(out / "grid_00.png") as sheet:
        assert sheet.height == HEADER + TILE


def test_results_of_an_earlier_run_are_told_where_nothing_is_scored(
    evaluate, subjects, tmp_path, capsys
):
    out = tmp_path / "out"
    assert run_script(*evaluate, "--output_dir", out) == 0
    for mask in subjects.glob("*_bg.png"):
        mask.write_bytes(b"no picture")
    assert run_script(*evaluate, "--output_dir", out) == 2
    assert error_of(capsys) == (
        f"error: {out / 'results.json'}: is of an earlier run; nothing was scored in this one"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metrics", "fid"), "metrics: got 'fid', expected one of clip, dino, attributes"),
        (("--metrics", "clip", "--clip_name_or_path", "nowhere"), "nowhere: cannot load CLIPModel"),
        (("--judge_path", "nowhere"), "nowhere: no judge"),
        (("--prompts", "nowhere.yaml"), "nowhere.yaml"),
        (("--test_data_dir", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_one_line(evaluate, tmp_path, capsys, options, message):
    assert run_script(*evaluate, "--output_dir", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_attributes_need_objects_of_the_small_world(evaluate, subjects, tmp_path, capsys):
    (subjects / "06_yellow_solid_square.png").rename(subjects / "corgi.png")
    (subjects / "06_yellow_solid_square_bg.png").rename(subjects / "corgi_bg.png")
    assert run_script(*evaluate, "--output_dir", tmp_path / "out") == 2
    assert "corgi: no object of the small world" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_shipped_prompts_fit_the_shipped_objects():
    prompts = read_prompts(REPOSITORY / "configs/prompts/small_world.yaml")
    assert len(read_subjects(REPOSITORY / "test_datasets", prompts.classes, "object")) == 16
