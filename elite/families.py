"""The two families of models, and all in which they differ: whatever else this package does, it
does for both by the same code.

| | Stable Diffusion 1.x and 2.x | SDXL |
| --- | --- | --- |
| context (B, 77, D) | last hidden state of one text encoder | last but one of two, side by side |
| words of D | one embedding | 768 + 1280, an embedding for each text encoder |
| the UNet reads besides | nothing | the second one's pooled text; sizes and crop |
| VAE in float16 | as in float32 | overflows |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from elite.text import spell_out, text_output, tokenize
from elite.wording import brief

# The tokenizer of each text encoder, by the names of the parts.
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class Family:
    """What a pipeline of diffusers calls things by.

    Args:
        name: in files.
        title: in messages.
        texts: arguments of a call beside `prompt` that are text.
        embeds: arguments in their place; `encode_prompt` returns them in this order.
        guided: tensors of a denoising step whose first half is for guidance.
        vae_overflows: whether float16 is too small for what the VAE computes.
    """

    name: str
    title: str
    texts: tuple[str, ...]
    embeds: tuple[str, ...]
    guided: tuple[str, ...]
    vae_overflows: bool


STABLE_DIFFUSION = Family(
    name="sd",
    title="Stable Diffusion 1.x or 2.x",
    texts=("negative_prompt",),
    embeds=("prompt_embeds", "negative_prompt_embeds"),
    guided=("prompt_embeds",),
    vae_overflows=False,
)
SDXL = Family(
    name="sdxl",
    title="SDXL",
    texts=("negative_prompt", "prompt_2", "negative_prompt_2"),
    embeds=(
        *("prompt_embeds", "negative_prompt_embeds"),
        *("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    ),
    guided=("prompt_embeds", "add_text_embeds", "add_time_ids"),
    vae_overflows=True,
)
FAMILIES = {family.name: family for family in (STABLE_DIFFUSION, SDXL)}


def family_of(unet: UNet2DConditionModel) -> Family:
    """That of a UNet: SDXL's reads pooled text and sizes too."""
    return SDXL if unet.config.addition_embed_type == "text_time" else STABLE_DIFFUSION


def text_encoders(parts: Mapping[str, Any]) -> list[CLIPTextModel]:
    """The one or two of these parts."""
    return [parts[name] for name in TOKENIZERS if name in parts]


def tokenizers(parts: Mapping[str, Any]) -> list[PreTrainedTokenizerBase]:
    """That of each text encoder."""
    return [parts[name] for name in TOKENIZERS.values() if name in parts]


def tokenize_for_each(
    tokenizers: Sequence[PreTrainedTokenizerBase],
    prompts: Sequence[str],
    placeholders: str | Sequence[str],
    num_words: int = 1,
) -> tuple[list[Tensor], Tensor]:
    """`text.tokenize` for each text encoder, with learned words spelled out. Returns the ids for
    each, and the positions, which are the same for all.

    Raises:
        ValueError: as `tokenize`, or the tokenizers read a prompt differently.
    """
    read = [
        tokenize(one, [spell_out(prompt, one) for prompt in prompts], placeholders, num_words)
        for one in tokenizers
    ]
    index = read[0][1]
    if any(not torch.equal(index, other) for _, other in read):
        raise ValueError(
            f"prompts {brief(list(prompts))}: the two tokenizers find the placeholder at different "
            "places; load learned words into both"
        )
    return [input_ids for input_ids, _ in read], index


def split_words(words: Tensor, text_encoders: Sequence[CLIPTextModel]) -> Sequence[Tensor]:
    """Words (..., D) to what each text encoder reads of them, (..., its width)."""
    return words.split([encoder.config.hidden_size for encoder in text_encoders], dim=-1)


def encode_texts(
    text_encoders: Sequence[CLIPTextModel],
    input_ids: Sequence[Tensor],
    size_and_crop: Tensor | None = None,
    words: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """What the UNet reads of texts: the context (B, 77, D), and its added conditions.

    Args:
        input_ids: (B, 77) for each text encoder.
        size_and_crop: (B, 6), what SDXL, and it alone, is told in pixels: height and width of a
            picture, top and left of the crop, height and width of that.
        words, index: as for `text.encode_text`, D wide.
    """
    of_each = [None] * len(text_encoders) if words is None else split_words(words, text_encoders)
    several = len(text_encoders) > 1
    outputs = [
        text_output(encoder, ids, part, index, output_hidden_states=several)
        for encoder, ids, part in zip(text_encoders, input_ids, of_each, strict=True)
    ]
    if not several:
        return outputs[0].last_hidden_state, {}
    context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return context, {"text_embeds": outputs[-1].text_embeds, "time_ids": size_and_crop}
