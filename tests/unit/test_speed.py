"""What is drawn with less work: as written out by hand, row by row, with callbacks, and without a
trace afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor

from elite import Concept
from elite.attention import local_inputs, visibility
from elite.deep_features import deep_features_reused, inner_modules
from elite.defaults import DEFAULT_SAMPLER
from elite.loading import make_scheduler
from elite.named_concepts import latent_regions
from elite.speed import EXACT, RUNGS, Speed, single_knobs, speed_of
from elite.text import encode_text, tokenize
from tests import tiny
from tests.tiny import draw, relative

STEPS = 6  # so that each rung reuses features, and in guided steps as well as in others
# Batched matrix products add in another order than single ones.
CLOSE = 1e-4
LEFT = np.arange(32) < np.full((32, 1), 16)
LESS = [name for name in RUNGS if name != "exact"]
SPEEDS = [
    Speed(guidance_stop=0.5),
    Speed(deep_every=2),
    Speed(guidance_stop=0.34, deep_every=3),
    Speed(guidance_stop=0.5, deep_every=4),  # the cut falls between two full steps
    Speed(deep_every=3, deep_first=3),
]


@pytest.fixture
def other(pipe) -> Concept:
    return pipe.encode_concept(*tiny.picture(1))


# --- the knobs ------------------------------------------------------------------------------------


def test_the_default_does_nothing():
    assert RUNGS["exact"] == EXACT == Speed() and str(EXACT) == ""
    assert EXACT.guided_steps(20) == 20


@pytest.mark.parametrize(
    ("share", "steps", "guided"), [(0.5, 20, 10), (0.55, 20, 11), (0.29, 100, 29), (0.01, 20, 1)]
)
def test_share_of_the_steps(share, steps, guided):
    assert Speed(guidance_stop=share).guided_steps(steps) == guided


def test_single_knobs_change_a_rung():
    fast = RUNGS["fast"]
    assert speed_of("fast") == speed_of(fast) == fast
    assert speed_of("fast", guidance_stop=0.9) == Speed(0.9, fast.deep_every)
    assert speed_of("exact", deep_every=3) == Speed(deep_every=3)
    assert str(Speed(0.5, 3)) == "guidance_stop 0.5, deep_every 3"
    assert speed_of("balanced", deep_first=5) == replace(RUNGS["balanced"], deep_first=5)
    assert str(Speed(deep_every=2)) == "deep_every 2"
    assert str(RUNGS["balanced"]) == "deep_every 5, deep_first 12"


@pytest.mark.parametrize(
    ("speed", "steps"),
    [
        (Speed(), [*range(20)]),
        (Speed(deep_every=3), [0, 3, 6, 9, 12, 15, 18]),
        (Speed(deep_every=3, deep_first=3), [0, 1, 3, 6, 9, 12, 15, 18]),
        (Speed(deep_every=4, deep_first=2), [0, 2, 6, 10, 14, 18]),
        (RUNGS["balanced"], [0, 1, 2, 4, 6, 9, 13, 18]),
        (Speed(deep_every=1, deep_first=4), [*range(20)]),
        (Speed(deep_every=20, deep_first=20), [0, 1, 3, 7, 15]),
    ],
    ids=str,
)
def test_steps_that_run_whole(speed, steps):
    assert [step for step in range(20) if speed.runs_whole(step)] == steps


def test_no_knob_alone_is_a_rung_or_does_nothing():
    for speed in single_knobs().values():
        assert speed not in RUNGS.values()
        assert speed.guided_steps(20) < 20 or not speed.runs_whole(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": "fats"}, "speed is 'fats'; choose one of exact, balanced, fast"),
        ({"guidance_stop": 0.0}, r"guidance_stop 0\.0: expected a share of the steps"),
        ({"guidance_stop": 1.1}, r"guidance_stop 1\.1: expected a share"),
        ({"deep_every": 0}, "deep_every 0: expected a whole number of steps"),
        ({"deep_every": 1.5}, r"deep_every 1\.5: expected a whole number"),
        ({"deep_first": 0}, "deep_first 0: expected a whole number of steps"),
    ],
)
def test_mistakes_are_named(pipe, concept, options, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, concept=concept, **options)


# --- which work is done ---------------------------------------------------------------------------


@contextmanager
def watched(pipe) -> Iterator[list[list[int]]]:
    """Within it, the list grows by [rows, rows of the middle block or 0] of each call."""
    calls: list[list[int]] = []
    before = pipe.unet.register_forward_pre_hook(lambda _, args: calls.append([len(args[0]), 0]))
    first = inner_modules(pipe.unet)[0].resnets[0]
    inside = first.register_forward_pre_hook(lambda _, args: calls[-1].__setitem__(1, len(args[0])))
    yield calls
    before.remove()
    inside.remove()


def test_rows_and_blocks_of_every_step(pipe, concept):
    prompts = {"prompt": ["a S", "S"], "seed": [1, 2], "num_inference_steps": STEPS}
    for speed, expected in (
        (EXACT, [[4, 4]] * 6),
        (SPEEDS[0], [[4, 4]] * 3 + [[2, 2]] * 3),
        (SPEEDS[1], [[4, 4], [4, 0]] * 3),
        (SPEEDS[2], [[4, 4], [4, 0], [2, 0], [2, 2], [2, 0], [2, 0]]),
        (SPEEDS[3], [[4, 4], [4, 0], [4, 0], [2, 0], [2, 2], [2, 0]]),
    ):
        with watched(pipe) as calls:
            draw(pipe, concept=concept, speed=speed, **prompts)
        assert calls == expected, speed


def test_guidance_1_runs_the_conditional_rows_alone(pipe, concept):
    for speed in RUNGS:
        with watched(pipe) as calls:
            draw(pipe, concept=concept, speed=speed, guidance_scale=1.0)
        assert {rows for rows, _ in calls} == {1}


# --- written out ----------------------------------------------------------------------------------


def predicted(
    unet, x: Tensor, t: Tensor, read: tuple[Tensor, list[Tensor]], deep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The noise in x (1, C, h, w), and what comes up from the inner blocks: computed where `deep`
    is None, else taken from there."""
    context, local = read
    last = unet.up_blocks[-1]
    if deep is None:
        seen: list[Tensor] = []
        with last.resnets[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            extra = {"image_embeds": local}
            noise = unet(x, t, context, added_cond_kwargs=extra).sample
        return noise, seen[0][:, : -unet.conv_in.out_channels]
    time = unet.time_embedding(unet.get_time_embed(x, t))
    joined = torch.cat([deep, unet.conv_in(x)], dim=1)
    inside = last.resnets[-1](joined, time)
    (out,) = last.attentions[-1](inside, encoder_hidden_states=read, return_dict=False)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(out))), deep


@torch.no_grad()
@pytest.mark.parametrize("speed", SPEEDS, ids=str)
def test_sampling_written_out(pipe, concept, speed):
    """Row by row: the unconditional ones end, and inner blocks run where the step says so. The
    object may appear on the left alone."""
    encoder, scheduler = pipe.text_encoder, make_scheduler(DEFAULT_SAMPLER)
    ids, index = tokenize(pipe.tokenizer, ["a S, far away"], "S")
    condition = encode_text(encoder, ids, concept.words[:, :1], index)
    nothing = encode_text(encoder, tokenize(pipe.tokenizer, [""], [])[0])
    condition, nothing = (x.repeat(1, 2, 1) for x in (condition, nothing))  # and in the region
    places, length = torch.stack([index, index + tiny.TEXT_LENGTH], dim=1), tiny.TEXT_LENGTH
    local = local_inputs(concept.feature_tokens, places, 0.7, 2 * length)
    shares = latent_regions({"S": LEFT}, ["S"], 16, 16)
    local.append(visibility(shares, index[:, None], 1, length))
    scheduler.set_timesteps(STEPS)
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    deep: dict[str, Tensor | None] = {}
    for step, t in enumerate(scheduler.timesteps):
        if speed.runs_whole(step):
            deep = {"uncond": None, "cond": None}
        x = scheduler.scale_model_input(latents, t)
        noise, deep["cond"] = predicted(pipe.unet, x, t, (condition, local), deep["cond"])
        if step < round(speed.guidance_stop * STEPS):
            uncond, deep["uncond"] = predicted(pipe.unet, x, t, (nothing, []), deep["uncond"])
            noise = uncond + 5.0 * (noise - uncond)
        latents = scheduler.step(noise, t, latents).prev_sample
    options = {"concept": concept, "lambda_": 0.7, "num_inference_steps": STEPS}
    options["regions"] = {"S": LEFT}
    drawn = draw(pipe, "a S, far away", speed=speed, **options)
    assert relative(drawn, latents) < CLOSE
    assert relative(drawn, draw(pipe, "a S, far away", **options)) > 10 * CLOSE


@torch.no_grad()
@pytest.mark.parametrize("freeu", [False, True])
def test_the_same_input_gives_the_same_output_with_features_reused(pipe, freeu):
    """FreeU writes into the features that it reads, here those of the last block too."""
    if freeu:
        pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, tiny.TEXT_LENGTH, 24)
    call = {"added_cond_kwargs": {"image_embeds": []}, "return_dict": False}
    expected = pipe.unet(x, 500, context, **call)[0]
    with deep_features_reused(pipe.unet, Speed(deep_every=3).runs_whole):
        for _ in range(4):
            assert torch.equal(pipe.unet(x, 500, context, **call)[0], expected)


def test_features_of_every_step_change_nothing(pipe, concept):
    expected = draw(pipe, concept=concept)
    with deep_features_reused(pipe.unet, Speed(deep_every=1).runs_whole):
        assert torch.equal(draw(pipe, concept=concept), expected)
    assert torch.equal(draw(pipe, concept=concept, speed="exact"), expected)


# --- batches, concepts, regions, samplers ---------------------------------------------------------


@pytest.mark.parametrize("speed", LESS)
def test_batch_equals_single_calls(pipe, concept, other, speed):
    prompts, concepts, seeds = ["a photo of a S", "S, far away"], [concept, other], [3, 5]
    options = {"speed": speed, "num_inference_steps": STEPS}
    together = draw(pipe, prompts, concept=concepts, lambda_=[0.8, 0.4], seed=seeds, **options)
    for row, lambda_ in enumerate((0.8, 0.4)):
        given = {"concept": concepts[row], "lambda_": lambda_, "seed": seeds[row]}
        single = draw(pipe, prompts[row], **given, **options)
        assert relative(together[row : row + 1], single) < CLOSE
        assert relative(together[1 - row : 2 - row], single) > 100 * CLOSE


@pytest.mark.parametrize("speed", LESS)
def test_several_pictures_per_prompt(pipe, concept, speed):
    options = {"concept": concept, "speed": speed, "num_inference_steps": STEPS}
    together = draw(pipe, num_images_per_prompt=2, seed=[1, 2], **options)
    for row, seed in enumerate((1, 2)):
        assert relative(together[row : row + 1], draw(pipe, seed=seed, **options)) < CLOSE


@pytest.mark.parametrize("speed", LESS)
def test_several_concepts_in_regions(pipe, concept, other, speed):
    """In a batch, too."""
    prompts = ["a S1 next to a S2", "a S2 and a S1"]
    given = {"concepts": {"S1": concept, "S2": other}, "regions": {"S1": LEFT, "S2": ~LEFT}}
    options = {"speed": speed, "num_inference_steps": STEPS}
    together = draw(pipe, prompts, seed=[3, 5], **given, **options)
    for row, seed in enumerate((3, 5)):
        single = draw(pipe, prompts[row], seed=seed, **given, **options)
        assert relative(together[row : row + 1], single) < CLOSE
    swapped = {**given, "regions": {"S1": ~LEFT, "S2": LEFT}}
    assert relative(draw(pipe, prompts, seed=[3, 5], **swapped, **options), together) > 10 * CLOSE


@pytest.mark.parametrize("speed", RUNGS)
@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_samplers_of_few_steps_draw_by_seed(pipe, concept, sampler, speed):
    """LCM adds noise at each step, TCD where eta says so: from the picture's own generator."""
    pipe.scheduler = make_scheduler(sampler)
    options = {"concept": concept, "speed": speed, "num_inference_steps": 4}
    options |= {"guidance_scale": 1.0, "eta": 0.3}
    together = draw(pipe, ["a S", "S"], seed=[3, 5], **options)
    for row, (prompt, seed) in enumerate((("a S", 3), ("S", 5))):
        assert relative(together[row : row + 1], draw(pipe, prompt, seed=seed, **options)) < CLOSE
    torch.manual_seed(1)
    assert torch.equal(draw(pipe, ["a S", "S"], seed=[3, 5], **options), together)


# --- callbacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", RUNGS)
def test_a_callback_is_given_what_it_asks_for(pipe, concept, speed):
    """Nothing else, at each step; where it may change the text, that changes no picture."""
    given: list[dict] = []

    def watch(pipe, step, timestep, tensors):
        given.append({name: len(x) for name, x in tensors.items()})
        return tensors

    options = {"concept": concept, "speed": speed, "num_inference_steps": STEPS}
    expected = draw(pipe, **options)
    assert torch.equal(draw(pipe, callback_on_step_end=watch, **options), expected)
    assert given == [{"latents": 1}] * STEPS
    given.clear()
    both = ["latents", "prompt_embeds"]
    asking = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": both}
    assert relative(draw(pipe, **asking, **options), expected) < CLOSE
    guided = RUNGS[speed].guided_steps(STEPS)
    rows = [2] * guided + [1] * (STEPS - guided)
    assert given == [{"latents": 1, "prompt_embeds": count} for count in rows]


def test_text_changed_where_guidance_ends_is_read(pipe, concept):
    options = {"concept": concept, "speed": Speed(guidance_stop=0.5), "num_inference_steps": 4}

    def silence(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * (step != 1)}

    asking = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    changed = draw(pipe, callback_on_step_end=silence, **asking, **options)
    assert relative(changed, draw(pipe, **options)) > 10 * CLOSE


@pytest.mark.parametrize("ratio", [0.2, 0.9])
def test_a_callback_may_end_guidance_itself(pipe, concept, ratio):
    """Earlier than the speed, or too late."""
    options = {"concept": concept, "num_inference_steps": 5}
    cut = SDCFGCutoffCallback(cutoff_step_ratio=ratio)
    speed = Speed(guidance_stop=0.4)
    drawn = draw(pipe, callback_on_step_end=cut, speed=speed, **options)
    alone = {"callback_on_step_end": cut} if ratio == 0.2 else {"speed": speed}
    assert relative(drawn, draw(pipe, **alone, **options)) < CLOSE


# --- and no trace afterwards ----------------------------------------------------------------------


def traces(pipe) -> list[str]:
    """Modules whose forward is not their class's, or that have hooks."""
    return [
        name
        for name, module in pipe.unet.named_modules()
        if "forward" in vars(module) or module._forward_pre_hooks or module._forward_hooks
    ]


@pytest.mark.parametrize("speed", LESS)
def test_exact_pictures_before_and_after_are_the_same(pipe, concept, speed):
    before, expected = traces(pipe), draw(pipe, concept=concept)
    draw(pipe, concept=concept, speed=speed, num_inference_steps=STEPS)
    assert traces(pipe) == before
    assert torch.equal(draw(pipe, concept=concept), expected)


def test_nothing_is_left_after_an_exception(pipe, concept):
    def fails(pipe, step, timestep, tensors):
        assert traces(pipe) != before
        if step == 3:  # without guidance, with features reused
            raise KeyboardInterrupt
        return tensors

    before, expected = traces(pipe), draw(pipe, concept=concept)
    with pytest.raises(KeyboardInterrupt):
        draw(
            pipe,
            concept=concept,
            speed="fast",
            num_inference_steps=STEPS,
            callback_on_step_end=fails,
        )
    assert traces(pipe) == before
    assert torch.equal(draw(pipe, concept=concept), expected)


def test_a_forward_that_an_offloading_hook_has_put_there_stays(pipe):
    module = pipe.unet.mid_block
    hooked = lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)  # noqa: E731
    module.forward = hooked
    with deep_features_reused(pipe.unet, Speed(deep_every=2).runs_whole):
        assert module.forward is not hooked
    assert module.forward is hooked and "forward" not in vars(pipe.unet.down_blocks[0])


@torch.no_grad()
def test_one_tensor_is_kept(pipe, concept, monkeypatch):
    """Of all else the shapes."""
    kept: list[Tensor] = []
    monkeypatch.setattr("elite.deep_features._kept", lambda x: kept.append(x) or x.clone())
    draw(pipe, concept=concept, num_inference_steps=1, deep_every=2)
    assert [tuple(x.shape) for x in kept] == [(2, 16, 16, 16)]
