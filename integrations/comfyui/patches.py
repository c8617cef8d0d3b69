"""What ELITE hands to ComfyUI: attention patches, and what goes with the text to them.

Nothing here imports ComfyUI. As in diffusers, no state hides in the model: the feature tokens ride
beside the prompt they belong to, so that rows without them (a negative prompt) have no local
branch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elite.attention import KeysValues, LocalKeysValues, equation_6, split_heads, with_concepts
from elite.mappers import LocalMapper

KEY = "elite"  # of what rides with a conditioning, and of the model's wrapper


class LocalBranch:
    """What the local branch of one concept reads, of every cross-attention.

    Args:
        local_mapper: whose K_l and V_l read f; they run once, on its device.
        f: feature tokens of the concept, (1, patches, D).
        lambda_: weight of the branch.
    """

    def __init__(self, local_mapper: LocalMapper, f: Tensor, lambda_: float) -> None:
        self.lambda_ = lambda_
        self._read = {
            layer: tuple(local_mapper.projection(layer, name)(f) for name in ("to_k", "to_v"))
            for layer in local_mapper.config.attention
        }
        self._cast: dict[str, tuple[Tensor, ...]] = {}  # the same, as the rows were last

    def of(self, layer: str, rows: Tensor, heads: int) -> LocalKeysValues:
        """K_l f and V_l f of a layer for these rows, on their device, where they stay until rows of
        another device or type come."""
        read = self._cast.get(layer, self._read[layer])
        if (read[0].device, read[0].dtype) != (rows.device, rows.dtype):
            read = tuple(x.to(rows) for x in self._read[layer])
        self._cast[layer] = read
        K, V = (split_heads(x, heads).expand(len(rows), -1, -1, -1) for x in read)
        return LocalKeysValues(K, V, rows.new_full((len(rows), 1, 1, 1), self.lambda_))


@dataclass(frozen=True, eq=False)
class Shown:
    """The concepts of one prompt: where the placeholder of each stands among its tokens, and its
    local branch."""

    concepts: tuple[tuple[int, LocalBranch], ...]

    def beside(self, layer: str, K: Tensor, V: Tensor) -> KeysValues:
        """K and V of the text, (B, h, tokens, c), with what a layer reads of these concepts."""
        places = torch.tensor([place for place, _ in self.concepts], device=V.device)
        one_hots = F.one_hot(places, V.shape[2]).expand(len(V), -1, -1)  # (B, N, tokens)
        local = tuple(branch.of(layer, V, V.shape[1]) for _, branch in self.concepts)
        return with_concepts(K, V, one_hots, local)


def attention_patch(layer: str) -> Callable[[Tensor, Tensor, Tensor, dict], Tensor]:
    """What stands in for the softmax of an attn2 (`set_model_attn2_replace`), whose own to_q, to_k
    and to_v run before it and to_out behind it. A function, since ComfyUI copies other objects."""

    def attend(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        Q, K, V = (split_heads(x, extra_options["n_heads"]) for x in (q, k, v))
        shown = extra_options.get(KEY)
        read = shown.beside(layer, K, V) if shown else KeysValues(K, V)
        out = equation_6(Q, read, extra_options["dim_head"] ** -0.5)  # (B, h, q, c)
        return out.transpose(1, 2).flatten(2)  # (B, q, C)

    return attend


def hand_on(
    executor: Callable[..., Tensor],
    x: Tensor,
    timesteps: Tensor,
    context: Tensor,
    y: Tensor | None,
    control: dict | None,
    transformer_options: dict[str, Any],
    **kwargs: Any,
) -> Tensor:
    """Wraps a call of the UNet: what rides with its conditioning reaches the attention patches."""
    options = {**transformer_options, KEY: kwargs.pop(KEY, None)}
    return executor(x, timesteps, context, y, control, options, **kwargs)
