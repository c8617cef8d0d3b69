"""Models other than Stable Diffusion v1-4: 2.x with its text width and v-prediction, and what the
community publishes."""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModel

from elite import ElitePipeline, GlobalMapper, LocalMapper
from elite.attention import cross_attention_layers, install, keys_values
from elite.defaults import DEFAULT_SAMPLER
from elite.loading import load_parts, make_scheduler, stock_pipeline
from elite.objectives import GlobalObjective, LocalObjective
from tests import tiny
from tests.conftest import make_pipe
from tests.tiny import draw, relative

# As 2.x differs from 1.x: wider text than image features, heads counted by level, linear
# projections around the attention, velocity instead of noise.
SD2 = {"text_width": 40, "attention_head_dim": [2, 4], "use_linear_projection": True}
CLOSE = 1e-4  # fused and unfused attention add in another order

VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def sd2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd2")
    return tiny.save_model_folder(folder, prediction_type="v_prediction", **SD2)


@pytest.fixture
def sd2(sd2_folder, tmp_path) -> ElitePipeline:
    tiny.save_mappers(tmp_path, sd2_folder)
    return make_pipe(sd2_folder, tmp_path)


# --- Stable Diffusion 2.x -------------------------------------------------------------------------


def test_mappers_take_the_width_of_the_text(sd2):
    concept = sd2.encode_concept(*tiny.picture(0))
    assert concept.words.shape == (1, 3, 40) and concept.feature_tokens.shape == (1, 16, 40)
    for layer, attn in cross_attention_layers(sd2.unet).items():
        assert sd2.local_mapper.projection(layer, "to_k").weight.shape == attn.to_k.weight.shape
    assert {attn.heads for attn in cross_attention_layers(sd2.unet).values()} == {2, 4}


def test_mappers_of_the_real_sizes_of_2_1():
    """On the meta device: no weights, no memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
            upcast_attention=True,
        )
        encoder = CLIPVisionModel(CLIPVisionConfig(**VIT_L_14))
        mapper = GlobalMapper.shaped_for(unet, encoder)
        install(unet, mapper)
        levels = [torch.empty(1, 257, 1024)] * 5
        assert mapper(levels).shape == (1, 5, 1024)
        z, t, text = torch.empty(1, 4, 96, 96), torch.tensor(1), torch.empty(1, 77, 1024)
        extra = {"image_embeds": keys_values(unet, text, [])}
        assert unet(z, t, text, added_cond_kwargs=extra).sample.shape == z.shape
    assert len(mapper.config.attention) == 16


def test_sd2_draws_the_concept(tmp_path, sd2):
    concept, other = (sd2.encode_concept(*tiny.picture(seed)) for seed in (0, 1))
    expected = draw(sd2, concept=concept)
    assert torch.isfinite(expected).all()
    assert relative(draw(sd2, concept=other), expected) > 1e-3
    assert relative(draw(sd2, concept=concept, lambda_=0.1), expected) > 1e-3
    sd2.save_pretrained(tmp_path / "elite")
    loaded = ElitePipeline.from_pretrained(tmp_path / "elite")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded, concept=concept), expected)


@pytest.mark.parametrize("scheduler", ["lms", "ddim"])
def test_sd2_is_stock_where_elite_changes_nothing(sd2_folder, scheduler):
    untouched = tiny.build_untouched(sd2_folder)
    untouched.scheduler = make_scheduler(scheduler, untouched.scheduler.config)
    assert untouched.scheduler.config.prediction_type == "v_prediction"
    parts = load_parts(sd2_folder)
    del parts["image_encoder"]
    plain = stock_pipeline({**parts, "scheduler": untouched.scheduler})
    plain.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(7))
    expected = plain(
        "a photo of a S",
        latents=noise,
        num_inference_steps=tiny.STEPS,
        guidance_scale=5.0,
        output_type="latent",
    ).images
    concept = tiny.word_as_concept(untouched)
    assert relative(draw(untouched, concept=concept, lambda_=0.0), expected) < CLOSE


def test_mappers_of_another_text_width_are_refused(sd2_folder, mapper_folder):
    with pytest.raises(ValueError, match="does not fit this model: wrong shape") as caught:
        make_pipe(sd2_folder, mapper_folder)
    assert "\n" not in str(caught.value)


# --- losses with v-prediction ---------------------------------------------------------------------

RANDOM = torch.Generator().manual_seed(0)
BATCH = {
    "caption": ["a photo of a S", "a S"],
    "pixels": torch.rand(2, 3, 32, 32, generator=RANDOM) * 2 - 1,
    "clip_pixels": torch.randn(2, 3, 32, 32, generator=RANDOM),
    "object_pixels": torch.randn(2, 3, 32, 32, generator=RANDOM),
    "object_mask": torch.ones(2, 1, 32, 32),
    "loss_mask": torch.ones(2, 1, 16, 16),
    "seed": torch.tensor([3, 4]),
}


def make_objective(folder, stage: int) -> GlobalObjective | LocalObjective:
    parts = load_parts(folder)
    models = parts["unet"], parts["image_encoder"], 32, tiny.HIDDEN_LAYERS
    torch.manual_seed(1)
    global_mapper = GlobalMapper.for_models(*models)
    if stage == 1:
        return GlobalObjective(parts, global_mapper)
    return LocalObjective(parts, global_mapper, LocalMapper.for_models(*models))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_velocity_is_what_is_learned(sd2_folder, stage):
    """A UNet that answers diffusers' own velocity has nothing left to learn; the noise is wrong."""
    objective = make_objective(sd2_folder, stage)
    reference = DDPMScheduler.from_pretrained(sd2_folder / "scheduler")
    z, noise = torch.randn(2, 2, 4, 16, 16)
    t = torch.tensor([10, 900])
    batch = {**BATCH, **objective.tokens(BATCH["caption"])}
    objective.predict = lambda *args: reference.get_velocity(z, noise, t)
    assert objective.loss(batch, z, noise, t)["mse"] == 0
    objective.predict = lambda *args: noise
    assert objective.loss(batch, z, noise, t)["mse"] > 0.1


@pytest.mark.parametrize("stage", [1, 2])
def test_sd2_trains(sd2_folder, stage):
    objective = make_objective(sd2_folder, stage)
    losses = []
    optimizer = torch.optim.AdamW(objective.trained.parameters(), lr=1e-3)
    for _ in range(4):
        loss = objective(BATCH)["loss"]  # the same noise each time
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_model_that_predicts_something_else_is_refused(tmp_path):
    folder = tiny.save_model_folder(tmp_path, prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type 'sample'; training knows epsilon and v_"):
        make_objective(folder, 1)


# --- Stable Diffusion 1.5 and community checkpoints -----------------------------------------------


def test_community_checkpoint_in_half_precision_with_its_own_scheduler(
    tmp_path, model_folder, mapper_folder
):
    """As such models are published: half precision, another sampler, other weights."""
    parts = load_parts(model_folder)
    del parts["image_encoder"]
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in parts["unet"].parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    parts["scheduler"] = EulerAncestralDiscreteScheduler.from_config(parts["scheduler"].config)
    published: StableDiffusionPipeline = stock_pipeline(parts).to(dtype=torch.float16)
    published.save_pretrained(tmp_path / "community")
    pipe = ElitePipeline.from_stable_diffusion(
        tmp_path / "community",
        global_mapper=mapper_folder / "global_mapper",
        local_mapper=mapper_folder / "local_mapper",
        image_encoder=model_folder / "image_encoder",
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.dtype == torch.float32
    concept = pipe.encode_concept(*tiny.picture(0))
    composed = ElitePipeline(
        **{
            name: getattr(pipe, name) for name in ("image_encoder", "global_mapper", "local_mapper")
        },
        **{name: part.float() for name, part in parts.items() if isinstance(part, torch.nn.Module)},
        tokenizer=parts["tokenizer"],
        scheduler=make_scheduler(DEFAULT_SAMPLER),
    )
    composed.set_progress_bar_config(disable=True)
    drawn = draw(pipe, concept=concept)
    assert torch.equal(drawn, draw(composed, concept=concept))
    original = make_pipe(model_folder, mapper_folder)
    assert relative(drawn, draw(original, concept=concept)) > 1e-3
