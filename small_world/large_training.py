"""Trains the parts of a small Stable Diffusion for so many seconds, on batches of `mixed`."""

import math
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModel

from elite.hardware import computes_in_bf16
from small_world.captions import place, with_article
from small_world.large import Size
from small_world.mixed import MixedWorld, base_batch, image_encoder_batch, seen_by_vae, vae_batch
from small_world.models import build_image_encoder, build_text_encoder, build_unet, build_vae
from small_world.objectives import BaseModelObjective, ImageEncoderObjective, VAEObjective
from small_world.pretrain import (
    NUM_PREVIEWS,
    base_pipeline,
    grid,
    preview_prompts,
    set_scaling_factor,
    to_image,
)
from small_world.world import SCENES

# Share of the time that is left after rendering (the rest is for grid.png and the files), and
# learning rate, of each part.
RECIPES = {"vae": (0.15, 1e-3), "image_encoder": (0.3, 1e-3), "base": (0.5, 7e-4)}
EMA_DECAY = 0.999
WARMUP_STEPS = 100
SAY_SECONDS = 10.0  # between two lines of progress


def train(
    part: str,
    objective: nn.Module,
    make_batch: Callable[[], dict[str, Tensor]],
    device: torch.device,
    seconds: float,
) -> None:
    """Trains a part for its share of the time, at least one step, in bf16 where the device
    computes in it; the learning rate falls as a cosine of the time, and what remains is the
    weights' moving average.

    Raises:
        ValueError: the loss is not finite.
    """
    share, rate = RECIPES[part]
    seconds *= share
    trained = list(objective.to(device).parameters())
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), fused=True)
    ema = EMAModel(trained, decay=EMA_DECAY, use_ema_warmup=True, power=0.75, foreach=True)
    objective.train()
    started = said = time.monotonic()
    step = samples = 0
    done = 0.0
    while done < 1:
        # Step.
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = rate * warm * (1 + math.cos(math.pi * done)) / 2
        batch = make_batch()
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(device)):
            out = objective(batch)
        out["loss"].backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trained)
        step, samples = step + 1, samples + len(next(iter(batch.values())))

        # Say how it goes.
        now = time.monotonic()
        done = min(1.0, (now - started) / seconds)
        if now - said > SAY_SECONDS or done == 1:
            said = now
            values = {name: float(value.detach()) for name, value in out.items()}
            if not math.isfinite(values["loss"]):
                raise ValueError(f"{part}: loss is {values['loss']} at step {step}; try again")
            told = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
            pace = samples / (now - started)
            print(f"{part}: step {step}, {samples} samples, {pace:.0f}/s, {told}", flush=True)
    ema.copy_to(trained)
    objective.requires_grad_(False).eval()


def train_all(
    size: Size, world: MixedWorld, seconds: float
) -> tuple[StableDiffusionPipeline, CLIPVisionModel]:
    """The parts one after the other, in so many seconds."""
    side, width, count, device = size.side, size.width, size.batch_size, world.device
    vae, image_encoder = build_vae(side), build_image_encoder(side, width)
    train("vae", VAEObjective(vae), partial(vae_batch, world, count), device, seconds)
    set_scaling_factor(vae, seen_by_vae(world.batch(count)["views"][:, 0]))
    train(
        "image_encoder",
        ImageEncoderObjective(image_encoder),
        partial(image_encoder_batch, world, count),
        device,
        seconds,
    )
    tokenizer = world.tokenizer
    objective = BaseModelObjective(
        build_text_encoder(tokenizer, width), build_unet(side, width, size.channels), tokenizer
    )
    make_batch = partial(base_batch, vae, image_encoder, world, count)
    train("base", objective, make_batch, device, seconds)
    return base_pipeline(vae=vae, tokenizer=tokenizer, **objective.parts), image_encoder


@torch.no_grad()
def preview(pipe: StableDiffusionPipeline, world: MixedWorld) -> Image.Image:
    """Rows of NUM_PREVIEWS pictures: trained on, through the VAE, critters by description (two
    rows), things by name (two rows)."""
    pixels = seen_by_vae(world.batch(2 * NUM_PREVIEWS)["views"][:, 0])[:NUM_PREVIEWS]
    decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
    shown = [to_image(picture) for picture in torch.cat([pixels, decoded])]
    things = np.random.default_rng(0).choice(world.names, 2 * NUM_PREVIEWS)
    prompts = [*preview_prompts(), *preview_prompts()]
    prompts += [with_article(str(n)) + place(s) for n, s in zip(things, cycle(SCENES))]
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generators)
    return grid([*shown, *drawn.images], NUM_PREVIEWS)
