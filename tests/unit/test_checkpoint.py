"""Mapper checkpoints: key names at full size, both directions bit for bit, and bad files."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from elite import GlobalMapper, LocalMapper
from elite.checkpoint import load_mapper, load_official, mapper_from_state_dict
from elite.mappers import Mapper
from tests import tiny

OFFICIAL = (
    Path(__file__).resolve().parents[1] / "parity" / "golden" / "official_checkpoint_keys.json"
)
KINDS = {"global_mapper": GlobalMapper, "local_mapper": LocalMapper}


# --- full size ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official() -> dict:
    return json.loads(OFFICIAL.read_text())


@pytest.fixture(scope="module")
def full_size(official) -> tuple[UNet2DConditionModel, CLIPVisionModel]:
    """Stable Diffusion v1-4's UNet and CLIP ViT-L/14 without memory."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    with torch.device("meta"):
        return UNet2DConditionModel(**official["unet_config"]), CLIPVisionModel(vision)


def shapes(mapper: Mapper) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in mapper.state_dict().items()}


@pytest.mark.parametrize("name", KINDS)
def test_keys_and_shapes_are_the_releases(official, full_size, name):
    with torch.device("meta"):
        mapper = KINDS[name].for_models(*full_size)
    assert sum(p.numel() for p in full_size[0].parameters()) == official["unet_params"]
    assert shapes(mapper) == official[name]["keys"]
    assert len(shapes(mapper)) == official[name]["n_keys"] == 132
    assert sum(p.numel() for p in mapper.parameters()) == official[name]["params"]


@pytest.mark.parametrize("name", KINDS)
def test_release_state_dict_loads_at_full_size(official, full_size, name):
    state = {
        key: torch.empty(shape, device="meta") for key, shape in official[name]["keys"].items()
    }
    mapper = mapper_from_state_dict(KINDS[name], state, *full_size)
    assert shapes(mapper) == official[name]["keys"]
    assert tuple(mapper.config.hidden_layers) == (4, 8, 12, 16)


# --- round trips ----------------------------------------------------------------------------------


@pytest.fixture
def state(mappers) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in mappers[0].state_dict().items()}


def save(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


@pytest.mark.parametrize("name", KINDS)
def test_release_ours_release_is_bit_identical(tmp_path, parts, mappers, name):
    models = parts["unet"], parts["image_encoder"]
    original = mappers[list(KINDS).index(name)].state_dict()
    # The order of keys means nothing.
    save({key: original[key] for key in reversed(original)}, tmp_path / "release.pt")

    ours = load_mapper(KINDS[name], tmp_path / "release.pt", *models)
    assert equal(ours.state_dict(), original)
    ours.save_pretrained(tmp_path / "ours")
    again = load_mapper(KINDS[name], tmp_path / "ours", *models)
    tiny.save_official(again, tmp_path / "again.pt")
    state = torch.load(tmp_path / "again.pt", weights_only=True)
    assert equal(state, original)
    assert all(type(value) is torch.Tensor for value in state.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_nothing(tmp_path, parts, state, dtype):
    """Half as many bytes on disk; the folder's weights are widened when loaded."""
    models = parts["unet"], parts["image_encoder"]
    halves = {key: value.to(dtype) for key, value in state.items()}
    mapper = mapper_from_state_dict(GlobalMapper, halves, *models)
    assert equal(mapper.state_dict(), halves)
    mapper.save_pretrained(tmp_path)
    loaded = load_mapper(GlobalMapper, tmp_path, *models).state_dict()
    assert equal({key: value.to(dtype) for key, value in loaded.items()}, halves)


def test_string_paths_work(parts, release_folder, mapper_folder):
    models = parts["unet"], parts["image_encoder"]
    load_mapper(GlobalMapper, str(release_folder / "global_mapper.pt"), *models)
    load_mapper(LocalMapper, str(mapper_folder / "local_mapper"), *models)


def test_a_missing_folder_is_no_name_on_the_hub(tmp_path, parts):
    models = parts["unet"], parts["image_encoder"]
    for path in (tmp_path / "global_mapper", "runs/global/global_mapper", "./mapper"):
        with pytest.raises(ValueError, match="no such folder; expected the GlobalMapper that"):
            load_mapper(GlobalMapper, path, *models)


def test_folder_keeps_its_own_levels(tmp_path, parts):
    """A release file says nothing of its levels; our folder does."""
    models = parts["unet"], parts["image_encoder"]
    GlobalMapper.for_models(*models, hidden_dim=8, hidden_layers=(0, 3)).save_pretrained(tmp_path)
    loaded = load_mapper(GlobalMapper, tmp_path, *models)
    assert list(loaded.config.hidden_layers) == [0, 3] and loaded.config.hidden_dim == 8


# --- files that do not fit ------------------------------------------------------------------------


def complaint(parts, path: Path | str, kind: type[Mapper] = GlobalMapper) -> str:
    with pytest.raises(ValueError) as caught:
        load_mapper(kind, path, parts["unet"], parts["image_encoder"])
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_wrong_missing_and_extra_keys_are_listed_at_once(tmp_path, parts, state):
    state.pop("mapping_1.3.bias")
    state["surplus.weight"] = torch.zeros(2)
    state["mapping_0.6.weight"] = torch.zeros(3, 3)
    message = complaint(parts, save(state, tmp_path / "x.pt"))
    assert "missing 1: mapping_1.3.bias" in message
    assert "unexpected 1: surplus.weight" in message
    assert "mapping_0.6.weight is (3, 3), expected (24, 32)" in message


def test_many_bad_keys_make_one_readable_line(tmp_path, parts, state):
    extra = {f"surplus_{i}": torch.zeros(1) for i in range(200)}
    message = complaint(parts, save(state | extra, tmp_path / "x.pt"))
    assert "unexpected 200: " in message and "and 194 more" in message and len(message) < 600


def test_mapper_of_another_model_is_refused(tmp_path, parts):
    unet = type(parts["unet"]).from_config(dict(parts["unet"].config), cross_attention_dim=40)
    foreign = GlobalMapper.for_models(unet, parts["image_encoder"], 32, tiny.HIDDEN_LAYERS)
    tiny.save_official(foreign, tmp_path / "x.pt")
    assert "is (40, 32), expected (24, 32)" in complaint(parts, tmp_path / "x.pt")
    foreign.save_pretrained(tmp_path / "folder")
    assert "trained for another model" in complaint(parts, tmp_path / "folder")


def test_a_mapper_of_the_other_stage_is_refused(tmp_path, parts, mappers):
    """Each was loaded as the other, and drew other pictures."""
    for name, mapper in zip(KINDS, reversed(mappers), strict=True):
        kind, found = KINDS[name].__name__, type(mapper).__name__
        mapper.save_pretrained(tmp_path / name)
        message = complaint(parts, tmp_path / name, KINDS[name])
        assert f"not a {kind} folder" in message and f"is of a {found!r}" in message


def test_wrong_weights_of_a_folder_are_listed(tmp_path, parts, mappers):
    """They were random, or left out without a word."""
    mappers[0].save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    weights = load_file(path)
    del weights["mapping_0.0.weight"]
    save_file({**weights, "surplus": torch.zeros(2)}, path)
    message = complaint(parts, tmp_path)
    assert "missing 1: mapping_0.0.weight" in message and "unexpected 1: surplus" in message


def test_other_files_beside_the_weights_count_for_nothing(tmp_path, parts, mappers):
    mappers[0].save_pretrained(tmp_path)
    save_file({"words": torch.zeros(2)}, tmp_path / "concept.safetensors")
    (path,) = tmp_path.glob("diffusion*.safetensors")
    whole = load_file(path)
    load_mapper(GlobalMapper, tmp_path, parts["unet"], parts["image_encoder"])
    save_file({k: v for k, v in whole.items() if k != "mapping_0.0.weight"}, path)
    save_file(whole, path.with_suffix(".fp16.safetensors"))
    assert "missing 1: mapping_0.0.weight" in complaint(parts, tmp_path)


def test_folder_with_a_damaged_config_is_refused(tmp_path, parts, mappers):
    mappers[0].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    complaint(parts, tmp_path)


def test_folder_with_damaged_weights_is_refused(tmp_path, parts, mappers):
    mappers[0].save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    complaint(parts, tmp_path)


@pytest.mark.parametrize("name", ["nothing.pt", "nothing"])
def test_missing_file_or_folder(tmp_path, parts, name):
    complaint(parts, tmp_path / name)


class Malicious:
    """Pickled code: whoever reads it writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.write_text, (self.trace, "executed")


@pytest.mark.parametrize("how", ["torch", "pickle", "beside tensors"])
def test_pickled_code_is_refused_and_never_executed(tmp_path, parts, state, how):
    trace, path = tmp_path / "trace", tmp_path / "x.pt"
    content = {**state, "extra": Malicious(trace)} if how == "beside tensors" else Malicious(trace)
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        save(content, path)
    assert "refused" in complaint(parts, path)
    assert not trace.exists()
    if how != "pickle":  # the trap works
        torch.load(path, weights_only=False)
        assert trace.read_text() == "executed"


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"state_dict": {"a": torch.zeros(1)}}, torch.zeros(3), {"mapping_0.0.weight": 3}],
    ids=["list", "nested", "tensor", "number"],
)
def test_other_plain_content_is_refused(tmp_path, content):
    save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="expected a flat state dict"):
        load_official(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_damaged_file_is_refused(tmp_path, parts, content):
    (tmp_path / "x.pt").write_bytes(content)
    complaint(parts, tmp_path / "x.pt")
