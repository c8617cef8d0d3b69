"""ElitePipeline on a tiny Stable Diffusion: independence, batches, settings, concepts."""

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from elite import Concept, ElitePipeline
from elite.attention import local_inputs
from elite.compat import MAPPERS
from elite.defaults import DEFAULT_SAMPLER, DEFAULT_STEPS
from elite.images import object_box, object_views
from elite.loading import SCHEDULERS, load_parts, make_scheduler
from elite.mappers import fingerprint_of
from elite.named_concepts import pick_words
from elite.settings import SAMPLERS
from elite.text import encode_text
from elite.wording import Note
from tests import tiny
from tests.conftest import make_pipe
from tests.tiny import STEPS, draw, relative

# Batched matrix products add in another order than single ones: some 1e-6 of the largest value,
# and guidance and sampling multiply that by about 10.
BATCH_TOLERANCE = 1e-4


def test_a_mask_that_is_all_object_gets_a_hint(pipe, recwarn):
    image, mask = tiny.picture(0)
    pipe.encode_concept(image, mask)
    assert not recwarn.list
    with pytest.warns(Note, match="corgi: every pixel is object"):
        pipe.encode_concept(image, np.ones_like(mask), name="corgi")


def test_an_object_that_no_patch_sees_gets_a_hint(pipe):
    image, mask = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), bool)
    mask[11:15, 11:15] = True  # within a patch of 10 pixels, beside its top-left one
    with pytest.warns(Note, match="dot: the object is smaller than a patch .* crop the picture"):
        concept = pipe.encode_concept(image, mask, name="dot")
    assert not concept.feature_tokens.any()


# --- beside other pipelines -----------------------------------------------------------------------


@pytest.fixture
def other(tmp_path) -> ElitePipeline:
    """Another Stable Diffusion with other mappers."""
    tiny.save_model_folder(tmp_path / "model", seed=5)
    tiny.save_mappers(tmp_path / "mappers", tmp_path / "model")
    return make_pipe(tmp_path / "model", tmp_path / "mappers")


def test_two_pipelines_interleaved_draw_what_each_draws_alone(pipe, concept, other):
    other_concept = other.encode_concept(*tiny.picture(1))
    alone, other_alone = draw(pipe, concept=concept), draw(other, concept=other_concept)
    assert relative(alone, other_alone) > 0.01

    def meanwhile(pipe, step, timestep, tensors):
        assert torch.equal(draw(other, concept=other_concept), other_alone)
        return tensors

    assert torch.equal(draw(pipe, concept=concept, callback_on_step_end=meanwhile), alone)


def stock_pipeline(parts: dict) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        **{name: part for name, part in parts.items() if name != "image_encoder"},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_of(seed: int) -> torch.Tensor:
    return torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(seed))


def draw_stock(pipe: StableDiffusionPipeline, prompt: str = "a photo of a S") -> torch.Tensor:
    """What `draw` asks of an ElitePipeline, asked of diffusers' own."""
    return pipe(
        prompt,
        latents=noise_of(7),
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="latent",
    ).images


def test_stock_pipeline_in_the_same_process_is_untouched(model_folder, pipe, concept):
    stock = stock_pipeline(load_parts(model_folder))
    before = draw_stock(stock)
    draw(pipe, concept=concept)
    assert torch.equal(draw_stock(stock), before)


def test_nothing_is_left_from_earlier_pictures(pipe, concept, concepts):
    first = draw(pipe, concept=concept)
    draw(pipe, "close-up of a S", concept=concepts[0], words="all", lambda_=0.1, guidance_scale=2.0)
    draw(pipe, "a photo of a dog")
    assert torch.equal(draw(pipe, concept=concept), first)


# --- against plain Stable Diffusion ---------------------------------------------------------------


@pytest.fixture
def untouched(model_folder) -> ElitePipeline:
    return tiny.build_untouched(model_folder)


def test_untouched_projections_without_concept_are_stock(parts, untouched):
    expected = draw_stock(stock_pipeline(parts), "a photo of a dog")
    # Fused and unfused attention add in another order.
    assert relative(draw(untouched, "a photo of a dog"), expected) < BATCH_TOLERANCE


def test_untouched_projections_at_lambda_0_are_stock(parts, untouched):
    """The word injected is the placeholder's own embedding."""
    concept = tiny.word_as_concept(untouched)
    expected = draw_stock(stock_pipeline(parts))
    # One more column in V changes the kernel's order of sums.
    assert relative(draw(untouched, concept=concept, lambda_=0.0), expected) < BATCH_TOLERANCE
    assert relative(draw(untouched, concept=concept, lambda_=0.8), expected) > 1e-3


def test_trained_projections_are_not_stock(parts, pipe):
    expected = draw_stock(stock_pipeline(parts), "a photo of a dog")
    assert relative(draw(pipe, "a photo of a dog"), expected) > 0.01


def test_uninstall_gives_plain_stable_diffusion_back(parts, pipe, concept):
    personal = draw(pipe, concept=concept)
    pipe.uninstall()
    plain = stock_pipeline({name: getattr(pipe, name) for name in parts})
    plain.scheduler = make_scheduler(DEFAULT_SAMPLER)
    assert torch.equal(draw_stock(plain), draw_stock(stock_pipeline(parts)))
    pipe.install()
    assert torch.equal(draw(pipe, concept=concept), personal)


# --- a batch is what single calls are -------------------------------------------------------------

PROMPTS = ["a photo of a S", "close-up of a S, far away", "S"]
LAMBDAS, SEEDS = [0.8, 0.6, 0.0], [3, 2**40, 5]


@pytest.mark.parametrize("words", [0, 2, "all"])
def test_batch_equals_single_calls(pipe, concepts, words):
    together = draw(pipe, PROMPTS, concept=concepts, lambda_=LAMBDAS, words=words, seed=SEEDS)
    for row, (prompt, concept) in enumerate(zip(PROMPTS, concepts, strict=True)):
        options = {"lambda_": LAMBDAS[row], "words": words, "seed": SEEDS[row]}
        single = draw(pipe, prompt, concept=concept, **options)
        assert relative(together[row : row + 1], single) < BATCH_TOLERANCE
        mate = (row + 1) % 3
        assert relative(together[mate : mate + 1], single) > 0.01


def test_batch_of_plain_prompts_equals_single_calls(pipe):
    prompts = ["a photo of a dog", "far away", ""]
    together = draw(pipe, prompts, seed=SEEDS)
    for row, prompt in enumerate(prompts):
        single = draw(pipe, prompt, seed=SEEDS[row])
        assert relative(together[row : row + 1], single) < BATCH_TOLERANCE


def test_one_concept_serves_all_prompts(pipe, concept):
    together = draw(pipe, PROMPTS, concept=concept, seed=SEEDS)
    each = draw(pipe, PROMPTS, concept=[concept] * 3, seed=SEEDS)
    assert torch.equal(together, each)


def test_several_pictures_per_prompt(pipe, concepts):
    """Rows are prompt by prompt, as diffusers has them."""
    options = {"concept": concepts[:2], "lambda_": [0.8, 0.4]}
    together = draw(pipe, PROMPTS[:2], num_images_per_prompt=2, seed=[1, 2, 3, 4], **options)
    assert len(together) == 4
    for row, seed in enumerate([1, 2, 3, 4]):
        prompt = row // 2
        single = draw(
            pipe, PROMPTS[prompt], concept=concepts[prompt], lambda_=[0.8, 0.4][prompt], seed=seed
        )
        assert relative(together[row : row + 1], single) < BATCH_TOLERANCE


def test_stacked_concept_is_a_list_of_concepts(pipe, concepts):
    stacked = draw(pipe, PROMPTS, concept=Concept.stack(concepts), seed=SEEDS)
    assert torch.equal(stacked, draw(pipe, PROMPTS, concept=concepts, seed=SEEDS))


def test_batch_of_views_encodes_as_single_pictures(pipe, concepts):
    views = [object_views(*tiny.picture(seed), 32, 4) for seed in (1, 2, 3)]
    batch = {key: torch.stack([view[key] for view in views]) for key in views[0]}
    together = pipe.encode_views(**batch)
    expected = Concept.stack(concepts)
    torch.testing.assert_close(together.words, expected.words)
    torch.testing.assert_close(together.feature_tokens, expected.feature_tokens)


def test_a_mapper_may_ask_for_the_object_alone(pipe):
    """The box of the mask, stretched to a square as crops are in training."""
    image, mask = tiny.picture(1)
    cropped = pipe.encode_concept(image[object_box(mask)], mask[object_box(mask)])
    whole = pipe.encode_concept(image, mask)
    mappers = pipe.global_mapper, pipe.local_mapper
    before = fingerprint_of(*mappers)
    pipe.global_mapper.register_to_config(crop_to_object=True)
    try:
        found = pipe.encode_concept(image, mask)
        assert fingerprint_of(*mappers) != before, "concepts of both must not be mixed"
    finally:
        pipe.global_mapper.register_to_config(crop_to_object=False)
    assert torch.equal(found.words, cropped.words)
    assert torch.equal(found.feature_tokens, cropped.feature_tokens)
    assert relative(found.words, whole.words) > 1e-3


def test_sizes_are_given_by_name(pipe, concept):
    """In second place some pipelines of diffusers have the height, others prompt_2."""
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments"):
        pipe("a S", 16, 16, concept=concept, seed=1)


@pytest.mark.parametrize("with_concept", [False, True])
def test_texts_may_be_of_any_kind_of_sequence(pipe, concept, with_concept):
    options = {"concept": concept} if with_concept else {}
    expected = draw(pipe, PROMPTS[:2], negative_prompt=["x", "x"], **options)
    for negative in ("x", ("x", "x")):
        drawn = draw(pipe, tuple(PROMPTS[:2]), negative_prompt=negative, **options)
        assert torch.equal(drawn, expected)


def test_one_text_is_for_all_embeddings(pipe, concept):
    embeds = pipe.condition("a S", concept)["prompt_embeds"].repeat(2, 1, 1)
    drawn = draw(pipe, None, prompt_embeds=embeds, negative_prompt="x")
    expected = draw(pipe, None, prompt_embeds=embeds, negative_prompt=["x", "x"])
    assert torch.equal(drawn, expected)


def test_none_means_one_picture_per_prompt(pipe, concept):
    drawn = draw(pipe, concept=concept, num_images_per_prompt=None)
    assert torch.equal(drawn, draw(pipe, concept=concept))


# --- several pictures of one object ---------------------------------------------------------------


def test_pictures_of_one_object_add_up(pipe, concepts):
    """Words are their mean, feature tokens stand side by side."""
    pictures = [tiny.picture(seed) for seed in (1, 2, 3)]
    one = pipe.encode_concept(*map(list, zip(*pictures, strict=True)))
    torch.testing.assert_close(one.words, torch.stack([c.words for c in concepts]).mean(0))
    tokens = torch.cat([c.feature_tokens for c in concepts], dim=1)
    torch.testing.assert_close(one.feature_tokens, tokens)
    assert relative(draw(pipe, concept=one), draw(pipe, concept=concepts[0])) > 0.01


def test_a_picture_shown_twice_is_that_picture(pipe, concepts):
    image, mask = tiny.picture(1)
    twice = pipe.encode_concept([image, image], (mask, mask))
    once = draw(pipe, concept=concepts[0])
    assert relative(draw(pipe, concept=twice), once) < BATCH_TOLERANCE


def test_each_picture_needs_its_mask(pipe):
    image, mask = tiny.picture(1)
    for images, masks in (([image, image], [mask]), ([image], [mask, mask]), ([], [])):
        with pytest.raises(ValueError, match="expected a mask for each picture"):
            pipe.encode_concept(images, masks)


# --- what shapes a picture ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"lambda_": 0.5},
        {"words": 1},
        {"words": "all"},
        {"seed": 8},
        {"guidance_scale": 2.0},
        {"guidance_scale": 1.0},
        {"num_inference_steps": 4},
        {"prompt": "close-up of a S"},
        {"negative_prompt": "far away"},
    ],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_each_setting_changes_the_picture(pipe, concept, change):
    assert relative(draw(pipe, concept=concept, **change), draw(pipe, concept=concept)) > 1e-4


def test_concept_changes_the_picture(pipe, concept, concepts):
    assert relative(draw(pipe, concept=concept), draw(pipe, concept=concepts[0])) > 1e-3


def test_local_branch_stays_out_of_the_unconditional_pass(pipe, concept):
    """At guidance g the prediction is u + g (c - u); one step of Euler is linear in it."""
    pipe.scheduler = make_scheduler("euler")

    def step(guidance, lambda_):
        options = {"guidance_scale": guidance, "lambda_": lambda_, "num_inference_steps": 1}
        return draw(pipe, concept=concept, **options)

    # What lambda adds comes from the conditional pass alone, so it is proportional to g.
    at_1 = step(1.0, 0.8) - step(1.0, 0.0)
    at_5 = step(5.0, 0.8) - step(5.0, 0.0)
    assert relative(at_5, 5 * at_1) < 1e-3
    assert at_1.abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("words", [0, "all"])
def test_sampling_written_out(pipe, concept, words):
    """The release's way: two passes, the unconditional one without local branch."""
    w = concept.words if words == "all" else concept.words[:, :1]
    ids = pipe.tokenizer(
        ["a S, far away", ""], padding="max_length", truncation=True, return_tensors="pt"
    )["input_ids"]
    index = torch.tensor([2])  # start token, a, S
    condition = encode_text(pipe.text_encoder, ids[:1], w, index)
    nothing = encode_text(pipe.text_encoder, ids[1:])
    local = local_inputs(concept.feature_tokens, index, 0.7, tiny.TEXT_LENGTH)
    scheduler = make_scheduler(DEFAULT_SAMPLER)
    scheduler.set_timesteps(STEPS)
    latents = noise_of(7) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(latents, t)
        uncond, cond = (
            pipe.unet(x, t, context, added_cond_kwargs={"image_embeds": extra}).sample
            for context, extra in ((nothing, []), (condition, local))
        )
        latents = scheduler.step(uncond + 5.0 * (cond - uncond), t, latents).prev_sample
    drawn = draw(pipe, "a S, far away", concept=concept, words=words, lambda_=0.7)
    assert relative(drawn, latents) < BATCH_TOLERANCE


@torch.no_grad()
def test_concept_is_what_the_mappers_make_of_the_views(pipe, concept):
    """The words see the picture, the feature tokens the object alone on black."""
    image, mask = tiny.picture(0)
    views = object_views(image, mask, 32, 4)

    def levels(view: torch.Tensor) -> list[torch.Tensor]:
        states = pipe.image_encoder(view[None], output_hidden_states=True).hidden_states
        return [states[8], *(states[layer] for layer in tiny.HIDDEN_LAYERS)]

    words = pipe.global_mapper(levels(views["clip_pixels"]))
    tokens = pipe.local_mapper(levels(views["object_pixels"]), views["patch_mask"][None])
    # The pipeline sends both views through CLIP as one batch, which may round otherwise.
    torch.testing.assert_close(concept.words, words)
    torch.testing.assert_close(concept.feature_tokens, tokens)


def test_seed_is_a_cpu_generator_in_float32(pipe, concept):
    by_seed = draw(pipe, concept=concept, seed=7)
    assert torch.equal(by_seed, draw(pipe, concept=concept, seed=None, latents=noise_of(7)))
    assert torch.equal(by_seed, draw(pipe, concept=concept, seed=[7]))


def test_size_is_free(pipe, concept):
    options = {"concept": concept, "num_inference_steps": 1, "seed": 7}
    assert pipe("a S", height=48, width=32, **options).images[0].size == (32, 48)
    assert pipe.resolution == 32 and pipe("a S", **options).images[0].size == (32, 32)


def test_lms_is_the_releases(pipe):
    """Fractional, evenly spaced timesteps."""
    scheduler = make_scheduler("lms", pipe.scheduler.config)
    scheduler.set_timesteps(100)
    expected = torch.linspace(999, 0, 100, dtype=torch.float64)
    torch.testing.assert_close(scheduler.timesteps.double(), expected, rtol=0, atol=1e-4)


def test_defaults(pipe):
    """The paper's guidance 5, lambda 0.8 and w0 alone, with our sampler."""
    assert type(pipe.scheduler) is SCHEDULERS[DEFAULT_SAMPLER]
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(ElitePipeline.__call__).parameters.items()
    }
    names = ("num_inference_steps", "guidance_scale", "lambda_", "words", "placeholder_token")
    assert [defaults[name] for name in names] == [DEFAULT_STEPS, 5.0, 0.8, 0, "S"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws(pipe, concept, name):
    pipe.scheduler = make_scheduler(name)
    assert torch.isfinite(draw(pipe, concept=concept)).all()


def test_karras_sigmas_are_crowded_at_little_noise():
    sigmas = []
    for name in ("dpm++", "dpm++_karras"):
        scheduler = make_scheduler(name)
        scheduler.set_timesteps(10)
        sigmas.append(scheduler.sigmas)
    even, crowded = sigmas
    torch.testing.assert_close(crowded[0], even[0])  # from all of the noise
    assert (crowded < 1).sum() > (even < 1).sum()


def test_sampler_keeps_the_models_noise_schedule():
    config = DDIMScheduler(
        beta_start=0.001, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction"
    ).config
    for name in SAMPLERS:
        made = make_scheduler(name, config).config
        assert (made.beta_start, made.beta_end, made.beta_schedule) == (0.001, 0.02, "linear")
        assert made.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="unknown scheduler 'lsm'; choose one of lms, dpm"):
        make_scheduler("lsm")


@pytest.mark.parametrize("given", [{"trained_betas": [0.1]}, {"rescale_betas_zero_snr": True}])
def test_a_noise_schedule_that_samplers_do_not_share_is_refused(model_folder, tmp_path, given):
    """It would be dropped, and another one drawn with."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | given))
    with pytest.raises(ValueError, match="expected no trained_betas and no rescale"):
        load_parts(folder)


def test_pick_words():
    words = torch.randn(2, 3, 4)
    assert torch.equal(pick_words(words, 2), words[:, 2:])
    assert pick_words(words, "all") is words
    for wrong in (3, -1):
        with pytest.raises(
            ValueError, match=f"word {wrong} does not exist; choose 0 to 2, or all words"
        ):
            pick_words(words, wrong)


# --- concepts -------------------------------------------------------------------------------------


def test_saved_concept_draws_the_same_picture(tmp_path, pipe, concept):
    concept.save(tmp_path / "x.safetensors")
    loaded = Concept.load(tmp_path / "x.safetensors")
    assert torch.equal(draw(pipe, concept=loaded), draw(pipe, concept=concept))


def test_images_and_arrays_are_the_same_concept(pipe, concept):
    image, mask = tiny.picture(0)
    for other_image, other_mask in (
        (Image.fromarray(image), Image.fromarray(mask)),
        (image, mask.astype(np.uint8) * 255),
        (Image.fromarray(image).convert("RGBA"), Image.fromarray(mask).convert("RGB")),
    ):
        again = pipe.encode_concept(other_image, other_mask)
        assert torch.equal(again.words, concept.words)
        assert torch.equal(again.feature_tokens, concept.feature_tokens)


def test_files_and_masks_of_three_channels_are_the_same_concept(pipe, concept, pairs, tmp_path):
    image, mask = tiny.picture(0)
    concept.save(path := tmp_path / "x.safetensors")
    again = [
        pipe.encode_concept(pairs / "pair0.png", str(pairs / "pair0_bg.png")),
        pipe.encode_concept(image, mask[..., None].repeat(3, axis=2).astype(np.uint8) * 255),
    ]
    assert all(torch.equal(one.words, concept.words) for one in again)
    drawn = draw(pipe, concept=concept, regions={"S": mask})
    region = str(pairs / "pair0_bg.png")
    assert torch.equal(draw(pipe, concept=path, regions={"S": region}), drawn)
    assert torch.equal(draw(pipe, concepts={"S": [str(path)]}, regions={"S": mask}), drawn)


def test_masked_out_patches_are_zero_tokens(concept):
    """The rectangle of the picture covers the middle 2 x 2 of 4 x 4 patches."""
    alive = concept.feature_tokens[0].abs().sum(dim=1).reshape(4, 4) > 0
    expected = torch.zeros(4, 4, dtype=bool)
    expected[1:3, 1:3] = True
    assert torch.equal(alive, expected)


def test_concept_of_other_mappers_is_refused(pipe, other):
    foreign = other.encode_concept(*tiny.picture(0))
    with pytest.raises(ValueError, match=f"fingerprint {foreign.fingerprint}, these are"):
        draw(pipe, concept=foreign)


def test_fingerprint_changes_with_the_weights(model_folder, mappers):
    parts = load_parts(model_folder)
    first = ElitePipeline(**parts, global_mapper=mappers[0], local_mapper=mappers[1]).fingerprint
    with torch.no_grad():
        mappers[1].mapping_0[6].bias[0] += 1e-3
    assert (
        ElitePipeline(**parts, global_mapper=mappers[0], local_mapper=mappers[1]).fingerprint
        != first
    )
    assert ElitePipeline(**parts, global_mapper=mappers[0]).fingerprint != first


def exchanged(how: str, pipe: ElitePipeline, folder: Path, given: dict) -> ElitePipeline:
    """A pipeline whose mappers are those given, in place of the others of `pipe` in the folder."""
    if how == "of a folder":
        return ElitePipeline.from_pretrained(folder, **given)
    if how == "of a pipeline":
        return ElitePipeline.from_pipe(pipe, **given)
    if how == "registered":
        pipe.register_modules(**given)
        return pipe
    for name, mapper in given.items():
        setattr(pipe, name, mapper)
    if how == "taken over":
        return ElitePipeline.from_pipe(pipe)
    if how == "saved":
        pipe.save_pretrained(folder / "again")
        return ElitePipeline.from_pretrained(folder / "again")
    return pipe


@pytest.mark.parametrize("names", [["global_mapper", "local_mapper"], ["local_mapper"]], ids=len)
@pytest.mark.parametrize(
    "how", ["of a folder", "of a pipeline", "registered", "assigned", "taken over", "saved"]
)
def test_exchanged_mappers_have_their_own_fingerprint(
    tmp_path, model_folder, pipe, concept, how, names
):
    """Concepts of the others were drawn without a word."""
    pipe.save_pretrained(tmp_path)
    others = zip(MAPPERS, tiny.build_mappers(model_folder, seed=5), strict=True)
    made = exchanged(how, pipe, tmp_path, {k: v for k, v in others if k in names})
    assert made.fingerprint == fingerprint_of(made.global_mapper, made.local_mapper)
    assert made.config.fingerprint == made.fingerprint != concept.fingerprint
    with pytest.raises(ValueError, match="concept was made by other mappers"):
        draw(made, concept=concept)
    its = made.encode_concept(*tiny.picture(0))
    assert torch.isfinite(draw(made, concept=its)).all()


def test_mappers_that_stay_keep_their_fingerprint(tmp_path, pipe, concept):
    """Rounded ones too, whose values would have another."""
    pipe.save_pretrained(tmp_path)
    for made in (
        ElitePipeline.from_pretrained(tmp_path, dtype=torch.float16),
        ElitePipeline.from_pipe(pipe, dtype=torch.float16),
        ElitePipeline.from_pipe(pipe, dtype=torch.float16, local_mapper=pipe.local_mapper),
    ):
        made.global_mapper = made.global_mapper
        assert made.fingerprint == concept.fingerprint
        assert fingerprint_of(made.global_mapper, made.local_mapper) != concept.fingerprint
    without = ElitePipeline.from_pretrained(tmp_path, local_mapper=None)
    assert without.fingerprint == concept.fingerprint and torch.isfinite(draw(without)).all()
    made.global_mapper = torch.compile(made.global_mapper)
    assert made.fingerprint == concept.fingerprint


def test_one_seed_counts_up_through_the_pictures_of_a_prompt(pipe, concept):
    prompts = ["a S", "a photo of a S"]
    several = {"concept": concept, "num_images_per_prompt": 2}
    first, second, *others = draw(pipe, prompts, **several, seed=np.int64(3))
    assert relative(first, second) > 0.1
    assert torch.equal(
        torch.stack([first, second, *others]), draw(pipe, prompts, **several, seed=[3, 4, 3, 4])
    )
    alone = draw(pipe, "a S", concept=concept, seed=torch.tensor(4))[0]
    assert relative(second, alone) < BATCH_TOLERANCE
