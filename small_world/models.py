"""The small Stable Diffusion's parts, built from configs: real diffusers and transformers
classes."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from elite.files import digest_files
from small_world.samples import SIDE
from small_world.tokenizer import MAX_LENGTH

WIDTH = 128  # of text and image features


def digest_weight_files(*folders: Path) -> str:
    """A short name for all weights below these folders, by which to tell what others made."""
    files = [file for folder in folders for file in sorted(folder.rglob("*.safetensors"))]
    return digest_files(*files)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int = WIDTH) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_vae(side: int = SIDE) -> AutoencoderKL:
    """Pictures of half the side, 32 x 32, to 8 x 8 x 16 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=side // 2,
    )


def build_image_encoder(side: int = SIDE, width: int = WIDTH) -> CLIPVisionModel:
    """CLIP's vision tower, of 64 px pictures in patches of 8."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=side,
        patch_size=8,
        projection_dim=width,
    )
    return CLIPVisionModel(config)


def build_unet(
    side: int = SIDE, width: int = WIDTH, channels: Sequence[int] = (128, 192)
) -> UNet2DConditionModel:
    """Of latents as `build_vae` makes them, and a level for each number of channels."""
    return UNet2DConditionModel(
        sample_size=side // 8,
        in_channels=16,
        out_channels=16,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=width,
        attention_head_dim=4,
    )
