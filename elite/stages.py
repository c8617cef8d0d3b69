"""What the training scripts share: frozen parts, mappers old and new, a configuration handed to the
loop, previews."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from elite.checkpoint import load_mapper
from elite.config import default_of, print_config, to_dict
from elite.console import Stopped, command_again
from elite.data import PairFolder
from elite.gallery import repository_of, uploading
from elite.images import cut_out
from elite.loading import DTYPES, load_parts, make_scheduler, pixels_per_latent, side_for_training
from elite.mappers import Mapper
from elite.named_concepts import Words
from elite.objectives import DenoisingObjective, EliteObjective
from elite.open_images import Source
from elite.pipeline import pipeline_of
from elite.settings import FitConfig, TrainConfig
from elite.shards import open_source
from elite.sheets import tile_rows
from elite.training import fit, make_accelerator

M = TypeVar("M", bound=Mapper)
PREVIEW_STEPS, PREVIEW_TEMPLATE = 25, "a photo of a {}"


def frozen_parts(config: TrainConfig) -> dict[str, Any]:
    """Everything of ELITE but the mappers, as `loading.load_parts` gives it."""
    torch.manual_seed(config.seed)  # every process draws the same fresh mapper
    return load_parts(
        config.pretrained_model_name_or_path,
        config.image_encoder_name_or_path,
        tokenizer=config.tokenizer_name,
        revision=config.revision,
        **config.model_files,
    )


def trained_mapper(kind: type[M], path: str, parts: Mapping[str, Any]) -> M:
    """The mapper of a file or folder in float32."""
    return load_mapper(kind, path, parts["unet"], parts["image_encoder"]).float()


def mapper_to_train(
    kind: type[M], path: str | None, parts: Mapping[str, Any], config: TrainConfig
) -> M:
    """The mapper of a file or folder in float32, or a fresh one where `path` is None.

    Raises:
        ValueError: the file is none, does not fit, or is of another shape than the configuration
            asks for.
    """
    if path is not None:
        mapper = trained_mapper(kind, path, parts)
        defaults = {item.name: default_of(item) for item in fields(config)}
        for name, own in (
            ("hidden_layers", list(mapper.config.hidden_layers)),
            ("mapper_hidden_size", mapper.config.hidden_dim),
        ):
            asked = getattr(config, name)
            if asked not in (defaults[name], own):
                raise ValueError(f"--{name} {asked}: {path} has {own}; leave out --{name}")
        return mapper
    shape = config.mapper_hidden_size or 1024, config.hidden_layers
    return kind.for_models(parts["unet"], parts["image_encoder"], *shape)


def training_data(config: TrainConfig) -> Source:
    """Where the images of the training come from."""
    return open_source(
        config.train_data_dir,
        cache=config.shard_cache,
        cache_gb=config.shard_cache_gb,
        window=config.shard_window,
    )


def training_side(config: FitConfig, parts: Mapping[str, Any]) -> int:
    """Side of the training images in pixels."""
    return side_for_training(config.resolution, parts["unet"].config, parts["vae"])


def publish(config: TrainConfig, objective: EliteObjective) -> None:
    """Says where the trained mapper is, and uploads it if the configuration says so."""
    if config.dry_run or not PartialState().is_main_process:
        return
    print(f"the trained mapper is in {Path(config.output_dir, objective.learns)}")
    if config.push_to_hub:
        repository = repository_of(config.hub_model_id, config.output_dir)
        with uploading(repository, Path(config.output_dir)):
            objective.trained.push_to_hub(repository, token=config.hub_token)


def fit_as_configured(
    config: FitConfig,
    objective: DenoisingObjective,
    dataset: Any,
    parts: dict[str, Any],
    preview: Callable[[], Image.Image] | None,
    preview_steps: int,
    own_rates: Mapping[str, float] | None = None,
    held: Mapping[str, Any] | None = None,
) -> None:
    """`training.fit` as the configuration says.

    Args:
        parts: what the objective computes with; the UNet may be compiled and checkpointed.
        preview: draws a picture of what the model does; None draws none.
        preview_steps: optimiser steps between two previews; 0 means no previews.
        own_rates: learning rates of parameters by how their names end, where these have one.
        held: what a resumed run must share with its checkpoint, besides the configuration.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if config.gradient_checkpointing:
        parts["unet"].enable_gradient_checkpointing()
    if config.compile:
        parts["unet"].compile()
    accelerator = make_accelerator(
        config.mixed_precision,
        config.gradient_accumulation_steps,
        cpu=not torch.accelerator.is_available(),
    )
    if accelerator.mixed_precision != "no":
        objective.cast_frozen(DTYPES[accelerator.mixed_precision])
    accumulation = accelerator.gradient_accumulation_steps  # `accelerate launch` may say another
    samples_per_step = config.train_batch_size * accumulation * accelerator.num_processes
    latents_side = training_side(config, parts) // pixels_per_latent(parts["vae"])
    max_steps = config.total_steps(steps_per_epoch=-(-len(dataset) // samples_per_step))
    if accelerator.is_main_process:
        print_config(config)
        print(
            f"{len(dataset)} samples, {samples_per_step} per step, {max_steps} steps, "
            f"{sum(p.numel() for p in objective.trained.parameters()):,} trained parameters"
        )
    rate_scale = samples_per_step if config.scale_lr else 1
    with TemporaryDirectory() as scratch:
        output_dir = Path(scratch if config.dry_run else config.output_dir)
        try:
            fit(
                objective,
                dataset,
                accelerator,
                output_dir=output_dir,
                max_steps=1 if config.dry_run else max_steps,
                batch_size=config.train_batch_size,
                seed=config.seed,
                num_workers=config.dataloader_num_workers,
                learning_rate=config.learning_rate * rate_scale,
                own_rates={name: rate * rate_scale for name, rate in (own_rates or {}).items()},
                lr_scheduler=config.lr_scheduler,
                lr_warmup_steps=config.lr_warmup_steps,
                adam_betas=(config.adam_beta1, config.adam_beta2),
                adam_epsilon=config.adam_epsilon,
                weight_decay=config.adam_weight_decay,
                max_grad_norm=config.max_grad_norm,
                save_steps=config.save_steps,
                checkpoints_total_limit=config.checkpoints_total_limit,
                resume=None if config.dry_run else config.resume_from_checkpoint,
                shard_optimizer=config.shard_optimizer,
                attention_positions=latents_side**2,
                ema_decay=config.ema_decay if config.ema else None,
                preview=preview,
                validation_steps=0 if config.dry_run else preview_steps,
                logging_dir="logs" if config.dry_run else config.logging_dir,
                config=to_dict(config),
                held=held,
            )
        except Stopped:
            accelerator.print("resume with:", command_again("--resume_from_checkpoint", "latest"))
            raise
    if config.dry_run:
        accelerator.print("dry run: one step trained, nothing saved")


def pair_preview(
    config: TrainConfig, objective: EliteObjective, parts: Mapping[str, Any], words: Words
) -> Callable[[], Image.Image] | None:
    """The previews of a stage, the first validation pairs as the model draws them now: generated |
    views | mask. None where the configuration wants none.

    Args:
        words: those the stage trains with, as for a call of `Elite`.
    """
    if not config.validation_steps or config.dry_run:
        return None
    pairs = PairFolder(config.validation_data_dir)

    def draw() -> Image.Image:
        pipe = pipeline_of(parts["unet"])(
            **{**parts, "scheduler": make_scheduler("dpm++", parts["scheduler"].config)},
            global_mapper=objective.global_mapper,
            local_mapper=objective.local_mapper,
            fingerprint="preview",  # for concepts that live as long
        )
        pipe.set_progress_bar_config(disable=True)
        prompt = PREVIEW_TEMPLATE.format(config.placeholder_token)
        rows = []
        for index in range(min(config.num_validation_images, len(pairs))):
            try:
                image, mask = pairs.read(index)
            except ValueError as error:
                tqdm.write(f"preview skips {error}")
                continue
            generated = pipe(
                prompt,
                concept=pipe.encode_views(**pipe.concept_views(image, mask)),
                words=words,
                placeholder_token=config.placeholder_token,
                seed=config.seed,
                height=config.resolution,
                width=config.resolution,
                num_inference_steps=PREVIEW_STEPS,
            ).images[0]
            views = [image, cut_out(image, mask), mask]
            rows.append([generated, *map(Image.fromarray, views)])
        return tile_rows(rows, ["generated", "view", "object view", "mask"])

    return draw
