"""The inference scripts' common page: build the pipeline, draw the folder, say what failed."""

import sys
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from elite.console import BAD_INPUT, OK, PARTLY_FAILED
from elite.data import PairFolder
from elite.drawing import Drawing, draw_folder, draw_prompt_grid
from elite.loading import DTYPES, load_stable_diffusion, make_scheduler, stock_pipeline
from elite.pipeline import ElitePipeline, Words
from elite.settings import (
    DrawConfig,
    EliteConfig,
    InferenceConfig,
    TextualInversionInferenceConfig,
)
from elite.textual_inversion import load_into, merge_embeddings


def pick_device(name: str | None) -> torch.device:
    """The device of this process: the one named, else CUDA, MPS or the CPU, as there is.

    Raises:
        ValueError: no such device here.
    """
    try:
        device = torch.device(name) if name else PartialState().device
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"device {name!r} is not available; leave out --device or use --device cpu"
        ) from None
    if device.type == "cpu":
        PartialState(cpu=True)
    return device


def run_textual_inversion(config: TextualInversionInferenceConfig) -> int:
    """Draws the prompts with learned words in a stock pipeline. Returns the exit status."""
    embeddings = merge_embeddings(config.embeddings)
    words = list(embeddings["text_encoder"])
    if not any(word in prompt for word in words for prompt in config.prompt):
        raise ValueError(
            f"--prompt: none of the learned words {', '.join(words)} is in it; write one there"
        )
    parts = load_stable_diffusion(config.pretrained_model_name_or_path)
    parts["scheduler"] = make_scheduler(config.scheduler, parts["scheduler"].config)
    pipe = stock_pipeline(parts)
    load_into(pipe, embeddings)
    pipe.set_progress_bar_config(disable=True)
    place(pipe, config)
    output_dir = Path(config.output_dir)
    draw_prompt_grid(
        pipe,
        config.prompt,
        range(config.seed, config.seed + config.num_images),
        output_dir,
        batch_size=config.batch_size,
        metadata=_origin(config),
        resolution=config.resolution,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    )
    print(f"pictures in {output_dir}; look at {output_dir / 'grid.png'} first")
    return OK


def _origin(config: DrawConfig) -> dict[str, str]:
    return {"scheduler": config.scheduler, "model": config.pretrained_model_name_or_path}


def place(pipe: DiffusionPipeline, config: DrawConfig) -> None:
    """Moves a pipeline to the device and number type that a configuration asks for."""
    device = pick_device(config.device)
    precision = config.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    pipe.to(device, DTYPES[precision])


def build_pipeline(
    config: EliteConfig, local_mapper: str | Literal[False] | None = None
) -> ElitePipeline:
    """The pipeline a configuration asks for, on its device and in its precision; False: no local
    branch."""
    pipe = ElitePipeline.from_stable_diffusion(
        config.pretrained_model_name_or_path,
        global_mapper=config.global_mapper_path,
        local_mapper=local_mapper,
        image_encoder=config.image_encoder_name_or_path,
    )
    pipe.scheduler = make_scheduler(config.scheduler, pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    place(pipe, config)
    return pipe


def drawing_of(config: EliteConfig, words: Words, lambda_: float) -> Drawing:
    """How a configuration wants its pictures drawn."""
    return Drawing(
        words=words,
        lambda_=lambda_,
        placeholder_token=config.placeholder_token,
        resolution=config.resolution,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    )


def run_inference(
    config: InferenceConfig,
    pipe: ElitePipeline,
    folder: str,
    words: Words = 0,
    lambda_: float = 0.0,
) -> int:
    """Draws the configuration's folder into OUTPUT_DIR/folder. Returns the exit status."""
    pairs = PairFolder(config.test_data_dir)
    if config.selected_data >= len(pairs):
        raise ValueError(
            f"--selected_data {config.selected_data}: {config.test_data_dir} has {len(pairs)} "
            "pairs; "
            f"choose 0 to {len(pairs) - 1}, or -1 for all"
        )
    output_dir = Path(config.output_dir) / folder
    failures = draw_folder(
        pipe,
        pairs,
        output_dir,
        drawing_of(config, words, lambda_),
        prompt=config.template.replace("{}", config.placeholder_token),
        seeds=range(config.seed, config.seed + config.num_images),
        indices=None if config.selected_data < 0 else [config.selected_data],
        batch_size=config.batch_size,
        metadata=_origin(config),
    )
    if not PartialState().is_main_process:
        return OK  # the main process speaks for all
    chosen = 1 if config.selected_data >= 0 else len(pairs)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        print(f"{len(failures)} of {chosen} pairs could not be drawn", file=sys.stderr)
    if len(failures) == chosen:
        return BAD_INPUT
    print(f"pictures in {output_dir}; look at {output_dir / 'grid.png'} first")
    return PARTLY_FAILED if failures else OK
