"""ELITE's cross-attention (paper eq. 6) as a per-instance processor of diffusers, and its
installation in a UNet.

The local tokens, the placeholder's position and lambda reach the processors beside the text, by the
road that diffusers has for image prompts: `encoder_hidden_states` arrives as `(text, [tokens,
placeholder, lambda])`. So no state hides in the UNet and two pipelines cannot disturb each other.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from elite.mappers import GlobalMapper, LocalMapper, Mapper, cross_attention_layers

AttentionNorm = Literal["sample", "batch"]


class EliteAttnProcessor:
    """Cross-attention with ELITE's own projections: K_g, V_g for all text, K_l, V_l for the feature
    tokens.

    `out = softmax(Q K_g^T s) V_g + lambda * a * softmax(Q K_l^T s) V_l`, where a is the attention
    each query pays to the placeholder, divided by its maximum.

    Deviation: the release takes that maximum over the whole batch, so a picture depends on its
    batch mates; here it is taken per sample. `attention_norm="batch"` reproduces the release.
    """

    def __init__(
        self,
        K_g: nn.Linear,
        V_g: nn.Linear,
        K_l: nn.Linear | None = None,
        V_l: nn.Linear | None = None,
        attention_norm: AttentionNorm = "sample",
    ) -> None:
        self.K_g, self.V_g, self.K_l, self.V_l = K_g, V_g, K_l, V_l
        self.attention_norm = attention_norm

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]],
        attention_mask: Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> Tensor:
        """hidden_states (B, queries, C); text (B, 77, D), alone or with the list of the module's
        docstring."""
        if not isinstance(encoder_hidden_states, tuple):
            encoder_hidden_states = encoder_hidden_states, []
        text, local = encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], len(text))
            attention_mask = attention_mask.view(len(text), attn.heads, -1, text.shape[1])

        def heads(x: Tensor) -> Tensor:  # (B, n, C) -> (B, heads, n, C / heads)
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        Q, K, V = heads(attn.to_q(hidden_states)), heads(self.K_g(text)), heads(self.V_g(text))
        if local and self.K_l is not None and self.V_l is not None:
            f, placeholder, lambda_ = local
            K_f, V_f = heads(self.K_l(f)), heads(self.V_l(f))
            out, column = _attend_with_column(Q, K, V, placeholder, attention_mask, attn.scale)
            a = column / self._maximum(column, lambda_)
            branch = F.scaled_dot_product_attention(Q, K_f, V_f, scale=attn.scale)
            out = out + lambda_[:, None].to(out) * a * branch
        else:
            out = F.scaled_dot_product_attention(Q, K, V, attention_mask, scale=attn.scale)
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)  # (B, queries, C)
        return attn.to_out[1](attn.to_out[0](out))

    def _maximum(self, column: Tensor, lambda_: Tensor) -> Tensor:
        """The divisor of a, (B, 1, 1, 1): over heads and queries, and in "batch" over all rows with
        a lambda."""
        maximum = column.amax(dim=(1, 2, 3), keepdim=True)
        if self.attention_norm == "batch":
            maximum = maximum.where(lambda_[:, None] != 0, maximum.min()).max()
        return maximum.clamp(min=torch.finfo(column.dtype).tiny)


def _attend_with_column(
    Q: Tensor, K: Tensor, V: Tensor, placeholder: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention and one column of its softmax, (B, heads, queries, 1), from a single fused call.

    The placeholder's one-hot (B, 1, 77) rides along as one more channel of V: what comes out there
    is the attention paid to it.
    """
    one_hot = placeholder[:, None].transpose(2, 3).to(V)  # (B, 1, 77, 1)
    out = F.scaled_dot_product_attention(
        Q, K, torch.cat([V, one_hot.expand(-1, V.shape[1], -1, -1)], dim=-1), mask, scale=scale
    )
    return out[..., :-1], out[..., -1:]


class LocalInputs(nn.Module):
    """Hands `image_embeds` to the attention processors as they are."""

    def forward(self, image_embeds: list[Tensor]) -> list[Tensor]:
        return image_embeds


def install(
    unet: UNet2DConditionModel,
    global_mapper: GlobalMapper,
    local_mapper: LocalMapper | None = None,
    attention_norm: AttentionNorm = "sample",
) -> None:
    """Gives every attn2 of this UNet (and of no other) the mappers' K and V.

    Raises:
        ValueError: a mapper was made for a UNet with other cross-attention layers.
    """
    layers = cross_attention_layers(unet)
    processors = {}
    for layer, attn in layers.items():
        K_g, V_g = (_projection(global_mapper, layer, name, attn) for name in ("to_k", "to_v"))
        processor = EliteAttnProcessor(K_g, V_g, attention_norm=attention_norm)
        if local_mapper is not None:
            processor.K_l = _projection(local_mapper, layer, "to_k", attn)
            processor.V_l = _projection(local_mapper, layer, "to_v", attn)
        processors[layer] = processor
    uninstall(unet)
    unet._elite_restore = {
        "processors": {layer: attn.processor for layer, attn in layers.items()},
        "encoder_hid_proj": unet.encoder_hid_proj,
        "encoder_hid_dim_type": unet.config.encoder_hid_dim_type,
    }
    for layer, attn in layers.items():
        attn.set_processor(processors[layer])
    unet.encoder_hid_proj = LocalInputs()
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")


def uninstall(unet: UNet2DConditionModel) -> None:
    """Gives the UNet back as it was before `install`; does nothing on a plain one."""
    if not is_installed(unet):
        return
    restore = unet._elite_restore
    for layer, attn in cross_attention_layers(unet).items():
        attn.set_processor(restore["processors"][layer])
    unet.encoder_hid_proj = restore["encoder_hid_proj"]
    unet.register_to_config(encoder_hid_dim_type=restore["encoder_hid_dim_type"])
    del unet._elite_restore


def is_installed(unet: UNet2DConditionModel) -> bool:
    return "_elite_restore" in vars(unet)


def local_inputs(
    f: Tensor, index: Tensor, lambda_: Tensor | float, text_length: int
) -> list[Tensor]:
    """The list that travels beside the text.

    Args:
        f: feature tokens (B, patches, D), after the mask.
        index: placeholder positions (B,).
        lambda_: weight of the local branch, one number or (B,).
        text_length: tokens of the text (77).

    Returns:
        [f, one-hot of the placeholder (B, 1, text_length), lambda (B, 1, 1)].
    """
    placeholder = F.one_hot(index, text_length)[:, None].to(f)  # (B, 1, 77)
    weights = torch.as_tensor(lambda_, dtype=f.dtype, device=f.device).expand(len(f))
    return [f, placeholder, weights[:, None, None]]


def local_values(local_mapper: LocalMapper, f: Tensor) -> list[Tensor]:
    """V_l f of every attn2, (B, patches, C) each; stage 2 regularises them."""
    return [local_mapper.projection(layer, "to_v")(f) for layer in local_mapper.config.attention]


def _projection(mapper: Mapper, layer: str, name: str, attn: Attention) -> nn.Linear:
    try:
        projection = mapper.projection(layer, name)
    except AttributeError:
        raise ValueError(
            f"{type(mapper).__name__} has no {layer}_{name}; it was trained for another UNet"
        ) from None
    expected = tuple(getattr(attn, name).weight.shape)
    if tuple(projection.weight.shape) != expected:
        raise ValueError(
            f"{type(mapper).__name__}: {layer}_{name} is {tuple(projection.weight.shape)}, the "
            "UNet needs "
            f"{expected}; it was trained for another UNet"
        )
    return projection
