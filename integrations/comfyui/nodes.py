"""The three nodes: load ELITE's mappers, encode a concept, apply it to MODEL and CLIP."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from elite.checkpoint import load_mapper
from elite.concept import Concept
from elite.defaults import LAMBDA, PLACEHOLDER
from elite.images import as_mask, doubt, fit_mask, object_views
from elite.mappers import GlobalMapper, LocalMapper, fingerprint_of, words_and_tokens
from elite.wording import note

from .models import ImageEncoder, Unet, with_projections, with_word
from .patches import LocalBranch

WHERE = "folder or .pt file in models/elite/, a path, or a name on the hub"


@dataclass(frozen=True)
class Elite:
    """Mappers with the image encoder that they read."""

    image_encoder: ImageEncoder
    global_mapper: GlobalMapper
    local_mapper: LocalMapper | None
    fingerprint: str


class LoadMappers:
    """Mappers that fit a MODEL and a CLIP_VISION of ComfyUI."""

    CATEGORY = FUNCTION = "elite"
    RETURN_TYPES = ("ELITE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict]:
        local = f"{WHERE}; empty for none"
        return {
            "required": {
                "model": ("MODEL",),
                "clip_vision": ("CLIP_VISION",),
                "global_mapper": ("STRING", {"default": "global_mapper.pt", "tooltip": WHERE}),
                "local_mapper": ("STRING", {"default": "local_mapper.pt", "tooltip": local}),
            }
        }

    def elite(
        self, model: Any, clip_vision: Any, global_mapper: str, local_mapper: str
    ) -> tuple[Elite]:
        """Raises ValueError where a mapper cannot be read, or does not fit."""
        sizes: Any = Unet(model), ImageEncoder(clip_vision)
        mappers = (
            load_mapper(GlobalMapper, _located(global_mapper), *sizes),
            load_mapper(LocalMapper, _located(local_mapper), *sizes) if local_mapper else None,
        )
        return (Elite(sizes[1], *mappers, fingerprint_of(*mappers)),)


def _located(name: str) -> str | Path:
    inside = Path(folder_paths.models_dir) / "elite" / name
    return inside if inside.exists() else name


class EncodeConcept:
    """One object, of a picture and its mask; several pictures in a batch are of the same object."""

    CATEGORY = FUNCTION = "elite"
    RETURN_TYPES = ("ELITE_CONCEPT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict]:
        return {"required": {"elite": ("ELITE",), "image": ("IMAGE",), "mask": ("MASK",)}}

    @torch.no_grad()
    def elite(self, elite: Elite, image: Tensor, mask: Tensor) -> tuple[Concept]:
        """Of pictures (B, H, W, 3) in [0, 1] and masks (B, H, W), all but 0 object.

        Raises ValueError where a mask is empty or of another shape than its picture.
        """
        masks = mask.reshape(-1, *mask.shape[-2:])
        if len(masks) != len(image):
            raise ValueError(
                f"{len(image)} pictures and {len(masks)} masks; expected a mask for each picture"
            )
        config = elite.image_encoder.config
        views = []
        for picture, given in zip(image[..., :3], masks, strict=True):
            pixels = (picture * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
            object_mask = fit_mask(as_mask(given.cpu().numpy()), pixels)
            if doubtful := doubt(object_mask):
                note(f"mask: {doubtful}")
            grid = config.image_size // config.patch_size
            crop = elite.global_mapper.config.crop_to_object
            views.append(object_views(pixels, object_mask, config.image_size, grid, crop))
        stacked = {key: torch.stack([view[key] for view in views]) for key in views[0]}
        encoder: Any = elite.image_encoder
        words, tokens = words_and_tokens(
            encoder, elite.global_mapper, elite.local_mapper, **stacked
        )
        return (Concept(words, tokens, elite.fingerprint).as_one(),)


class ApplyElite:
    """A concept in MODEL and CLIP; apply another to the results for two in one prompt."""

    CATEGORY = FUNCTION = "elite"
    RETURN_TYPES = ("MODEL", "CLIP")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict]:
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "elite": ("ELITE",),
                "concept": ("ELITE_CONCEPT",),
                "lambda_": ("FLOAT", {"default": LAMBDA, "min": 0.0, "max": 2.0, "step": 0.05}),
                "placeholder": ("STRING", {"default": PLACEHOLDER}),
            }
        }

    @torch.no_grad()
    def elite(
        self,
        model: Any,
        clip: Any,
        elite: Elite,
        concept: Concept,
        lambda_: float,
        placeholder: str,
    ) -> tuple[Any, Any]:
        """Raises ValueError where other mappers made the concept or patched the model."""
        concept.check_mappers(elite.fingerprint)
        branch = None
        if elite.local_mapper is not None and concept.feature_tokens is not None:
            branch = LocalBranch(elite.local_mapper, concept.feature_tokens, lambda_)
        return (
            with_projections(model, elite.global_mapper, elite.fingerprint),
            with_word(clip, placeholder, concept, branch),
        )


NODE_CLASS_MAPPINGS = {
    "EliteLoadMappers": LoadMappers,
    "EliteEncodeConcept": EncodeConcept,
    "EliteApply": ApplyElite,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "EliteLoadMappers": "Load ELITE mappers",
    "EliteEncodeConcept": "Encode concept (ELITE)",
    "EliteApply": "Apply ELITE to MODEL and CLIP",
}
