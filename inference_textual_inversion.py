"""Draws prompts with learned words, one or several concepts in each.

    python inference_textual_inversion.py --pretrained_model_name_or_path MODEL \\
        --embeddings runs/cat runs/mug --prompt "a <cat> in a <mug>" --num_images 4
"""

from functools import partial
from pathlib import Path
from typing import Any

from elite.config import parse_config
from elite.console import quiet_libraries, run
from elite.settings import TextualInversionInferenceConfig


def main() -> int:
    config = parse_config(TextualInversionInferenceConfig)
    quiet_libraries()
    from elite.drawing import draw_prompts
    from elite.files import digest_weights
    from elite.inference import draw_grid, model_name, prepare_to_draw
    from elite.loading import load_stable_diffusion, make_scheduler, stock_pipeline
    from elite.text import contains_word
    from textual_inversion.files import load_into, merge_embeddings

    # The words.
    embeddings = merge_embeddings(config.embeddings)
    words = list(embeddings["text_encoder"])
    negative = config.negative_prompt if config.guidance_scale > 1 else None  # else nobody reads it
    for prompt in config.prompt:
        texts = [prompt, negative or ""]
        if not any(contains_word(text, word) for word in words for text in texts):
            raise ValueError(
                f"--prompt {prompt!r}: none of the learned words {', '.join(words)} is in it, nor "
                "in a --negative_prompt that is read; write one there"
            )

    # A stock pipeline that knows them.
    parts = load_stable_diffusion(config.pretrained_model_name_or_path, **config.model_files)
    parts["scheduler"] = make_scheduler(config.scheduler, parts["scheduler"].config)
    pipe = stock_pipeline(parts)
    load_into(pipe, embeddings)
    pipe.set_progress_bar_config(disable=True)
    prepare_to_draw(pipe, config)

    # The pictures.
    options: dict[str, Any] = {
        "resolution": config.resolution,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "negative_prompt": config.negative_prompt or None,
    }
    metadata = {
        **options,
        "scheduler": config.scheduler,
        "model": model_name(config),
        "embeddings": digest_weights(*embeddings.values())[:16],
        "dtype": str(pipe.unet.dtype),
        **pipe.named_weights,
    }
    draw = partial(draw_prompts, pipe, **options)
    return draw_grid(config, draw, config.prompt, Path(config.output_dir), metadata)


if __name__ == "__main__":
    run(main)
