"""Stable Diffusion v1-4 and SDXL by their sizes alone: every part with random weights, without a
download. Time and memory do not depend on what the weights are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from elite import Concept, Elite, GlobalMapper, LocalMapper
from elite.attention import install, uninstall
from elite.families import family_of
from elite.loading import make_scheduler, stock_pipeline
from elite.pipeline import pipeline_of
from small_world.tokenizer import build_tokenizer

TEXT_LENGTH = 77
SPECIAL = ("bos", "eos", "pad")  # tokens
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROMPT = "a photo of a S"
FINGERPRINT = "benchmark"  # of random mappers: theirs would take seconds to sum up

TINY_UNET = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
UNET: dict[str, dict[str, Any]] = {  # the rest is diffusers' default
    "full": {"sample_size": 64, "cross_attention_dim": 768},
    "tiny": TINY_UNET,
    "xl": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    },
    "tiny_xl": {
        **TINY_UNET,
        "cross_attention_dim": 24 + 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}
CHANNELS = {"full": (128, 256, 512, 512), "tiny": (16, 16, 16, 16)}  # of the VAE, 8 px a latent
TEXT = {
    "full": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "tiny": {
        "vocab_size": 2000,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
SECOND_TEXT = {
    "xl": {
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    "tiny_xl": {**TEXT["tiny"], "hidden_size": 32, "projection_dim": 16},
}
VISION = {
    "full": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    "tiny": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
}
MAPPERS = {
    "full": {"hidden_dim": 1024, "hidden_layers": (4, 8, 12, 16)},
    "tiny": {"hidden_dim": 32, "hidden_layers": (1, 2, 4, 6)},
}
for sizes in (CHANNELS, TEXT, VISION, MAPPERS):  # of SDXL as of Stable Diffusion
    sizes |= {"xl": sizes["full"], "tiny_xl": sizes["tiny"]}


def build_stable_diffusion(
    size: str, device: torch.device, dtype: torch.dtype = torch.float32, scheduler: str = "lms"
) -> dict[str, Any]:
    """The parts of a stock pipeline: vae, text_encoder, tokenizer, unet, scheduler; of SDXL the
    second text_encoder_2 and tokenizer_2, too."""
    torch.manual_seed(0)
    levels = len(CHANNELS[size])
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TEXT_LENGTH
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in SPECIAL}
    with init_empty_weights():
        unet = UNet2DConditionModel(**UNET[size])
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=CHANNELS[size],
            layers_per_block=1 if size.startswith("tiny") else 2,
            norm_num_groups=8 if size.startswith("tiny") else 32,
        )
        text = {"max_position_embeddings": TEXT_LENGTH, **special}
        text_encoder = CLIPTextModel(CLIPTextConfig(**text, **TEXT[size]))
    parts = {
        "vae": filled(vae, device, dtype),
        "text_encoder": filled(text_encoder, device, dtype),
        "tokenizer": tokenizer,
        "unet": filled(unet, device, dtype),
        "scheduler": make_scheduler(scheduler),
    }
    if size in SECOND_TEXT:
        with init_empty_weights():
            second = CLIPTextModelWithProjection(CLIPTextConfig(**text, **SECOND_TEXT[size]))
        parts |= {"text_encoder_2": filled(second, device, dtype), "tokenizer_2": tokenizer}
    return parts


def build_image_encoder(
    size: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> CLIPVisionModel:
    with init_empty_weights():
        model = CLIPVisionModel(CLIPVisionConfig(**VISION[size]))
    return filled(model, device, dtype)


def build_parts(
    size: str, device: torch.device, dtype: torch.dtype = torch.float32, scheduler: str = "lms"
) -> dict[str, Any]:
    """The parts of an ElitePipeline, mappers included."""
    parts = build_stable_diffusion(size, device, dtype, scheduler)
    parts["image_encoder"] = build_image_encoder(size, device, dtype)
    for name, kind in (("global_mapper", GlobalMapper), ("local_mapper", LocalMapper)):
        mapper = kind.for_models(parts["unet"], parts["image_encoder"], **MAPPERS[size])
        parts[name] = mapper.to(device, dtype).eval()
    return parts


def build_elite(parts: dict[str, Any]) -> Elite:
    pipe = pipeline_of(parts["unet"])(**parts, fingerprint=FINGERPRINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_stock(parts: dict[str, Any]) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The stock pipeline over those of the parts that it has."""
    others = ("image_encoder", "global_mapper", "local_mapper")
    pipe = stock_pipeline({name: part for name, part in parts.items() if name not in others})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def plain(parts: dict[str, Any]) -> Iterator[None]:
    """Within it, the UNet that both pipelines share is the stock one."""
    uninstall(parts["unet"])
    try:
        yield
    finally:
        install(parts["unet"], parts["global_mapper"], parts["local_mapper"])


def random_concept(pipe: Elite) -> Concept:
    """A concept as `encode_concept` gives it, in shape and number type; half of it is object."""
    width, levels = pipe.unet.config.cross_attention_dim, pipe.global_mapper.num_levels
    patches = pipe.grid**2
    options = {"device": pipe.device, "dtype": pipe.unet.dtype}
    tokens = torch.randn(1, patches, width, **options)
    tokens[:, ::2] = 0
    words = torch.randn(1, levels, width, **options)
    return Concept(words, tokens, FINGERPRINT, family=family_of(pipe.unet).name)


def picture(width: int = 1024, height: int = 768) -> tuple[np.ndarray, np.ndarray]:
    """A decoded picture, uint8 (H, W, 3), and the mask of its object, bool (H, W)."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), dtype=bool)
    mask[height // 5 : height * 4 // 5, width // 5 : width * 4 // 5] = True
    return image, mask


def filled(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model without weights gets them: small and normal, norms as they start; ready for use."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(dtype).to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.data.copy_(buffers[name])
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.normal_(std=0.02)
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.reset_parameters()
    return model.eval().requires_grad_(False)
