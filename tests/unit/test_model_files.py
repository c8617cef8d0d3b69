"""Models as others keep them: fp16 variants, and checkpoints in a single file."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_scripts.cache_latents import main as cache_latents
from elite.loading import load_parts, load_stable_diffusion, stock_pipeline
from tests import tiny
from tests.conftest import FAST, run_script, same_pictures
from tests.open_images import make_open_images
from tests.single_file import save_single_file


@pytest.fixture(scope="module")
def fp16(tmp_path_factory, model_folder):
    """The model folder with the names of fp16 weights; its values are float32."""
    folder = tmp_path_factory.mktemp("fp16") / "model"
    shutil.copytree(model_folder, folder)
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    return folder


@pytest.fixture(params=["sd", "xl"])
def family(request, model_folder, xl_folder):
    return {"sd": model_folder, "xl": xl_folder}[request.param]


def assert_equal(parts: dict, others: dict) -> None:
    assert parts.keys() == others.keys()
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            state, other = part.state_dict(), others[name].state_dict()
            assert state.keys() == other.keys(), name
            for key, value in state.items():
                assert torch.equal(value, other[key]), f"{name}: {key}"
                assert other[key].dtype == value.dtype and not other[key].is_meta
    assert dict(parts["scheduler"].config) == dict(others["scheduler"].config)


def test_variant_is_read(fp16, model_folder):
    assert_equal(load_parts(model_folder), load_parts(fp16, variant="fp16"))


def test_image_encoder_may_have_no_variant(fp16, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(fp16, folder)
    shutil.rmtree(folder / "image_encoder")
    shutil.copytree(model_folder / "image_encoder", folder / "image_encoder")
    assert_equal(load_parts(model_folder), load_parts(folder, variant="fp16"))


@pytest.mark.parametrize("variant", [None, "fp8"])
def test_variant_there_is_is_named(fp16, variant):
    with pytest.raises(ValueError, match=r"its weights are of a variant, choose --variant fp16$"):
        load_parts(fp16, variant=variant)


@pytest.fixture
def configs(family, tmp_path):
    """What a folder in diffusers layout has besides its weights."""
    stock_pipeline(load_stable_diffusion(family)).save_pretrained(tmp_path / "configs")
    for path in (tmp_path / "configs").rglob("*.safetensors"):
        path.unlink()
    return tmp_path / "configs"


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_single_file_gives_the_parts_of_the_folder(family, configs, tmp_path, ending):
    expected = load_stable_diffusion(family)
    if ending == "ckpt" and "text_encoder_2" in expected:
        pytest.skip("SDXL is handed on as safetensors")
    path = save_single_file(expected, tmp_path / f"model.{ending}")
    found = load_stable_diffusion(path, single_file_config=configs)
    assert_equal(expected, found)
    assert len(found["tokenizer"]) == len(expected["tokenizer"])
    assert found["tokenizer"].model_max_length == tiny.TEXT_LENGTH


class Bomb:
    """Raises when unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


def test_other_files_are_refused_in_one_line(tmp_path):
    torch.save({"state_dict": Bomb()}, tmp_path / "code.ckpt")
    (tmp_path / "text.ckpt").write_text("x")
    (tmp_path / "text.safetensors").write_text("x")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match="cannot load this single file") as caught:
            load_stable_diffusion(path, single_file_config=tmp_path)
        assert "\n" not in str(caught.value) and "--single_file_config" in str(caught.value)


def test_scripts_draw_from_either(whole_model, fp16, tmp_path):
    """ELITE's pictures of a single file and of a variant are those of the folder."""
    stock_pipeline(load_stable_diffusion(whole_model)).save_pretrained(tmp_path / "configs")
    file = save_single_file(load_stable_diffusion(whole_model), tmp_path / "model.safetensors")
    tiny.save_pairs(tmp_path / "pairs", 1)
    mappers = [f"--{k}_mapper_path={whole_model / f'{k}_mapper'}" for k in ("global", "local")]
    common = (*FAST, *mappers, "--test_data_dir", tmp_path / "pairs")
    single = ("--single_file_config", tmp_path / "configs")
    encoder = ("--image_encoder_name_or_path", whole_model / "image_encoder")
    for name, options in {
        "folder": (whole_model,),
        "file": (file, *single, *encoder),
        "variant": (fp16, "--variant", "fp16"),
    }.items():
        model = ("--pretrained_model_name_or_path", *options, "--output_dir", tmp_path / name)
        assert run_script("inference_local.py", *common, *model) == 0
    folder, *others = (tmp_path / name / "object_l0p8" for name in ("folder", "file", "variant"))
    assert all(same_pictures(folder, other) for other in others)


def test_latents_of_either_are_cached(model_folder, fp16, tmp_path):
    make_open_images(tmp_path / "set", n=2)
    stock_pipeline(load_stable_diffusion(model_folder)).save_pretrained(tmp_path / "configs")
    file = save_single_file(load_stable_diffusion(model_folder), tmp_path / "model.safetensors")
    written = []
    for model, *options in (
        (model_folder,),
        (fp16, "--variant", "fp16"),
        (file, "--single_file_config", str(tmp_path / "configs")),
    ):
        arguments = [str(tmp_path / "set"), str(tmp_path / "latents"), "--device", "cpu", *options]
        assert cache_latents([*arguments, "--pretrained_model_name_or_path", str(model)]) == 0
        (shard,) = (tmp_path / "latents").glob("*.safetensors")
        written.append(shard.stat().st_mtime_ns)
    assert len(set(written)) == 1  # the others found the first one's shard to be theirs


def without_a_weight(folder, part, start):
    """Rewrites a part's file without the weights whose names begin so."""
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    kept = {key: value for key, value in weights.items() if not key.startswith(start)}
    assert 0 < len(kept) < len(weights)
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "start"),
    [
        ("text_encoder", "text_model.encoder.layers.0"),
        ("image_encoder", "vision_model.encoder.layers.0"),
        ("unet", "conv_in"),
        ("vae", "decoder.conv_in"),
    ],
)
def test_missing_weights_are_named(model_folder, tmp_path, part, start):
    """Loaders fill them with random numbers, and other pictures came each time."""
    shutil.copytree(model_folder, tmp_path / "model")
    (path,) = (tmp_path / "model" / part).glob("*.safetensors")
    if not any(key.startswith(start) for key in load_file(path)):
        start = start.partition(".")[2]  # transformers' newer names
    without_a_weight(tmp_path / "model", part, start)
    said = rf"model.{{1,2}}{part}:? has no weights for .*; it is damaged or of"
    with pytest.raises(ValueError, match=said):
        load_parts(tmp_path / "model")
