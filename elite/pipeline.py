"""ElitePipeline and EliteXLPipeline: Stable Diffusion and SDXL with ELITE's mappers plugged in;
encode a concept once, draw it many times.

In reading order: construct, encode, call, all of it for both; at the end the two. How a prompt
becomes what the UNet reads is in `conditioning.py`, in what the two differ in `families.py`, what
diffusers alone asks for in `compat.py`.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModel

from elite.attention import AttentionNorm, install, is_installed, is_installed_with, uninstall
from elite.checkpoint import check_mapper, load_mapper
from elite.compat import (
    call_options,
    callback_arguments,
    callback_may_change_context,
    check_arguments,
    check_names,
    check_steps,
    sides_of,
    texts_per_prompt,
)
from elite.concept import Concept
from elite.conditioning import (
    Conditioning,
    PromptConditioning,
    contexts_of,
    in_turn,
    local_of_prompts,
)
from elite.deep_features import deep_features_reused, reuses
from elite.defaults import DEFAULT_STEPS, GUIDANCE_SCALE, LAMBDA, PLACEHOLDER
from elite.families import SDXL, STABLE_DIFFUSION, family_of
from elite.images import ImageLike, as_image, as_mask, doubt, fit_mask, object_views
from elite.kinds import is_whole
from elite.loading import inside, load_parts, pixels_per_latent
from elite.mappers import GlobalMapper, LocalMapper, fingerprint_of, words_and_tokens
from elite.named_concepts import ConceptLike, Concepts, Weights, Words, concepts_by_name
from elite.speed import Speed, speed_of
from elite.wording import brief, note


class Elite(PromptConditioning):
    """Text-to-image with one-picture concepts (ELITE, arXiv 2302.13848): what the pipelines of both
    families are.

    A call without a concept draws the prompt through the mappers' K_g, V_g, as the release does for
    its unconditional pass. `local_mapper` may be None: global mapping only.
    """

    attention_norm: AttentionNorm = "sample"

    # --- construct --------------------------------------------------------------------------------

    def add_mappers(
        self,
        global_mapper: GlobalMapper,
        local_mapper: LocalMapper | None,
        fingerprint: str | None = None,
    ) -> None:
        """Plugs the mappers in; the constructors' last step.

        Args:
            fingerprint: ties concepts to these mappers; kept when they are loaded in another
                precision. None takes one of their values.

        Raises:
            ValueError: the UNet is of the other family, or the mappers were made for another one.
        """
        check_family(type(self), self.unet, "unet")
        self.register_modules(global_mapper=global_mapper, local_mapper=local_mapper)
        self.register_to_config(
            fingerprint=fingerprint or fingerprint_of(global_mapper, local_mapper)
        )
        self.install()

    @classmethod
    def from_stable_diffusion(
        cls,
        model: str | Path,
        *,
        global_mapper: str | Path | GlobalMapper | None = None,
        local_mapper: str | Path | LocalMapper | Literal[False] | None = None,
        image_encoder: str | Path | CLIPVisionModel | None = None,
        torch_dtype: torch.dtype | None = torch.float32,
        variant: str | None = None,
        single_file_config: str | Path | None = None,
    ) -> Self:
        """Composes a pipeline from a Stable Diffusion and mappers; its scheduler is the default
        sampler over the model's noise schedule (`loading.make_scheduler` makes others).
        `Elite.from_stable_diffusion` takes a model of either family.

        Args:
            model: folder in diffusers layout, hub name, or a checkpoint in a single file.
            global_mapper, local_mapper: folder, hub name, `.pt` file of the release, or a mapper.
                None takes `global_mapper/` and `local_mapper/` inside the model folder; without the
                latter, or with `local_mapper=False`, there is no local branch.
            image_encoder: CLIP vision tower. None takes `image_encoder/` inside the model folder,
                else CLIP ViT-L/14 from the hub.
            variant, single_file_config: as for `loading.load_parts`.

        Raises:
            ValueError: a part is missing or does not fit; the message names it. Or the model is of
                the other family.
        """
        is_type = isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point
        if torch_dtype is not None and not is_type:
            raise ValueError(f"torch_dtype is {brief(torch_dtype)}; expected one as torch.float16")
        for kind, given in ((GlobalMapper, global_mapper), (LocalMapper, local_mapper)):
            if isinstance(given, str | Path):  # before gigabytes are read
                check_mapper(kind, given)
        parts = load_parts(
            model, image_encoder, variant=variant, single_file_config=single_file_config
        )
        unet, encoder = parts["unet"], parts["image_encoder"]
        made_by: Any = pipeline_of(unet) if cls is Elite else cls
        check_family(made_by, unet, model)
        mappers: dict[str, Any] = {}
        for name, kind, given in (
            ("global_mapper", GlobalMapper, global_mapper),
            ("local_mapper", LocalMapper, local_mapper),
        ):
            source = inside(model, name) if given is None else None if given is False else given
            if isinstance(source, str | Path):
                source = load_mapper(kind, source, unet, encoder)
            mappers[name] = source
        if mappers["global_mapper"] is None:
            raise ValueError(
                f"{model}: has no global_mapper/; pass the path of a global mapper "
                "(--global_mapper_path)"
            )
        fingerprint = fingerprint_of(mappers["global_mapper"], mappers["local_mapper"])
        parts |= mappers
        for name, part in parts.items():  # `pipe.to` warns of each, whatever its type
            if isinstance(part, torch.nn.Module) and part.dtype != torch_dtype:
                is_given = part in (global_mapper, local_mapper, image_encoder)
                own = copy.deepcopy(part) if is_given else part  # another pipeline may have it
                parts[name] = own.to(torch_dtype)
        return made_by(**parts, fingerprint=fingerprint)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Loads what `save_pretrained` wrote; `Elite.from_pretrained` that of either family. With
        mappers in place of the folder's the fingerprint is theirs."""
        source = pretrained_model_name_or_path
        if cls is Elite:
            source = source if Path(source).is_dir() else cls.download(source, **kwargs)
            found = cls.load_config(source)["_class_name"]
            kinds: dict[str, Any] = {
                kind.__name__: kind for kind in (ElitePipeline, EliteXLPipeline)
            }
            if found not in kinds:
                raise ValueError(
                    f"{source}: is a {brief(found)}, no pipeline of ELITE's; from_stable_diffusion "
                    "makes one of it and mappers"
                )
            return kinds[found].from_pretrained(source, **kwargs)
        return super().from_pretrained(source, **kwargs)

    def install(self, attention_norm: AttentionNorm | None = None) -> None:
        """Plugs the mappers into this pipeline's UNet; done by the constructor. None keeps the
        norm, "sample" at first and in a pipeline that was saved and loaded."""
        norm = self.attention_norm if attention_norm is None else attention_norm
        install(self.unet, self.global_mapper, self.local_mapper, norm)
        self.attention_norm = norm

    @in_turn
    def take_unet(self) -> None:
        """Plugs the mappers in anew where another pipeline of this UNet has plugged in its own."""
        own = self.global_mapper, self.local_mapper, self.attention_norm
        if is_installed(self.unet) and not is_installed_with(self.unet, *own):
            self.install()

    def uninstall(self) -> None:
        """Gives the plain Stable Diffusion back, bit for bit."""
        uninstall(self.unet)

    @property
    def grid(self) -> int:
        """Side of the CLIP patch grid."""
        config = self.image_encoder.config
        return config.image_size // config.patch_size

    # --- encode -----------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_concept(
        self,
        image: ImageLike | Sequence[ImageLike],
        mask: ImageLike | Sequence[ImageLike],
        name: str = "mask",
    ) -> Concept:
        """Reads one object: picture and mask to words and feature tokens (paper section 3); the box
        of the mask alone where the global mapper's config says `crop_to_object`. Warns where the
        mask looks inverted or is all object.

        Args:
            image: file, PIL image, or uint8 (H, W, 3); or a list of pictures of the same object,
                whose words are averaged and whose feature tokens are read together.
            mask: file, PIL image, or array (H, W) or (H, W, 3); every non-zero pixel is object. A
                list with a list of pictures.
            name: what error messages call the mask.

        Raises:
            ValueError: either is something else, or the mask is empty or of another shape.
        """
        images, masks = (x if isinstance(x, list | tuple) else [x] for x in (image, mask))
        if len(images) != len(masks) or not images:
            raise ValueError(
                f"{len(images)} pictures and {len(masks)} masks; expected a mask for each picture"
            )
        views = []
        for picture, given in zip(images, masks, strict=True):
            mask = as_mask(given, name)
            if doubtful := doubt(mask):
                note(f"{name}: {doubtful}")
            views.append(self.concept_views(picture, mask, name))
        return self.encode_views(**stack_views(views)).as_one()

    def concept_views(
        self, image: ImageLike, mask: ImageLike, name: str = "mask"
    ) -> dict[str, Tensor]:
        """What `encode_views` takes, one row, on the CPU; arguments and errors as for
        `encode_concept`."""
        if self.image_encoder is None:
            raise ValueError("image_encoder is None; load the pipeline with one to encode concepts")
        pixels = as_image(image)
        views = object_views(
            pixels,
            fit_mask(as_mask(mask, name), pixels, name),
            self.image_encoder.config.image_size,
            self.grid,
            self.global_mapper.config.crop_to_object,
        )
        if self.local_mapper is not None and not views["patch_mask"].any():
            note(
                f"{name}: the object is smaller than a patch of the image encoder, so that it has "
                "no feature tokens and lambda does nothing; crop the picture around it"
            )
        return {key: view[None] for key, view in views.items()}

    @torch.no_grad()
    def encode_views(
        self, clip_pixels: Tensor, object_pixels: Tensor, patch_mask: Tensor
    ) -> Concept:
        """Reads several objects at once, from their views.

        Args:
            clip_pixels, object_pixels: (B, 3, H, W), CLIP-normalised.
            patch_mask: m, (B, patches, 1).
        """
        device = self._execution_device
        views = (view.to(device) for view in (clip_pixels, object_pixels, patch_mask))
        mappers = self.global_mapper, self.local_mapper
        words, tokens = words_and_tokens(self.image_encoder, *mappers, *views)
        return Concept(words, tokens, self.fingerprint, self.family.name)

    # --- call -------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        concept: ConceptLike | Sequence[ConceptLike] | None = None,
        concepts: Concepts | None = None,
        lambda_: Weights | Mapping[str, Weights] = LAMBDA,
        words: Words = 0,
        placeholder_token: str = PLACEHOLDER,
        regions: Mapping[str, ImageLike] | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float = GUIDANCE_SCALE,
        seed: int | Sequence[int] | None = None,
        speed: str | Speed = "exact",
        guidance_stop: float | None = None,
        deep_every: int | None = None,
        deep_first: int | None = None,
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput | StableDiffusionXLPipelineOutput:
        """Draws a prompt with a concept in place of its placeholder, or with several.

        Args:
            prompt: one or several; with a concept, each holds the placeholder exactly once.
            concept: one for all prompts, or one each, or their files; None draws the plain prompt.
            concepts: in its place, up to 8 by their placeholders: {"S1": a, "S2": b} for "a S1 next
                to a S2".
            lambda_: weight of the local branch, one or one per prompt: 0.8 reproduces the object,
                0.6 edits it. With several concepts, also by their placeholders.
            words: which of w replaces the placeholder: an index (0, the primary word) or "all".
            placeholder_token: the word of the prompt that stands for `concept`.
            regions: masks by placeholder, of any size: where the picture may show that concept.
            num_inference_steps: denoising steps of the pipeline's scheduler.
            guidance_scale: of classifier-free guidance; 1 or less means none.
            seed: one per picture (prompts x num_images_per_prompt), or the first of each prompt's,
                from which they count up. All noise comes from a CPU generator in float32, so seeds
                travel between devices, dtypes and batch sizes. None uses `generator`.
            speed: "exact", "balanced" or "fast": how much exactness is given up for time.
            guidance_stop, deep_every, deep_first: knobs of `Speed`; None leaves them as the speed
                has them.
            kwargs: as for StableDiffusionPipeline or StableDiffusionXLPipeline.

        Returns:
            What that pipeline returns.

        Raises:
            ValueError: placeholder absent, twice or too late; concept of other mappers; wrong
                counts; unknown names, also in `lambda_` or `regions`; a seed beside other noise; a
                concept beside embeddings.
        """
        if "ip_adapter_image" in kwargs:
            raise ValueError(
                "ip_adapter_image: ELITE takes none; pass what encode_concept makes of it"
            )
        check_names(kwargs, call_options(super().__call__), self.__call__)
        speed = speed_of(speed, guidance_stop, deep_every, deep_first)
        check_arguments(self, guidance_scale, {**kwargs, "regions": regions})
        if kwargs.get("timesteps") is None and kwargs.get("sigmas") is None:
            check_steps(num_inference_steps, self.scheduler)
        # Of one alone, the stock pipeline of Stable Diffusion would take neither.
        kwargs |= sides_of(self, kwargs)
        self.take_unet()
        concepts = concepts_by_name(concept, concepts, placeholder_token)
        prompts, count, kwargs = texts_per_prompt(prompt, kwargs, self.family)
        local = local_of_prompts(kwargs.get("ip_adapter_image_embeds") or [], count)
        if not concepts:
            check_unused({"regions": regions or None, "words": words, "lambda_": lambda_})
        else:
            for name in ("prompt_2", "prompt_embeds", "ip_adapter_image_embeds"):
                if kwargs.get(name) is not None:
                    raise ValueError(f"{name}: a concept goes with prompt alone; leave {name} out")
            embeds, local = self._condition(
                prompts, concepts, lambda_, words, regions or {}, kwargs
            )
            prompts, kwargs = [], kwargs | embeds
        if seed is not None:
            kwargs["generator"], kwargs["latents"] = self._initial_noise(seed, count, kwargs)
        elif kwargs.get("latents") is not None:
            kwargs["latents"] = self._checked_latents(count, kwargs)
        context: list[Tensor] = []
        may_change = callback_may_change_context(kwargs)
        if regions or not may_change:
            embeds = self._encode_text(prompts, guidance_scale, kwargs, regions or {})
            context = [] if may_change else contexts_of(embeds)
            prompts, kwargs = [], kwargs | embeds
        # Diffusers hands this on to prepare_ip_adapter_image_embeds, below, which fills `kept` with
        # K and V of every cross-attention; through the UNet these reach `EliteAttnProcessor`.
        conditioning = Conditioning(context, local)
        kwargs |= callback_arguments(conditioning.kept, kwargs, speed, self.family)
        kwargs |= {"ip_adapter_image": conditioning, "ip_adapter_image_embeds": None}
        is_whole = speed.deep_every == 1
        with reuses(None) if is_whole else deep_features_reused(self.unet, speed.runs_whole):
            return super().__call__(
                prompts or None,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                **kwargs,
            )

    def _initial_noise(
        self, seed: int | Sequence[int], prompts: int, kwargs: dict
    ) -> tuple[list[torch.Generator], Tensor]:
        """A CPU generator per picture, for samplers that go on drawing from it, and the standard
        normal latents of each."""
        for other in ("generator", "latents"):
            if kwargs.get(other) is not None:
                raise ValueError(f"seed and {other} are both given; leave one of them out")
        each = kwargs["num_images_per_prompt"]
        if is_whole(seed):
            seed = [int(seed) + i for _ in range(prompts) for i in range(each)]
        given: Any = seed.tolist() if isinstance(seed, np.ndarray | Tensor) else seed
        seeds: list[Any] = list(given) if isinstance(given, list | tuple | range) else [given]
        generators = make_generators(seeds)
        if len(seeds) != prompts * each:
            raise ValueError(
                f"{len(seeds)} seeds for {prompts * each} pictures; pass one, or one per picture"
            )
        return generators, initial_noise(self, generators, kwargs["height"], kwargs["width"])

    def _checked_latents(self, prompts: int, kwargs: dict) -> Tensor:
        """The latents of a call, in the number type of the UNet; torch's messages on those that
        do not fit name neither."""
        latents, pictures = kwargs["latents"], prompts * kwargs["num_images_per_prompt"]
        expected = pictures, *latent_shape(self, kwargs["height"], kwargs["width"])
        if not isinstance(latents, Tensor) or latents.shape != expected:
            raise ValueError(
                f"latents is {brief(latents)}; expected a tensor {expected}, or another height, "
                "width or number of pictures"
            )
        return latents.to(self.unet.dtype)


class ElitePipeline(Elite, StableDiffusionPipeline):
    """`Elite` of Stable Diffusion 1.x and 2.x."""

    family = STABLE_DIFFUSION
    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = [  # noqa: RUF012
        "safety_checker",
        "feature_extractor",
        "image_encoder",
        "local_mapper",
    ]

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
        self.add_mappers(global_mapper, local_mapper, fingerprint)


class EliteXLPipeline(Elite, StableDiffusionXLPipeline):
    """`Elite` of SDXL: its words are 768 + 1280 wide, for the two text encoders, its K and V
    2048."""

    family = SDXL
    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components = ["feature_extractor", "image_encoder", "local_mapper"]  # noqa: RUF012

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModel,
        global_mapper: GlobalMapper,
        local_mapper: LocalMapper | None = None,
        feature_extractor: None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool = False,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.add_mappers(global_mapper, local_mapper, fingerprint)


def pipeline_of(unet: UNet2DConditionModel) -> type[ElitePipeline] | type[EliteXLPipeline]:
    """The pipeline for the family of a UNet."""
    return EliteXLPipeline if family_of(unet) is SDXL else ElitePipeline


def check_family(kind: type[Elite], unet: UNet2DConditionModel, source: str | Path) -> None:
    """Raises ValueError where a UNet is not of the family of a pipeline."""
    fitting = pipeline_of(unet)
    if not issubclass(kind, fitting):
        raise ValueError(
            f"{source}: is {fitting.family.title}, no model of {kind.__name__}; "
            f"take {fitting.__name__}"
        )


def stack_views(views: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `concept_views` gives of several pictures, for `encode_views` at once."""
    return {key: torch.cat([view[key] for view in views]) for key in views[0]}


def check_unused(given: Mapping[str, Any]) -> None:
    """Raises ValueError where a call without a concept is told something about it."""
    defaults = {"regions": None, "words": 0, "lambda_": LAMBDA}
    for name, value in given.items():
        is_empty = value is None or (isinstance(value, Mapping) and not value)
        if not is_empty and not np.all(np.asarray(value) == defaults[name]):
            raise ValueError(f"{name}: no concept; pass concept or concepts, or leave {name} out")


def make_generators(seeds: Sequence[Any]) -> list[torch.Generator]:
    """One per picture, on the CPU whatever the pipeline's device. Raises ValueError for a seed that
    is none."""
    for seed in seeds:
        if not is_whole(seed) or not -(2**63) <= int(seed) < 2**64:
            raise ValueError(f"seed is {brief(seed)}; expected whole numbers of 64 bits")
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def latent_shape(pipe: DiffusionPipeline, height: int, width: int) -> tuple[int, int, int]:
    """(C, h, w) of pictures of these sizes in pixels."""
    factor = pixels_per_latent(pipe.vae)
    return pipe.unet.config.in_channels, height // factor, width // factor


def initial_noise(
    pipe: DiffusionPipeline, generators: Sequence[torch.Generator], height: int, width: int
) -> Tensor:
    """Standard normal latents of pictures of these sizes in pixels, each from its own generator in
    float32."""
    shape = latent_shape(pipe, height, width)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return noise.to(pipe._execution_device, pipe.unet.dtype)
