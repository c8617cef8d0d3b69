"""A prompt with concepts in it, as the UNet's cross-attentions read it: the context, in which words
w stand for placeholders, and beside it the feature tokens f, their places and lambda."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from threading import RLock
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from elite.attention import KeysValues, is_installed, keys_values, local_inputs, visibility
from elite.compat import (
    CONDITION_OPTIONS,
    DiffusersPipeline,
    as_texts,
    check_arguments,
    check_names,
    sides_of,
    text_options,
)
from elite.concept import Concept
from elite.defaults import GUIDANCE_SCALE, LAMBDA, PLACEHOLDER
from elite.families import split_words, text_encoders, tokenize_for_each, tokenizers
from elite.images import ImageLike
from elite.loading import pixels_per_latent
from elite.named_concepts import (
    ConceptLike,
    Concepts,
    Weights,
    Words,
    as_weight,
    concepts_by_name,
    latent_regions,
    pick_words,
    places_in_readings,
    row_per_prompt,
    weights_by_name,
    words_of_readings,
)
from elite.text import check_texts, injected, word_positions
from elite.wording import note

P = ParamSpec("P")
T = TypeVar("T")
# Of the thread that tokenizes (tokenizers keep how they pad), or that plugs its pipeline's mappers
# into a UNet and computes K and V.
TURN = RLock()


def in_turn(method: Callable[P, T]) -> Callable[P, T]:
    """The method, which one thread at a time calls."""

    @wraps(method)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with TURN:
            return method(*args, **kwargs)

    return locked


@dataclass(frozen=True)
class Conditioning:
    """What the cross-attentions read in one call, one row per prompt."""

    context: list[Tensor]  # as `contexts_of` gives it; empty where a callback may change it
    local: list[Tensor]  # `local_inputs`, or empty
    kept: dict[str, KeysValues] = field(default_factory=dict)  # of all steps


class PromptConditioning(DiffusersPipeline):
    """The part of `pipeline.Elite` that turns prompts into what its UNet reads."""

    @torch.no_grad()
    def condition(
        self,
        prompt: str,
        concept: ConceptLike | None = None,
        concepts: Mapping[str, ConceptLike] | None = None,
        lambda_: float | Mapping[str, float] = LAMBDA,
        words: Words = 0,
        placeholder_token: str = PLACEHOLDER,
        regions: Mapping[str, ImageLike] | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float = GUIDANCE_SCALE,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """A prompt with concepts for the call of a stock pipeline of diffusers that shares this
        UNet: image-to-image, inpainting, ControlNet and others that take IP-Adapter embeddings.

        Args:
            prompt: one, with the placeholders; stock pipelines repeat its local inputs for the
                batch.
            concept, concepts, lambda_, words, placeholder_token, regions, guidance_scale: as for a
                call of this pipeline.
            kwargs: `clip_skip` and `cross_attention_kwargs`, if the stock pipeline gets them too;
                `height` and `width`, if regions are given for other than the usual size.

        Returns:
            {prompt_embeds (1, 77, D), negative_prompt_embeds (1, 77, D) or None without guidance,
            for SDXL the pooled ones of both (1, P) too, ip_adapter_image_embeds (list),
            guidance_scale}; with regions 77 for each reading of the prompt.

        Raises:
            ValueError: as for a call of this pipeline, or no concept.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"expected one prompt, not {prompt!r}; call once per prompt")
        check_names(kwargs, CONDITION_OPTIONS, self.condition)
        check_arguments(self, guidance_scale, {**kwargs, "regions": regions})
        negative_prompts = as_texts("negative_prompt", negative_prompt)
        named = concepts_by_name(concept, concepts, placeholder_token)
        if not named:
            raise ValueError("no concept; pass concept or concepts")
        self.take_unet()
        embeds, local = self._condition([prompt], named, lambda_, words, regions or {}, kwargs)
        given = {**kwargs, **embeds, "negative_prompt": negative_prompts}
        embeds = self._encode_text([], guidance_scale, given, regions or {})
        contexts = contexts_of(embeds)
        if not local:  # stock pipelines want some; this adds nothing
            context = contexts[-1]
            nothing = context.new_zeros(1, 1, context.shape[2])
            index = torch.zeros(1, dtype=torch.int64, device=context.device)
            local = local_inputs(nothing, index, 0.0, context.shape[1])
        if len(contexts) > 1:  # the guidance rows read no feature tokens, and see everything
            local = [torch.cat([torch.full_like(x, neutral(x)), x]) for x in local]
        return {
            **{name: embeds[name] for name in self.family.embeds},
            "ip_adapter_image_embeds": local,
            "guidance_scale": guidance_scale,
        }

    @in_turn
    def _condition(
        self,
        prompts: list[str],
        concepts: Concepts,
        lambda_: Weights | Mapping[str, Weights],
        words: Words,
        regions: Mapping[str, ImageLike],
        kwargs: dict,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """`prompt_embeds` (B, 77, D), with regions 77 for each reading of the prompts, for SDXL
        `pooled_prompt_embeds` (B, P) too, and the local inputs of these prompts."""
        self._check_installed()
        if None in text_encoders(self.components):
            raise ValueError(
                "text_encoder is None; load the pipeline with one, or pass what `condition` gave"
            )
        names, device, count = list(concepts), self._execution_device, len(prompts)
        weights = weights_by_name(lambda_, names)
        sides = sides_of(self, kwargs).values()
        shares = latent_regions(regions, names, *(s // pixels_per_latent(self.vae) for s in sides))
        rows = [self._rows(concepts[name], count) for name in names]
        for name, row in zip(names, rows, strict=True):
            reads_none = self.local_mapper is not None and row.feature_tokens is None
            if reads_none and as_weight(weights[name]).any():
                note(
                    f"{name}: the concept was encoded without the local mapper, so lambda does "
                    "nothing; encode it again with this pipeline"
                )

        # The words into the prompt, or with regions into each of its readings.
        chosen = torch.stack([pick_words(row.words, words) for row in rows], dim=1)
        num_words = chosen.shape[2]  # of (B, N, L, D)
        encoders = text_encoders(self.components)
        ids_of_each, index = tokenize_for_each(
            tokenizers(self.components), prompts, names, num_words
        )
        index = index.to(device)
        readings = []
        for each in words_of_readings(chosen, shares):
            with ExitStack() as injections:
                of_each = zip(encoders, split_words(each, encoders), ids_of_each, strict=True)
                for encoder, part, input_ids in of_each:
                    injections.enter_context(injected(encoder, part, index, input_ids.to(device)))
                # These ids are read, whatever the text; `tokenize` has checked their number.
                encoded = self.encode_prompt(
                    prompt=[""] * count,
                    device=device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=False,
                    **text_options(kwargs),
                )
            named = zip(self.family.embeds, encoded, strict=True)
            readings.append({name: x for name, x in named if x is not None})
        length = readings[0]["prompt_embeds"].shape[1]
        context = torch.cat([reading["prompt_embeds"] for reading in readings], dim=1)
        embeds = {**readings[0], "prompt_embeds": context}

        # Beside it the feature tokens of each concept, its placeholder and its lambda.
        index = word_positions(index, num_words)  # (B, N)
        local: list[Tensor] = []
        for n, (name, row) in enumerate(zip(names, rows, strict=True)):
            if row.feature_tokens is None:
                continue
            weight = as_weight(weights[name])
            if weight.numel() not in (1, count):
                raise ValueError(
                    f"{weight.numel()} lambdas for {count} prompts; pass one, or one per prompt"
                )
            f = row.feature_tokens.to(device, self.unet.dtype)
            places = places_in_readings(index, n, shares, length)
            local += local_inputs(f, places, weight.to(device), context.shape[1])
        if shares:
            shares = {n: share.to(device, self.unet.dtype) for n, share in shares.items()}
            local.append(visibility(shares, index, num_words, length))
        return embeds, local

    def _check_installed(self) -> None:
        if not is_installed(self.unet):
            raise ValueError("the mappers are not in the UNet; call pipe.install() first")

    def check_concept(self, concept: Concept) -> None:
        """Raises ValueError where a concept is not of this pipeline's mappers and model."""
        concept.check_mappers(self.fingerprint, self.family)
        found, width = concept.words.shape[2], self.unet.config.cross_attention_dim
        if found != width:
            raise ValueError(
                f"concept has words {found} wide, this model {width}; encode it again with this "
                "pipeline"
            )

    def _rows(self, concept: ConceptLike | Sequence[ConceptLike], count: int) -> Concept:
        """One concept's rows for these prompts, seen to be of this pipeline."""
        rows = row_per_prompt(concept, count, self._execution_device)
        self.check_concept(rows)
        return rows

    @in_turn
    def _encode_text(
        self,
        prompts: list[str],
        guidance_scale: float,
        kwargs: dict,
        regions: Mapping[str, ImageLike],
    ) -> dict[str, Any]:
        """What takes the place of the texts in the arguments of a call: no text, and embeddings
        (prompts, 77, D), of SDXL pooled ones (prompts, P) too; if not guided, no negative ones.

        Args:
            regions: those of the concepts in `prompt_embeds`, which hold a reading for each; so the
                negative ones are repeated.
        """
        texts, embeds = self.family.texts, self.family.embeds
        given = {key: kwargs.get(key) for key in (*texts, *embeds)}
        guided = guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None
        if not guided:
            given |= {key: None for key in embeds if key.startswith("negative")}
        readings = 1 + len(regions)
        if (whole := given["prompt_embeds"]) is not None:
            given["prompt_embeds"] = whole[:, : whole.shape[1] // readings]
        prompt, side = prompts or None, self.resolution
        self.check_inputs(prompt=prompt, height=side, width=side, callback_steps=None, **given)
        check_texts(prompt, *(given[key] for key in texts))
        encoded = self.encode_prompt(
            prompt=prompt,
            device=self._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            **text_options(kwargs),
            **given,
        )
        named = dict(zip(embeds, encoded, strict=True))
        if whole is not None:
            named["prompt_embeds"] = whole.to(named["prompt_embeds"])
        if (negative := named["negative_prompt_embeds"]) is not None:
            named["negative_prompt_embeds"] = negative.repeat(1, readings, 1)
        return {**dict.fromkeys(texts), **named}

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Conditioning,
        ip_adapter_image_embeds: None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
    ) -> dict[str, KeysValues] | list[Tensor]:
        """K and V of every cross-attention for all steps; the local inputs alone where a callback
        may change the context.

        `num_images_per_prompt` is the whole batch (prompts x pictures), as the stock pipelines pass
        it. The guidance rows come first and have no local inputs.
        """

        def repeated(x: Tensor) -> Tensor:
            return x.repeat_interleave(num_images_per_prompt // len(x), dim=0).to(device)

        local = [repeated(x) for x in ip_adapter_image.local]
        if local:
            self._check_installed()
        if not ip_adapter_image.context or not is_installed(self.unet):
            return local
        context = torch.cat([repeated(x) for x in ip_adapter_image.context])
        lora_scale = (self.cross_attention_kwargs or {}).get("scale", 1.0)
        with TURN:  # another thread may have plugged in the mappers of another pipeline
            self.take_unet()
            ip_adapter_image.kept.update(keys_values(self.unet, context, local, lora_scale))
        return ip_adapter_image.kept


def contexts_of(embeds: Mapping[str, Tensor | None]) -> list[Tensor]:
    """Contexts (prompts, 77, D), of the negative prompts (if guided) and of the prompts."""
    both = embeds["negative_prompt_embeds"], embeds["prompt_embeds"]
    return [context for context in both if context is not None]


def local_of_prompts(local: Sequence[Tensor], count: int) -> list[Tensor]:
    """Local inputs, a row for each prompt or one for all, without the guidance rows that
    `condition` puts in front. Raises ValueError where they are of another number of prompts."""
    if local and all((half == neutral(x)).all() for x in local for half in x.chunk(2)[:-1]):
        local = [x.chunk(2)[-1] for x in local]
    for rows in map(len, local):
        if rows not in (1, count):
            raise ValueError(
                f"{rows} rows of ip_adapter_image_embeds for {count} prompts; pass what condition "
                "gives"
            )
    return [x.expand(count, *x.shape[1:]) for x in local]


def neutral(local_input: Tensor) -> float:
    """What a row of a local input is filled with that reads no feature tokens and sees
    everything."""
    return float(local_input.ndim == 4)  # a `visibility` is all ones
