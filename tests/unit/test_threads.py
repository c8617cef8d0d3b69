"""Threads, and generations within generations, whose pipelines share a UNet and a text encoder."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch

from elite import Concept, ElitePipeline
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
