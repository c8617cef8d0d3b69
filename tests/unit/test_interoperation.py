"""Diffusers' extras on an ElitePipeline: LoRA, textual inversion, clip skip, callbacks, savers of
memory, devices and number types, any scheduler."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.schedulers import LMSDiscreteScheduler

from elite import ElitePipeline
from elite.attention import EliteAttnProcessor
from elite.mappers import cross_attention_layers
from tests import tiny
from tests.tiny import STEPS, draw, relative

# Only the order of sums differs.
CLOSE = 1e-4
EACH_STEP = {  # the callback may change the text, so K and V are computed at each step
    "callback_on_step_end": lambda pipe, step, timestep, tensors: tensors,
    "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
}
CROSS_KV, CROSS_Q, SELF, TEXT = (
    r".*attn2\.to_[kv]",
    r".*attn2\.to_q",
    r".*attn1\.to_[qkv]",
    ["q_proj", "v_proj"],
)


def draw_plainly(pipe: ElitePipeline, prompt: str = "a photo of a dog", **options) -> torch.Tensor:
    """`draw` without ELITE."""
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    pipe.uninstall()
    made = StableDiffusionPipeline.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, **options}
    try:
        return made(prompt, latents=noise, output_type="latent", **options).images
    finally:
        pipe.install()


# --- LoRA -----------------------------------------------------------------------------------------


@pytest.fixture
def make_lora(tmp_path, parts):
    """Writes a LoRA file with random weights for some projections of the UNet or text encoder."""
    peft = pytest.importorskip("peft")

    def make(targets):
        torch.manual_seed(5)
        model = parts["text_encoder" if targets is TEXT else "unet"]
        model.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        name = "text_encoder_lora_layers" if targets is TEXT else "unet_lora_layers"
        layers = {name: peft.get_peft_model_state_dict(model)}
        StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", **layers)
        return tmp_path / "lora"

    return make


@pytest.mark.parametrize("targets", [CROSS_KV, CROSS_Q, SELF, TEXT], ids=str)
def test_lora_changes_the_picture_and_leaves_no_trace(pipe, concept, make_lora, targets):
    expected = draw(pipe, concept=concept)
    pipe.load_lora_weights(make_lora(targets))
    changed = draw(pipe, concept=concept)
    assert relative(changed, expected) > 1e-3
    without = draw(pipe, concept=concept, cross_attention_kwargs={"scale": 0.0})
    assert relative(without, expected) < CLOSE
    pipe.disable_lora()
    assert relative(draw(pipe, concept=concept), expected) < CLOSE
    pipe.enable_lora()
    assert torch.equal(draw(pipe, concept=concept), changed)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, concept=concept), expected)


@pytest.mark.parametrize("targets", [CROSS_KV, ["to_q", "to_k", "to_v", "to_out.0"]], ids=str)
@pytest.mark.parametrize("options", [{}, {"cross_attention_kwargs": {"scale": 0.5}}], ids=str)
def test_lora_does_what_it_does_to_stable_diffusion(model_folder, make_lora, targets, options):
    """With K_g and V_g still the UNet's; also where ELITE's projections stand in for those that the
    LoRA was trained on."""
    untouched = tiny.build_untouched(model_folder)
    untouched.load_lora_weights(make_lora(targets))
    expected = draw_plainly(untouched, **options)
    assert relative(draw(untouched, "a photo of a dog", **options), expected) < CLOSE
    each_step = draw(untouched, "a photo of a dog", **options, **EACH_STEP)
    assert relative(each_step, expected) < CLOSE


def test_fused_lora_draws_as_a_loaded_one(pipe, concept, make_lora):
    pipe.load_lora_weights(make_lora(["to_q", "to_k", "to_v", "to_out.0"]))
    expected = draw(pipe, concept=concept)
    pipe.fuse_lora()
    assert relative(draw(pipe, concept=concept), expected) < CLOSE
    pipe.unfuse_lora()
    assert relative(draw(pipe, concept=concept), expected) < CLOSE


@pytest.mark.parametrize(
    "options", [{"cross_attention_kwargs": {"scale": 0.5}}, EACH_STEP], ids=len
)
def test_a_fused_lora_has_no_scale_of_a_call(pipe, concept, make_lora, options):
    pipe.load_lora_weights(make_lora(CROSS_KV))
    pipe.fuse_lora()
    expected = draw(pipe, concept=concept)
    assert relative(draw(pipe, concept=concept, **options), expected) < CLOSE


def test_a_fused_lora_stays_as_it_was(pipe, concept, make_lora):
    """What is set afterwards changed ELITE's projections, and nothing else of the model."""
    both = {**EACH_STEP, "cross_attention_kwargs": {"scale": 0.5}}
    pipe.load_lora_weights(make_lora(CROSS_KV), adapter_name="one")
    without = draw(pipe, concept=concept, cross_attention_kwargs={"scale": 0.0})
    pipe.fuse_lora()
    expected = draw(pipe, concept=concept)
    assert relative(draw(pipe, concept=concept, **both), expected) < CLOSE
    pipe.set_adapters(["one"], [0.0])
    assert relative(draw(pipe, concept=concept), expected) < CLOSE
    pipe.set_adapters(["one"], [1.0])
    pipe.unfuse_lora()
    pipe.set_adapters(["one"], [0.0])
    assert relative(draw(pipe, concept=concept), without) < CLOSE


def test_of_several_loras_the_fused_ones_count(pipe, concept, make_lora):
    file = make_lora(CROSS_KV)
    pipe.load_lora_weights(file, adapter_name="first")
    expected = draw(pipe, concept=concept)
    pipe.load_lora_weights(file, adapter_name="second")
    pipe.set_adapters(["first", "second"])
    assert relative(draw(pipe, concept=concept), expected) > 1e-3
    pipe.fuse_lora(adapter_names=["first"])
    assert relative(draw(pipe, concept=concept), expected) < CLOSE


def test_a_refused_prompt_leaves_the_weight_of_a_lora(pipe, concept, make_lora):
    pipe.load_lora_weights(make_lora(TEXT))
    pipe.load_textual_inversion({"<cat>": torch.randn(1, 24)}, token="<cat>")
    expected = draw(pipe, concept=concept)
    with pytest.raises(ValueError, match="runs past"):
        draw(pipe, "a " * 80 + "<cat>", cross_attention_kwargs={"scale": 0.25})
    assert torch.equal(draw(pipe, concept=concept), expected)


def test_a_lora_that_was_fused_and_unloaded_is_not_in_elites_projections(pipe, concept, make_lora):
    """It has gone into weights that ELITE does not read: a limit that docs/diffusers.md names."""
    expected = draw(pipe, concept=concept)
    pipe.load_lora_weights(make_lora(CROSS_KV))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, concept=concept), expected)


@pytest.mark.parametrize(
    ("kind", "options", "fuses", "message"),
    [
        ("LoraConfig", {"use_dora": True}, False, "'odd': is a DoRA; of these ELITE's cross"),
        ("LoraConfig", {"use_dora": True}, True, "'odd': is a DoRA; of these ELITE's cross"),
        ("LoraConfig", {"lora_bias": True}, False, "'odd': is a LoRA with a bias; of these"),
        ("LoHaConfig", {}, False, r"\['odd'\]: is no LoRA; of these"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(pipe, concept, kind, options, fuses, message):
    """What they do beside adding to the weight was left out."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(r=4, target_modules=CROSS_KV, **options)
    expected = draw(pipe, concept=concept)
    pipe.unet.add_adapter(config, "odd")
    if fuses:
        pipe.unet.fuse_lora()
    with pytest.raises(ValueError, match=message):
        draw(pipe, concept=concept)
    pipe.unet.disable_adapters()
    if not fuses:
        assert relative(draw(pipe, concept=concept), expected) < CLOSE


# --- the prompt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["<mug>", "<Mug>"])
def test_words_of_textual_inversion_beside_a_concept(pipe, concept, name):
    torch.manual_seed(3)
    plain = draw(pipe, "a photo of a S and a dog", concept=concept)
    pipe.load_textual_inversion({"<cat>": torch.randn(1, 24)}, token="<cat>")
    pipe.load_textual_inversion({name: torch.randn(2, 24)}, token=name)
    cat, mug = (
        draw(pipe, f"a photo of a S and a {word}", concept=concept) for word in ("<cat>", name)
    )
    assert relative(cat, plain) > 1e-3 and relative(mug, cat) > 1e-3
    before = draw(pipe, f"a {name} and a S", concept=concept)
    pipe.text_encoder.get_input_embeddings().weight.data[-1].neg_()  # 2nd vector of <mug>
    assert relative(draw(pipe, f"a {name} and a S", concept=concept), before) > 1e-3
    pipe.unload_textual_inversion()
    assert torch.equal(draw(pipe, "a photo of a S and a dog", concept=concept), plain)


def test_a_word_of_several_vectors_is_read_as_without_a_concept(model_folder):
    untouched = tiny.build_untouched(model_folder)
    untouched.load_textual_inversion({"<mug>": torch.randn(3, 24)}, token="<mug>")
    prompt = "a <mug> beside a S"
    drawn = draw(untouched, prompt, concept=tiny.word_as_concept(untouched), lambda_=0.0)
    assert relative(drawn, draw(untouched, prompt)) < CLOSE


def test_clip_skip_is_read_as_without_a_concept(model_folder):
    untouched = tiny.build_untouched(model_folder)
    options = {"concept": tiny.word_as_concept(untouched), "lambda_": 0.0}
    skipped = draw(untouched, **options, clip_skip=1)
    assert relative(skipped, draw(untouched, clip_skip=1)) < CLOSE
    assert relative(skipped, draw(untouched, **options)) > 1e-3


def test_negative_prompt_is_its_embeddings(pipe, concept):
    expected = draw(pipe, concept=concept, negative_prompt="a red critter")
    ids = pipe.tokenizer(
        "a red critter", padding="max_length", max_length=tiny.TEXT_LENGTH, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        negative = pipe.text_encoder(ids).last_hidden_state
    drawn = draw(pipe, concept=concept, negative_prompt_embeds=negative)
    assert torch.equal(drawn, expected)
    assert relative(draw(pipe, concept=concept), expected) > 1e-3


# --- callbacks ------------------------------------------------------------------------------------


def test_a_callback_sees_every_step_and_may_change_the_latents(pipe, concept):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, tensors["latents"].clone()))
        return tensors

    drawn = draw(pipe, concept=concept, callback_on_step_end=watch)
    assert [step for step, _ in seen] == list(range(STEPS))
    assert torch.equal(seen[-1][1], drawn)

    def cleared(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not draw(pipe, concept=concept, callback_on_step_end=cleared).any()


def test_a_callback_may_stop_the_drawing(pipe, concept):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True
        return tensors

    stopped = draw(pipe, concept=concept, callback_on_step_end=stop)
    assert steps == [0] and relative(stopped, draw(pipe, concept=concept)) > 1e-3


def test_a_callback_changes_no_text_that_it_was_not_given(pipe, concept):
    def changed(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros(2, 77, 24)}

    with pytest.raises(ValueError, match="gives back prompt_embeds, which it was not given; name"):
        draw(pipe, concept=concept, callback_on_step_end=changed)


@pytest.mark.parametrize("speed", ["exact", "fast"])
def test_a_callback_may_answer_nothing(pipe, concept, speed):
    """Which was a traceback."""
    drawn = draw(pipe, concept=concept, speed=speed, callback_on_step_end=lambda *_: None)
    assert torch.equal(drawn, draw(pipe, concept=concept, speed=speed))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (3, "callback_on_step_end is 3; expected a function"),
        (lambda *_: [1], r"callback_on_step_end gives back \[1\]; expected tensors by name, or"),
        (lambda *_: False, "callback_on_step_end gives back False; expected tensors by name, or"),
    ],
)
def test_callbacks_that_are_none_are_named(pipe, concept, callback, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, concept=concept, callback_on_step_end=callback)


# --- savers of memory -----------------------------------------------------------------------------


def elite_layers(pipe: ElitePipeline) -> list[bool]:
    layers = cross_attention_layers(pipe.unet).values()
    return [isinstance(attn.processor, EliteAttnProcessor) for attn in layers]


@pytest.mark.parametrize("slice_size", ["auto", "max", 1])
def test_attention_slicing_draws_the_same(pipe, concept, slice_size):
    expected = draw(pipe, concept=concept)
    before = {name: type(made) for name, made in pipe.unet.attn_processors.items()}
    pipe.enable_attention_slicing(slice_size)
    kinds = {type(made).__name__ for made in pipe.unet.attn_processors.values()}
    assert kinds == {"SlicedAttnProcessor", "EliteAttnProcessor"} and all(elite_layers(pipe))
    assert relative(draw(pipe, concept=concept), expected) < CLOSE
    pipe.disable_attention_slicing()
    assert {name: type(made) for name, made in pipe.unet.attn_processors.items()} == before
    assert torch.equal(draw(pipe, concept=concept), expected)


def test_fused_projections_draw_the_same(pipe, concept):
    expected = draw(pipe, concept=concept)
    pipe.fuse_qkv_projections()
    assert all(elite_layers(pipe))
    assert relative(draw(pipe, concept=concept), expected) < CLOSE
    pipe.unfuse_qkv_projections()
    assert relative(draw(pipe, concept=concept), expected) < CLOSE


def test_what_exchanges_processors_keeps_the_norm_and_an_uninstalled_unet(pipe):
    pipe.install(attention_norm="batch")
    pipe.enable_attention_slicing()
    pipe.install()
    processors = [attn.processor for attn in cross_attention_layers(pipe.unet).values()]
    assert {made.attention_norm for made in processors} == {"batch"}
    pipe.uninstall()
    pipe.disable_attention_slicing()
    assert not any(elite_layers(pipe))


def test_exchanged_processors_are_named_and_install_mends_them(pipe, concept):
    expected = draw(pipe, concept=concept)
    pipe.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match=r"AttnProcessor instead of ELITE's; call pipe\.install"):
        draw(pipe, concept=concept)
    pipe.install()
    assert relative(draw(pipe, concept=concept), expected) < CLOSE


@pytest.mark.parametrize("saver", ["enable_slicing", "enable_tiling"])
def test_vae_slicing_and_tiling(pipe, concept, saver):
    """Pictures of 32 px are one tile, so nothing changes."""
    options = {"concept": concept, "output_type": "pt", "num_images_per_prompt": 2}
    expected = draw(pipe, **options)
    getattr(pipe.vae, saver)()
    assert relative(draw(pipe, **options), expected) < CLOSE


def test_vae_tiling_of_a_large_picture(pipe, concept):
    pipe.vae.enable_tiling()
    picture = draw(pipe, concept=concept, output_type="pt", height=64, width=96)
    assert picture.shape == (1, 3, 64, 96) and torch.isfinite(picture).all()


def offload_models(pipe: ElitePipeline, device: str) -> None:
    pipe.enable_model_cpu_offload(device=device)


def offload_groups(pipe: ElitePipeline, device: str) -> None:
    pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")


def offload_layers(pipe: ElitePipeline, device: str) -> None:
    pipe.enable_sequential_cpu_offload(device=device)


@pytest.mark.parametrize("offload", [offload_models, offload_groups])
def test_offloading_draws_the_same(pipe, concept, offload):
    expected = draw(pipe, concept=concept)
    offload(pipe, "cpu")
    assert torch.equal(draw(pipe, concept=concept), expected)
    again = pipe.encode_concept(*tiny.picture(0))  # after the first picture hooks are set anew
    assert torch.equal(draw(pipe, concept=again), expected)


def test_offloading_leaves_the_mappers_on_the_device(pipe):
    """The UNet reads their K and V, which a hook of the whole mapper would not notice."""
    pipe.enable_model_cpu_offload(device="cpu")
    hooked = {name for name, part in pipe.components.items() if hasattr(part, "_hf_hook")}
    assert hooked == {"text_encoder", "image_encoder", "unet", "vae"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", [offload_models, offload_groups, offload_layers])
def test_offloading_from_a_gpu(pipe, concept, offload):
    expected = draw(pipe.to("cuda"), concept=concept).cpu()
    offload(pipe.to("cpu"), "cuda")
    for _ in range(2):
        assert relative(draw(pipe, concept=concept).cpu(), expected) < 1e-3


# --- devices, number types, schedulers ------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map(tmp_path, pipe, concept, device_map):
    expected = draw(pipe, concept=concept)
    pipe.save_pretrained(tmp_path / "elite")
    mapped = ElitePipeline.from_pretrained(tmp_path / "elite", device_map=device_map)
    mapped.set_progress_bar_config(disable=True)
    assert relative(draw(mapped, concept=concept).cpu(), expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_dtype(tmp_path, pipe, concept, dtype):
    expected = draw(pipe, concept=concept, num_inference_steps=1)
    pipe.save_pretrained(tmp_path / "elite")
    halves = ElitePipeline.from_pretrained(tmp_path / "elite", torch_dtype=dtype)
    halves.set_progress_bar_config(disable=True)
    drawn = draw(halves, concept=concept, num_inference_steps=1)
    assert drawn.dtype == dtype and halves.global_mapper.dtype == dtype
    # Rounding of weights and activations; more steps of random weights multiply it.
    assert relative(drawn.float(), expected) < 0.1


# Those with `_backends` need packages that are not installed.
COMPATIBLES = [
    cls.__name__ for cls in LMSDiscreteScheduler().compatibles if not hasattr(cls, "_backends")
]


@pytest.mark.parametrize("name", sorted(COMPATIBLES))
def test_every_scheduler_of_diffusers_draws(pipe, concept, name):
    (scheduler,) = (cls for cls in pipe.scheduler.compatibles if cls.__name__ == name)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    options = {"seed": None, "num_images_per_prompt": 2, "num_inference_steps": 4}
    a, b = draw(pipe, concept=concept, generator=torch.Generator().manual_seed(0), **options)
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
