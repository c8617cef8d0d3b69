"""What a pipeline owes to diffusers and the method does not need: the hub, saving, exchanges of
attention processors, clip_skip, callbacks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from inspect import signature
from types import MappingProxyType
from typing import Any, Self

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Generator, Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from elite.adapters import has_adapters, remember_merged
from elite.attention import KeysValues, conditional_rows, is_installed, split_local_inputs
from elite.cards import Carded, pipeline_card
from elite.families import Family, text_encoders
from elite.kinds import is_number, is_whole
from elite.loading import pixels_per_latent, side_in_pixels
from elite.mappers import fingerprint_of
from elite.speed import Speed
from elite.text import check_texts, read_prompt
from elite.wording import brief, nearest

MAPPERS = "global_mapper", "local_mapper"


def with_fingerprint(parts: dict[str, Any], source: Any = None) -> dict[str, Any]:
    """Parts and config of a pipeline that is made of another one or a folder: the fingerprint of
    that is not of other mappers that are given. None computes it."""
    given = {name: parts[name] for name in MAPPERS if parts.get(name) is not None}
    others = any(part is not getattr(source, name, None) for name, part in given.items())
    return {"fingerprint": None, **parts} if others else parts


class DiffusersPipeline(Carded, DiffusionPipeline):
    """The side of `pipeline.Elite` that faces diffusers, before a stock pipeline in the order of
    bases; that class adds `install` and `uninstall`."""

    family: Family
    # The UNet reads their K and V; a hook on the whole mapper would not see that.
    _exclude_from_cpu_offload = ["global_mapper", "local_mapper"]  # noqa: RUF012
    # What metadata says of its weights: {"base": ..., "lora": ..., "weights": ...}.
    named_weights: Mapping[str, str] = MappingProxyType({})

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures the model draws by default."""
        return side_in_pixels(self.unet, self.vae)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """As diffusers'; with mappers in place of the folder's the fingerprint is theirs."""
        return super().from_pretrained(pretrained_model_name_or_path, **with_fingerprint(kwargs))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """As diffusers'; with mappers in place of the pipeline's the fingerprint is theirs."""
        return super().from_pipe(pipeline, **with_fingerprint(kwargs, pipeline))

    def __setattr__(self, name: str, value: Any) -> None:
        """As diffusers'; a mapper in place of another one has another fingerprint. Not one that is
        taken away, nor its compiled self."""
        before = vars(self).get(name)
        super().__setattr__(name, value)
        is_exchange = name in MAPPERS and before is not None and value is not None
        if is_exchange and getattr(value, "_orig_mod", value) is not before:
            self.register_to_config(fingerprint=None)

    @property
    def fingerprint(self) -> str:
        """Ties concepts to the mappers that are there. Of exchanged ones it is computed when it is
        first asked for."""
        if self.config.fingerprint is None:
            mappers = self.global_mapper, self.local_mapper
            self.register_to_config(fingerprint=fingerprint_of(*mappers))
        return self.config.fingerprint

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetches a pipeline from the hub for `from_pretrained` and returns its folder.

        Diffusers' own refuses parts of classes that are not its own, such as the mappers.
        """
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        wanted = ["*.json", "*.txt", "*.safetensors"]  # nothing that is unpickled
        return snapshot_download(pretrained_model_name, allow_patterns=wanted, **given)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves the whole in diffusers layout, with a model card; the UNet's files are plain Stable
        Diffusion. Raises ValueError while a LoRA is loaded: what is saved could not be loaded."""
        for name, part in self.components.items():
            if isinstance(part, nn.Module) and has_adapters(part):
                raise ValueError(
                    f"{name} is wrapped for LoRAs, and cannot be saved so; call "
                    "pipe.unfuse_lora() where it is fused, then pipe.unload_lora_weights(), and "
                    "elite.lora.fuse_loras to save a LoRA as well"
                )
        with self._plain_unet():
            super().save_pretrained(*args, **kwargs)

    def card(self) -> str:
        """The model card that is saved with it."""
        base = str(self.unet.config.get("_name_or_path") or "")
        has_local = self.local_mapper is not None
        return pipeline_card(base, has_local, self.resolution, type(self).__name__)

    @contextmanager
    def _plain_unet(self) -> Iterator[None]:
        """Within it the UNet is plain Stable Diffusion."""
        installed = is_installed(self.unet)
        self.uninstall()
        try:
            yield
        finally:
            if installed:
                self.install(self.attention_norm)

    # These exchange the processors of every attention: of ELITE's only the ones it stands in for.

    def set_attention_slice(self, *args: Any) -> None:
        with self._plain_unet():
            super().set_attention_slice(*args)

    def set_use_memory_efficient_attention_xformers(self, *args: Any) -> None:
        with self._plain_unet():
            super().set_use_memory_efficient_attention_xformers(*args)

    def fuse_qkv_projections(self, *args: Any, **kwargs: Any) -> None:
        with self._plain_unet():
            super().fuse_qkv_projections(*args, **kwargs)

    def unfuse_qkv_projections(self, *args: Any, **kwargs: Any) -> None:
        with self._plain_unet():
            super().unfuse_qkv_projections(*args, **kwargs)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        super().fuse_lora(*args, **kwargs)
        remember_merged(self.unet)

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        super().unfuse_lora(*args, **kwargs)
        remember_merged(self.unet)

    def load_ip_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError."""
        raise ValueError("ELITE stands where an IP-Adapter would; use a stock pipeline for that")

    unload_ip_adapter = load_ip_adapter

    def maybe_convert_prompt(
        self, prompt: str | list[str], tokenizer: PreTrainedTokenizerBase
    ) -> str | list[str]:
        return read_prompt(prompt, tokenizer)

    @property
    def present_text_encoders(self) -> list[CLIPTextModel]:
        """Those that the pipeline has: it may have none, and be called with embeddings."""
        return [one for one in text_encoders(self.components) if one is not None]

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """As diffusers', whose clip_skip looks for the `text_model` that transformers 5 has
        dissolved."""
        encoder = self.text_encoder
        skips = encoder is not None and kwargs.get("clip_skip") is not None
        lends_itself = skips and not hasattr(encoder, "text_model")
        if lends_itself:
            encoder.__dict__["text_model"] = encoder  # past nn.Module, which would register it
        try:
            with lora_scales_kept(self.present_text_encoders):
                return super().encode_prompt(*args, **kwargs)
        finally:
            if lends_itself:
                del encoder.__dict__["text_model"]


@contextmanager
def lora_scales_kept(models: Iterable[nn.Module]) -> Iterator[None]:
    """Behind it LoRA adapters weigh what they did before: diffusers leaves a scale that it has set
    for a prompt where that cannot be encoded."""
    layers: list[Any] = [layer for model in models for layer in model.modules()]
    before = [(layer, dict(layer.scaling)) for layer in layers if hasattr(layer, "lora_A")]
    try:
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)


# --- the arguments of a call ----------------------------------------------------------------------

NEGATIVE_SIZES = "negative_original_size", "negative_target_size"  # of SDXL

CONDITION_OPTIONS = {"clip_skip", "cross_attention_kwargs", "height", "width"}


def call_options(stock_call: Callable) -> set[str]:
    """The arguments of a stock pipeline's call, which takes the first two by **kwargs."""
    return {"callback", "callback_steps", *signature(stock_call).parameters}


def check_names(given: Iterable[str], options: Set[str], function: Callable) -> None:
    """Raises ValueError for a keyword, taken by **kwargs, that is neither an option nor a parameter
    of the function."""
    known = (options | signature(function).parameters.keys()) - {"args", "kwargs", "self"}
    for name in given:
        if name not in known:
            raise ValueError(f"{name}: unknown argument{nearest(name, known)}")


def check_arguments(pipe: DiffusersPipeline, guidance_scale: float, kwargs: dict) -> None:
    """Raises ValueError where an argument of a call is of another kind, or a number that makes no
    picture."""
    check_number("guidance_scale", guidance_scale)
    for name, (fits, expected) in KINDS.items():
        given = kwargs.get(name)
        if given is not None and not fits(given):
            raise ValueError(f"{name} is {brief(given)}; expected {expected}")
    for side in ("height", "width"):
        if kwargs.get(side) is not None:
            check_whole(side, kwargs[side], least=8)
    of_pipe = pipe.present_text_encoders
    if kwargs.get("clip_skip") is not None and of_pipe:
        deepest = min(e.config.num_hidden_layers for e in of_pipe) - len(of_pipe) + 1
        check_whole("clip_skip", kwargs["clip_skip"], 0, deepest)


def _is_tensor(rank: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Tensor) and value.ndim == rank


def _are_all(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(isinstance(x, kind) for x in value)


def _are_local_inputs(value: Any) -> bool:
    if not _are_all(Tensor)(value) or len(value) % 3 == 2:
        return False
    concepts, visible = split_local_inputs(list(value))
    ranks = {part.ndim for concept in concepts for part in concept}
    return ranks <= {3} and (visible is None or visible.ndim == 4)


TEXTS = _is_tensor(3), "a tensor (prompts, tokens, width)"
POOLED = _is_tensor(2), "a tensor (prompts, width)"
# Whether a value, other than None, is of the kind that is expected.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "regions": (lambda value: isinstance(value, Mapping), '{"S1": mask, "S2": mask}'),
    "guidance_rescale": (is_number, "a number"),
    "eta": (is_number, "a number"),
    "cross_attention_kwargs": (
        lambda value: isinstance(value, Mapping) and is_number(value.get("scale") or 1),
        'names with values, {"scale": 0.5}',
    ),
    "generator": (
        lambda value: _are_all(Generator)(value if isinstance(value, list) else [value]),
        "a torch.Generator, or a list of one per picture",
    ),
    "prompt_embeds": TEXTS,
    "negative_prompt_embeds": TEXTS,
    "pooled_prompt_embeds": POOLED,
    "negative_pooled_prompt_embeds": POOLED,
    "ip_adapter_image_embeds": (_are_local_inputs, "what condition gives"),
    "callback_on_step_end": (callable, "a function"),
    "callback_on_step_end_tensor_inputs": (_are_all(str), "a list of names"),
}


def check_number(name: str, value: Any) -> float:
    """The value. Raises ValueError where it is no number."""
    if not is_number(value):
        raise ValueError(f"{name} is {brief(value)}; expected a number")
    return value


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as a whole number. Raises ValueError where it is none, or out of bounds."""
    if not is_whole(value) or value < least or (most is not None and value > most):
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} is {brief(value)}; expected {bounds}")
    return int(value)


def texts_per_prompt(
    prompt: str | Sequence[str] | None, kwargs: dict, family: Family
) -> tuple[list[str], int, dict[str, Any]]:
    """The prompts of a call, none where there are embeddings; their number; and the other
    arguments, with each text once for each prompt and a number of pictures.

    Raises:
        ValueError: no prompt, a text that is none, or less than a picture of each.
    """
    prompts, embeds = as_texts("prompt", prompt) or [], kwargs.get("prompt_embeds")
    count = len(prompts if embeds is None else embeds)
    if not count:
        raise ValueError("no prompt; pass one, or several")
    texts = {name: as_texts(name, kwargs.get(name), count) for name in family.texts}
    each = kwargs.get("num_images_per_prompt")
    each = check_whole("num_images_per_prompt", 1 if each is None else each, least=1)
    if count * each > 1 and all(kwargs.get(name) is not None for name in NEGATIVE_SIZES):
        raise ValueError(
            f"{', '.join(NEGATIVE_SIZES)}: diffusers mixes up the rows of several pictures; draw "
            "one a call"
        )
    return prompts, count, {**kwargs, **texts, "num_images_per_prompt": each}


def as_text(name: str, given: Any) -> str:
    """The text. Raises ValueError where it is none."""
    if not isinstance(given, str):
        raise ValueError(f"{name} is {brief(given)}; expected a text")
    check_texts(given)
    return given


def sides_of(pipe: DiffusersPipeline, kwargs: dict) -> dict[str, int]:
    """Height and width of a call: as given, else as the latents (B, C, h, w) have them, else the
    model's own."""
    sides, latents = ("height", "width"), kwargs.get("latents")
    if isinstance(latents, Tensor) and latents.ndim == 4 and not any(map(kwargs.get, sides)):
        factor = pixels_per_latent(pipe.vae)
        return dict(zip(sides, (factor * side for side in latents.shape[2:]), strict=True))
    return {side: kwargs.get(side) or pipe.resolution for side in sides}


def check_steps(steps: Any, scheduler: Any) -> int:
    """The number of steps. Raises ValueError where it is none, or more than the scheduler has."""
    most = scheduler.config.get("num_train_timesteps")
    return check_whole("num_inference_steps", steps, 1, most)


def as_texts(name: str, given: Any, count: int = 1) -> list[str] | None:
    """One text `count` times, or those that are given. Raises ValueError where one is none."""
    if given is None:
        return None
    if isinstance(given, str):
        return [given] * count
    several = isinstance(given, Iterable) and not isinstance(given, Mapping)
    texts = list(given) if several else [given]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {brief(given)}; expected a text, or several")
    return texts


def text_options(kwargs: dict) -> dict[str, Any]:
    """What the arguments of a call say about the text encoder."""
    lora_scale = (kwargs.get("cross_attention_kwargs") or {}).get("scale")
    return {"clip_skip": kwargs.get("clip_skip"), "lora_scale": lora_scale}


def callback_may_change_context(kwargs: dict) -> bool:
    """Whether the callback of a call is given the prompts' embeddings."""
    return any("prompt_embeds" in name for name in _callback_inputs(kwargs))


def callback_arguments(kept: dict, kwargs: dict, speed: Speed, family: Family) -> dict[str, Any]:
    """The arguments of a call with which guidance ends where the speed says so, and `kept` is empty
    before the VAE decodes, which takes more memory than the steps."""
    callback = kwargs.get("callback_on_step_end")
    asked = _callback_inputs(kwargs)

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        given = {name: tensors[name] for name in asked}
        answer = given if callback is None else callback(pipe, step, timestep, given)
        answer = {} if answer is None else answer
        if not isinstance(answer, dict):
            raise ValueError(
                f"callback_on_step_end gives back {brief(answer)}; expected tensors by name, or "
                "None to change nothing"
            )
        for name in answer:
            if "prompt_embeds" in name and name not in asked:
                raise ValueError(
                    f"callback_on_step_end gives back {name}, which it was not given; name it in "
                    "callback_on_step_end_tensor_inputs"
                )
        is_last = step == pipe.num_timesteps - 1
        stops = step + 1 == speed.guided_steps(pipe.num_timesteps) and not is_last
        if stops and pipe.do_classifier_free_guidance:
            answer = _without_guidance(pipe, kept, {**tensors, **answer})
        if is_last:
            kept.clear()
        pipe.take_unet()  # the callback may have drawn with another pipeline of this UNet
        return answer

    guided = [] if speed.guidance_stop == 1 else family.guided
    needed = [name for name in guided if name not in asked]
    return {
        "callback_on_step_end": on_step_end,
        "callback_on_step_end_tensor_inputs": [*asked, *needed],
    }


def _without_guidance(pipe: Any, kept: dict[str, KeysValues], tensors: dict) -> dict:
    """The tensors of a step with which the next ones have the conditional rows alone; callbacks of
    diffusers, SDCFGCutoffCallback and SDXLCFGCutoffCallback, do the same for a single prompt."""
    pipe._guidance_scale = 1.0
    kept.update(conditional_rows(kept))
    return {**tensors, **{name: tensors[name].chunk(2)[1] for name in pipe.family.guided}}


def _callback_inputs(kwargs: dict) -> list[str]:
    """The tensors that the callback of a call is given; diffusers' own callbacks name theirs."""
    named = getattr(kwargs.get("callback_on_step_end"), "tensor_inputs", None)
    given = kwargs.get("callback_on_step_end_tensor_inputs") if named is None else named
    return ["latents"] if given is None else list(given)
