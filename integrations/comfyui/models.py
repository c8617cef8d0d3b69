"""ComfyUI's models as ELITE's code knows models, and ELITE's patches in them."""

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save
from torch import Tensor

from elite.concept import Concept
from elite.files import write_atomically
from elite.mappers import GlobalMapper
from elite.text import whole_word
from elite.wording import brief

from .patches import KEY, LocalBranch, Shown, attention_patch, hand_on

UNET = "diffusion_model."


class ImageEncoder:
    """A CLIP_VISION of ComfyUI as `elite.mappers` reads the towers of transformers."""

    dtype = torch.float32

    def __init__(self, clip_vision: Any) -> None:
        tower: Any = getattr(clip_vision.model, "vision_model", None)
        if getattr(tower, "embeddings", None) is None:
            raise ValueError(
                f"clip_vision is {type(clip_vision.model).__name__}; expected CLIP ViT, for "
                "released mappers ViT-L/14 (clip_vision_vit_l.safetensors)"
            )
        patches = tower.embeddings.patch_embedding
        self.clip_vision, self.tower = clip_vision, tower
        self.config = SimpleNamespace(
            hidden_size=patches.out_channels,
            patch_size=patches.kernel_size[0],
            image_size=clip_vision.image_size,
            num_hidden_layers=len(tower.encoder.layers),
        )

    def __call__(self, clip_pixels: Tensor, output_hidden_states: bool = True) -> SimpleNamespace:
        """`last_hidden_state` and all `hidden_states`, on the CPU, of pixels (B, 3, H, W)."""
        comfy.model_management.load_models_gpu([self.clip_vision.patcher])
        pixels = clip_pixels.to(self.clip_vision.load_device)
        first = self.tower.pre_layrnorm(self.tower.embeddings(pixels))  # ComfyUI leaves it out
        last, others, *_ = self.tower(pixels, intermediate_output="all")  # others: (B, layers, ...)
        states = [x.cpu() for x in (first, *others.unbind(1))]
        return SimpleNamespace(last_hidden_state=last.cpu(), hidden_states=states)


class Unet:
    """The cross-attentions of a MODEL of ComfyUI, by their names in diffusers."""

    def __init__(self, model: Any) -> None:
        unet_config = model.model.model_config.unet_config
        end = ".to_k.weight"
        self.paths = {
            name.removesuffix(end): path.removesuffix(end)
            for name, path in comfy.utils.unet_to_diffusers(unet_config).items()
            if name.endswith("attn2" + end)
        }
        if not self.paths or unet_config.get("adm_in_channels"):
            raise ValueError(
                f"model is {type(model.model.model_config).__name__}; expected Stable Diffusion "
                "1.x or one of its shape"
            )
        self.model = model
        self.config = SimpleNamespace(cross_attention_dim=unet_config["context_dim"])

    def named_modules(self) -> list[tuple[str, torch.nn.Module]]:
        """As `elite.mappers.cross_attention_layers` asks for them."""
        return [
            (name, self.model.get_model_object(UNET + path)) for name, path in self.paths.items()
        ]


def with_projections(model: Any, global_mapper: GlobalMapper, fingerprint: str) -> Any:
    """A MODEL whose cross-attentions read text through K_g and V_g, and concepts beside it.

    K_g and V_g are patches of the weights, as LoRAs are, and add up with those.

    Raises:
        ValueError: it has ELITE's patches already, of other mappers.
    """
    applied = model.get_attachment(KEY)
    if applied == fingerprint:
        return model
    if applied:
        raise ValueError("model has the patches of other ELITE mappers; apply one pair of mappers")
    model = model.clone()
    weights = model.get_key_patches()  # with what the model has without patches first
    differences = {}
    for name, path in Unet(model).paths.items():
        layer = name.replace(".", "_")
        for part in ("to_k", "to_v"):
            key = f"{UNET}{path}.{part}.weight"
            weight, read = weights[key][0]
            own = read(weight.to("cpu", torch.float32, copy=True), inplace=True)
            differences[key] = (global_mapper.projection(layer, part).weight.detach() - own,)
        model.set_model_attn2_replace(attention_patch(layer), *_block(path))
    model.add_patches(differences)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, hand_on)
    model.set_attachments(KEY, fingerprint)
    return model


def _block(path: str) -> tuple[str, int, int]:
    """("input", 1, 0) of input_blocks.1.1.transformer_blocks.0.attn2."""
    kind, number, *_, depth, _ = path.split(".")
    kind = kind.removesuffix("_blocks").removesuffix("_block")
    return kind, 0 if kind == "middle" else int(number), int(depth)


def with_word(clip: Any, placeholder: str, concept: Concept, branch: LocalBranch | None) -> Any:
    """A CLIP that reads the primary word of a concept where a prompt has the placeholder, and shows
    its local branch to the model with what it encodes.

    The word is an embedding of ComfyUI, in a file of its temporary folder.
    """
    encoder = getattr(clip.tokenizer, "clip", None)
    if encoder is None or not hasattr(clip.tokenizer, encoder):
        raise ValueError(
            f"clip has {type(clip.tokenizer).__name__}; expected that of Stable Diffusion 1.x"
        )
    word = concept.words[0, 0].float().cpu()  # w0: (D,)
    name = f"elite_{concept.digest}"
    folder = Path(folder_paths.get_temp_directory()) / "elite"
    content = save({"emb_params": word[None].contiguous()})
    write_atomically(folder / f"{name}.safetensors", lambda path: path.write_bytes(content))

    clip = clip.clone()
    clip.tokenizer = _tokenizer(clip.tokenizer, encoder, placeholder, name, str(folder))
    plain = clip.patcher.get_model_object("encode_token_weights")

    def encode_token_weights(tokens: dict[str, list]) -> tuple:
        context, pooled, *extras = plain(tokens)
        extra = extras[0] if extras else {}
        (chunks,) = tokens.values()
        every = itertools.chain(*chunks)
        places = [i for i, (token, *_) in enumerate(every) if _is_word(token, word)]
        if places and branch is not None:
            conds = extra.get("model_conds", {})
            before = conds[KEY].cond.concepts if KEY in conds else ()
            taken = [place for place, _ in before]  # by the same concept under another word
            free = [(place, branch) for place in places if place not in taken]
            shown = Shown((*before, *free[:1]))
            extra = {**extra, "model_conds": {**conds, KEY: comfy.conds.CONDConstant(shown)}}
        return context, pooled, extra

    clip.patcher.add_object_patch("encode_token_weights", encode_token_weights)
    return clip


def _is_word(token: object, word: Tensor) -> bool:
    """Whether a token of ComfyUI, a number or an embedding, is this word."""
    return isinstance(token, Tensor) and token.shape == word.shape and torch.equal(token, word)


def _tokenizer(tokenizer: Any, encoder: str, placeholder: str, name: str, folder: str) -> Any:
    """The same with the embedding `name` of a folder where a text has the placeholder."""
    tokenizer = copy.copy(tokenizer)
    plain = tokenizer.tokenize_with_weights
    inner = copy.copy(getattr(tokenizer, encoder))
    others = inner.embedding_directory or []
    inner.embedding_directory = [*([others] if isinstance(others, str) else others), folder]
    setattr(tokenizer, encoder, inner)
    pattern = whole_word(placeholder)

    def tokenize_with_weights(text: str, *args: Any, **kwargs: Any) -> dict[str, list]:
        spelled, count = pattern.subn(f" embedding:{name} ", text)
        if count > 1:
            raise ValueError(
                f"prompt {brief(text)} has {count} times the placeholder {brief(placeholder)}; "
                "write it at most once"
            )
        return plain(spelled, *args, **kwargs)

    tokenizer.tokenize_with_weights = tokenize_with_weights
    return tokenizer
