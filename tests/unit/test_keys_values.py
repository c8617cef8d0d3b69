"""Keys and values once per generation: computed once, right whatever changes, compiled whole."""

import weakref

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from torch import nn

from elite.attention import install, keys_values, local_inputs
from elite.mappers import Mapper, cross_attention_layers
from elite.text import encode_text, tokenize
from tests import tiny
from tests.tiny import STEPS, draw

# Only the batch that K and V are computed in differs.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
EACH_STEP = {  # the callback may change the text, so nothing is computed beforehand
    "callback_on_step_end": lambda pipe, step, timestep, tensors: tensors,
    "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
}


def count_calls(mapper: Mapper) -> list[nn.Module]:
    """The K and V projections of a mapper as they are called."""
    calls: list[nn.Module] = []
    for layer in mapper.config.attention:
        for name in ("to_k", "to_v"):
            mapper.projection(layer, name).register_forward_hook(
                lambda module, inputs, output: calls.append(module)
            )
    return calls


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("pictures", [1, 3])
def test_projections_run_once_per_generation(pipe, concept, steps, pictures):
    calls = [count_calls(mapper) for mapper in (pipe.global_mapper, pipe.local_mapper)]
    options = {"num_inference_steps": steps, "num_images_per_prompt": pictures}
    draw(pipe, concept=concept, **options)
    for made in calls:
        assert len(made) == len(set(made)) == 2 * len(cross_attention_layers(pipe.unet))


def test_projections_run_at_each_step_where_the_text_may_change(pipe, concept):
    calls = count_calls(pipe.global_mapper)
    draw(pipe, concept=concept, **EACH_STEP)
    assert len(calls) == STEPS * 2 * len(cross_attention_layers(pipe.unet))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a red critter"},
        {"num_images_per_prompt": 2, "seed": [7, 8]},
        {"words": "all", "lambda_": 0.3},
        {"lambda_": 0.0},
    ],
    ids=str,
)
def test_once_equals_each_step(pipe, concept, options):
    once = draw(pipe, concept=concept, **options)
    each_step = draw(pipe, concept=concept, **options, **EACH_STEP)
    torch.testing.assert_close(once, each_step, **CLOSE)


def test_text_changed_by_a_callback_is_read(pipe, concept):
    def nothing_said(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    options = {**EACH_STEP, "concept": concept}
    changed = draw(pipe, **{**options, "callback_on_step_end": nothing_said})
    assert (changed - draw(pipe, **options)).abs().max() > 1e-2


def test_callbacks_of_diffusers_that_cut_the_text_are_read(pipe, concept):
    """Without guidance in the second half, one row of text is left."""
    cut = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    options = {"concept": concept, "num_inference_steps": 4}
    drawn = draw(pipe, **options, callback_on_step_end=cut)
    assert drawn.isfinite().all()
    assert (drawn - draw(pipe, **options)).abs().max() > 1e-3


@pytest.mark.parametrize("watched", [False, True])
def test_they_are_gone_before_the_vae_decodes(pipe, concept, monkeypatch, watched):
    made, alive, steps = [], [], []

    def watch(pipe, step, timestep, tensors):
        steps.append(step)
        return tensors

    def noted(*args):
        found = keys_values(*args)
        made.extend(weakref.ref(part.K) for part in found.values())
        return found

    monkeypatch.setattr("elite.conditioning.keys_values", noted)
    options = {"callback_on_step_end": watch} if watched else {}
    with pipe.vae.decoder.register_forward_pre_hook(
        lambda *_: alive.append(sum(kept() is not None for kept in made))
    ):
        pipe("a S", concept=concept, seed=1, num_inference_steps=3, **options)
    assert made and alive == [0]
    assert steps == [0, 1, 2] * watched


def test_each_change_shows_in_the_next_picture(pipe, concept):
    """Nothing of the generation before is used again."""
    other = pipe.encode_concept(*tiny.picture(1))
    seen = [
        draw(pipe, concept=concept),
        draw(pipe, concept=other),
        draw(pipe, "close-up of a S", concept=concept),
        draw(pipe, concept=concept, lambda_=0.2),
        draw(pipe, concept=concept, negative_prompt="a critter"),
    ]
    with torch.no_grad():
        for mapper, name in ((pipe.global_mapper, "to_k"), (pipe.local_mapper, "to_v")):
            layer = next(iter(mapper.config.attention))
            mapper.projection(layer, name).weight.mul_(3)
            seen.append(draw(pipe, concept=concept))
    for i, a in enumerate(seen):
        assert all((a - b).abs().max() > 1e-4 for b in seen[:i]), i


def inputs(pipe, concept) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A guided batch: text of two rows, local inputs of the second."""
    ids, index = tokenize(pipe.tokenizer, ["a S"], "S")
    text = encode_text(pipe.text_encoder, ids, concept.words[:, :1], index)
    nothing = encode_text(pipe.text_encoder, tokenize(pipe.tokenizer, ["S"], "S")[0])
    local = local_inputs(concept.feature_tokens, index, 0.8, tiny.TEXT_LENGTH)
    return torch.cat([nothing, text]), local


@torch.no_grad()
def test_rows_without_local_inputs_equal_zero_tokens(pipe, concept):
    """The last rows have them, as `ElitePipeline` says it, or all have, as stock pipelines do."""
    text, local = inputs(pipe, concept)
    z, t = torch.randn(2, 4, 16, 16), torch.tensor(500)
    f, placeholder, lambda_ = local
    padded = [torch.cat([torch.zeros_like(x), x]) for x in (f, placeholder, lambda_)]
    once, last_row, all_rows = (
        pipe.unet(z, t, text, added_cond_kwargs={"image_embeds": extra}).sample
        for extra in (keys_values(pipe.unet, text, local), local, padded)
    )
    torch.testing.assert_close(once, last_row, **CLOSE)
    torch.testing.assert_close(once, all_rows, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("with_local", [True, False])
def test_compiles_without_a_graph_break(pipe, concept, with_local):
    text, local = inputs(pipe, concept)
    extra = keys_values(pipe.unet, text, local if with_local else [])
    z, t = torch.randn(2, 4, 16, 16), torch.tensor(500)
    call = {"added_cond_kwargs": {"image_embeds": extra}, "return_dict": False}
    torch._dynamo.reset()
    explained = torch._dynamo.explain(pipe.unet)(z, t, text, **call)
    assert explained.graph_break_count == 0 and explained.graph_count == 1
    expected = pipe.unet(z, t, text, **call)[0]
    compiled = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, t, text, **call)[0], expected, **CLOSE)


def test_a_compiled_unet_draws_the_same_and_is_compiled_once(pipe, concept):
    expected = draw(pipe, concept=concept)
    other = pipe.encode_concept(*tiny.picture(1))
    other_expected = draw(pipe, "a red S", concept=other, lambda_=0.4)
    torch._dynamo.reset()
    compilations: list[int] = []

    def backend(graph, example_inputs):
        compilations.append(len(compilations))
        return graph.forward

    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=backend)
    torch.testing.assert_close(draw(pipe, concept=concept), expected, **CLOSE)
    second = draw(pipe, "a red S", concept=other, lambda_=0.4)
    torch.testing.assert_close(second, other_expected, **CLOSE)
    assert len(compilations) == 1


def test_install_and_uninstall_reach_a_compiled_unet(pipe, mappers):
    layers = cross_attention_layers(pipe.unet)
    compiled = torch.compile(pipe.unet, backend="eager")
    pipe.uninstall()
    install(compiled, *mappers)
    assert all(attn.processor.layer == layer for layer, attn in layers.items())
