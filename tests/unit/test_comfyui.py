"""ELITE's patches for ComfyUI against our own attention: in a stand-in of ComfyUI's transformer
block always, and in ComfyUI itself where COMFYUI names a checkout of it, with its requirements
installed."""

import importlib
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from elite import ElitePipeline, GlobalMapper, LocalMapper
from elite.attention import EliteAttnProcessor, local_inputs
from elite.loading import make_scheduler
from elite.mappers import Mapper, cross_attention_layers
from tests import tiny
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "integrations" / "comfyui"
COMFYUI = os.environ.get("COMFYUI")
OF_COMFYUI = (
    *("comfy", "comfy.conds", "comfy.model_management", "comfy.utils", "comfy.patcher_extension"),
    "folder_paths",
)
OF_OURS = tuple(f"integrations.comfyui{name}" for name in ("", ".nodes", ".models", ".patches"))
CLOSE = 1e-5  # of float32: sums are taken in another order
PROMPT, NEGATIVE = "a photo of a S, in the snow", "blurry"


def is_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= CLOSE * b.abs().max().clamp(min=1))


# --- a stand-in of ComfyUI's block ----------------------------------------------------------------


@pytest.fixture(scope="module")
def patches() -> ModuleType:
    """The part of the integration that imports nothing of ComfyUI."""
    spec = importlib.util.spec_from_file_location("comfyui_patches", FOLDER / "patches.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def in_comfy(patches, layer, attn, mappers, states, context, shown=None) -> Tensor:
    """An attn2 as ComfyUI calls it with a replacement: its projections, here with K_g and V_g in
    the weights, the patch between them, and the options of the block."""
    q = attn.to_q(states)
    k, v = (mappers[0].projection(layer, name)(context) for name in ("to_k", "to_v"))
    options = {"n_heads": attn.heads, "dim_head": q.shape[2] // attn.heads, "block": ("input", 1)}
    seen: list[dict] = []

    def unet(*args, **kwargs):
        seen.append(args[-1])
        assert not kwargs
        return args[0]

    rides = {} if shown is None else {patches.KEY: shown}
    patches.hand_on(unet, states, None, context, None, None, options, **rides)
    assert patches.KEY not in options  # nothing stays behind
    return attn.to_out[0](patches.attention_patch(layer)(q, k, v, seen[0]))


@pytest.mark.parametrize("count", [0, 1, 2])
@torch.no_grad()
def test_the_patched_attention_is_ours(patches, parts, mappers, count):
    torch.manual_seed(5)
    context, f = torch.randn(3, 77, 24), torch.randn(2, 1, 16, 24)
    lambdas, places = (0.8, 0.3), (4, 9)
    for layer, attn in cross_attention_layers(parts["unet"]).items():
        states = torch.randn(3, 64, attn.to_q.in_features)
        projections = [m.projection(layer, name) for m in mappers for name in ("to_k", "to_v")]
        local: list[Tensor] = []
        concepts = []
        for n in range(count):
            index = torch.tensor([places[n]]).expand(3)
            local += local_inputs(f[n].expand(3, -1, -1), index, lambdas[n], 77)
            branch = patches.LocalBranch(mappers[1], f[n], lambdas[n])
            concepts.append((places[n], branch))
        ours = EliteAttnProcessor(*projections)(attn, states, (context, local))
        shown = patches.Shown(tuple(concepts)) if count else None
        theirs = in_comfy(patches, layer, attn, mappers, states, context, shown)
        assert is_close(theirs, ours)
        if count:
            plain = EliteAttnProcessor(*projections)(attn, states, context)
            assert not is_close(theirs, plain)


@torch.no_grad()
def test_casts_leave_what_was_read(patches, parts, mappers):
    """Half precision between two calls in float32 rounds nothing; one cast of a layer is kept."""
    branch = patches.LocalBranch(mappers[1], torch.randn(1, 16, 24), 0.8)
    layer, attn = next(iter(cross_attention_layers(parts["unet"]).items()))
    rows = torch.zeros(2, 4, 1)
    first, half, again = (
        branch.of(layer, rows.to(dtype), attn.heads).K
        for dtype in (torch.float32, torch.float16, torch.float32)
    )
    assert half.dtype == torch.float16 and torch.equal(half, first.half())
    assert again.dtype == torch.float32 and torch.equal(again, first)
    cast = [branch.of(layer, rows.half(), attn.heads).K for _ in range(2)]
    assert cast[0].data_ptr() == cast[1].data_ptr(), "cast once"


@pytest.fixture
def nodes_alone(monkeypatch) -> ModuleType:
    """The nodes, with stand-ins of what their modules import of ComfyUI."""
    if COMFYUI:
        pytest.skip("ComfyUI's own modules are imported")
    for name in (*OF_COMFYUI, *OF_OURS):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    for name in OF_OURS:
        del sys.modules[name]
    return importlib.import_module("integrations.comfyui.nodes")


class StandInClip:
    """A CLIP of ComfyUI whose encoding is nothing but what rides beside it."""

    def __init__(self) -> None:
        self.patcher = self
        self.tokenizer = MagicMock(clip="clip_l")
        self.tokenizer.clip_l.embedding_directory = None
        self.encode: Callable[..., tuple] = lambda tokens: (None, None, {})

    def clone(self) -> "StandInClip":
        return self

    def get_model_object(self, name: str) -> Callable[..., tuple]:
        return self.encode

    def add_object_patch(self, name: str, patch: Callable[..., tuple]) -> None:
        self.encode = patch


def test_one_concept_under_two_words_stands_at_both(nodes_alone, concept, mappers, tmp_path):
    models = sys.modules["integrations.comfyui.models"]
    models.folder_paths.get_temp_directory.return_value = str(tmp_path)
    models.comfy.conds.CONDConstant = lambda cond: SimpleNamespace(cond=cond)
    clip: Any = StandInClip()
    for placeholder, lambda_ in (("S1", 0.8), ("S2", 0.5)):
        branch = models.LocalBranch(mappers[1], concept.feature_tokens, lambda_)
        clip = models.with_word(clip, placeholder, concept, branch)
    word = concept.words[0, 0]
    for tokens, expected in (
        ([49406, word, 5, word], [(1, 0.8), (3, 0.5)]),
        ([49406, 5, word], [(2, 0.8)]),
    ):
        *_, beside = clip.encode({"l": [[(token, 1.0) for token in tokens]]})
        shown = beside["model_conds"]["elite"].cond.concepts
        assert [(place, branch.lambda_) for place, branch in shown] == expected


@pytest.mark.parametrize("crop", [False, True])
def test_a_concept_is_read_as_the_pipeline_reads_it(crop, pipe, nodes_alone):
    nodes = nodes_alone
    pipe.global_mapper.register_to_config(crop_to_object=crop)
    mappers = pipe.global_mapper, pipe.local_mapper
    elite = nodes.Elite(pipe.image_encoder, *mappers, pipe.fingerprint)
    image, mask = tiny.picture(0)
    pixels, given = (torch.from_numpy(x)[None] for x in (image, mask))
    (concept,) = nodes.EncodeConcept().elite(elite, pixels / 255, given.float())
    expected = pipe.encode_concept(image, mask)
    assert torch.equal(concept.words, expected.words)
    assert torch.equal(concept.feature_tokens, expected.feature_tokens)
    pipe.global_mapper.register_to_config(crop_to_object=not crop)
    assert not torch.equal(concept.words, pipe.encode_concept(image, mask).words)


# --- ComfyUI itself -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comfy() -> ModuleType:
    """ComfyUI's modules, on the CPU."""
    if not COMFYUI:
        pytest.skip("set COMFYUI to a checkout of ComfyUI to test against its source")
    sys.path.append(COMFYUI)
    importlib.import_module("comfy.cli_args").args.cpu = True
    for name in ("sd", "sample", "samplers", "supported_models", "clip_vision", "model_patcher"):
        importlib.import_module(f"comfy.{name}")
    return sys.modules["comfy"]


@pytest.fixture(scope="module")
def models(comfy) -> dict[str, nn.Module]:
    """A tiny Stable Diffusion whose sizes ComfyUI takes: groups of 32, and CLIP's tokenizer."""
    made = tiny.build_models()
    torch.manual_seed(2)
    made["unet"] = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=24,
    )
    text = {**made["text_encoder"].config.to_dict(), "vocab_size": 49408}
    text |= {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    made["text_encoder"] = CLIPTextModel(CLIPTextConfig(**text))
    return {name: model.eval() for name, model in made.items()}


@pytest.fixture(scope="module")
def of_comfy(comfy, models) -> tuple[Mapper, Mapper]:
    torch.manual_seed(4)
    mappers = []
    for kind in (GlobalMapper, LocalMapper):
        sizes = models["unet"], models["image_encoder"], 32, tiny.HIDDEN_LAYERS
        mapper = kind.for_models(*sizes)
        with torch.no_grad():
            for parameter in mapper.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        mappers.append(mapper.eval())
    return mappers[0], mappers[1]


@pytest.fixture
def ours(models, of_comfy) -> ElitePipeline:
    path = Path(str(COMFYUI)) / "comfy" / "sd1_tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(path, model_max_length=77)
    parts = {**models, "tokenizer": tokenizer}
    unet = UNet2DConditionModel.from_config(models["unet"].config).eval()
    unet.load_state_dict(models["unet"].state_dict())
    mappers = {"global_mapper": of_comfy[0], "local_mapper": of_comfy[1]}
    return ElitePipeline(**{**parts, "unet": unet}, **mappers, scheduler=make_scheduler("ddim"))


@pytest.fixture
def nodes(comfy, tmp_path, of_comfy) -> ModuleType:
    """Our nodes, with the mappers as files of the release in models/elite/."""
    paths = importlib.import_module("folder_paths")
    paths.set_temp_directory(str(tmp_path / "temp"))
    paths.models_dir = str(tmp_path / "models")
    (tmp_path / "models" / "elite").mkdir(parents=True)
    for name, mapper in zip(("global_mapper", "local_mapper"), of_comfy, strict=True):
        tiny.save_official(mapper, tmp_path / "models" / "elite" / f"{name}.pt")
    return importlib.import_module("integrations.comfyui.nodes")


@pytest.fixture
def loaded(comfy, models, tmp_path) -> SimpleNamespace:
    """The same models as a MODEL, a CLIP and a CLIP_VISION."""
    config = {
        "image_size": 32,
        "in_channels": 4,
        "model_channels": 32,
        "out_channels": 4,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 0],
        "transformer_depth_output": [1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "context_dim": 24,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
    }
    cpu = torch.device("cpu")
    model_config = comfy.supported_models.SD15(config)
    unet = comfy.model_base.BaseModel(model_config, device=cpu).eval()
    names = comfy.utils.unet_to_diffusers(model_config.unet_config)
    theirs = {names[key]: value for key, value in models["unet"].state_dict().items()}
    unet.diffusion_model.load_state_dict(theirs)
    model = comfy.model_patcher.ModelPatcher(unet, load_device=cpu, offload_device=cpu)

    text = models["text_encoder"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    options = {
        "dtype": torch.float32,
        "clip_l_model_config": {size: getattr(text.config, size) for size in sizes},
    }
    clip = comfy.sd.CLIP(model_config.clip_target(), model_options=options)
    fill(clip.cond_stage_model.clip_l.transformer.text_model, text)

    config = models["image_encoder"].config
    path = tmp_path / "vision.json"
    sizes = (*sizes, "image_size", "patch_size", "num_channels", "hidden_act", "projection_dim")
    vision = {size: getattr(config, size) for size in sizes}
    path.write_text(json.dumps({**vision, "model_type": "clip_vision_model"}), encoding="utf-8")
    clip_vision = comfy.clip_vision.ClipVisionModel(str(path))
    clip_vision.model.float()
    fill(clip_vision.model.vision_model, models["image_encoder"])
    return SimpleNamespace(model=model, clip=clip, clip_vision=clip_vision)


def fill(theirs: nn.Module, ours: nn.Module) -> None:
    """Copies the weights of a model of transformers."""
    found = {key.split("_model.", 1)[-1]: value for key, value in ours.state_dict().items()}
    theirs.load_state_dict({key: found[key] for key in theirs.state_dict()})


def applied(nodes, loaded, lambda_=0.8, placeholder="S", seed=0) -> tuple:
    """MODEL, CLIP, mappers and concept after our three nodes."""
    image, mask = (torch.from_numpy(x)[None] for x in tiny.picture(seed))
    arguments = loaded.model, loaded.clip_vision, "global_mapper.pt", "local_mapper.pt"
    (elite,) = nodes.LoadMappers().elite(*arguments)
    (concept,) = nodes.EncodeConcept().elite(elite, image / 255, mask.float())
    pair = nodes.ApplyElite().elite(loaded.model, loaded.clip, elite, concept, lambda_, placeholder)
    return (*pair, elite, concept)


def encode(clip, text: str) -> list:
    """What ComfyUI's CLIPTextEncode does."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def test_the_concept_is_ours(nodes, loaded, ours):
    concept, expected = applied(nodes, loaded)[-1], ours.encode_concept(*tiny.picture(0))
    assert is_close(concept.words, expected.words)
    assert is_close(concept.feature_tokens, expected.feature_tokens)
    assert concept.fingerprint == ours.fingerprint


@pytest.mark.parametrize("prompt", [PROMPT, "S", "close-up of a (S:1.0)'s hat"])
def test_the_text_is_ours(nodes, loaded, ours, prompt):
    _, clip, _, concept = applied(nodes, loaded)
    ((context, beside),) = encode(clip, prompt)
    plain = prompt.replace("(S:1.0)", "S")
    expected = ours.condition(plain, concept, guidance_scale=1.0)
    assert is_close(context, expected["prompt_embeds"])
    ((place, _),) = beside["model_conds"]["elite"].cond.concepts
    assert place == int(expected["ip_adapter_image_embeds"][1].argmax())
    assert "model_conds" not in encode(clip, NEGATIVE)[0][1]
    assert "model_conds" not in encode(loaded.clip, prompt)[0][1]  # the CLIP that came in


def drawn(comfy, model, positive, negative) -> Tensor:
    """Two steps of ComfyUI's own sampler: latents as the UNet knows them."""
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    arguments = 2, 4.0, "euler", "normal", positive, negative, torch.zeros_like(noise)
    latents = comfy.sample.sample(model, noise, *arguments, disable_pbar=True, seed=0)
    return model.model.process_latent_in(latents)


@torch.no_grad()
def drawn_by_us(
    comfy, model, ours, concept, lambda_=0.8, prompt=PROMPT, negative=NEGATIVE
) -> Tensor:
    """The same steps of Euler through our UNet, called as our pipeline calls it."""
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 2)
    given = ours.condition(prompt, concept, lambda_=lambda_, negative_prompt=negative)
    context = torch.cat([given["negative_prompt_embeds"], given["prompt_embeds"]])
    local = [x.repeat_interleave(2, dim=0) for x in given["ip_adapter_image_embeds"]]
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    x = x * (1 + sigmas[0] ** 2) ** 0.5
    for sigma, following in itertools.pairwise(sigmas):
        eps = ours.unet(
            (x / (sigma**2 + 1) ** 0.5).repeat(2, 1, 1, 1),
            sampling.timestep(sigma).float(),
            context.repeat_interleave(2, dim=0),
            added_cond_kwargs={"image_embeds": local},
        ).sample
        negative, positive = eps.chunk(2)
        x = x + (negative + 4.0 * (positive - negative)) * (following - sigma)
    return x


@torch.inference_mode()  # as ComfyUI runs its nodes
def test_pictures_are_ours(comfy, nodes, loaded, ours):
    plain = drawn(comfy, loaded.model, *(encode(loaded.clip, x) for x in (PROMPT, NEGATIVE)))
    model, clip, _, concept = applied(nodes, loaded)
    theirs = drawn(comfy, model, encode(clip, PROMPT), encode(clip, NEGATIVE))
    assert is_close(theirs, drawn_by_us(comfy, model, ours, concept))
    assert not is_close(theirs, drawn_by_us(comfy, model, ours, concept, lambda_=0.1))
    again = drawn(comfy, loaded.model, *(encode(loaded.clip, x) for x in (PROMPT, NEGATIVE)))
    assert torch.equal(again, plain)  # the model that came in stays as it was


@torch.inference_mode()
def test_loras_before_and_behind_add_up_with_elite(comfy, nodes, loaded, of_comfy):
    layer, path = next(
        iter(
            importlib.import_module("integrations.comfyui.models").Unet(loaded.model).paths.items()
        )
    )
    key = f"diffusion_model.{path}.to_k.weight"
    expected = of_comfy[0].projection(layer.replace(".", "_"), "to_k").weight
    for when in ("before", "behind"):
        model = loaded.model.clone()
        delta = torch.ones_like(expected)
        if when == "before":
            model.add_patches({key: (delta,)})
        patched = SimpleNamespace(**{**vars(loaded), "model": model})
        model = applied(nodes, patched)[0]
        if when == "behind":
            model.add_patches({key: (delta,)})
        comfy.model_management.load_models_gpu([model])
        assert is_close(comfy.utils.get_attr(model.model, key), expected + delta)
        model.detach()


@torch.inference_mode()
def test_two_concepts_ride_with_one_prompt(nodes, loaded):
    model, clip, elite, _ = applied(nodes, loaded, placeholder="S1")
    second = applied(nodes, loaded, seed=1)[-1]
    both, clip = nodes.ApplyElite().elite(model, clip, elite, second, 0.5, "S2")
    assert both is model  # K_g and V_g are there once
    ((_, beside),) = encode(clip, "a S1 next to a S2")
    shown = beside["model_conds"]["elite"].cond.concepts
    assert [(place, branch.lambda_) for place, branch in shown] == [(2, 0.8), (6, 0.5)]


@torch.inference_mode()
def test_mistakes_are_named(nodes, loaded, of_comfy):
    model, clip, elite, concept = applied(nodes, loaded)
    with pytest.raises(ValueError, match="'a S and a S' has 2 times the placeholder 'S'"):
        clip.tokenize("a S and a S")
    image, mask = torch.rand(1, 8, 8, 3), torch.ones(2, 8, 8)
    with pytest.raises(ValueError, match="1 pictures and 2 masks"):
        nodes.EncodeConcept().elite(elite, image, mask)
    with pytest.raises(ValueError, match="mask has no object pixel"):
        nodes.EncodeConcept().elite(elite, image, mask[:1] * 0)
    other = nodes.Elite(elite.image_encoder, *of_comfy, "another")
    with pytest.raises(ValueError, match="concept was made by other mappers"):
        nodes.ApplyElite().elite(model, clip, other, concept, 0.8, "S")
    with pytest.raises(ValueError, match=r"x\.pt: no such file"):
        nodes.LoadMappers().elite(loaded.model, loaded.clip_vision, "x.pt", "")
    flux = SimpleNamespace(model=SimpleNamespace(model_config=SimpleNamespace(unet_config={})))
    with pytest.raises(ValueError, match=r"expected Stable Diffusion 1\.x"):
        nodes.LoadMappers().elite(flux, loaded.clip_vision, "x.pt", "")


# --- the workflow ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workflow() -> dict:
    return json.loads((FOLDER / "workflow.json").read_text(encoding="utf-8"))


def test_the_links_of_the_workflow_join_what_they_say(workflow):
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for link, source, slot, target, place, kind in workflow["links"]:
        start, end = by_id[source]["outputs"][slot], by_id[target]["inputs"][place]
        assert start["type"] == end["type"] == kind
        assert link in start["links"] and end["link"] == link
    ends = [place["link"] for node in workflow["nodes"] for place in node["inputs"]]
    assert sorted(ends) == [link[0] for link in workflow["links"]]


@torch.inference_mode()
def test_the_workflow_runs(comfy, nodes, loaded, ours, workflow):
    """Its graph, with our nodes and, for ComfyUI's own, what they come to."""
    image, mask = (torch.from_numpy(x)[None] for x in tiny.picture(0))
    stock = {
        "CheckpointLoaderSimple": lambda name: (loaded.model, loaded.clip, None),
        "CLIPVisionLoader": lambda name: (loaded.clip_vision,),
        "LoadImage": lambda *widgets: (image / 255, None),
        "LoadImageMask": lambda *widgets: (mask.float(),),
        "CLIPTextEncode": lambda clip, text: (encode(clip, text),),
        "EmptyLatentImage": lambda *widgets: (None,),
        "KSampler": lambda model, positive, negative, *others: (
            drawn(comfy, model, positive, negative),
        ),
        "VAEDecode": lambda samples, vae: (samples,),
        "SaveImage": lambda images, prefix: (images,),
    }
    made: dict[int, tuple] = {}
    starts = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    for node in sorted(workflow["nodes"], key=lambda node: node["order"]):
        given = [made[source][slot] for source, slot in (starts[i["link"]] for i in node["inputs"])]
        kind = nodes.NODE_CLASS_MAPPINGS.get(node["type"])
        if kind is None:
            made[node["id"]] = stock[node["type"]](*given, *node["widgets_values"])
            continue
        names = list(kind.INPUT_TYPES()["required"])
        assert names[: len(given)] == [place["name"] for place in node["inputs"]]
        arguments = dict(zip(names, [*given, *node["widgets_values"]], strict=True))
        made[node["id"]] = getattr(kind(), kind.FUNCTION)(**arguments)
        assert [out["type"] for out in node["outputs"]] == list(kind.RETURN_TYPES)
    concept = ours.encode_concept(*tiny.picture(0))
    prompt, lambda_ = "a photo of a S on the beach", 0.6
    expected = drawn_by_us(comfy, loaded.model, ours, concept, lambda_, prompt, "")
    assert is_close(made[max(made)][0], expected)
