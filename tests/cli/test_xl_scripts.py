"""Every script on SDXL: trained, encoded, drawn, scored; the model alone says which family."""

import json

import numpy as np
import pytest
import torch

from app.studio import Order, Studio
from elite import Concept
from small_world.classifier import Judge
from tests import tiny
from tests.conftest import FAST, files, make_pipe, pixels, run_script
from tests.faults.runs import metrics
from tests.open_images import make_open_images

SUBJECT = "06_yellow_solid_square"
TRAINING = (
    *("--max_train_steps", "2", "--gradient_accumulation_steps", "1"),
    *("--hidden_layers", "4", "8", "--mapper_hidden_size", "32", "--mixed_precision", "no"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, xl_folder):
    """`global_mapper/` and `local_mapper/` of two steps each, with a preview."""
    folder = tmp_path_factory.mktemp("trained")
    data, pairs = make_open_images(folder / "data", n=4), tiny.save_pairs(folder / "pairs", 1)
    common = (
        *("--pretrained_model_name_or_path", xl_folder, "--train_data_dir", data, *TRAINING),
        *("--validation_data_dir", pairs, "--validation_steps", "2"),
    )
    assert run_script("train_global.py", *common, "--output_dir", folder / "global") == 0
    mapper = ("--global_mapper_path", folder / "global" / "global_mapper")
    assert run_script("train_local.py", *common, *mapper, "--output_dir", folder / "local") == 0
    for stage in ("global", "local"):
        assert files(folder / stage / "previews") == {"000002.png"}
        (folder / stage / f"{stage}_mapper").rename(folder / f"{stage}_mapper")
    return folder


def test_training_from_shards_and_cached_latents_is_the_same(trained, xl_folder, tmp_path):
    shards, latents = tmp_path / "shards", tmp_path / "latents"
    model = ("--pretrained_model_name_or_path", xl_folder)
    pack = ("data_scripts/make_shards.py", trained / "data", shards)
    assert run_script(*pack) == 0
    assert run_script("data_scripts/cache_latents.py", shards, latents, *model) == 0
    given = ("--train_data_dir", shards, "--cache_latents", latents, "--validation_steps", "0")
    output = ("--output_dir", tmp_path / "out")
    assert run_script("train_global.py", *model, *TRAINING, *given, *output) == 0
    for found, expected in zip(metrics(tmp_path / "out"), metrics(trained / "global"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def models(xl_folder, trained):
    return (
        *("--pretrained_model_name_or_path", xl_folder),
        *("--global_mapper_path", trained / "global_mapper"),
        *("--local_mapper_path", trained / "local_mapper"),
    )


def test_trained_mappers_draw_folders_and_concept_files(trained, models, tmp_path, pairs, capsys):
    drawn = ("inference_local.py", *models, *FAST, "--suffix", "xl", "--llambda", "0.6")
    concepts, data = tmp_path / "concepts", ("--test_data_dir", pairs)
    assert run_script("encode.py", *models, *data, "--output_dir", concepts, *FAST[2:]) == 0
    assert Concept.load(concepts / "pair0.safetensors").family == "sdxl"
    assert run_script(*drawn, *data, "--output_dir", tmp_path / "pairs") == 0
    from_files = ("--concept_path", concepts, "--output_dir", tmp_path / "files")
    assert run_script(*drawn, *from_files) == 0
    for name in ("00000_00042.png", "00001_00042.png"):
        of_pair, of_file = (tmp_path / way / "xl_l0p6" / name for way in ("pairs", "files"))
        assert np.array_equal(pixels(of_pair), pixels(of_file))
    words_alone = (*models[:4], *FAST, *data, "--output_dir", tmp_path)
    assert run_script("inference_global.py", *words_alone) == 0


def test_concepts_of_the_other_family_are_refused(models, tmp_path, concept, capsys):
    concept.save(tmp_path / "sd.safetensors")
    given = ("--concept_path", tmp_path, "--output_dir", tmp_path / "out")
    assert run_script("inference_local.py", *models, *FAST, *given) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1 and "Stable Diffusion 1.x or 2.x, this model is SDXL; encode" in said[0]


def test_scores(models, tmp_path):
    subjects = tiny.save_pairs(tmp_path / "subjects", 1)
    for suffix in ("", "_bg"):
        (subjects / f"pair0{suffix}.png").rename(subjects / f"{SUBJECT}{suffix}.png")
    Judge(widths=(8, 8)).save_pretrained(tmp_path / "judge")
    (tmp_path / "prompts.yaml").write_text("prompts: {object: ['a {} on the grass']}\n")
    given = ("--test_data_dir", subjects, "--prompts", tmp_path / "prompts.yaml")
    given += ("--judge_path", tmp_path / "judge", "--output_dir", tmp_path / "out")
    assert run_script("evaluate.py", *models, *FAST, "--num_images", "1", *given) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["pictures"] == 1


def test_the_app_draws(xl_folder, trained, tmp_path):
    studio = Studio(make_pipe(xl_folder, trained))
    concept = studio.encode(*tiny.picture(0))
    concept.save(tmp_path / "concept.safetensors")
    loaded = studio.load_concept(tmp_path / "concept.safetensors")
    assert torch.equal(loaded.words, concept.words)
    order = Order(studio.check_prompts("a photo of a S"), num_inference_steps=2)
    (drawn,) = next(studio.draw({"S": loaded}, order, lambda *told: None))
    assert drawn.picture.size == (32, 32)
