"""ELITE as modular blocks of diffusers draws what the pipeline draws."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.modular_pipelines import ModularPipeline

from elite import ElitePipeline
from elite.loading import make_scheduler
from elite.modular import EliteBlocks
from tests import tiny
from tests.tiny import STEPS, draw

PROMPT = "a photo of a S"
GIVEN = {"prompt": PROMPT, "negative_prompt": "blurry", "seed": 7, "num_inference_steps": STEPS}


def modular_of(pipe: ElitePipeline, blocks: EliteBlocks) -> ModularPipeline:
    """The blocks over the parts of a pipeline."""
    names = [spec.name for spec in blocks.expected_components]
    made = blocks.init_pipeline()
    made.update_components(**{name: pipe.components[name] for name in names})
    made.update_components(fingerprint=pipe.fingerprint)
    return made


def test_blocks_draw_what_the_pipeline_draws(pipe, concept):
    image, mask = tiny.picture(0)
    expected = draw(pipe, PROMPT, concept=concept, lambda_=0.6, negative_prompt="blurry")
    modular = modular_of(pipe, EliteBlocks())
    state = modular(image=image, mask=mask, lambda_=0.6, **GIVEN)
    assert torch.equal(state.latents, expected)
    assert state.images[0].size == (32, 32)
    other = modular(image=image, mask=mask, lambda_=0.1, output="latents", **GIVEN)
    assert not torch.equal(other, expected)


def test_blocks_crop_as_the_mapper_asks(pipe):
    pipe.global_mapper.register_to_config(crop_to_object=True)
    try:
        image, mask = tiny.picture(0)
        concept = pipe.encode_concept(image, mask)
        expected = draw(pipe, PROMPT, concept=concept, negative_prompt="blurry")
        drawn = modular_of(pipe, EliteBlocks())(image=image, mask=mask, output="latents", **GIVEN)
    finally:
        pipe.global_mapper.register_to_config(crop_to_object=False)
    assert torch.equal(drawn, expected)


def test_a_concept_takes_the_place_of_its_block(pipe, concept):
    blocks = EliteBlocks()
    blocks.sub_blocks.pop("concept")
    modular = modular_of(pipe, blocks)
    expected = draw(pipe, PROMPT, concept=concept, guidance_scale=1.0)
    drawn = modular(concept=concept, guidance_scale=1.0, output="latents", **GIVEN)
    assert torch.equal(drawn, expected)
    other = type(concept)(concept.words, concept.feature_tokens, "another")
    with pytest.raises(ValueError, match="concept was made by other mappers"):
        modular(concept=other, **GIVEN)
    with pytest.raises(ValueError, match=r"concept is of 2 objects; pass one, as concept\[0\]"):
        modular(concept=type(concept).stack([concept, concept]), **GIVEN)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 64}, "width: unknown argument"),
        ({"num_images_per_prompt": 4}, "num_images_per_prompt: unknown argument"),
        ({"words": "all"}, "words: unknown argument"),
        ({"lambdaa_": 0.3}, "lambdaa_: unknown argument; did you mean lambda_?"),
        ({"concept": "x.safetensors"}, "concept: a block makes it; leave it out, or take out"),
        ({"prompt": ["a S"]}, "prompt is ['a S']; expected a text"),
        ({"negative_prompt": ["a"]}, "negative_prompt is ['a']; expected a text"),
        ({"placeholder_token": 5}, "placeholder_token is 5; expected a text"),
        *(({"lambda_": x}, f"lambda_ is {x!r}; expected a number") for x in ("a", float("inf"))),
        *(
            ({"guidance_scale": x}, f"guidance_scale is {x!r}; expected a number")
            for x in ("5", float("nan"), [5.0])
        ),
        *(
            ({"num_inference_steps": x}, f"num_inference_steps is {x!r}; expected 1 to 1000")
            for x in (0, 2.5, "2", 1001)
        ),
        *(({"seed": x}, f"seed is {x!r}; expected whole") for x in ("a", [1, 2], 2**64, True)),
    ],
)
def test_wrong_arguments_are_one_line(pipe, given, message):
    """Names were ignored, wrong kinds ended in messages of torch."""
    image, mask = tiny.picture(0)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        modular_of(pipe, EliteBlocks())(**{"image": image, "mask": mask, **GIVEN, **given})
    assert "\n" not in str(raised.value)


def test_a_concept_may_be_a_file(tmp_path, pipe, concept):
    blocks = EliteBlocks()
    blocks.sub_blocks.pop("concept")
    modular = modular_of(pipe, blocks)
    concept.save(tmp_path / "concept.safetensors")
    drawn = modular(concept=tmp_path / "concept.safetensors", output="latents", **GIVEN)
    assert torch.equal(drawn, modular(concept=concept, output="latents", **GIVEN))
    with pytest.raises(ValueError, match="concept is 5; expected that of encode_concept or a file"):
        modular(concept=5, **GIVEN)
    with pytest.raises(ValueError, match="image: unknown argument"):
        modular(concept=concept, image=tiny.picture(0)[0], **GIVEN)


def test_blocks_load_a_saved_pipeline(tmp_path, pipe, concept):
    pipe.save_pretrained(tmp_path)
    modular = EliteBlocks().init_pipeline(str(tmp_path))
    modular.load_components()
    image, mask = tiny.picture(0)
    drawn = modular(image=image, mask=mask, output="latents", **GIVEN)
    expected = draw(pipe, PROMPT, concept=concept, negative_prompt="blurry")
    assert torch.equal(drawn, expected)
    assert modular.config.fingerprint == pipe.fingerprint


def test_blocks_draw_with_tcd_as_the_pipeline_does(pipe, concept):
    """Whose noise is 0.3 unless it is told."""
    pipe.scheduler = make_scheduler("tcd", pipe.scheduler.config)
    image, mask = tiny.picture(0)
    expected = draw(pipe, PROMPT, concept=concept, negative_prompt="blurry")
    drawn = modular_of(pipe, EliteBlocks())(image=image, mask=mask, output="latents", **GIVEN)
    assert torch.equal(drawn, expected)


def test_blocks_do_not_take_sdxl(xl_folder, pipe, concept):
    blocks = EliteBlocks()
    blocks.sub_blocks.pop("concept")
    modular = modular_of(pipe, blocks)
    modular.update_components(unet=UNet2DConditionModel.from_pretrained(xl_folder / "unet"))
    with pytest.raises(ValueError, match="not with SDXL"):
        modular(concept=concept, **GIVEN)


@pytest.mark.parametrize("drawn_before", [False, True])
def test_exchanged_mappers_refuse_concepts_of_the_others(model_folder, pipe, concept, drawn_before):
    blocks = EliteBlocks()
    blocks.sub_blocks.pop("concept")
    modular = modular_of(pipe, blocks)
    if drawn_before:
        modular(concept=concept, **GIVEN)
    global_mapper, local_mapper = tiny.build_mappers(model_folder, seed=5)
    modular.update_components(global_mapper=global_mapper, local_mapper=local_mapper)
    with pytest.raises(ValueError, match="concept was made by other mappers"):
        modular(concept=concept, **GIVEN)
