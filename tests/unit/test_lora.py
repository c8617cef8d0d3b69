"""LoRA files in the weights: as added by hand, several of them, of other programs; and bad ones."""

import pickle
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from elite import ElitePipeline
from elite import lora as lora_module
from elite.loading import load_stable_diffusion, make_scheduler, stock_pipeline
from elite.lora import WEIGHTS, find_lora, fuse_loras
from elite.mappers import cross_attention_layers
from elite.speed import RUNGS
from tests import tiny
from tests.conftest import make_pipe
from tests.tiny import draw, relative, save_lora

# Only the order of sums differs.
CLOSE = 1e-4

peft = pytest.importorskip("peft")

Added = dict[str, torch.Tensor]


@pytest.fixture
def files(pipe, tmp_path) -> dict[Path, Added]:
    """Two LoRA files, and what each adds to the weights."""
    paths = [tmp_path / name for name in ("lcm.safetensors", "ink_blue.safetensors")]
    return {path: save_lora(path, pipe, seed) for seed, path in enumerate(paths)}


@torch.no_grad()
def add_by_hand(pipe: ElitePipeline, added: Added, weight: float) -> None:
    """To the modules' weights, and of to_k and to_v of attn2 to K_g and V_g as well."""
    for name, delta in added.items():
        part, _, module = name.partition(".")
        getattr(pipe, part).get_submodule(module).weight += weight * delta
        attn, _, projection = module.rpartition(".")
        if attn.endswith("attn2") and projection in ("to_k", "to_v"):
            processor = pipe.unet.get_submodule(attn).processor
            (processor.K_g if projection == "to_k" else processor.V_g).weight += weight * delta


def modules(pipe: ElitePipeline) -> list[str]:
    """Names and kinds of all modules."""
    return [
        f"{part}.{name} {type(module).__name__}"
        for part in ("unet", "text_encoder", "global_mapper")
        for name, module in getattr(pipe, part).named_modules()
    ]


# --- what they add --------------------------------------------------------------------------------


def test_a_picture_is_that_of_merged_weights(pipe, whole_model, concept, files):
    """Of two LoRAs with weights, together; and nothing of peft is left."""
    plain, before = draw(pipe, concept=concept), modules(pipe)
    (first, of_first), (second, of_second) = files.items()
    names = fuse_loras(pipe, [str(first), f"{second}:-0.5"])
    assert modules(pipe) == before
    assert [name.split(" (")[0] for name in names] == ["lcm 1", "ink_blue -0.5"]
    by_hand = ElitePipeline.from_stable_diffusion(whole_model)
    by_hand.set_progress_bar_config(disable=True)
    add_by_hand(by_hand, of_first, 1.0)
    alone = draw(by_hand, concept=concept)
    add_by_hand(by_hand, of_second, -0.5)
    expected = draw(by_hand, concept=concept)
    assert relative(draw(pipe, concept=concept), expected) < CLOSE
    assert relative(alone, expected) > 100 * CLOSE and relative(plain, expected) > 100 * CLOSE


def test_a_picture_of_sdxl_is_that_of_merged_weights(xl_folder, tmp_path):
    """Of both text encoders, too."""
    tiny.save_mappers(tmp_path, xl_folder)
    pipe, by_hand = (make_pipe(xl_folder, tmp_path) for _ in range(2))
    concept = pipe.encode_concept(*tiny.picture(0))
    plain = draw(pipe, concept=concept)
    added = save_lora(tmp_path / "lora.safetensors", pipe)
    assert {name.split(".")[0] for name in added} == {"unet", "text_encoder", "text_encoder_2"}
    fuse_loras(pipe, [f"{tmp_path / 'lora.safetensors'}:0.5"])
    add_by_hand(by_hand, added, 0.5)
    expected = draw(by_hand, concept=concept)
    assert relative(draw(pipe, concept=concept), expected) < CLOSE
    assert relative(plain, expected) > 100 * CLOSE


def test_elites_projections_get_what_those_of_the_unet_get(pipe, files):
    path, added = next(iter(files.items()))
    layers = cross_attention_layers(pipe.unet).values()
    before = [(a.processor.K_g.weight.clone(), a.processor.V_g.weight.clone()) for a in layers]
    fuse_loras(pipe, [f"{path}:0.3"])
    for attn, (K_g, V_g) in zip(layers, before, strict=True):
        name = next(name for name, module in pipe.unet.named_modules() if module is attn)
        for now, then, projection in (("K_g", K_g, "to_k"), ("V_g", V_g, "to_v")):
            gained = getattr(attn.processor, now).weight - then
            torch.testing.assert_close(gained, 0.3 * added[f"unet.{name}.{projection}"])


def test_fused_draws_as_loaded_by_diffusers(pipe, whole_model, concept, files):
    """Whose adapters stay beside the weights and add to K and V as these are computed."""
    loaded = ElitePipeline.from_stable_diffusion(whole_model)
    loaded.set_progress_bar_config(disable=True)
    for name, path in zip(("a", "b"), files, strict=True):
        loaded.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    loaded.set_adapters(["a", "b"], [0.7, 0.4])
    first, second = files
    fuse_loras(pipe, [f"{first}:0.7", f"{second}:0.4"])
    expected = draw(loaded, concept=concept)
    assert relative(draw(pipe, concept=concept), expected) < CLOSE


def test_the_concept_is_still_drawn(pipe, concept, files):
    fuse_loras(pipe, [f"{next(iter(files))}:0.2"])
    drawn = draw(pipe, concept=concept)
    for other in ({"lambda_": 0.0}, {"concept": pipe.encode_concept(*tiny.picture(1))}):
        assert relative(draw(pipe, **{"concept": concept, **other}), drawn) > 100 * CLOSE


@pytest.mark.parametrize("speed", RUNGS)
def test_few_steps_without_guidance_at_every_speed(pipe, concept, files, speed):
    """A batch equals single calls, and the UNet sees the rows of the prompts alone."""
    fuse_loras(pipe, [str(next(iter(files)))])
    pipe.scheduler = make_scheduler("lcm")
    options = {"concept": concept, "speed": speed, "num_inference_steps": 4, "guidance_scale": 1.0}
    rows: list[int] = []
    with pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]))):
        together = draw(pipe, ["a S", "S, far away"], seed=[3, 5], **options)
    assert rows == [2] * 4
    for row, (prompt, seed) in enumerate((("a S", 3), ("S, far away", 5))):
        assert relative(together[row : row + 1], draw(pipe, prompt, seed=seed, **options)) < CLOSE


def test_plain_stable_diffusion_has_it_too(pipe, whole_model, files):
    path = str(next(iter(files)))
    pipe_names = fuse_loras(pipe, [path])
    stock = stock_pipeline(load_stable_diffusion(whole_model))
    assert fuse_loras(stock, [path]) == pipe_names
    pipe.uninstall()
    for name, weight in stock.unet.state_dict().items():
        torch.testing.assert_close(pipe.unet.state_dict()[name], weight)


def test_files_of_diffusers_are_read(pipe, whole_model, concept, files, tmp_path):
    """Its names of tensors, in the folder that it makes."""
    path = next(iter(files))
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    layers = {
        f"{part}_lora_layers": peft.get_peft_model_state_dict(
            getattr(pipe, part), adapter_name="default_0"
        )
        for part in ("unet", "text_encoder")
    }
    factor = 0.5  # alpha / rank, of which these files say nothing
    layers = {
        part: {key: x * (factor if "lora_B" in key else 1) for key, x in tensors.items()}
        for part, tensors in layers.items()
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path / "folder", **layers)
    pipe.unload_lora_weights()
    other = ElitePipeline.from_stable_diffusion(whole_model)
    other.set_progress_bar_config(disable=True)
    fuse_loras(other, [str(tmp_path / "folder")])
    fuse_loras(pipe, [str(path)])
    assert relative(draw(other, concept=concept), draw(pipe, concept=concept)) < CLOSE


def test_a_fused_lora_is_saved_a_loaded_one_refused(pipe, concept, files, tmp_path):
    """What diffusers had loaded, or fused, was saved under names that nothing reads."""
    path, folder = next(iter(files)), tmp_path / "saved"
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"text_encoder is wrapped for LoRAs, .*; call"):
            pipe.save_pretrained(folder)
        pipe.fuse_lora()
    assert not folder.exists()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    fuse_loras(pipe, [str(path)])
    expected = draw(pipe, concept=concept)
    pipe.save_pretrained(folder)
    loaded = ElitePipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, concept=concept), expected)


def test_a_loaded_lora_of_sdxl_is_not_saved(xl_folder, tmp_path):
    tiny.save_mappers(tmp_path, xl_folder)
    pipe = make_pipe(xl_folder, tmp_path)
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="unet is wrapped for LoRAs, and cannot be saved so; call"):
        pipe.save_pretrained(tmp_path / "saved")


# --- which file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "weight"), [("", 1.0), (":0.5", 0.5), (":-1", -1.0), (":.25", 0.25), (":2.", 2.0)]
)
def test_weights(files, ending, weight):
    path = next(iter(files))
    found = find_lora(f"{path}{ending}")
    assert (found.name, found.path, found.weight) == ("lcm", path, weight)


def test_a_colon_may_be_part_of_a_name(files, tmp_path):
    path = next(iter(files)).rename(tmp_path / "ink: 2.safetensors")
    assert find_lora(f"{path}:0.5").path == find_lora(str(path)).path == path


def test_another_content_has_another_name(files):
    path = next(iter(files))
    before = str(find_lora(str(path)))
    save_file({key: x + 1 for key, x in load_file(path).items()}, path)
    assert str(find_lora(str(path))) != before


@pytest.mark.parametrize(
    ("given", "name", "asked"),
    [
        ("maker/lcm-lora-sdv1-5", "lcm-lora-sdv1-5", ("maker/lcm-lora-sdv1-5", WEIGHTS)),
        ("maker/few/4steps.safetensors:0.5", "4steps", ("maker/few", "4steps.safetensors")),
    ],
)
def test_of_the_hub(files, monkeypatch, given, name, asked):
    """One that is imitated."""
    calls: list[tuple[str, str]] = []
    path = next(iter(files))
    monkeypatch.setattr(lora_module, "hf_hub_download", lambda *a: calls.append(a) or str(path))
    found = find_lora(given)
    assert calls == [asked] and (found.name, found.path) == (name, path)


# --- bad files ------------------------------------------------------------------------------------


class Boom:
    def __reduce__(self):
        return (pytest.fail, ("a stranger's code has run",))


def bad_tensors(tensors: Added) -> dict[str, Added]:
    """Files by what is wrong with them."""
    first = next(key for key in tensors if key.endswith("lora_down.weight"))
    up = first.replace("down", "up")
    wide = {key: torch.cat([x, x], 1) if "lora_down" in key else x for key, x in tensors.items()}
    return {
        "elsewhere": {key.replace("_blocks_0", "_blocks_7"): x for key, x in tensors.items()},
        "wide": wide,
        "half": {key: x for key, x in tensors.items() if key != up},
        "no_lora": {"mapping_0.weight": tensors[first]},
        "empty": {},
        "nan": {**tensors, up: tensors[up] * float("nan")},
        "dora": {**tensors, first.replace("lora_down.weight", "dora_scale"): tensors[up][:, 0]},
    }


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("elsewhere", r"of its 60 layers are in this model; it is a LoRA of another"),
        ("wide", "not a LoRA of this model"),
        ("half", "not a LoRA of this model"),
        ("no_lora", "not a LoRA of this model"),
        ("empty", "0 of its 0 layers"),
        ("nan", "cannot be added to the weights"),
        ("dora", "is a DoRA"),
    ],
)
def test_bad_tensors_are_named(pipe, files, tmp_path, kind, message):
    path = tmp_path / f"{kind}.safetensors"
    tensors = bad_tensors(load_file(next(iter(files))))[kind]
    save_file({key: x.clone() for key, x in tensors.items()}, path)
    with pytest.raises(ValueError, match=message) as raised:
        fuse_loras(pipe, [str(path)])
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("boom.bin", "are read as .safetensors alone"),
        ("boom.pt", "are read as .safetensors alone"),
        ("boom.safetensors", "not a LoRA of this model"),
        ("folder", "no such LoRA file"),
        ("nowhere.safetensors", "no such LoRA file; expected"),
        ("", "no such LoRA file; expected"),
    ],
)
def test_nothing_is_unpickled(pipe, tmp_path, name, message):
    for ending in ("bin", "pt", "safetensors"):
        (tmp_path / f"boom.{ending}").write_bytes(pickle.dumps({"lora": Boom()}))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(ValueError, match=message) as raised:
        fuse_loras(pipe, [str(tmp_path / name)])
    assert "\n" not in str(raised.value)


def test_without_peft_the_remedy_is_named(pipe, files, monkeypatch):
    monkeypatch.setattr(lora_module, "is_peft_available", lambda: False)
    with pytest.raises(ValueError, match="pip install peft"):
        fuse_loras(pipe, [str(next(iter(files)))])


def test_what_the_hub_does_not_have(monkeypatch):
    def offline(*_):
        raise OSError("cannot reach it\nand so on")

    monkeypatch.setattr(lora_module, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"a/b: no such LoRA file .* \(cannot reach it\)$"):
        find_lora("a/b")


def test_loras_go_to_the_pipelines_own_mappers(pipe, model_folder, mapper_folder, concept, files):
    """Of two pipelines with one UNet the other one's K and V got them."""
    given = list(map(str, files))
    alone = make_pipe(model_folder, mapper_folder)
    fuse_loras(alone, given)
    global_mapper, local_mapper = tiny.build_mappers(model_folder, seed=5)
    parts = {**pipe.components, "global_mapper": global_mapper, "local_mapper": local_mapper}
    ElitePipeline(**parts)
    fuse_loras(pipe, given)
    assert torch.equal(draw(pipe, concept=concept), draw(alone, concept=concept))
