"""From CLIP features to words and feature tokens: the two mapping networks of ELITE (paper section
3).

State-dict keys are those of the released checkpoints. A mapper also owns the K and V projections
that are trained together with it, one pair per cross-attention layer of the UNet; `elite.attention`
plugs them in.
"""

from collections.abc import Sequence
from typing import Self

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPVisionModel

from elite.cards import Carded, mapper_card
from elite.files import digest_weights
from elite.wording import brief

HIDDEN_LAYERS = (4, 8, 12, 16)  # of CLIP ViT-L/14's 24


def clip_levels(
    image_encoder: CLIPVisionModel,
    clip_pixels: Tensor,
    hidden_layers: Sequence[int] = HIDDEN_LAYERS,
) -> list[Tensor]:
    """Hierarchical CLIP features: the last hidden state (no post-layernorm), then the hidden states
    named.

    Args:
        image_encoder: the CLIP vision tower.
        clip_pixels: (B, 3, H, W), CLIP-normalised.
        hidden_layers: indices into the tower's hidden states; 0 is the embedding.

    Returns:
        1 + len(hidden_layers) tensors (B, 1 + patches, d); token 0 is CLS.
    """
    output = image_encoder(clip_pixels.to(image_encoder.dtype), output_hidden_states=True)
    return [output.last_hidden_state, *(output.hidden_states[layer] for layer in hidden_layers)]


def clip_levels_of_views(
    image_encoder: CLIPVisionModel, views: Sequence[Tensor], hidden_layers: Sequence[Sequence[int]]
) -> list[list[Tensor]]:
    """`clip_levels` of several batches of pictures in one pass, each with hidden layers of its
    own."""
    every_layer = sorted(set().union(*hidden_layers))
    last, *states = clip_levels(image_encoder, torch.cat(list(views)), every_layer)
    state_of = dict(zip(every_layer, states, strict=True))
    levels, start = [], 0
    for view, layers in zip(views, hidden_layers, strict=True):
        rows = slice(start, start + len(view))
        levels.append([state[rows] for state in (last, *(state_of[layer] for layer in layers))])
        start += len(view)
    return levels


def check_levels(image_encoder: CLIPVisionModel, hidden_layers: Sequence[int]) -> None:
    """Raises ValueError where the image encoder lacks one of the hidden states."""
    depth = image_encoder.config.num_hidden_layers
    if any(not 0 <= layer <= depth for layer in hidden_layers):
        raise ValueError(
            f"hidden_layers {brief(list(hidden_layers))} do not fit an image encoder of {depth} "
            f"layers; choose from 0 to {depth}"
        )


def cross_attention_layers(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """Every attn2 of the UNet in module order, keyed as in the released checkpoints (dots turned to
    underscores); of a compiled UNet too."""
    return {
        path.removeprefix("_orig_mod.").replace(".", "_"): module
        for path, module in unet.named_modules()
        if path.endswith("attn2")
    }


class Mapper(Carded, ModelMixin, ConfigMixin):
    """What both mapping networks share: an MLP pair per CLIP level, and K and V of every
    cross-attention.

    Args:
        input_dim: width d of the CLIP features.
        output_dim: width of the text embedding.
        hidden_dim: width of the MLPs.
        hidden_layers: the CLIP hidden states that follow the last one; they make levels 1, 2, ...
        attention: {layer name: output width of its to_k and to_v}; empty for a mapper without K and
            V.
        crop_to_object: of a global mapper: whether pictures are read cropped to the boxes of their
            objects, as training shows them. Deviation: the release reads whole pictures, whose
            objects are then smaller than any that it was trained on.
    """

    @register_to_config
    def __init__(
        self,
        input_dim: int = 1024,
        output_dim: int = 768,
        hidden_dim: int = 1024,
        hidden_layers: Sequence[int] = HIDDEN_LAYERS,
        attention: dict[str, int] | None = None,
        crop_to_object: bool = False,
    ) -> None:
        super().__init__()
        for level in range(1 + len(hidden_layers)):
            for name in (f"mapping_{level}", f"mapping_patch_{level}"):
                self.add_module(name, _mlp(input_dim, hidden_dim, output_dim))
        for layer, width in (attention or {}).items():
            self.add_module(f"{layer}_to_k", nn.Linear(output_dim, width, bias=False))
            self.add_module(f"{layer}_to_v", nn.Linear(output_dim, width, bias=False))

    @classmethod
    def shaped_for(
        cls,
        unet: UNet2DConditionModel,
        image_encoder: CLIPVisionModel,
        hidden_dim: int = 1024,
        hidden_layers: Sequence[int] = HIDDEN_LAYERS,
    ) -> Self:
        """A mapper with the widths and layers of these models, but none of their weights.

        Raises:
            ValueError: the image encoder lacks one of the hidden layers.
        """
        check_levels(image_encoder, hidden_layers)
        layers = cross_attention_layers(unet)
        return cls(
            input_dim=image_encoder.config.hidden_size,
            output_dim=unet.config.cross_attention_dim,
            hidden_dim=hidden_dim,
            hidden_layers=list(hidden_layers),
            attention={name: attn.to_k.out_features for name, attn in layers.items()},
        )

    @classmethod
    def for_models(
        cls,
        unet: UNet2DConditionModel,
        image_encoder: CLIPVisionModel,
        hidden_dim: int = 1024,
        hidden_layers: Sequence[int] = HIDDEN_LAYERS,
    ) -> Self:
        """A new mapper that fits these models, its K and V started from the UNet's own."""
        mapper = cls.shaped_for(unet, image_encoder, hidden_dim, hidden_layers)
        with torch.no_grad():
            for name, attn in cross_attention_layers(unet).items():
                for projection in ("to_k", "to_v"):
                    mapper.projection(name, projection).weight.copy_(
                        getattr(attn, projection).weight
                    )
        return mapper

    def card(self) -> str:
        """The model card that is saved with it."""
        return mapper_card(type(self).__name__, dict(self.config))

    @property
    def num_levels(self) -> int:
        return 1 + len(self.config.hidden_layers)

    def projection(self, layer: str, name: str) -> nn.Linear:
        """`to_k` or `to_v` of one cross-attention layer."""
        return self.get_submodule(f"{layer}_{name}")

    def map_level(self, level: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """mapping_i of CLS, (B, D), and mapping_patch_i of the patches, (B, patches, D)."""
        if features.shape[-1] != self.config.input_dim:
            raise ValueError(
                f"image features are {features.shape[-1]} wide, the mapper expects "
                f"{self.config.input_dim}; use the image encoder it was trained with"
            )
        features = features.to(self.dtype)
        cls = self.get_submodule(f"mapping_{level}")(features[:, 0])
        patches = self.get_submodule(f"mapping_patch_{level}")(features[:, 1:])
        return cls, patches


class GlobalMapper(Mapper):
    """The global mapping network: one word per CLIP level (paper eq. 3), w0 from the deepest."""

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """levels: tensors (B, 1 + patches, d) from `clip_levels`. Returns w, (B, number of levels,
        D)."""
        words = []
        for i, features in enumerate(levels):
            cls, patches = self.map_level(i, features)
            words.append(cls + patches.mean(dim=1))  # (B, D)
        return torch.stack(words, dim=1)


class LocalMapper(Mapper):
    """The local mapping network: one feature token per patch, averaged over the levels (paper
    section 3)."""

    def forward(self, levels: Sequence[Tensor], patch_mask: Tensor | None = None) -> Tensor:
        """f of the paper.

        Args:
            levels: tensors (B, 1 + patches, d) from `clip_levels` of the object view.
            patch_mask: m, (B, patches, 1), 0 or 1; masked-out patches become zero tokens. None
                keeps all.

        Returns:
            (B, patches, D).
        """
        tokens = torch.zeros(())
        for i, features in enumerate(levels):
            cls, patches = self.map_level(i, features)
            tokens = tokens.to(patches) + (cls[:, None] + patches) / len(levels)
        return tokens if patch_mask is None else tokens * patch_mask.to(tokens)


def words_and_tokens(
    image_encoder: CLIPVisionModel,
    global_mapper: GlobalMapper,
    local_mapper: LocalMapper | None,
    clip_pixels: Tensor,
    object_pixels: Tensor,
    patch_mask: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """w (B, levels, D) and f (B, patches, D) of objects, from their views as
    `images.object_views` gives them; without a local mapper f is None."""
    layers = global_mapper.config.hidden_layers
    if local_mapper is None:
        return global_mapper(clip_levels(image_encoder, clip_pixels, layers)), None
    levels, object_levels = clip_levels_of_views(
        image_encoder, [clip_pixels, object_pixels], [layers, local_mapper.config.hidden_layers]
    )
    return global_mapper(levels), local_mapper(object_levels, patch_mask)


def fingerprint_of(*mappers: Mapper | None) -> str:
    """A short name for the weights of mappers and how they read, which ties concepts to them."""
    there = [mapper for mapper in mappers if mapper is not None]
    read = [{"crop_to_object": torch.ones(1)} for mapper in there if mapper.config.crop_to_object]
    return digest_weights(*(mapper.state_dict() for mapper in there), *read)[:16]


def _mlp(input_dim: int, hidden_dim: int, output_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(input_dim, hidden_dim),
        nn.LayerNorm(hidden_dim),
        nn.LeakyReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.LayerNorm(hidden_dim),
        nn.LeakyReLU(),
        nn.Linear(hidden_dim, output_dim),
    )
