"""A tiny Stable Diffusion with random weights in diffusers layout, mappers, and picture folders,
for the tests."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTModel,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

from elite import Concept, Elite, GlobalMapper, LocalMapper
from elite.families import text_encoders
from elite.loading import load_parts
from elite.mappers import Mapper
from elite.pipeline import pipeline_of
from small_world.tokenizer import build_tokenizer

HIDDEN_LAYERS = (4, 8)  # as a release checkpoint of three levels has them
TEXT_LENGTH = 77
STEPS = 3  # of `draw`
LORA_LAYERS = r"to_[qkv]$|to_out\.0$|conv1$|time_emb_proj$|[qkv]_proj$|out_proj$|fc[12]$"


def build_models(
    seed: int = 0, text_width: int = 24, **unet_config: object
) -> dict[str, nn.Module]:
    """unet, vae, text_encoder, image_encoder: 16 x 16 latents, 32 px pictures, a 4 x 4 patch
    grid."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=text_width,
        **{"attention_head_dim": 4, **unet_config},
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        sample_size=32,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    models = {
        "unet": unet,
        "vae": vae,
        "text_encoder": CLIPTextModel(text),
        "image_encoder": CLIPVisionModel(vision),
    }
    return {name: model.eval() for name, model in models.items()}


def build_xl_models() -> dict[str, nn.Module]:
    """The parts in which SDXL differs: a second text encoder, and a UNet that reads both."""
    torch.manual_seed(3)
    models = build_models(seed=3)
    text = models["text_encoder"].config.to_dict()
    unet = {key: v for key, v in models["unet"].config.items() if not key.startswith("_")}
    second = CLIPTextConfig(**{**text, "hidden_size": 32, "projection_dim": 16})
    unet |= {
        "cross_attention_dim": 24 + 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    models["text_encoder_2"] = CLIPTextModelWithProjection(second).eval()
    models["unet"] = UNet2DConditionModel(**unet).eval()
    del models["image_encoder"]
    return models


def save_xl_folder(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A tiny SDXL in diffusers layout."""
    save_model_folder(folder, prediction_type=prediction_type)
    for name, model in build_xl_models().items():
        model.save_pretrained(folder / name)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    return folder


def save_model_folder(
    folder: Path, seed: int = 0, prediction_type: str = "epsilon", **sizes: object
) -> Path:
    """The models, tokenizer and v1-4's own scheduler config in diffusers layout."""
    for name, model in build_models(seed, **sizes).items():
        model.save_pretrained(folder / name)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TEXT_LENGTH
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        skip_prk_steps=True,
        steps_offset=1,
    )
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def build_untouched(model_folder: Path) -> Elite:
    """A pipeline of fresh mappers: their K and V are still the UNet's."""
    parts = load_parts(model_folder)
    models = parts["unet"], parts["image_encoder"], 32, HIDDEN_LAYERS
    pipe = pipeline_of(parts["unet"])(
        **parts,
        global_mapper=GlobalMapper.for_models(*models),
        local_mapper=LocalMapper.for_models(*models),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def word_as_concept(pipe: Elite, word: str = "S") -> Concept:
    """A concept whose words are the embedding of a word of the tokenizer: it changes nothing but
    what the local branch adds."""
    token = pipe.tokenizer(word)["input_ids"][1]
    encoders = text_encoders(pipe.components)
    rows = [encoder.get_input_embeddings().weight[token].detach() for encoder in encoders]
    return replace(pipe.encode_concept(*picture(0)), words=torch.cat(rows).expand(1, 3, -1))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def save_lora(path: Path, pipe: Elite, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA file with random weights as kohya's programs and LCM-LoRA have them: convolutions too,
    and of the text encoders. Returns what it adds to each weight, by "unet.", "text_encoder." or
    "text_encoder_2.", and the weight's module."""
    generator = torch.Generator().manual_seed(seed)
    tensors, added, rank, alpha = {}, {}, 2, 1.0
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    if hasattr(pipe, "text_encoder_2"):
        prefixes["text_encoder"] = "lora_te1_text_model_"
        prefixes["text_encoder_2"] = "lora_te2_text_model_"
    for part, prefix in prefixes.items():
        for name, module in getattr(pipe, part).named_modules():
            if not re.search(LORA_LAYERS, name):
                continue
            out, into, *kernel = module.weight.shape
            down = 0.1 * torch.randn(rank, into, *kernel, generator=generator)
            up = torch.randn(out, rank, *[1 for _ in kernel], generator=generator)
            key = prefix + name.removeprefix("text_model.").replace(".", "_")
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
            product = up.flatten(1) @ down.flatten(1) * alpha / rank
            added[f"{part}.{name}"] = product.unflatten(1, module.weight.shape[1:])
    save_file(tensors, path)
    return added


def build_mappers(model_folder: Path, seed: int = 1) -> tuple[GlobalMapper, LocalMapper]:
    """Mappers for the folder, with random weights everywhere: K and V too differ from the
    UNet's."""
    parts = load_parts(model_folder)
    torch.manual_seed(seed)
    mappers = []
    for cls in (GlobalMapper, LocalMapper):
        mapper = cls.for_models(
            parts["unet"], parts["image_encoder"], hidden_dim=32, hidden_layers=HIDDEN_LAYERS
        )
        with torch.no_grad():
            for parameter in mapper.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        mappers.append(mapper.eval())
    return mappers[0], mappers[1]


def save_mappers(folder: Path, model_folder: Path) -> None:
    """`global_mapper/` and `local_mapper/` in our format."""
    for name, mapper in zip(
        ("global_mapper", "local_mapper"), build_mappers(model_folder), strict=True
    ):
        mapper.save_pretrained(folder / name)


def save_release_mappers(folder: Path, model_folder: Path) -> None:
    """`global_mapper.pt` and `local_mapper.pt` as the release writes them."""
    for name, mapper in zip(
        ("global_mapper", "local_mapper"), build_mappers(model_folder), strict=True
    ):
        save_official(mapper, folder / f"{name}.pt")


def picture(seed: int = 0, width: int = 40, height: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 (H, W, 3), and a mask, bool (H, W), with a rectangle of object."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = True
    return image, mask


def draw(pipe: StableDiffusionPipeline, prompt="a photo of a S", **options) -> torch.Tensor:
    """A picture's latents, so that nothing is rounded."""
    options = {"num_inference_steps": STEPS, "output_type": "latent", "seed": 7, **options}
    return pipe(prompt, **options).images


def save_pairs(folder: Path, count: int = 2) -> Path:
    """`pair0.png` with `pair0_bg.png` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image, mask = picture(i)
        Image.fromarray(image).save(folder / f"pair{i}.png")
        Image.fromarray(mask).save(folder / f"pair{i}_bg.png")
    return folder


def save_official(mapper: Mapper, path: Path) -> None:
    """A mapper as the release saves it: a plain state dict."""
    torch.save({key: x.detach().cpu().contiguous() for key, x in mapper.state_dict().items()}, path)


def save_sam_folder(folder: Path, side: int = 64) -> Path:
    """A Segment Anything of random weights that reads pictures of `side` pixels."""
    torch.manual_seed(0)
    vision = SamVisionConfig(
        hidden_size=16,
        output_channels=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=8,
        mlp_dim=16,
        window_size=4,
        global_attn_indexes=[1],
        num_pos_feats=4,
    )
    prompts = SamPromptEncoderConfig(
        hidden_size=8, image_size=side, patch_size=8, mask_input_channels=4
    )
    decoder = SamMaskDecoderConfig(
        hidden_size=8,
        mlp_dim=16,
        num_attention_heads=2,
        iou_head_hidden_dim=8,
        num_multimask_outputs=3,
    )
    config = SamConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    SamModel(config).save_pretrained(folder)
    reader = SamImageProcessor(
        size={"longest_edge": side}, pad_size={"height": side, "width": side}
    )
    SamProcessor(reader).save_pretrained(folder)
    return folder


def save_owl_folder(folder: Path) -> Path:
    """An OWLv2 of random weights, but that its boxes are known: a third of the square that a
    picture is padded to, around the points at 1/3, 2/3 and 1 of its sides."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 16
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {
        **width,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**width, "num_attention_heads": 2, "image_size": 48, "patch_size": 16}
    model = Owlv2ForObjectDetection(
        Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    )
    with torch.no_grad():
        model.box_head.dense2.weight.zero_()
        model.box_head.dense2.bias.zero_()
    model.save_pretrained(folder)
    reader = Owlv2ImageProcessorPil(size={"height": 48, "width": 48})
    Owlv2Processor(reader, tokenizer).save_pretrained(folder)
    return folder


def save_dino_folder(folder: Path) -> Path:
    """A Grounding DINO of random weights that knows two words."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "a", "critter", "tree"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    text = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1],
        num_heads=[1, 1, 1],
        window_size=4,
        out_features=["stage2", "stage3"],
    )
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
        num_feature_levels=3,
        max_text_len=32,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    reader = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    GroundingDinoProcessor(reader, tokenizer).save_pretrained(folder)
    return folder


def save_clip_folder(folder: Path) -> Path:
    """A CLIP of random weights with the small world's tokenizer."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "projection_dim": 8}
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 20,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**size, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_vit_folder(folder: Path) -> Path:
    """A ViT of random weights, as DINO is one."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    ViTModel(config).save_pretrained(folder)
    return folder
