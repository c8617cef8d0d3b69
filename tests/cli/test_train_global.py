"""`train_global.py` and its own flags."""

import json

import pytest
from safetensors.torch import load_file

from tests.conftest import run_script
from tests.open_images import make_open_images


@pytest.mark.parametrize(
    ("flags", "kv_step"), [((), 1e-3), (("--kv_learning_rate", "1e-5", "--crop_to_object"), 1e-5)]
)
def test_k_and_v_learn_at_their_own_rate(
    flags, kv_step, model_folder, mapper_folder, tmp_path, capsys
):
    """The first step of AdamW moves a weight by the learning rate."""
    start = mapper_folder / "global_mapper"
    status = run_script(
        "train_global.py",
        *("--pretrained_model_name_or_path", model_folder, "--global_mapper_path", start),
        *("--train_data_dir", make_open_images(tmp_path / "data", n=4), "--output_dir", tmp_path),
        *("--max_train_steps", "1", "--train_batch_size", "2", "--validation_steps", "0"),
        *("--learning_rate", "1e-3", "--adam_weight_decay", "0", *flags),
    )
    assert status == 0
    config = json.loads((tmp_path / "global_mapper" / "config.json").read_text())
    assert config["crop_to_object"] is ("--crop_to_object" in flags)
    said = f"the trained mapper is in {tmp_path / 'global_mapper'}\n"
    assert capsys.readouterr().out.endswith(said)
    file = "diffusion_pytorch_model.safetensors"
    before, after = load_file(start / file), load_file(tmp_path / "global_mapper" / file)
    for name, weights in before.items():
        is_kv = name.endswith(("_to_k.weight", "_to_v.weight"))
        step = float((after[name] - weights).abs().max())
        assert step == pytest.approx(kv_step if is_kv else 1e-3, rel=0.02), name


@pytest.mark.parametrize(
    ("flags", "asked"),
    [(("--hidden_layers", "2", "4"), "[2, 4]"), (("--mapper_hidden_size", "64"), "64")],
)
def test_a_mapper_that_is_there_keeps_its_shape(
    flags, asked, model_folder, mapper_folder, tmp_path, capsys
):
    start = mapper_folder / "global_mapper"
    given = ("--pretrained_model_name_or_path", model_folder, "--global_mapper_path", start)
    status = run_script("train_global.py", *given, "--train_data_dir", tmp_path, *flags)
    said = capsys.readouterr().err
    assert status == 2 and f"{flags[0]} {asked}: {start} has " in said, said
