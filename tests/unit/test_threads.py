"""Threads, and generations within generations, whose pipelines share a UNet and a text encoder."""

import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch

from elite import Concept, ElitePipeline, conditioning
from tests import tiny
from tests.tiny import draw, relative

ROUNDS = 8
CLOSE = 1e-4


def beside(pipe: ElitePipeline, **parts) -> ElitePipeline:
    """Another pipeline of the same models, but for these parts."""
    scheduler = deepcopy(pipe.scheduler)
    other = ElitePipeline(**{**pipe.components, "scheduler": scheduler, **parts})
    other.set_progress_bar_config(disable=True)
    return other


def own_mappers(model_folder) -> dict:
    names = ("global_mapper", "local_mapper")
    return dict(zip(names, tiny.build_mappers(model_folder, seed=5), strict=True))


@pytest.mark.parametrize("mappers", ["same", "other"])
@pytest.mark.parametrize("speed", ["exact", "fast"])
def test_threads_draw_what_one_draws(pipe, model_folder, mappers, speed):
    """One in three pictures was of the other thread's words or mappers, at speeds a traceback."""
    other = beside(pipe, **(own_mappers(model_folder) if mappers == "other" else {}))
    calls = [
        (some, {"concept": some.encode_concept(*tiny.picture(n)), "num_inference_steps": 3, **way})
        for n, (some, way) in enumerate([(pipe, {"speed": speed}), (other, {})])
    ]
    expected = [draw(some, **options) for some, options in calls]

    def drawn(number: int) -> list[float]:
        some, options = calls[number]
        return [relative(draw(some, **options), expected[number]) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(drawn, range(2)))
    assert max(map(max, found)) < CLOSE, found
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_mappers_stay_while_k_and_v_are_computed(pipe, model_folder, monkeypatch):
    """The other thread plugged its own in meanwhile."""
    other = beside(pipe, **own_mappers(model_folder))
    calls = [
        (some, {"concept": some.encode_concept(*tiny.picture(0)), "num_inference_steps": 1})
        for some in (pipe, other)
    ]
    expected = [draw(some, **options) for some, options in calls]
    computed = conditioning.keys_values

    def slowly(*args):
        time.sleep(0.2)
        return computed(*args)

    monkeypatch.setattr(conditioning, "keys_values", slowly)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda call: draw(call[0], **call[1]), calls))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("inner", ["exact", "fast"])
def test_a_callback_may_draw_with_the_same_unet(pipe, concept: Concept, inner):
    other, of_callback = beside(pipe), []

    def draws(pipe, step, timestep, tensors):
        if step == 1:
            options = {"concept": concept, "speed": inner, "num_inference_steps": 4}
            of_callback.append(draw(other, **options))
        return {}

    options = {"concept": concept, "speed": "fast", "num_inference_steps": 6}
    expected = draw(pipe, **options)
    alone = draw(other, concept=concept, speed=inner, num_inference_steps=4)
    assert torch.equal(draw(pipe, callback_on_step_end=draws, **options), expected)
    assert torch.equal(of_callback[0], alone)


def test_a_callback_that_may_change_the_prompt_may_draw_with_other_mappers(pipe, model_folder):
    other = beside(pipe, **own_mappers(model_folder))
    its = other.encode_concept(*tiny.picture(1))
    concept = pipe.encode_concept(*tiny.picture(0))
    options = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "concept": concept}
    expected = draw(pipe, callback_on_step_end=lambda *_: {}, **options)

    def draws(*_) -> None:
        draw(other, concept=its, num_inference_steps=1)

    assert torch.equal(draw(pipe, callback_on_step_end=draws, **options), expected)
