"""ELITE's cross-attention (paper eq. 6) as a per-instance processor of diffusers, and its
installation in a UNet.

What goes with the text reaches the processors as diffusers hands on image prompts:
`encoder_hidden_states` arrives as `(context, image_embeds)`. `image_embeds` is either `[f,
placeholder, lambda]` of each concept (see `local_inputs`), or the `KeysValues` of every layer,
computed once for all steps of a generation. So no state of a call hides in the UNet; of pipelines
that share one, each plugs in its own mappers before it draws (`pipeline.Elite.take_unet`).

Shapes: B rows of the batch, with guidance the unconditional ones first; R, the last of them, with a
local branch; N concepts; h heads of width c; q queries; 77 tokens with Stable Diffusion, with
regions as many for each reading of the prompt.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from elite.adapters import added_by_lora
from elite.mappers import GlobalMapper, LocalMapper, Mapper, cross_attention_layers
from elite.wording import brief

AttentionNorm = Literal["sample", "batch"]
COLUMNS = 8  # channels beside V, one a concept: fused kernels want multiples of 8


class LocalKeysValues(NamedTuple):
    """What the local branch of a concept reads, for the last R of the B rows; the others have
    none."""

    K: Tensor  # K_l f, (R, h, patches, c)
    V: Tensor  # V_l f, (R, h, patches, c)
    lambda_: Tensor  # (R, 1, 1, 1)


class KeysValues(NamedTuple):
    """All that one cross-attention reads beside its queries. Nothing here depends on the
    timestep."""

    K: Tensor  # K_g context, (B, h, 77, c)
    V: Tensor  # V_g context, (B, h, 77, c), with a local branch c + COLUMNS
    local: tuple[LocalKeysValues, ...] = ()  # of every concept
    visible: Tensor | None = None  # see `visibility`, for the last R rows; None means all


class EliteAttnProcessor:
    """Cross-attention with ELITE's own projections: K_g, V_g for all text, K_l, V_l for the feature
    tokens.

    `out = softmax(Q K_g^T s) V_g + lambda * a * softmax(Q K_l^T s) V_l`, where a is the attention
    each query pays to the placeholder, divided by its maximum. Each of several concepts adds such a
    term with its own placeholder and lambda.

    Deviation: the release takes that maximum over the whole batch, so a picture depends on its
    batch mates; here it is taken per sample. `attention_norm="batch"` reproduces the release.
    """

    _attention_backend: AttentionBackendName | None = None  # of `unet.set_attention_backend`

    def __init__(
        self,
        K_g: nn.Linear,
        V_g: nn.Linear,
        K_l: nn.Linear | None = None,
        V_l: nn.Linear | None = None,
        attention_norm: AttentionNorm = "sample",
        layer: str = "",
    ) -> None:
        self.K_g, self.V_g, self.K_l, self.V_l = K_g, V_g, K_l, V_l
        self.attention_norm, self.layer = attention_norm, layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor] | dict[str, KeysValues]],
        attention_mask: Tensor | None = None,
        *args: object,
        **kwargs: object,
    ) -> Tensor:
        """Eq. 6 for hidden_states (B, q, C) and a context (B, 77, D), alone or with what the
        module's docstring calls image_embeds. Returns (B, q, C)."""
        if not isinstance(encoder_hidden_states, tuple):
            encoder_hidden_states = encoder_hidden_states, []
        context, image_embeds = encoder_hidden_states
        if isinstance(image_embeds, dict):  # K_g, V_g; K_l, V_l and lambda of each concept
            read = image_embeds[self.layer]
        else:
            read = self.keys_values(attn, context, image_embeds)

        Q = split_heads(attn.to_q(hidden_states), attn.heads)  # Q: (B, h, q, c)
        bias = self._bias(attn, attention_mask, context, read.visible, Q)  # mostly None
        out = equation_6(Q, read, attn.scale, bias, self.attention_norm, self._attention_backend)
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)  # all heads: (B, q, C)
        return attn.to_out[1](attn.to_out[0](out))  # the layer's own projection: (B, q, C)

    def keys_values(
        self, attn: Attention, context: Tensor, local: list[Tensor], lora_scale: float = 1.0
    ) -> KeysValues:
        """K and V of these inputs: context (B, 77, D), and nothing or `local_inputs` of R rows.

        LoRA adapters of the UNet's own to_k and to_v, which ELITE replaces, add to K_g and V_g.
        """
        heads = attn.heads
        K = split_heads(self.K_g(context) + added_by_lora(attn.to_k, context, lora_scale), heads)
        V = split_heads(self.V_g(context) + added_by_lora(attn.to_v, context, lora_scale), heads)
        concepts, visible = split_local_inputs(local)
        if not concepts or self.K_l is None or self.V_l is None:
            return KeysValues(K, V, visible=visible)
        one_hots = torch.cat([placeholder for _, placeholder, _ in concepts], dim=1)  # (R, N, 77)
        of_each = tuple(
            LocalKeysValues(
                split_heads(self.K_l(f), heads),
                split_heads(self.V_l(f), heads),
                lambda_[:, None].to(V),
            )
            for f, _, lambda_ in concepts
        )
        return with_concepts(K, V, one_hots, of_each, visible)

    @staticmethod
    def _bias(
        attn: Attention,
        attention_mask: Tensor | None,
        context: Tensor,
        visible: Tensor | None,
        Q: Tensor,
    ) -> Tensor | None:
        """What is added to the scores Q K_g^T s, (B, h or 1, q or 1, 77); None for
        nothing: diffusers' own mask, and -inf where a concept may not appear."""
        bias = None
        if attention_mask is not None:
            bias = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
            bias = bias.view(len(context), attn.heads, -1, context.shape[1])
        if visible is not None:
            hidden = _region_bias(visible, len(Q), Q.shape[2]).to(Q)
            bias = hidden if bias is None else bias + hidden
        return bias


def equation_6(
    Q: Tensor,
    read: KeysValues,
    s: float,
    bias: Tensor | None = None,
    attention_norm: AttentionNorm = "sample",
    backend: AttentionBackendName | None = None,
) -> Tensor:
    """Eq. 6 of the paper for queries Q (B, h, q, c), what they read, a scale s and what is added to
    the scores of the text. Returns (B, h, q, c)."""
    # With a local branch V_g has one-hots of the placeholders beside it: there comes out what each
    # query pays them.
    out = _attend(Q, read.K, read.V, bias, s, backend)  # softmax(Q K_g^T s) V_g: (B, h, q, c [+ 8])
    if read.local:
        rows = slice(-len(read.local[0].K), None)  # the R conditional ones
        paid = out[rows, ..., -COLUMNS:]  # softmax(Q K_g^T s) in the columns S: (R, h, q, 8)
        out = out[..., :-COLUMNS]  # softmax(Q K_g^T s) V_g: (B, h, q, c)
        Q = Q[rows]  # Q: (R, h, q, c)

    for n, (K_l, V_l, lambda_) in enumerate(read.local):
        column = paid[..., n, None]  # softmax(Q K_g^T s) in the column S: (R, h, q, 1)
        a = column / _maximum(column, lambda_, attention_norm)  # a, at most 1: (R, h, q, 1)
        branch = _fused(Q, K_l, V_l, None, s, backend)  # softmax(Q K_l^T s) V_l: (R, h, q, c)
        out = _add_to_last_rows(out, lambda_ * a * branch)  # + lambda a softmax(..) V_l
    return out


def with_concepts(
    K: Tensor,
    V: Tensor,
    one_hots: Tensor,
    local: tuple[LocalKeysValues, ...],
    visible: Tensor | None = None,
) -> KeysValues:
    """K and V of the text, (B, h, 77, c), with what is local to N concepts, of the last R rows;
    one_hots (R, N, 77) say where their placeholders stand.

    These ride along as more channels of V: what comes out there is the attention paid to them.
    """
    columns = one_hots.transpose(1, 2)[:, None].to(V)  # (R, 1, 77, N)
    free = COLUMNS - len(local)
    if free < 0:
        raise ValueError(f"{len(local)} concepts in one prompt; at most {COLUMNS} are possible")
    guided = len(V) - len(columns)  # rows without a local branch
    columns = F.pad(columns, (0, free, 0, 0, 0, 0, guided, 0))  # (B, 1, 77, 8)
    V = torch.cat([V, columns.expand(-1, V.shape[1], -1, -1)], dim=-1)  # (B, h, 77, c + 8)
    return KeysValues(K, V, local, visible)


def _maximum(column: Tensor, lambda_: Tensor, attention_norm: AttentionNorm) -> Tensor:
    """The divisor of a, (R, 1, 1, 1): over heads and queries, and in "batch" over all rows with a
    lambda."""
    maximum = column.amax(dim=(1, 2, 3), keepdim=True)
    if attention_norm == "batch":
        maximum = maximum.where(lambda_ != 0, maximum.min()).max()
    return maximum.clamp(min=torch.finfo(column.dtype).tiny)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, n, C) to (B, heads, n, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    bias: Tensor | None,
    scale: float,
    backend: AttentionBackendName | None,
) -> Tensor:
    """softmax(Q K^T s + bias) V, where V may be wider than K.

    On a CPU the fused kernel takes no wider V: zeros make Q and K as wide, which changes no score.
    In float32 it takes longer there, for so few keys.
    """
    if Q.device.type != "cpu":
        return _fused(Q, K, V, bias, scale, backend)
    if Q.dtype != torch.float32:
        if wider := V.shape[-1] - K.shape[-1]:
            Q, K = F.pad(Q, (0, wider)), F.pad(K, (0, wider))
        return _fused(Q, K, V, bias, scale, backend)
    scores = Q @ K.transpose(2, 3) * scale  # (B, h, q, 77)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1) @ V


def _fused(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    bias: Tensor | None,
    scale: float,
    backend: AttentionBackendName | None,
) -> Tensor:
    """The same by torch's fused kernel, or by that of the backend, which wants V as wide as K and
    no bias."""
    if backend is None or bias is not None or V.shape[-1] != K.shape[-1]:
        return F.scaled_dot_product_attention(Q, K, V, bias, scale=scale)
    Q, K, V = (x.transpose(1, 2) for x in (Q, K, V))  # (B, n, h, c) each
    return dispatch_attention_fn(Q, K, V, scale=scale, backend=backend).transpose(1, 2)


def _region_bias(visible: Tensor, rows: int, queries: int) -> Tensor:
    """What is added to the scores of `rows` rows, (rows, 1, q, 77), at the size of a layer
    with this many queries."""
    height, width = visible.shape[2:]
    while height * width > queries:  # the UNet halves, rounding up
        height, width = (height + 1) // 2, (width + 1) // 2
    seen = F.adaptive_avg_pool2d(visible, (height, width)).flatten(2).transpose(1, 2)
    return F.pad(seen.log()[:, None], (0, 0, 0, 0, 0, 0, rows - len(visible), 0))


def _add_to_last_rows(x: Tensor, added: Tensor) -> Tensor:
    rows = len(x) - len(added)
    return torch.cat([x[:rows], x[rows:] + added]) if rows else x + added


def keys_values(
    unet: UNet2DConditionModel, context: Tensor, local: list[Tensor], lora_scale: float = 1.0
) -> dict[str, KeysValues]:
    """What every attn2 of a UNet with ELITE installed reads, to be passed to it as `image_embeds`
    for as long as context and local inputs stay as they are.

    Args:
        context: (B, 77, D), all rows of the denoising batch.
        local: `local_inputs` of the last R of these rows, or empty.
        lora_scale: of the UNet's LoRA adapters, if it has any.

    Raises:
        ValueError: something has put other attention processors in ELITE's place.
    """
    layers = cross_attention_layers(unet)
    for layer, attn in layers.items():
        if not isinstance(attn.processor, EliteAttnProcessor):
            raise ValueError(
                f"{layer} has the attention processor {type(attn.processor).__name__} instead of "
                "ELITE's; call pipe.install() after changing the UNet's processors"
            )
    return {
        layer: attn.processor.keys_values(attn, context, local, lora_scale)
        for layer, attn in layers.items()
    }


def conditional_rows(of_layers: dict[str, KeysValues]) -> dict[str, KeysValues]:
    """The same for the second half of a guided batch alone; what is local has no other rows."""
    return {
        layer: read._replace(K=read.K.chunk(2)[1], V=read.V.chunk(2)[1])
        for layer, read in of_layers.items()
    }


def install(
    unet: UNet2DConditionModel,
    global_mapper: GlobalMapper,
    local_mapper: LocalMapper | None = None,
    attention_norm: AttentionNorm = "sample",
) -> None:
    """Gives every attn2 of this UNet (and of no other) the mappers' K and V. Where others are
    installed, each layer is given these at once: another thread may be drawing with the UNet.

    Raises:
        ValueError: a mapper was made for a UNet with other cross-attention layers, or no such norm.
    """
    if attention_norm not in get_args(AttentionNorm):
        known = " or ".join(get_args(AttentionNorm))
        raise ValueError(f"attention_norm is {brief(attention_norm)}; expected {known}")
    layers = cross_attention_layers(unet)
    processors = {}
    for layer, attn in layers.items():
        K_g, V_g = (_projection(global_mapper, layer, name, attn) for name in ("to_k", "to_v"))
        processor = EliteAttnProcessor(K_g, V_g, attention_norm=attention_norm, layer=layer)
        if local_mapper is not None:
            processor.K_l = _projection(local_mapper, layer, "to_k", attn)
            processor.V_l = _projection(local_mapper, layer, "to_v", attn)
        processors[layer] = processor
    if not is_installed(unet):
        unet._elite_restore = {
            "processors": {layer: attn.processor for layer, attn in layers.items()},
            "encoder_hid_proj": unet.encoder_hid_proj,
            "encoder_hid_dim_type": unet.config.encoder_hid_dim_type,
            "hook": unet.register_forward_pre_hook(_image_embeds_given, with_kwargs=True),
        }
    unet._elite_restore["of"] = global_mapper, local_mapper, attention_norm
    for layer, attn in layers.items():
        processors[layer]._attention_backend = getattr(attn.processor, "_attention_backend", None)
        attn.set_processor(processors[layer])
    unet.encoder_hid_proj = nn.Identity()  # hands `image_embeds` to the processors as they are
    # As diffusers' own IP-Adapters do: the config that is saved stays what it was.
    unet.config.encoder_hid_dim_type = "ip_image_proj"


def uninstall(unet: UNet2DConditionModel) -> None:
    """Gives the UNet back as it was before `install`, but for an attention backend that was set
    since; does nothing on a plain one."""
    if not is_installed(unet):
        return
    restore = unet._elite_restore
    for layer, attn in cross_attention_layers(unet).items():
        plain = restore["processors"][layer]
        backend = getattr(attn.processor, "_attention_backend", None)
        if backend is not None:  # for the next `install`
            plain._attention_backend = backend
        attn.set_processor(plain)
    unet.encoder_hid_proj = restore["encoder_hid_proj"]
    unet.config.encoder_hid_dim_type = restore["encoder_hid_dim_type"]
    restore["hook"].remove()
    del unet._elite_restore


def _image_embeds_given(unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Stock pipelines give none with a plain prompt. Raises ValueError for regions of another
    size than that of the latents (B, C, h, w)."""
    beside = {"image_embeds": [], **(kwargs.get("added_cond_kwargs") or {})}
    visible, latents = visible_of(beside["image_embeds"]), args[0] if args else kwargs["sample"]
    if visible is not None and visible.shape[2:] != latents.shape[2:]:
        made, drawn = (" x ".join(map(str, x.shape[2:])) for x in (visible, latents))
        raise ValueError(
            f"regions were made for {made} latents (height x width), {drawn} are drawn; pass "
            "height and width of the picture to condition"
        )
    return args, {**kwargs, "added_cond_kwargs": beside}


def is_installed(unet: UNet2DConditionModel) -> bool:
    return hasattr(unet, "_elite_restore")


def is_installed_with(
    unet: UNet2DConditionModel,
    global_mapper: GlobalMapper,
    local_mapper: LocalMapper | None,
    attention_norm: AttentionNorm,
) -> bool:
    """Whether the last `install` was of these."""
    given = global_mapper, local_mapper, attention_norm
    return is_installed(unet) and unet._elite_restore["of"] == given


def local_inputs(
    f: Tensor, index: Tensor, lambda_: Tensor | float, text_length: int
) -> list[Tensor]:
    """The `image_embeds` that go with the context for one concept. Those of several are joined by
    `+`; a `visibility` may follow at the end.

    Args:
        f: feature tokens (B, patches, D), after the mask.
        index: placeholder positions, (B,) or (B, P) where it stands several times.
        lambda_: weight of the local branch, one number or (B,).
        text_length: tokens of the context (77).

    Returns:
        [f, one-hot of the placeholder (B, 1, text_length), lambda (B, 1, 1)].
    """
    one_hots = F.one_hot(index.reshape(len(index), -1), text_length)  # (B, P, 77)
    placeholder = one_hots.sum(dim=1, keepdim=True).to(f)  # (B, 1, 77)
    weights = torch.as_tensor(lambda_, dtype=f.dtype, device=f.device).expand(len(f))
    return [f, placeholder, weights[:, None, None]]


def visibility(
    regions: Mapping[int, Tensor], index: Tensor, num_words: int, text_length: int
) -> Tensor:
    """Which tokens of a prompt's readings (see `named_concepts`) each place of the picture sees: a
    region that of its own, all other places the first one, but no word that has a region. Where
    words are not seen, a is 0, so that the local branch is confined as well.

    Deviation: the release draws one object, wherever it likes.

    Args:
        regions: by concept, (h, w) in [0, 1], at the size of the latents or larger.
        index: position of each concept's first word in a reading, (B, N).
        num_words: of each concept.
        text_length: of a reading.

    Returns:
        (B, (1 + regions) text_length, h, w) in [0, 1].
    """
    shares = torch.stack(list(regions.values()))
    outside = (1 - shares.sum(dim=0, keepdim=True)).clamp(min=0)
    readings = torch.cat([outside, shares]).repeat_interleave(text_length, dim=0)
    visible = readings.repeat(len(index), 1, 1, 1)
    rows = torch.arange(len(index))
    for n in regions:
        for word in range(num_words):
            visible[rows, index[:, n] + word] = 0
    return visible


def split_local_inputs(local: list[Tensor]) -> tuple[list[list[Tensor]], Tensor | None]:
    """`[f, placeholder, lambda]` of each concept, and the visibility if there is one."""
    whole = len(local) - len(local) % 3
    concepts = [local[start : start + 3] for start in range(0, whole, 3)]
    return concepts, local[-1] if whole < len(local) else None


def visible_of(image_embeds: list[Tensor] | dict[str, KeysValues]) -> Tensor | None:
    """The visibility in what goes with the text, of all layers, if there is one."""
    if isinstance(image_embeds, dict):
        return next(iter(image_embeds.values())).visible if image_embeds else None
    return split_local_inputs(image_embeds)[1]


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
            f"UNet needs {expected}; it was trained for another UNet"
        )
    return projection
