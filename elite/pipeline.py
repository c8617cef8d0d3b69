"""ElitePipeline: Stable Diffusion with ELITE's mappers plugged in; encode a concept once, draw it
many times."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from elite.attention import (
    AttentionNorm,
    KeysValues,
    install,
    is_installed,
    keys_values,
    local_inputs,
    uninstall,
)
from elite.checkpoint import load_mapper
from elite.concept import Concept
from elite.images import fit_mask, object_views, to_mask, to_rgb
from elite.loading import inside, load_parts, pixels_per_latent, side_in_pixels
from elite.mappers import GlobalMapper, LocalMapper, Mapper, clip_levels, clip_levels_of_views
from elite.text import encode_text, tokenize

ImageLike = Image.Image | np.ndarray
Words = int | Literal["all"]


class ElitePipeline(StableDiffusionPipeline):
    """Text-to-image with one-picture concepts (ELITE, arXiv 2302.13848).

    A call without a concept draws the prompt through the mappers' K_g, V_g, as the release does for
    its unconditional pass. `local_mapper` may be None: global mapping only.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "local_mapper"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModel,
        global_mapper: GlobalMapper,
        local_mapper: LocalMapper | None = None,
        safety_checker: None = None,
        feature_extractor: None = None,
        requires_safety_checker: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self.register_modules(global_mapper=global_mapper, local_mapper=local_mapper)
        # Ties concepts to these mappers; kept when they are loaded in another precision.
        self.fingerprint = fingerprint or _fingerprint(global_mapper, local_mapper)
        self.register_to_config(fingerprint=self.fingerprint)
        self.install()

    @classmethod
    def from_stable_diffusion(
        cls,
        model: str | Path,
        *,
        global_mapper: str | Path | GlobalMapper | None = None,
        local_mapper: str | Path | LocalMapper | Literal[False] | None = None,
        image_encoder: str | Path | CLIPVisionModel | None = None,
        torch_dtype: torch.dtype = torch.float32,
    ) -> "ElitePipeline":
        """Composes a pipeline from a Stable Diffusion and mappers.

        Args:
            model: folder in diffusers layout, or a hub name.
            global_mapper, local_mapper: folder, hub name, `.pt` file of the release, or a mapper.
                None takes `global_mapper/` and `local_mapper/` inside the model folder; without the
                latter, or with `local_mapper=False`, there is no local branch.
            image_encoder: CLIP vision tower. None takes `image_encoder/` inside the model folder,
                else CLIP ViT-L/14 from the hub.

        Raises:
            ValueError: a part is missing or does not fit; the message names it.
        """
        parts = load_parts(model, image_encoder)
        unet, encoder = parts["unet"], parts["image_encoder"]
        mappers: dict[str, Any] = {}
        for name, kind, given in (
            ("global_mapper", GlobalMapper, global_mapper),
            ("local_mapper", LocalMapper, local_mapper),
        ):
            source = inside(model, name) if given is None else given or None
            if isinstance(source, str | Path):
                source = load_mapper(kind, source, unet, encoder)
            mappers[name] = source
        if mappers["global_mapper"] is None:
            raise ValueError(
                f"{model}: has no global_mapper/; pass the path of a global mapper "
                "(--global_mapper_path)"
            )
        return cls(**parts, **mappers).to(dtype=torch_dtype)

    def install(self, attention_norm: AttentionNorm = "sample") -> None:
        """Plugs the mappers into this pipeline's UNet; done by the constructor."""
        install(self.unet, self.global_mapper, self.local_mapper, attention_norm)

    def uninstall(self) -> None:
        """Gives the plain Stable Diffusion back, bit for bit."""
        uninstall(self.unet)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves the whole in diffusers layout; the UNet's files are plain Stable Diffusion."""
        installed = is_installed(self.unet)
        self.uninstall()
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            if installed:
                self.install()

    @property
    def grid(self) -> int:
        """Side of the CLIP patch grid."""
        config = self.image_encoder.config
        return config.image_size // config.patch_size

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures the model draws by default."""
        return side_in_pixels(self.unet, self.vae)

    @torch.no_grad()
    def encode_concept(self, image: ImageLike, mask: ImageLike, name: str = "mask") -> Concept:
        """Reads one object: picture and mask to words and feature tokens (paper section 3).

        Args:
            image: PIL image, or uint8 (H, W, 3).
            mask: PIL image or array (H, W); every non-zero pixel is object.
            name: what error messages call the mask.

        Raises:
            ValueError: the mask is empty or of another shape.
        """
        return self.encode_views(**self.concept_views(image, mask, name))

    def concept_views(
        self, image: ImageLike, mask: ImageLike, name: str = "mask"
    ) -> dict[str, Tensor]:
        """What `encode_views` takes, one row, on the CPU; arguments and errors as for
        `encode_concept`."""
        pixels = to_rgb(image) if isinstance(image, Image.Image) else np.asarray(image)
        object_mask = to_mask(mask) if isinstance(mask, Image.Image) else np.asarray(mask) > 0
        views = object_views(
            pixels,
            fit_mask(object_mask, pixels, name),
            self.image_encoder.config.image_size,
            self.grid,
        )
        return {key: view[None] for key, view in views.items()}

    @torch.no_grad()
    def encode_views(
        self, clip_pixels: Tensor, object_pixels: Tensor, patch_mask: Tensor
    ) -> Concept:
        """The same for a batch of views.

        Args:
            clip_pixels, object_pixels: (B, 3, H, W), CLIP-normalised.
            patch_mask: m, (B, patches, 1).
        """
        device = self._execution_device
        clip_pixels, object_pixels = clip_pixels.to(device), object_pixels.to(device)
        layers = self.global_mapper.config.hidden_layers
        if self.local_mapper is None:
            levels = clip_levels(self.image_encoder, clip_pixels, layers)
            return Concept(self.global_mapper(levels), None, self.fingerprint)
        levels, object_levels = clip_levels_of_views(
            self.image_encoder,
            [clip_pixels, object_pixels],
            [layers, self.local_mapper.config.hidden_layers],
        )
        tokens = self.local_mapper(object_levels, patch_mask.to(device))
        return Concept(self.global_mapper(levels), tokens, self.fingerprint)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *args: Any,
        concept: Concept | Sequence[Concept] | None = None,
        lambda_: float | Sequence[float] = 0.8,
        words: Words = 0,
        placeholder_token: str = "S",
        num_inference_steps: int = 100,
        guidance_scale: float = 5.0,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput:
        """Draws a prompt with a concept in place of its placeholder.

        Args:
            prompt: one or several; with a concept, each holds the placeholder exactly once.
            concept: one for all prompts, or one each; None draws the plain prompt.
            lambda_: weight of the local branch, one or one per prompt: 0.8 reproduces the object,
                0.6 edits it.
            words: which of w replaces the placeholder: an index (0, the primary word) or "all".
            placeholder_token: the word of the prompt that stands for the concept.
            num_inference_steps: denoising steps of the pipeline's scheduler.
            guidance_scale: of classifier-free guidance; 1 or less means none.
            seed: one per picture (prompts x num_images_per_prompt). The initial noise comes from a
                CPU generator in float32, so seeds travel between devices, dtypes and batch sizes.
                None uses `generator`.
            args, kwargs: as for StableDiffusionPipeline.

        Returns:
            StableDiffusionPipelineOutput.

        Raises:
            ValueError: placeholder absent, twice or too late; concept of other mappers; wrong
                counts.
        """
        local = kwargs.pop("ip_adapter_image_embeds", None) or []
        if concept is not None and prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            kwargs["prompt_embeds"], local = self._condition(
                prompts, concept, lambda_, words, placeholder_token
            )
            if isinstance(kwargs.get("negative_prompt"), str):
                kwargs["negative_prompt"] = [kwargs["negative_prompt"]] * len(prompts)
            prompt = None
        if seed is not None:
            kwargs["latents"] = self._initial_noise(seed, prompt, kwargs)
        text: list[Tensor] = []
        if not _may_change_text(kwargs):
            text = self._encode_text(prompt, guidance_scale, kwargs)
            prompt = None
        return super().__call__(
            prompt,
            *args,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            ip_adapter_image=_Conditioning(text, local),
            **kwargs,
        )

    def _encode_text(
        self, prompt: str | Sequence[str] | None, guidance_scale: float, kwargs: dict
    ) -> list[Tensor]:
        """Text contexts (prompts, 77, D), of the negative prompts (if guided) and of the prompts.

        In `kwargs` they take the place of the prompts.
        """
        given = {
            key: kwargs.pop(key, None)
            for key in ("negative_prompt", "prompt_embeds", "negative_prompt_embeds")
        }
        side = self.resolution
        self.check_inputs(prompt, side, side, None, **given)
        self._clip_skip = kwargs.get("clip_skip")
        context, negative = self.encode_prompt(
            prompt,
            self._execution_device,
            1,
            guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None,
            lora_scale=(kwargs.get("cross_attention_kwargs") or {}).get("scale"),
            clip_skip=kwargs.get("clip_skip"),
            **given,
        )
        kwargs |= {"prompt_embeds": context, "negative_prompt_embeds": negative}
        return [context] if negative is None else [negative, context]

    def _condition(
        self,
        prompts: list[str],
        concept: Concept | Sequence[Concept],
        lambda_: float | Sequence[float],
        words: Words,
        placeholder_token: str,
    ) -> tuple[Tensor, list[Tensor]]:
        """Text context (B, 77, D) and the local inputs for these prompts."""
        concepts = [concept] if isinstance(concept, Concept) else list(concept)
        concept = Concept.stack(concepts)
        concept.check_mappers(self.fingerprint)
        if len(concept) not in (1, len(prompts)):
            raise ValueError(
                f"{len(concept)} concepts for {len(prompts)} prompts; pass one, or one per prompt"
            )
        device = self._execution_device
        rows = (
            torch.arange(len(prompts))
            if len(concept) > 1
            else torch.zeros(len(prompts), dtype=torch.int64)
        )
        chosen = pick_words(concept.words, words)[rows].to(device)  # (B, L, D)
        input_ids, index = tokenize(self.tokenizer, prompts, placeholder_token, chosen.shape[1])
        context = encode_text(self.text_encoder, input_ids.to(device), chosen, index.to(device))
        local: list[Tensor] = []
        if concept.feature_tokens is not None:
            f = concept.feature_tokens[rows].to(device, self.unet.dtype)
            weights = torch.as_tensor(lambda_, dtype=torch.float32)
            if weights.numel() not in (1, len(prompts)):
                raise ValueError(
                    f"{weights.numel()} lambdas for {len(prompts)} prompts; pass one, or one per "
                    "prompt"
                )
            local = local_inputs(f, index.to(device), weights.to(device), context.shape[1])
        return context, local

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: "_Conditioning",
        ip_adapter_image_embeds: None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
    ) -> dict[str, KeysValues] | list[Tensor]:
        """K and V of every cross-attention for all steps; the local inputs alone where a callback
        may change the text.

        `num_images_per_prompt` is the whole batch (prompts x pictures), as the stock pipelines pass
        it. The guidance rows come first and have no local inputs.
        """

        def repeated(x: Tensor) -> Tensor:
            return x.repeat_interleave(num_images_per_prompt // len(x), dim=0).to(device)

        local = [repeated(x) for x in ip_adapter_image.local]
        if not ip_adapter_image.text or not is_installed(self.unet):
            return local
        return keys_values(
            self.unet, torch.cat([repeated(x) for x in ip_adapter_image.text]), local
        )

    def _initial_noise(
        self, seed: int | Sequence[int], prompt: str | Sequence[str] | None, kwargs: dict
    ) -> Tensor:
        """Standard normal latents, each from its own CPU generator."""
        embeds = kwargs.get("prompt_embeds")
        prompts = (
            len(embeds)
            if embeds is not None
            else 1
            if isinstance(prompt, str)
            else len(prompt or ())
        )
        count = prompts * kwargs.get("num_images_per_prompt", 1)
        seeds = [seed] * count if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise ValueError(
                f"{len(seeds)} seeds for {count} pictures; pass one, or one per picture"
            )
        height, width = (kwargs.get(side) or self.resolution for side in ("height", "width"))
        return initial_noise(self, seeds, height, width)


@dataclass(frozen=True)
class _Conditioning:
    """What one call shows to the cross-attentions, one row per prompt."""

    text: list[Tensor]  # as `_encode_text` gives them; empty where a callback may change them
    local: list[Tensor]  # `local_inputs`, or empty


def _may_change_text(kwargs: dict) -> bool:
    inputs = kwargs.get("callback_on_step_end_tensor_inputs") or ()
    return any("prompt_embeds" in name for name in inputs)


def initial_noise(pipe: DiffusionPipeline, seeds: Sequence[int], height: int, width: int) -> Tensor:
    """Standard normal latents of pictures of these sizes in pixels, each from a CPU generator of
    its own in float32."""
    factor = pixels_per_latent(pipe.vae)
    shape = (pipe.unet.config.in_channels, height // factor, width // factor)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(pipe._execution_device, pipe.unet.dtype)


def pick_words(words: Tensor, which: Words) -> Tensor:
    """w (B, levels, D) to the words that are injected: (B, 1, D) for an index, all for "all"."""
    if which == "all":
        return words
    if not 0 <= which < words.shape[1]:
        raise ValueError(f"word {which} does not exist; choose 0 to {words.shape[1] - 1} or 'all'")
    return words[:, which : which + 1]


def _fingerprint(*mappers: Mapper | None) -> str:
    """A short name for these weights."""
    digest = hashlib.sha256()
    for mapper in mappers:
        for key, value in sorted(mapper.state_dict().items()) if mapper is not None else ():
            sums = torch.stack([value.double().sum(), value.double().abs().sum()])
            digest.update(key.encode() + sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
