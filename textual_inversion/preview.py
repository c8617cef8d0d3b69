"""Previews of a word in training."""

from typing import Any

from PIL import Image

from elite.drawing import draw_prompts
from elite.loading import make_scheduler, stock_pipeline
from elite.settings import TextualInversionConfig
from elite.sheets import tile_rows
from elite.stages import PREVIEW_STEPS


class PromptPreview:
    """Pictures of the new word as it is now, one seed each."""

    def __init__(self, config: TextualInversionConfig, parts: dict[str, Any]) -> None:
        self.config, self.parts = config, parts
        self.prompt = config.infer_prompt.replace("{}", config.placeholder_token)

    def __call__(self) -> Image.Image:
        scheduler = make_scheduler("dpm++", self.parts["scheduler"].config)
        pipe = stock_pipeline({**self.parts, "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        seeds = range(self.config.seed, self.config.seed + self.config.num_infer_images)
        pictures = draw_prompts(
            pipe,
            [self.prompt] * len(seeds),
            seeds,
            resolution=self.config.resolution,
            num_inference_steps=PREVIEW_STEPS,
        )
        return tile_rows([pictures], [f"seed {seed}" for seed in seeds], self.prompt)
