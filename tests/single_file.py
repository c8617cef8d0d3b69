"""A Stable Diffusion of the tests as one checkpoint, under the names its first code base gave."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
UNET = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
)
VAE = (
    ("conv_norm_out", "norm_out"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"),
    (".resnets.", ".block."),
    ("down_blocks", "down"),
)
OPEN_CLIP = (
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
    ("self_attn", "attn"),
    ("final_layer_norm", "ln_final"),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
)


def renamed(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for new, old in names:
        key = key.replace(new, old)
    return key


def unet_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one resnet a level on the way down and two on the way up, as the tests' UNets have."""
    attended = {key[:11] for key in state if re.match(r"up_blocks\.\d\.attentions", key)}

    def name(match: re.Match) -> str:
        block, way, level, part, number, _ = match.groups()
        part = {"resnets": "0", "attentions": "1"}.get(part, part)
        if part.endswith("samplers"):
            number, part = "1", "0.op" if way == "down" else f"{1 + (block in attended)}.conv"
        place = 2 * int(level) + int(number) + (way == "down")
        return f"{'input' if way == 'down' else 'output'}_blocks.{place}.{part}"

    blocks = r"^((down|up)_blocks\.(\d))\.(\w+)\.(\d)((?<=samplers\.0)\.conv)?"
    tensors = {}
    for key, value in state.items():
        key = renamed(key, RESNET) if ".resnets." in key else key
        is_outer = re.match(blocks, key) is None
        key = renamed(key, UNET) if is_outer else re.sub(blocks, name, key)
        tensors[f"model.diffusion_model.{key}"] = value
    return tensors


def vae_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for key, value in state.items():
        if ".attentions." in key and value.ndim == 2:
            value = value[:, :, None, None]
        key = renamed(key, VAE)
        key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{1 - int(m[1])}", key)
        tensors[f"first_stage_model.{key}"] = value
    return tensors


def open_clip_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    tensors = {"text_projection": state.pop("text_projection.weight").T}
    for key, value in state.items():
        if match := re.search(r"q_proj\.(weight|bias)", key):
            parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            key = key.replace(f".{match[0]}", f".in_proj_{match[1]}")
            value = torch.cat(parts)
        elif "k_proj" in key or "v_proj" in key:
            continue
        tensors[renamed(key, OPEN_CLIP)] = value
    return {f"conditioner.embedders.1.model.{key}": value for key, value in tensors.items()}


def save_single_file(parts: dict, path: Path) -> Path:
    """The parts of `load_stable_diffusion` in one file, .safetensors or .ckpt."""
    states = {
        name: parts[name].state_dict() for name in parts if hasattr(parts[name], "state_dict")
    }
    is_xl = "text_encoder_2" in parts
    clip = "conditioner.embedders.0" if is_xl else "cond_stage_model"
    tensors = {**unet_tensors(states["unet"]), **vae_tensors(states["vae"])}
    for key, value in states["text_encoder"].items():
        tensors[f"{clip}.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    if is_xl:
        tensors |= open_clip_tensors(states["text_encoder_2"])
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    return path
