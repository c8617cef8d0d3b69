"""`data_scripts/cache_latents.py`, and `train_global.py --cache_latents` with what it wrote."""

import json

import pytest

from tests.conftest import run_script
from tests.open_images import UNREADABLE, make_open_images

SCRIPT = "data_scripts/cache_latents.py"


@pytest.fixture(scope="module")
def open_images(tmp_path_factory):
    return make_open_images(tmp_path_factory.mktemp("data"), n=4)


def train(model_folder, mapper_folder, open_images, output_dir, *options):
    return run_script(
        "train_global.py",
        *("--pretrained_model_name_or_path", model_folder, "--train_data_dir", open_images),
        *("--global_mapper_path", mapper_folder / "global_mapper", "--output_dir", output_dir),
        *("--max_train_steps", "2", "--train_batch_size", "2"),
        *("--gradient_accumulation_steps", "1", "--validation_steps", "0", *options),
    )


def losses(output_dir):
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_cached_training_has_the_losses_of_plain_training(
    model_folder, mapper_folder, open_images, tmp_path, capsys
):
    cache = tmp_path / "cache"
    model = ("--pretrained_model_name_or_path", model_folder)
    assert run_script(SCRIPT, open_images, cache, *model, "--device", "cpu") == 0
    output = capsys.readouterr()
    assert f"{cache}: latents of 4 targets at 32 px" in output.out and "4/4" in output.err
    own = (model_folder, mapper_folder, open_images)
    assert train(*own, tmp_path / "plain") == 0
    assert train(*own, tmp_path / "cached", "--cache_latents", cache) == 0
    # the VAE sums in another order for another batch size
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)

    capsys.readouterr()
    options = ("--resolution", "64", "--cache_latents", cache)
    assert train(*own, tmp_path / "other", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {cache}: the latents are of 32 px, not 64 (1 of 1 shards")


def test_unreadable_images_are_listed_and_the_status_is_3(model_folder, tmp_path, capsys):
    root = make_open_images(tmp_path / "data", n=1, oddities=True)
    arguments = (root, tmp_path / "cache", "--pretrained_model_name_or_path", model_folder)
    assert run_script(SCRIPT, *arguments, "--dtype", "float16", "--device", "cpu") == 3
    error = capsys.readouterr().err
    assert "2 images could not be read:" in error
    assert all(f"{name}.jpg: n" in error for name in UNREADABLE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch_size", "0"), "error: --batch_size 0: expected 1 or more"),
        (("--resolution", "30"), "error: --resolution 30: this model needs a multiple of 4; 32 is"),
        (("--revision", "none", "--resolution", "4"), "--resolution 4: expected 8 or more"),
        (("--device", "nowhere"), "error: device 'nowhere' is not available"),
    ],
)
def test_mistakes_give_one_line_and_2(
    model_folder, open_images, tmp_path, capsys, arguments, message
):
    options = ("--pretrained_model_name_or_path", model_folder, *arguments)
    assert run_script(SCRIPT, open_images, tmp_path / "cache", *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "cache").exists()


def test_folder_of_no_model(open_images, tmp_path, capsys):
    options = ("--pretrained_model_name_or_path", tmp_path)
    assert run_script(SCRIPT, open_images, tmp_path / "cache", *options) == 2
    assert f"{tmp_path}: cannot load vae" in capsys.readouterr().err
