"""What LoRA adapters add to the projections to_k and to_v, in whose place ELITE's own stand."""

from typing import Any

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from elite.wording import brief

REMEDY = (
    "of these ELITE's cross-attentions cannot add to_k and to_v; unload it, or take a plain LoRA"
)
MERGED = "_elite_merged_scaling"  # attribute of a layer with LoRA adapters


def lora_weights(layer: Any, scale: float = 1.0) -> list[Tensor]:
    """What LoRA adapters add to a projection's weight: those merged into it, as they were, else
    the active ones times the scale. Raises ValueError for those that do more than add to it."""
    if getattr(layer, "disable_adapters", True):  # a plain Linear has none
        return []
    if not layer.merged_adapters:
        return [scale * layer.get_delta_weight(name) for name in _names(layer)]
    now = dict(layer.scaling)  # which may have been set since
    try:
        layer.scaling.update(getattr(layer, MERGED, {}))
        return [layer.get_delta_weight(name) for name in _names(layer)]
    finally:
        layer.scaling.update(now)


def _names(layer: Any) -> list[str]:
    """The merged adapters of a layer, else the active ones, seen to be plain LoRA."""
    names = layer.merged_adapters or layer.active_adapters
    if not hasattr(layer, "lora_A"):
        raise ValueError(f"adapter {brief(names)}: is no LoRA; {REMEDY}")
    names = [name for name in names if name in layer.lora_A]
    for name in names:
        is_dora = name in layer.lora_magnitude_vector
        if is_dora or layer.lora_B[name].bias is not None:
            kind = "is a DoRA" if is_dora else "is a LoRA with a bias"
            raise ValueError(f"adapter {brief(name)}: {kind}; {REMEDY}")
    return names


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of a model are wrapped for adapters, loaded or fused; its weights then have
    other names."""
    return any(hasattr(layer, "merged_adapters") for layer in model.modules())


def remember_merged(unet: UNet2DConditionModel) -> None:
    """Notes at which scaling the UNet's LoRA adapters were merged, if they are."""
    for layer in unet.modules():
        if hasattr(layer, "merged_adapters"):
            before = getattr(layer, MERGED, {})
            names = [name for name in layer.merged_adapters if name in layer.scaling]
            setattr(layer, MERGED, {name: before.get(name, layer.scaling[name]) for name in names})


def added_by_lora(layer: Any, x: Tensor, scale: float) -> Tensor | float:
    """What LoRA adapters add to the output of a projection for x."""
    return sum((F.linear(x, weight.to(x)) for weight in lora_weights(layer, scale)), 0.0)
