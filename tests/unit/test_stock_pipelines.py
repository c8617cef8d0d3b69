"""Diffusers' own pipelines around a UNet with ELITE installed, fed by `ElitePipeline.condition`."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from elite import ElitePipeline
from elite.loading import load_parts, make_scheduler
from tests import tiny
from tests.tiny import draw, relative

# Fused and unfused attention, and batches of other sizes, add in another order.
CLOSE = 1e-4
PROMPT = "a photo of a S"
LATENT_SIDE = 16


def start() -> Image.Image:
    return Image.fromarray(tiny.picture(4, 32, 32)[0])


def inpainted() -> Image.Image:
    """The right half."""
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    return Image.fromarray(mask)


def controlnet(model_folder) -> ControlNetModel:
    torch.manual_seed(11)
    unet = load_parts(model_folder)["unet"]
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    with torch.no_grad():
        for parameter in net.parameters():  # its outputs start at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


TASKS = {
    "text-to-image": (StableDiffusionPipeline, lambda: {"height": 32, "width": 32}),
    "image-to-image": (StableDiffusionImg2ImgPipeline, lambda: {"image": start(), "strength": 0.6}),
    "inpainting": (
        StableDiffusionInpaintPipeline,
        lambda: {"image": start(), "mask_image": inpainted(), "height": 32, "width": 32},
    ),
    "controlnet": (StableDiffusionControlNetPipeline, lambda: {"image": start()}),
}
every_task = pytest.mark.parametrize("task", TASKS)


def stock(task: str, pipe: DiffusionPipeline, model_folder) -> DiffusionPipeline:
    """Diffusers' pipeline for a task, on the parts of another."""
    parts = {"controlnet": controlnet(model_folder)} if task == "controlnet" else {}
    made = TASKS[task][0].from_pipe(pipe, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def draw_stock(task: str, pipe: DiffusionPipeline, seed: int = 7, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = {"num_inference_steps": 5, "output_type": "latent", "generator": generator}
    return pipe(**{**TASKS[task][1](), **inputs, **options}).images


@every_task
def test_equals_stable_diffusion_where_elite_changes_nothing(model_folder, task):
    """K and V still the UNet's, the word the placeholder's own, lambda 0."""
    untouched = tiny.build_untouched(model_folder)
    given = untouched.condition(PROMPT, tiny.word_as_concept(untouched), lambda_=0.0)
    drawn = draw_stock(task, stock(task, untouched, model_folder), **given)
    untouched.uninstall()
    plain = stock(task, untouched, model_folder)
    expected = draw_stock(task, plain, prompt=PROMPT, guidance_scale=5.0)
    assert relative(drawn, expected) < CLOSE


@every_task
def test_concept_and_lambda_change_the_picture(model_folder, pipe, concept, task):
    other = pipe.encode_concept(*tiny.picture(1))
    made = stock(task, pipe, model_folder)
    drawn = draw_stock(task, made, **pipe.condition(PROMPT, concept))
    assert relative(draw_stock(task, made, **pipe.condition(PROMPT, other)), drawn) > 1e-3
    weak = draw_stock(task, made, **pipe.condition(PROMPT, concept, lambda_=0.1))
    assert relative(weak, drawn) > 1e-3


# Not inpainting: diffusers draws its noise in another order there for a batch.
@pytest.mark.parametrize("task", ["text-to-image", "image-to-image", "controlnet"])
@pytest.mark.parametrize("regions", [{}, {"S": np.array([[True, False]])}], ids=["", "region"])
def test_several_pictures_of_a_prompt_equal_single_ones(model_folder, pipe, concept, task, regions):
    made = stock(task, pipe, model_folder)
    given = pipe.condition(PROMPT, concept, regions=regions)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = draw_stock(task, made, num_images_per_prompt=2, **{**given, "generator": generators})
    for row, seed in enumerate((1, 2)):
        assert relative(both[row : row + 1], draw_stock(task, made, seed, **given)) < CLOSE


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a red critter"},
        {"words": "all", "lambda_": 0.3},
        {"regions": {"S": np.array([[True, False]])}},
    ],
    ids=str,
)
def test_text_to_image_is_what_elite_draws(model_folder, pipe, concept, options):
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    made = stock("text-to-image", pipe, model_folder)
    given = pipe.condition(PROMPT, concept, **options)
    drawn = draw_stock("text-to-image", made, latents=noise, num_inference_steps=3, **given)
    assert relative(drawn, draw(pipe, concept=concept, **options)) < CLOSE


@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 1.0}, {"regions": {"S": np.array([[True, False]])}}], ids=str
)
def test_elites_own_pipeline_takes_it_too(pipe, concept, options):
    given = pipe.condition(PROMPT, concept, **options)
    drawn = draw(pipe, prompt=None, **given, num_images_per_prompt=2)
    expected = draw(pipe, PROMPT, concept=concept, **options, num_images_per_prompt=2)
    assert relative(drawn, expected) < CLOSE
    wrong = {**given, "ip_adapter_image_embeds": [x[:0] for x in given["ip_adapter_image_embeds"]]}
    with pytest.raises(ValueError, match="0 rows of ip_adapter_image_embeds for 1 prompt"):
        draw(pipe, prompt=None, **wrong)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_one_condition_serves_every_row_of_embeddings(pipe, concept, guidance_scale):
    given = pipe.condition(PROMPT, concept, guidance_scale=guidance_scale)
    texts = ("prompt_embeds", "negative_prompt_embeds")
    for count in (2, 3):
        several = {name: x.repeat(count, 1, 1) for name in texts if (x := given[name]) is not None}
        drawn = draw(pipe, prompt=None, **{**given, **several}, seed=list(range(count)))
        for seed, row in enumerate(drawn):
            alone = draw(pipe, prompt=None, **given, seed=seed)
            assert relative(row[None], alone) < CLOSE


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_embeddings_need_no_text_encoder(pipe, concept, guidance_scale):
    given = pipe.condition(PROMPT, concept, guidance_scale=guidance_scale)
    expected = draw(pipe, prompt=None, **given)
    pipe.text_encoder = None
    assert torch.equal(draw(pipe, prompt=None, **given), expected)


def test_conditions_one_after_the_other_are_no_batch(pipe, concept):
    """Each has its guidance row first, so that every second row would be taken for a prompt's."""
    given = pipe.condition(PROMPT, concept)
    several = {
        name: given[name].repeat(2, 1, 1) for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    local = [torch.cat([x, x]) for x in given["ip_adapter_image_embeds"]]
    with pytest.raises(ValueError, match="4 rows of ip_adapter_image_embeds for 2 prompts"):
        draw(pipe, prompt=None, **{**given, **several, "ip_adapter_image_embeds": local})


def test_inpainting_keeps_what_is_outside_the_mask(model_folder, pipe, concept):
    made = stock("inpainting", pipe, model_folder)
    other = pipe.encode_concept(*tiny.picture(1))
    a, b = (draw_stock("inpainting", made, **pipe.condition(PROMPT, c)) for c in (concept, other))
    half = LATENT_SIDE // 2
    assert torch.equal(a[..., :half], b[..., :half])
    assert relative(a[..., half:], b[..., half:]) > 1e-3


def test_global_branch_alone_needs_no_local_inputs(model_folder, mapper_folder):
    pipe = ElitePipeline.from_stable_diffusion(
        model_folder, global_mapper=mapper_folder / "global_mapper"
    )
    pipe.set_progress_bar_config(disable=True)
    concept = pipe.encode_concept(*tiny.picture(0))
    made = stock("text-to-image", pipe, model_folder)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    given = pipe.condition(PROMPT, concept)
    drawn = draw_stock("text-to-image", made, latents=noise, num_inference_steps=3, **given)
    assert relative(drawn, draw(pipe, concept=concept)) < CLOSE


def test_another_scheduler_of_a_stock_pipeline_is_its_own(model_folder, pipe, concept):
    expected = draw(pipe, concept=concept)
    made = stock("image-to-image", pipe, model_folder)
    made.scheduler = make_scheduler("ddim")
    assert torch.isfinite(
        draw_stock("image-to-image", made, **pipe.condition(PROMPT, concept))
    ).all()
    assert torch.equal(draw(pipe, concept=concept), expected)


def test_a_plain_prompt_is_drawn_as_elite_draws_it(model_folder, pipe):
    made = stock("text-to-image", pipe, model_folder)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    options = {"prompt": PROMPT, "guidance_scale": 5.0, "num_inference_steps": 3, "latents": noise}
    assert relative(draw_stock("text-to-image", made, **options), draw(pipe)) < CLOSE


def test_what_a_stock_pipeline_saves_can_be_loaded(tmp_path, model_folder, pipe):
    stock("text-to-image", pipe, model_folder).save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.unet.config.encoder_hid_dim_type is None


@pytest.mark.parametrize("how", ["call", "condition"])
def test_pipelines_of_one_unet_draw_with_their_own_mappers(model_folder, pipe, concept, how):
    def drawn(by: ElitePipeline, given) -> torch.Tensor:
        if how == "call":
            return draw(by, concept=given)
        made = stock("text-to-image", by, model_folder)
        return draw_stock("text-to-image", made, **by.condition(PROMPT, given))

    expected = drawn(pipe, concept)
    global_mapper, local_mapper = tiny.build_mappers(model_folder, seed=9)
    others = {"global_mapper": global_mapper, "local_mapper": local_mapper}
    second = ElitePipeline(**{**pipe.components, **others})
    second.set_progress_bar_config(disable=True)
    its = second.encode_concept(*tiny.picture(0))
    different = drawn(second, its)
    assert torch.equal(drawn(pipe, concept), expected)
    assert torch.equal(drawn(second, its), different) and relative(different, expected) > 1e-3


def test_mistakes_are_named(pipe, concept):
    with pytest.raises(ValueError, match="no placeholder 'S'"):
        pipe.condition("a photo", concept)
    with pytest.raises(ValueError, match="expected one prompt, not"):
        pipe.condition([PROMPT, PROMPT], concept)


@pytest.mark.parametrize("size", [(64, 16), (48, 32)], ids=["equal area", "another"])
@pytest.mark.parametrize("each_step", [False, True])
def test_regions_of_another_size_are_refused(pipe, concept, size, each_step):
    """Of an equal area they were drawn at the wrong places, of others torch complained."""
    height, width = size
    regions = {"S": np.eye(2)}
    square = pipe.condition(PROMPT, concept, regions=regions)
    fitting = pipe.condition(PROMPT, concept, regions=regions, height=height, width=width)
    sides = {"height": height, "width": width}
    if each_step:
        inputs = ["latents", "prompt_embeds"]
        sides |= {"callback_on_step_end_tensor_inputs": inputs}
    assert torch.isfinite(draw(pipe, None, **sides, **fitting)).all()
    made = StableDiffusionPipeline.from_pipe(pipe)
    latents = f"regions were made for 16 x 16 latents .*, {height // 2} x {width // 2} are drawn"
    with pytest.raises(ValueError, match=f"{latents}; pass height and width of the picture to"):
        draw(pipe, None, **sides, **square)
    with pytest.raises(ValueError, match=latents):
        draw_stock("text-to-image", made, **sides, **square)
