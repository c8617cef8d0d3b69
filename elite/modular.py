"""ELITE as modular blocks of diffusers: encode a concept, the text with its word, denoise, decode.

Without the first block a concept that was encoded before is an input:

    blocks = EliteBlocks()
    blocks.sub_blocks.pop("concept")
"""

from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    ModularPipeline,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.schedulers import UniPCMultistepScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from elite.attention import install, keys_values, local_inputs
from elite.compat import as_text, check_names, check_number, check_steps, with_fingerprint
from elite.concept import Concept
from elite.defaults import DEFAULT_STEPS, GUIDANCE_SCALE, LAMBDA, PLACEHOLDER
from elite.families import STABLE_DIFFUSION, family_of
from elite.images import as_image, as_mask, fit_mask, object_views
from elite.loading import side_in_pixels
from elite.mappers import GlobalMapper, LocalMapper, fingerprint_of, words_and_tokens
from elite.named_concepts import as_concept
from elite.pipeline import initial_noise, make_generators
from elite.text import encode_text, read_prompt, spell_out, tokenize

Step = tuple[ModularPipeline, PipelineState]
MAPPERS = [ComponentSpec("global_mapper", GlobalMapper), ComponentSpec("local_mapper", LocalMapper)]
FINGERPRINT = ConfigSpec("fingerprint", None, "ties concepts to the mappers; None computes it")


def _fingerprint(components: ModularPipeline) -> str:
    mappers = components.global_mapper, components.local_mapper
    return components.config.fingerprint or fingerprint_of(*mappers)


class EncodeConcept(ModularPipelineBlocks):
    """Picture and mask to a concept (paper section 3)."""

    description = "Reads an object of a picture and its mask: words and feature tokens."
    expected_components = [ComponentSpec("image_encoder", CLIPVisionModel), *MAPPERS]
    expected_configs = [FINGERPRINT]
    inputs = [
        InputParam("image", required=True, description="file, PIL image or uint8 (H, W, 3)"),
        InputParam("mask", required=True, description="the same; all but 0 is object"),
    ]
    intermediate_outputs = [OutputParam("concept", Concept)]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> Step:
        block = self.get_block_state(state)
        config = components.image_encoder.config
        pixels = as_image(block.image)
        grid = config.image_size // config.patch_size
        mask = fit_mask(as_mask(block.mask), pixels)
        crop = components.global_mapper.config.crop_to_object
        views = object_views(pixels, mask, config.image_size, grid, crop)
        device = components._execution_device
        words, tokens = words_and_tokens(
            components.image_encoder,
            components.global_mapper,
            components.local_mapper,
            **{name: view[None].to(device) for name, view in views.items()},
        )
        block.concept = Concept(words, tokens, _fingerprint(components))
        self.set_block_state(state, block)
        return components, state


class TextWithWord(ModularPipelineBlocks):
    """The prompt with w0 in place of its placeholder, and what the cross-attentions read of it."""

    description = "Encodes the prompt with the concept's word; K and V of all cross-attentions."
    expected_components = [
        ComponentSpec("tokenizer", CLIPTokenizer),
        ComponentSpec("text_encoder", CLIPTextModel),
        ComponentSpec("unet", UNet2DConditionModel),
        *MAPPERS,
    ]
    expected_configs = [FINGERPRINT]
    inputs = [
        InputParam("prompt", str, required=True, description="with the placeholder once"),
        InputParam("concept", Concept, required=True, description="of one object, or its file"),
        InputParam("negative_prompt", str, default=""),
        InputParam("lambda_", float, default=LAMBDA, description="weight of the local branch"),
        InputParam("placeholder_token", str, default=PLACEHOLDER),
        InputParam("guidance_scale", float, default=GUIDANCE_SCALE),
    ]
    intermediate_outputs = [
        OutputParam("prompt_embeds", Tensor, "(1 or 2, 77, D), the guidance row first"),
        OutputParam("keys_values", dict, "of every cross-attention, for all steps"),
    ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> Step:
        block = self.get_block_state(state)
        if family_of(components.unet) is not STABLE_DIFFUSION:
            raise ValueError("ELITE's blocks draw with Stable Diffusion 1.x and 2.x, not with SDXL")
        check_number("guidance_scale", block.guidance_scale)
        lambda_ = check_number("lambda_", block.lambda_)
        texts = "prompt", "negative_prompt", "placeholder_token"
        prompt, negative, placeholder = (as_text(name, getattr(block, name)) for name in texts)
        concept = as_concept(block.concept)
        concept.check_mappers(_fingerprint(components))
        if len(concept) != 1:
            raise ValueError(f"concept is of {len(concept)} objects; pass one, as concept[0]")
        tokenizer, encoder = components.tokenizer, components.text_encoder
        unet, device = components.unet, components._execution_device
        install(unet, components.global_mapper, components.local_mapper)

        prompt = spell_out(prompt, tokenizer)
        ids, index = (x.to(device) for x in tokenize(tokenizer, [prompt], placeholder))
        word = concept.words[:, :1].to(device)  # w0: (1, 1, D)
        context = encode_text(encoder, ids, word, index)
        local = []
        if concept.feature_tokens is not None:
            f = concept.feature_tokens.to(device, unet.dtype)
            local = local_inputs(f, index, lambda_, context.shape[1])
        if block.guidance_scale > 1:
            options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            negatives = [read_prompt(negative, tokenizer)]
            negative_ids = tokenizer(negatives, **options).input_ids.to(device)
            context = torch.cat([encode_text(encoder, negative_ids), context])
        block.prompt_embeds = context
        block.keys_values = keys_values(unet, context, local)
        self.set_block_state(state, block)
        return components, state


class Denoise(ModularPipelineBlocks):
    """The steps of the scheduler, with classifier-free guidance."""

    description = "Draws latents from the noise of a seed."
    expected_components = [
        ComponentSpec("unet", UNet2DConditionModel),
        ComponentSpec("vae", AutoencoderKL),
        ComponentSpec("scheduler", UniPCMultistepScheduler),
    ]
    inputs = [
        InputParam("prompt_embeds", Tensor, required=True),
        InputParam("keys_values", dict, required=True),
        InputParam("guidance_scale", float, default=GUIDANCE_SCALE),
        InputParam("num_inference_steps", int, default=DEFAULT_STEPS),
        InputParam("seed", int, default=0),
    ]
    intermediate_outputs = [OutputParam("latents", Tensor)]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> Step:
        block = self.get_block_state(state)
        unet, scheduler, context = components.unet, components.scheduler, block.prompt_embeds
        guidance_scale = check_number("guidance_scale", block.guidance_scale)
        steps = check_steps(block.num_inference_steps, scheduler)
        side = side_in_pixels(unet, components.vae)
        (generator,) = generators = make_generators([block.seed])
        scheduler.set_timesteps(steps, device=context.device)
        latents = initial_noise(components, generators, side, side) * scheduler.init_noise_sigma
        beside_noise = {"generator": generator, "eta": 0.0}  # as stock pipelines
        taken = signature(scheduler.step).parameters
        extra = {name: value for name, value in beside_noise.items() if name in taken}
        for t in scheduler.timesteps:
            rows = scheduler.scale_model_input(latents.repeat(len(context), 1, 1, 1), t)
            beside = {"image_embeds": block.keys_values}
            predicted = unet(rows, t, context, added_cond_kwargs=beside).sample
            if len(context) == 2:
                negative, positive = predicted.chunk(2)
                predicted = negative + guidance_scale * (positive - negative)
            latents = scheduler.step(predicted, t, latents, **extra).prev_sample
        block.latents = latents
        self.set_block_state(state, block)
        return components, state


class Decode(ModularPipelineBlocks):
    """Latents to PIL images."""

    description = "Decodes the latents."
    expected_components = [ComponentSpec("vae", AutoencoderKL)]
    inputs = [InputParam("latents", Tensor, required=True)]
    intermediate_outputs = [OutputParam("images", list)]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> Step:
        block = self.get_block_state(state)
        vae = components.vae
        pixels = vae.decode(block.latents / vae.config.scaling_factor).sample
        block.images = VaeImageProcessor().postprocess(pixels)
        self.set_block_state(state, block)
        return components, state


class EliteModularPipeline(ModularPipeline):
    """What `EliteBlocks().init_pipeline()` makes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', which ignores inputs that no block has. Raises ValueError for those."""
        made = {output.name for output in self.blocks.intermediate_outputs}
        options = {n for i in self.blocks.inputs for n in (i.name, i.kwargs_type) if n is not None}
        for name in (made - options) & kwargs.keys():
            raise ValueError(f"{name}: a block makes it; leave it out, or take out the block")
        check_names(kwargs, options, super().__call__)
        return super().__call__(*args, **kwargs)

    def update_components(self, **kwargs: Any) -> None:
        """As diffusers'; of mappers that are given without a fingerprint it is computed."""
        super().update_components(**with_fingerprint(kwargs))


class EliteBlocks(SequentialPipelineBlocks):
    """All of them: `EliteBlocks().init_pipeline()`, then `update_components(**pipe.components,
    fingerprint=pipe.fingerprint)` with the parts of an ElitePipeline."""

    block_classes = [EncodeConcept, TextWithWord, Denoise, Decode]
    block_names = ["concept", "text", "denoise", "decode"]
    description = "Draws a prompt with the object of one picture (ELITE, arXiv 2302.13848)."

    def init_pipeline(self, *args: Any, **kwargs: Any) -> EliteModularPipeline:
        return EliteModularPipeline(deepcopy(self), *args, **kwargs)
