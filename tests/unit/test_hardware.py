"""Less memory and faster kernels change no picture, or as little as they say."""

import shutil
from functools import partial

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from elite.attention import EliteAttnProcessor
from elite.drawing import Drawing
from elite.hardware import (
    FP8,
    compile_blocks,
    decode_in_parts,
    offload_in_groups,
    order_channels_last,
    store_in_fp8,
)
from elite.inference import prepare_to_draw
from elite.loading import make_scheduler
from elite.mappers import cross_attention_layers
from elite.settings import InferenceLocalConfig
from elite.speed import RUNGS
from tests import tiny
from tests.tiny import draw, relative

CPU = torch.device("cpu")
STEPS = 6
# Only the order of sums differs.
CLOSE = 1e-4


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", RUNGS)
def test_weights_that_come_and_go_draw_the_same(pipe, concept, speed):
    """With hooks on the CPU alone: neither a GPU nor its streams."""
    options = {"concept": concept, "speed": speed, "num_inference_steps": STEPS}
    expected = draw(pipe, output_type="np", **options)
    offload_in_groups(pipe, CPU)
    parts = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.image_encoder, pipe.global_mapper]
    for part in parts:
        assert any(hasattr(module, "_diffusers_hook") for module in part.modules()), type(part)
    assert (draw(pipe, output_type="np", **options) == expected).all()
    again = pipe.encode_concept(*tiny.picture(0))
    assert torch.equal(again.words, concept.words)
    assert torch.equal(again.feature_tokens, concept.feature_tokens)


def test_pictures_are_decoded_one_by_one(pipe, concept):
    rows: list[int] = []
    options = {"concept": concept, "seed": [1, 2], "num_images_per_prompt": 2}
    expected = draw(pipe, output_type="np", **options)
    decode_in_parts(pipe)
    with pipe.vae.decoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]))):
        drawn = draw(pipe, output_type="np", **options)
    assert rows == [1, 1]
    assert abs(drawn - expected).max() < CLOSE


def test_only_pictures_larger_than_the_models_own_are_decoded_in_tiles(pipe, concept):
    seen: list[int] = []
    pipe.vae.tile_sample_min_size = pipe.vae.tile_latent_min_size = 8  # a VAE of smaller pictures
    decode_in_parts(pipe)
    with pipe.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2])):
        draw(pipe, concept=concept, output_type="np")
        assert seen == [16]
        draw(pipe, concept=concept, output_type="np", height=64, width=64)
    assert len(seen) > 2 and max(seen) == 16


def test_weights_in_8_bits(pipe, concept):
    """Stored, not computed with: the picture is near; norms and what ELITE has added are left."""
    expected = draw(pipe, concept=concept)
    store_in_fp8(pipe.unet)
    conv, norm = pipe.unet.conv_in, pipe.unet.conv_norm_out
    assert conv.weight.dtype == FP8 and norm.weight.dtype == torch.float32
    assert pipe.unet.dtype == torch.float32
    assert pipe.global_mapper.dtype == torch.float32
    drawn = draw(pipe, concept=concept)
    assert conv.weight.dtype == FP8
    assert CLOSE < relative(drawn, expected) < 0.3
    for speed in RUNGS:
        assert draw(pipe, concept=concept, speed=speed, num_inference_steps=STEPS).isfinite().all()


# --- kernels --------------------------------------------------------------------------------------


def test_channels_last_draws_the_same(pipe, concept):
    expected = draw(pipe, concept=concept, output_type="np")
    order_channels_last(pipe)
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert abs(draw(pipe, concept=concept, output_type="np") - expected).max() < CLOSE


def counting(graphs: list) -> object:
    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    return backend


def test_each_block_is_compiled_once_and_draws_the_same(pipe, concept):
    """Over all steps, and for the next concept and prompt; guidance that ends is one more."""
    other = pipe.encode_concept(*tiny.picture(1))
    calls = [
        {"concept": concept, "num_inference_steps": STEPS},
        {"prompt": "a red S", "concept": other, "lambda_": 0.4},
        {"concept": concept, "num_inference_steps": STEPS, "speed": "fast"},
    ]
    expected = [draw(pipe, **options) for options in calls]
    graphs: list = []
    torch._dynamo.reset()
    pipe.unet.compile_repeated_blocks(
        fullgraph=True, isolate_recompiles=True, backend=counting(graphs)
    )
    blocks = len(cross_attention_layers(pipe.unet))
    counts = []
    for options, wanted in zip(calls, expected, strict=True):
        assert relative(draw(pipe, **options), wanted) < CLOSE
        counts.append(len(graphs))
    assert counts[:2] == [blocks] * 2 and blocks < counts[2] <= 2 * blocks


@torch._dynamo.config.patch(recompile_limit=1)
def test_more_kinds_of_calls_are_compiled_than_torch_allows(pipe, concept, monkeypatch):
    torch._dynamo.reset()
    compiled = partial(pipe.unet.compile_repeated_blocks, backend=counting([]))
    monkeypatch.setattr(pipe.unet, "compile_repeated_blocks", compiled)
    compile_blocks(pipe.unet)
    for guidance_scale in (1.0, 5.0):  # twice as many rows are another kind
        options = {"concept": concept, "num_inference_steps": 1}
        assert torch.isfinite(draw(pipe, guidance_scale=guidance_scale, **options)).all()


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "cl"))), reason="no C++ compiler")
def test_compiled_by_inductor(pipe, concept):
    expected = draw(pipe, concept=concept)
    torch._dynamo.reset()
    compile_blocks(pipe.unet)
    assert relative(draw(pipe, concept=concept), expected) < CLOSE


def test_the_attention_backend_of_diffusers_is_honoured(pipe, concept, monkeypatch):
    """Where it computes the same: V as wide as K, and no mask."""
    expected, asked = draw(pipe, concept=concept), []

    def dispatch(Q, K, V, scale, backend):
        asked.append((backend, Q.shape[-1] == V.shape[-1]))
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (Q, K, V)), scale=scale
        ).transpose(1, 2)

    monkeypatch.setattr("elite.attention.dispatch_attention_fn", dispatch)
    assert torch.equal(draw(pipe, concept=concept), expected) and not asked
    pipe.unet.set_attention_backend("_native_math")
    try:
        assert torch.equal(draw(pipe, concept=concept), expected)
        assert set(asked) == {(AttentionBackendName._NATIVE_MATH, True)}
        monkeypatch.undo()
        assert relative(draw(pipe, concept=concept), expected) < CLOSE
    finally:
        pipe.unet.reset_attention_backend()
    processor = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
    assert isinstance(processor, EliteAttnProcessor) and processor._attention_backend is None


def test_a_backend_stays_while_processors_are_exchanged(pipe, tmp_path):
    def of_a_layer():
        return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor

    pipe.unet.set_attention_backend("_native_math")
    try:
        pipe.install()  # as previews of training do
        pipe.save_pretrained(tmp_path)  # of the plain UNet, so that ELITE's go and come
        assert isinstance(of_a_layer(), EliteAttnProcessor)
        assert of_a_layer()._attention_backend == AttentionBackendName._NATIVE_MATH
    finally:
        pipe.unet.reset_attention_backend()


# --- as a configuration says ----------------------------------------------------------------------


def prepared(pipe, **settings) -> None:
    prepare_to_draw(pipe, InferenceLocalConfig(device="cpu", mixed_precision="no", **settings))


def test_by_default_nothing_is_changed(pipe, concept):
    expected = draw(pipe, concept=concept)
    prepared(pipe)
    assert torch.equal(draw(pipe, concept=concept), expected) and not pipe.named_weights


def test_settings_are_followed(pipe, concept):
    prepared(pipe, low_memory=True, fp8_weights=True, channels_last=True)
    assert pipe.vae.use_slicing and pipe.vae.use_tiling
    assert pipe.unet.conv_in.weight.dtype == FP8
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert pipe.named_weights == {"weights": "torch.float8_e4m3fn"}
    pipe.scheduler = make_scheduler("dpm++")
    assert draw(pipe, concept=concept).isfinite().all()


def test_pictures_of_tiles_say_so(pipe):
    plain = [Drawing(resolution=side).metadata(pipe) for side in (None, 32, 64)]
    prepared(pipe, low_memory=True)
    tiled = [Drawing(resolution=side).metadata(pipe) for side in (None, 32, 64)]
    assert tiled == [*plain[:2], {**plain[2], "tiled": "True"}]


def test_compile_is_followed(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr("elite.inference.compile_blocks", asked.append)
    prepared(pipe, compile=True)
    assert asked == [pipe.unet]


@pytest.mark.parametrize("name", ["low_memory", "fp8_weights"])
def test_settings_that_do_not_go_together(pipe, name):
    with pytest.raises(ValueError, match=f"--compile and --{name} are both given"):
        prepared(pipe, compile=True, **{name: True})
