"""SDXL: by the same code as Stable Diffusion, for two text encoders, pooled text and sizes."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import SDXLCFGCutoffCallback
from safetensors import safe_open
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.models import UNET
from elite import Concept, Elite, ElitePipeline, EliteXLPipeline, GlobalMapper
from elite.attention import install, keys_values
from elite.families import encode_texts, split_words, text_encoders, tokenize_for_each
from elite.loading import load_parts, make_scheduler, stock_pipeline
from tests import tiny
from tests.conftest import make_pipe
from tests.tiny import draw, relative
from tests.unit.test_keys_values import EACH_STEP
from tests.unit.test_other_models import BATCH, VIT_L_14, make_objective
from tests.unit.test_stock_pipelines import controlnet, inpainted, start

PROMPT = "a photo of a S"
WIDTHS = [24, 32]  # of the tiny text encoders
CLOSE = 1e-4  # fused and unfused attention, and batches of other sizes, add in another order


@pytest.fixture(scope="module")
def v_folder(tmp_path_factory):
    """An SDXL that predicts velocities."""
    return tiny.save_xl_folder(tmp_path_factory.mktemp("xl_v"), prediction_type="v_prediction")


@pytest.fixture(scope="module")
def xl_mappers(tmp_path_factory, xl_folder):
    folder = tmp_path_factory.mktemp("xl_mappers")
    tiny.save_mappers(folder, xl_folder)
    return folder


@pytest.fixture
def xl(xl_folder, xl_mappers) -> EliteXLPipeline:
    return make_pipe(xl_folder, xl_mappers)


@pytest.fixture
def xl_concept(xl) -> Concept:
    return xl.encode_concept(*tiny.picture(0))


def noise(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What `draw` starts from."""
    return torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7)).to(dtype)


# --- drawing --------------------------------------------------------------------------------------


def test_the_model_decides_the_family(xl, xl_folder, xl_mappers, model_folder, mapper_folder):
    assert type(xl) is EliteXLPipeline and isinstance(xl, StableDiffusionXLPipeline)
    assert type(make_pipe(model_folder, mapper_folder)) is ElitePipeline
    with pytest.raises(ValueError, match=r"is SDXL, no model of ElitePipeline; take EliteXL"):
        ElitePipeline.from_stable_diffusion(xl_folder, global_mapper=xl_mappers / "global_mapper")
    with pytest.raises(ValueError, match=r"is Stable Diffusion 1.x or 2.x, no model of EliteXL"):
        EliteXLPipeline.from_stable_diffusion(model_folder)
    with pytest.raises(ValueError, match="does not fit this model: wrong shape"):
        make_pipe(xl_folder, mapper_folder)


def test_words_and_tokens_are_as_wide_as_both_text_encoders(xl, xl_concept):
    assert xl_concept.words.shape == (1, 3, sum(WIDTHS)) and len(xl_concept.words) == 1
    assert xl_concept.feature_tokens.shape == (1, 16, sum(WIDTHS))
    parts = split_words(xl_concept.words, text_encoders(xl.components))
    assert [part.shape[2] for part in parts] == WIDTHS
    assert torch.equal(torch.cat(parts, dim=-1), xl_concept.words)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_is_stock_where_elite_changes_nothing(request, prediction, dtype):
    """K and V still the UNet's, the word the placeholder's own, and lambda 0, at which the scripts
    leave the feature tokens out: bit for bit where both attend by the same kernel, as in half
    precision. In float64 the scale 8 ** -0.5 and torch's 1 / sqrt(8) differ in their last bit."""
    folder = request.getfixturevalue("xl_folder" if prediction == "epsilon" else "v_folder")
    untouched = tiny.build_untouched(folder)
    concept = tiny.word_as_concept(untouched)
    untouched.scheduler = make_scheduler("lms", untouched.scheduler.config)
    untouched.to(dtype)
    parts = load_parts(folder)
    del parts["image_encoder"]
    plain = stock_pipeline({**parts, "scheduler": untouched.scheduler}).to(dtype)
    plain.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": tiny.STEPS, "guidance_scale": 5.0, "output_type": "latent"}
    options |= {"latents": noise(dtype), "negative_prompt": "red"}
    expected = plain(PROMPT, **options).images

    def drawn(lambda_: float, concept: Concept) -> torch.Tensor:
        return untouched(PROMPT, concept=concept, lambda_=lambda_, **options).images

    assert relative(drawn(1.0, concept), expected) > 1e-3
    if dtype == torch.float64:
        assert relative(drawn(0.0, concept), expected) < 1e-12
    else:
        without_tokens = dataclasses.replace(concept, feature_tokens=None)
        assert torch.equal(drawn(0.0, without_tokens), expected)


def test_concept_and_lambda_change_the_picture(xl, xl_concept):
    expected = draw(xl, concept=xl_concept)
    assert torch.isfinite(expected).all()
    other = xl.encode_concept(*tiny.picture(1))
    assert relative(draw(xl, concept=other), expected) > 1e-3
    assert relative(draw(xl, concept=xl_concept, lambda_=0.1), expected) > 1e-3
    for part in range(2):  # each text encoder reads its own
        words = [x.clone() for x in xl_concept.words.split(WIDTHS, dim=-1)]
        words[part] += 1
        changed = dataclasses.replace(xl_concept, words=torch.cat(words, dim=-1))
        assert relative(draw(xl, concept=changed), expected) > 1e-3
    both = draw(xl, [PROMPT] * 2, concept=[xl_concept, other], seed=[7, 7])
    assert relative(both[:1], expected) < CLOSE


def test_each_region_reads_the_prompt_for_itself(xl, xl_concept):
    """A region of everything is as none, whatever the callback; two are something else."""
    expected = draw(xl, concept=xl_concept)
    whole = {"S": np.ones((4, 4), dtype=bool)}
    assert relative(draw(xl, concept=xl_concept, regions=whole), expected) < CLOSE
    assert relative(draw(xl, concept=xl_concept, regions=whole, **EACH_STEP), expected) < CLOSE
    left = {"S": np.array([[True, False]])}
    assert relative(draw(xl, concept=xl_concept, regions=left), expected) > 1e-3


def test_sizes_of_the_negative_prompt_are_refused_for_several_pictures(xl, xl_concept):
    """Diffusers would give every second picture the other row's."""
    sizes = {"negative_original_size": (64, 64), "negative_target_size": (32, 32)}
    assert torch.isfinite(draw(xl, concept=xl_concept, **sizes)).all()
    with pytest.raises(ValueError, match="diffusers mixes up the rows of several pictures"):
        draw(xl, concept=xl_concept, **sizes, num_images_per_prompt=2)


def test_prompt_2_is_no_place_for_a_concept(xl, xl_concept):
    with pytest.raises(ValueError, match="prompt_2: a concept goes with prompt alone"):
        draw(xl, concept=xl_concept, prompt_2="a photo")
    assert torch.isfinite(draw(xl, "a photo", prompt_2="red")).all()


def test_a_word_learned_by_one_text_encoder_alone_is_refused(xl, xl_concept):
    xl.tokenizer.add_tokens(["<cat>"])
    with pytest.raises(ValueError, match="find the placeholder at different places; load learned"):
        draw(xl, "a <cat> with a S", concept=xl_concept)


def test_guidance_ends_as_with_the_callback_of_diffusers(xl, xl_concept):
    ended = draw(xl, concept=xl_concept, speed="exact", guidance_stop=0.5, num_inference_steps=4)
    cut = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    expected = draw(xl, concept=xl_concept, callback_on_step_end=cut, num_inference_steps=4)
    assert relative(ended, expected) < CLOSE
    assert relative(draw(xl, concept=xl_concept, num_inference_steps=4), ended) > 1e-3
    assert torch.isfinite(draw(xl, concept=xl_concept, speed="fast")).all()


@torch.no_grad()
def test_pooled_text_ends_where_the_words_have_moved_it():
    """The embeddings of "far away" in place of S give what the written prompt gives."""
    models = tiny.build_xl_models()
    encoders = [models["text_encoder"], models["text_encoder_2"]]
    tokenizer = tiny.build_tokenizer()
    tokenizer.model_max_length = tiny.TEXT_LENGTH
    (ids, _), index = tokenize_for_each([tokenizer] * 2, ["a S photo"], "S", 2)
    (written, _), _ = tokenize_for_each([tokenizer] * 2, ["a far away photo"], [])
    rows = [encoder.get_input_embeddings()(written[:, 2:4]) for encoder in encoders]
    sizes = torch.zeros(1, 6)
    context, added = encode_texts(encoders, [ids] * 2, sizes, torch.cat(rows, dim=-1), index)
    expected, as_written = encode_texts(encoders, [written] * 2, sizes)
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(added["text_embeds"], as_written["text_embeds"])

    # Moved out, the end is taken to be at the last place.
    (ids, _), index = tokenize_for_each([tokenizer] * 2, ["S" + " a" * 74], "S", 2)
    words = torch.randn(1, 2, sum(WIDTHS))
    pooled = encode_texts(encoders, [ids] * 2, sizes, words, index)[1]["text_embeds"]
    last = models["text_encoder_2"].text_model.final_layer_norm.register_forward_hook(
        lambda module, args, output: seen.append(output[:, -1])
    )
    seen: list[torch.Tensor] = []
    encode_texts(encoders, [ids] * 2, sizes, words, index)
    last.remove()
    torch.testing.assert_close(pooled, models["text_encoder_2"].text_projection(seen[0]))


# --- files ----------------------------------------------------------------------------------------


def test_saved_whole_and_loaded(tmp_path, xl, xl_concept):
    expected = draw(xl, concept=xl_concept)
    xl.save_pretrained(tmp_path)
    loaded = EliteXLPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, concept=xl_concept), expected)
    assert "EliteXLPipeline.from_pretrained" in (tmp_path / "README.md").read_text()
    xl.uninstall()
    plain = StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    plain.set_progress_bar_config(disable=True)
    options = {"latents": noise(), "num_inference_steps": 2, "output_type": "latent"}
    assert torch.isfinite(plain("a", **options).images).all()


def test_elite_loads_what_either_family_has_saved(tmp_path, xl_folder, xl, pipe):
    """It ended in a message of diffusers about no modules; ElitePipeline took SDXL's folder."""
    for made in (pipe, xl):
        folder = tmp_path / type(made).__name__
        made.save_pretrained(folder)
        assert type(Elite.from_pretrained(folder)) is type(made)
        assert Elite.from_pretrained(str(folder), local_mapper=None).local_mapper is None
    with pytest.raises(ValueError, match="unet: is SDXL, no model of ElitePipeline; take EliteXLP"):
        ElitePipeline.from_pretrained(folder)
    plain = StableDiffusionXLPipeline.from_pipe(xl, add_watermarker=False)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(
        ValueError, match="is a 'StableDiffusionXLPipeline', no pipeline of ELITE's"
    ):
        Elite.from_pretrained(tmp_path / "plain")


def test_concept_files_say_their_family_and_the_other_refuses_them(tmp_path, pipe, concept, xl):
    own = xl.encode_concept(*tiny.picture(0))
    own.save(tmp_path / "xl.safetensors")
    concept.save(tmp_path / "sd.safetensors")
    with safe_open(tmp_path / "xl.safetensors", framework="pt") as file:
        assert file.metadata()["family"] == "sdxl"
    with safe_open(tmp_path / "sd.safetensors", framework="pt") as file:
        assert "family" not in file.metadata()
    assert torch.equal(draw(xl, concept=tmp_path / "xl.safetensors"), draw(xl, concept=own))
    with pytest.raises(ValueError, match="was made for SDXL, this model is Stable Diffusion"):
        draw(pipe, concept=tmp_path / "xl.safetensors")
    with pytest.raises(ValueError, match=r"was made for Stable Diffusion .*, this model is SDXL"):
        draw(xl, concept=tmp_path / "sd.safetensors")
    unknown = dataclasses.replace(own, family="sd3")
    with pytest.raises(ValueError, match="was made for 'sd3', this model is SDXL"):
        draw(xl, concept=unknown)


# --- stock pipelines ------------------------------------------------------------------------------


TASKS = {
    "text-to-image": (StableDiffusionXLPipeline, lambda: {"height": 32, "width": 32}),
    "image-to-image": (
        StableDiffusionXLImg2ImgPipeline,
        lambda: {"image": start(), "strength": 0.6},
    ),
    "inpainting": (
        StableDiffusionXLInpaintPipeline,
        lambda: {
            **{"image": start(), "mask_image": inpainted(), "height": 32, "width": 32},
            "strength": 0.9,
        },
    ),
    "controlnet": (
        StableDiffusionXLControlNetPipeline,
        lambda: {"image": start(), "height": 32, "width": 32},
    ),
}


def draw_stock(task: str, pipe: Elite, folder, **options) -> torch.Tensor:
    kind, inputs = TASKS[task]
    parts = {"controlnet": controlnet(folder)} if task == "controlnet" else {}
    components = {k: v for k, v in pipe.components.items() if not k.endswith("_mapper")}
    made = kind(**components, **parts, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    fixed = {"generator": torch.Generator().manual_seed(7), "output_type": "latent"}
    return made(**inputs(), **{"num_inference_steps": 5, **fixed, **options}).images


@pytest.mark.parametrize("task", TASKS)
def test_condition_for_stock_pipelines(xl_folder, xl, xl_concept, task):
    untouched = tiny.build_untouched(xl_folder)
    given = untouched.condition(PROMPT, tiny.word_as_concept(untouched), lambda_=0.0)
    drawn = draw_stock(task, untouched, xl_folder, **given)
    untouched.uninstall()
    expected = draw_stock(task, untouched, xl_folder, prompt=PROMPT, guidance_scale=5.0)
    assert relative(drawn, expected) < CLOSE

    drawn = draw_stock(task, xl, xl_folder, **xl.condition(PROMPT, xl_concept))
    other = xl.encode_concept(*tiny.picture(1))
    changed = draw_stock(task, xl, xl_folder, **xl.condition(PROMPT, other))
    assert relative(changed, drawn) > 1e-3
    if task == "text-to-image":
        assert (
            relative(
                draw_stock(
                    task, xl, xl_folder, latents=noise(), **xl.condition(PROMPT, xl_concept)
                ),
                draw(xl, concept=xl_concept, num_inference_steps=5),
            )
            < CLOSE
        )


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_reach_the_mapper_alone(xl_folder, stage):
    objective = make_objective(xl_folder, stage)
    objective(BATCH)["loss"].backward()
    own = "global_mapper." if stage == 1 else "local_mapper."
    for name, parameter in objective.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == name.startswith(own), name


@pytest.mark.parametrize("stage", [1, 2])
def test_training_reads_what_drawing_reads(xl_folder, stage):
    """Context, pooled text and sizes of a training step are those of the pipeline's call."""
    objective = make_objective(xl_folder, stage)
    seen: list[dict] = []
    objective.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append({"args": args, **kwargs}), with_kwargs=True
    )
    with torch.no_grad():
        objective({key: value[:1] for key, value in BATCH.items()})
    trained = seen.pop()
    pipe = EliteXLPipeline(
        **load_parts(xl_folder) | {"unet": objective.unet},
        global_mapper=objective.global_mapper,
        local_mapper=objective.local_mapper,
    )
    pipe.set_progress_bar_config(disable=True)
    views = {key: BATCH[key][:1] for key in ("clip_pixels", "object_pixels")}
    concept = pipe.encode_views(**views, patch_mask=torch.ones(1, 16, 1))
    words = "all" if stage == 1 else 0
    draw(pipe, BATCH["caption"][0], concept=concept, words=words, guidance_scale=1.0)
    torch.testing.assert_close(trained["args"][2], seen[0]["encoder_hidden_states"])
    for name in ("text_embeds", "time_ids"):
        drawn = seen[0]["added_cond_kwargs"][name]
        torch.testing.assert_close(trained["added_cond_kwargs"][name], drawn)
    assert trained["added_cond_kwargs"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


def test_half_precision_spares_the_vae(xl_folder, model_folder):
    objective = make_objective(xl_folder, 1)
    objective.cast_frozen(torch.float16)
    assert objective.vae.dtype == torch.float32 and objective.unet.dtype == torch.float16
    assert {encoder.dtype for encoder in objective.text_encoders} == {torch.float16}
    objective = make_objective(model_folder, 1)
    objective.cast_frozen(torch.float16)
    assert objective.vae.dtype == torch.float16


@pytest.mark.parametrize(("stage", "prediction"), [(1, "epsilon"), (2, "v_prediction")])
def test_one_object_can_be_learned_by_heart(request, stage, prediction):
    """With one noise and timestep the loss falls to half."""
    folder = "xl_folder" if prediction == "epsilon" else "v_folder"
    objective = make_objective(request.getfixturevalue(folder), stage)
    batch = {key: value[:1] for key, value in BATCH.items()}
    batch["pixels"] = batch["pixels"][..., :16, :16]
    batch["loss_mask"] = batch["loss_mask"][..., :8, :8]
    optimizer = torch.optim.AdamW(objective.trained.parameters(), lr=3e-2)
    losses = []
    for _ in range(120):
        loss = objective(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


# --- sizes ----------------------------------------------------------------------------------------


def test_mappers_of_the_real_sizes():
    """On the meta device: no weights, no memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET["xl"])
        assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684  # as published
        encoder = CLIPVisionModel(CLIPVisionConfig(**VIT_L_14))
        mapper = GlobalMapper.shaped_for(unet, encoder)
        install(unet, mapper)
        assert mapper([torch.empty(1, 257, 1024)] * 5).shape == (1, 5, 2048)
        z, t, text = torch.empty(1, 4, 128, 128), torch.tensor(1), torch.empty(1, 77, 2048)
        added = {
            "image_embeds": keys_values(unet, text, []),
            "text_embeds": torch.empty(1, 1280),
            "time_ids": torch.empty(1, 6),
        }
        assert unet(z, t, text, added_cond_kwargs=added).sample.shape == z.shape
    assert len(mapper.config.attention) == 70
    sizes = {name: parameter.numel() for name, parameter in mapper.named_parameters()}
    assert sum(sizes.values()) == 382_812_160
    assert sum(size for name, size in sizes.items() if "attn2" in name) == 340_787_200
