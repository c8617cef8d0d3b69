"""Stable Diffusion's parts from a folder, the hub or a single file, and samplers by name."""

import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from elite.defaults import DEFAULT_SAMPLER
from elite.families import SDXL, family_of
from elite.files import check_archive, is_file
from elite.text import read_prompt
from elite.wording import first_line

HUB_IMAGE_ENCODER = "openai/clip-vit-large-patch14"
EXPECTED = "expected a folder in diffusers layout, a hub name or a single-file checkpoint"
SCHEDULERS = {
    "lms": LMSDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "dpm++_karras": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "lcm": LCMScheduler,
    "tcd": TCDScheduler,
}
SPACED_FROM_0 = ("ddim", "pndm", "lcm", "tcd")  # timesteps; of the others evenly over all
MOST_STEPS = {"lcm": 50, "tcd": 50}  # of which these take some
# By the names of --mixed_precision.
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOATS = tuple(DTYPES.values())  # what weights and concepts are stored in
# Stable Diffusion's noise schedule, for model folders that carry none.
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
MAX_TRAIN_TIMESTEPS = 100_000
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def make_scheduler(name: str, config: dict | None = None) -> KarrasDiffusionSchedulers:
    """A scheduler by name over the model's own noise schedule.

    LMS is the release's: fractional timesteps spaced by linspace. The model's config alone would
    draw something else.

    Raises:
        ValueError: unknown name.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}")
    schedule = {key: (config or {}).get(key, value) for key, value in NOISE_SCHEDULE.items()}
    if prediction_type := (config or {}).get("prediction_type"):
        schedule["prediction_type"] = prediction_type
    spacing = "leading" if name in SPACED_FROM_0 else "linspace"
    extra: dict[str, dict[str, bool]] = {
        "ddim": {"clip_sample": False, "set_alpha_to_one": False},
        "pndm": {"skip_prk_steps": True},
        "dpm++_karras": {"use_karras_sigmas": True},
        "lcm": {"set_alpha_to_one": False},
        "tcd": {"set_alpha_to_one": False},
    }
    return SCHEDULERS[name](
        **schedule, timestep_spacing=spacing, steps_offset=1, **extra.get(name, {})
    )


def load_parts(
    model: str | Path,
    image_encoder: str | Path | CLIPVisionModel | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | Path | None = None,
) -> dict:
    """Everything of ELITE but the mappers, in float32: the parts of `load_stable_diffusion`, and
    image_encoder.

    Args:
        model: folder in diffusers layout, hub name, or a checkpoint in a single file.
        image_encoder: None takes `image_encoder/` of the model folder, else CLIP ViT-L/14 from the
            hub.
        tokenizer: None takes the model's own.
        revision: of the model on the hub.
        variant: of the weights' files, as fp16 in `model.fp16.safetensors`.
        single_file_config: folder in diffusers layout, or hub name, with the configs and tokenizer
            of a single file; None lets diffusers choose one of the hub by the file's tensors.

    Raises:
        ValueError: a part is missing or unreadable; the message names it.
    """
    parts = load_stable_diffusion(model, tokenizer, revision, variant, single_file_config)
    if not isinstance(image_encoder, CLIPVisionModel):
        own = None if image_encoder else inside(model, "image_encoder")
        options = {"variant": variant} if own and variant in _variants(own) else {}
        image_encoder = load_model(
            CLIPVisionModel, image_encoder or own or HUB_IMAGE_ENCODER, **options
        )
    return {**parts, "image_encoder": image_encoder}


def image_encoder_sizes(
    model: str | Path, image_encoder: str | Path | None = None
) -> CLIPVisionModel:
    """The image encoder without its weights, for drawing concepts that are encoded already: mappers
    are checked against its sizes, but it cannot compute.

    Args, Raises: as `load_parts`.
    """
    source = image_encoder or inside(model, "image_encoder") or HUB_IMAGE_ENCODER
    with torch.device("meta"):
        return CLIPVisionModel(load_part(CLIPVisionConfig, source))


def load_stable_diffusion(
    model: str | Path,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | Path | None = None,
) -> dict:
    """vae, text_encoder, tokenizer, unet and scheduler of a Stable Diffusion, in float32; of SDXL
    text_encoder_2 and tokenizer_2 too.

    Args, Raises: as `load_parts`.
    """
    hub = {"revision": revision} if revision else {}
    if is_file(model):
        parts = _load_single_file(model, single_file_config)
    else:
        weights = {**hub, **({"variant": variant} if variant else {})}
        names = {"text_encoder": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet2DConditionModel}
        parts = {name: load_model(cls, model, name, **weights) for name, cls in names.items()}
        if family_of(parts["unet"]) is SDXL:
            parts["text_encoder_2"] = load_model(
                CLIPTextModelWithProjection, model, "text_encoder_2", **weights
            )
            parts["tokenizer_2"] = load_part(CLIPTokenizer, model, "tokenizer_2", **hub)
        if tokenizer is None:
            parts["tokenizer"] = load_part(CLIPTokenizer, model, "tokenizer", **hub)
        parts["scheduler"] = _load_scheduler(model, hub)
    if tokenizer is not None:
        parts["tokenizer"] = load_part(CLIPTokenizer, tokenizer)
    for name in parts.keys() & {"tokenizer", "tokenizer_2"}:  # no more tokens than are read
        limit = parts[name.replace("tokenizer", "text_encoder")].config.max_position_embeddings
        parts[name].model_max_length = min(parts[name].model_max_length, limit)
    return parts


def _load_single_file(path: str | Path, config: str | Path | None) -> dict:
    """The same parts of a checkpoint in a single file, whose tensors have other names."""
    try:
        kind = StableDiffusionPipeline
        if Path(path).suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                if any(key.startswith("conditioner.") for key in file.keys()):  # noqa: SIM118
                    kind = StableDiffusionXLPipeline
        else:
            check_archive(path)
        options = {} if config is None else {"config": str(config)}
        pipe = kind.from_single_file(str(path), **options)
    except Exception as error:  # whatever a stranger's file provokes
        raise ValueError(
            f"{path}: cannot load this single file ({first_line(error)}); expected a whole "
            "checkpoint of Stable Diffusion as .safetensors or plain .ckpt, and with "
            "--single_file_config a folder in diffusers layout that has its configs and tokenizer"
        ) from None
    _check_noise_schedule(dict(pipe.scheduler.config), path)
    names = ["text_encoder", "vae", "unet", "tokenizer"]
    names += [name for name in ("text_encoder_2", "tokenizer_2") if name in pipe.components]
    parts = {name: pipe.components[name] for name in names}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.float().eval()
    return {**parts, "scheduler": make_scheduler(DEFAULT_SAMPLER, pipe.scheduler.config)}


def stock_pipeline(parts: dict) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The plain text-to-image pipeline of diffusers over these parts; prompts are read by
    `text.read_prompt`."""
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline
    if "text_encoder_2" in parts:
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.maybe_convert_prompt = read_prompt
    return pipe


def _load_scheduler(model: str | Path, hub: dict) -> KarrasDiffusionSchedulers:
    """The default sampler over the model's noise schedule; a folder without a scheduler has Stable
    Diffusion's."""
    if Path(model).is_dir() and not (Path(model) / "scheduler").is_dir():
        return make_scheduler(DEFAULT_SAMPLER)
    config = load_part(SCHEDULERS[DEFAULT_SAMPLER], model, "scheduler", loader="load_config", **hub)
    _check_noise_schedule(config, model)
    return make_scheduler(DEFAULT_SAMPLER, config)


def _check_noise_schedule(config: dict, model: str | Path) -> None:
    """Raises ValueError where a value of the noise schedule is of another kind or out of range."""
    if not isinstance(config, dict):
        raise ValueError(f"{model}: scheduler_config.json: expected names with values")
    schedule = {**NOISE_SCHEDULE, **config}
    prediction_type = schedule.get("prediction_type") or "epsilon"
    steps = schedule["num_train_timesteps"]
    ends = [schedule[name] for name in ("beta_start", "beta_end")]
    possible = {
        f"num_train_timesteps of 1 to {MAX_TRAIN_TIMESTEPS}": isinstance(steps, int)
        and 1 <= steps <= MAX_TRAIN_TIMESTEPS,
        "beta_start and beta_end between 0 and 1": all(
            isinstance(end, int | float) and 0 < end < 1 for end in ends
        ),
        f"beta_schedule {' or '.join(BETA_SCHEDULES)}": schedule["beta_schedule"] in BETA_SCHEDULES,
        f"prediction_type {' or '.join(PREDICTIONS)}": prediction_type in PREDICTIONS,
        # The samplers that we offer do not all know these.
        "no trained_betas and no rescale_betas_zero_snr": not (
            schedule.get("trained_betas") or schedule.get("rescale_betas_zero_snr")
        ),
    }
    if missed := [expected for expected, is_met in possible.items() if not is_met]:
        raise ValueError(f"{model}: scheduler_config.json: expected {', '.join(missed)}")


def load_part(
    cls: type,
    source: str | Path,
    subfolder: str = "",
    loader: str = "from_pretrained",
    remedy: str = EXPECTED,
    **options: Any,
) -> Any:
    """One part, as its loader gives it."""
    if not Path(source).exists() and not may_be_on_hub(source):
        raise ValueError(f"{source}: no such folder; {remedy}")
    if subfolder:
        options["subfolder"] = subfolder
    try:
        part = getattr(cls, loader)(source, **options)
    except Exception as error:
        variants = " or ".join(sorted(_variants(Path(source) / subfolder)))
        if variants:
            remedy = f"its weights are of a variant, choose --variant {variants}"
        what = subfolder or cls.__name__
        raise ValueError(f"{source}: cannot load {what} ({first_line(error)}); {remedy}") from None
    if cls is CLIPTokenizer and len(part) == len(set(part.all_special_ids)):
        # Without its files, transformers gives a tokenizer that knows no word.
        raise ValueError(
            f"{source}: no {subfolder or 'tokenizer'}; expected vocab.json and merges.txt in it"
        )
    return part


def may_be_on_hub(source: str | Path) -> bool:
    """Whether it has the form of a hub name, NAME or OWNER/NAME."""
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        return False
    return True


def load_model(
    cls: type,
    source: str | Path,
    subfolder: str = "",
    unread: str = "",
    remedy: str = EXPECTED,
    **options: Any,
) -> Any:
    """A model in float32, none of its weights missing: loaders fill those with random numbers.

    Args:
        unread: what the weights that may be missing begin with, since nothing reads them.

    Raises:
        ValueError: as `load_part`, or weights are missing.
    """
    options["output_loading_info"] = True
    model, report = load_part(cls, source, subfolder, remedy=remedy, **options)
    needed = [key for key in report["missing_keys"] if not (unread and key.startswith(unread))]
    if needed:
        place = f"{source}: {subfolder}" if subfolder else f"{source}:"
        raise ValueError(
            f"{place} has no weights for {min(needed)}; it is damaged or of another kind, {remedy}"
        )
    return model.float().eval()


def _variants(folder: Path) -> set[str]:
    """The variants of the weights in a folder: fp16 of `model.fp16.safetensors`."""
    if not os.path.isdir(folder):
        return set()
    return {path.name.split(".")[1].partition("-")[0] for path in folder.glob("*.*.safetensors")}


def inside(model: str | Path, part: str) -> Path | None:
    """The folder of a part in a local model folder, if there is one."""
    folder = Path(model) / part
    return folder if folder.is_dir() else None


def side_in_pixels(unet: UNet2DConditionModel, vae: AutoencoderKL) -> int:
    """Side of the pictures these models draw by default."""
    return unet.config.sample_size * pixels_per_latent(vae)


def side_for_training(
    resolution: int | None, unet_config: Mapping[str, Any], vae: AutoencoderKL
) -> int:
    """Side of the training images in pixels; None means that of the pictures the model draws.

    Raises:
        ValueError: the UNet, which halves its latents at each level but the last, cannot halve so
            many.
    """
    natural = unet_config["sample_size"] * pixels_per_latent(vae)
    resolution = resolution or natural
    multiple = pixels_per_latent(vae) * 2 ** (len(unet_config["block_out_channels"]) - 1)
    if resolution % multiple:
        raise ValueError(
            f"--resolution {resolution}: this model needs a multiple of {multiple}; {natural} is "
            "its own"
        )
    return resolution


def pixels_per_latent(vae: AutoencoderKL) -> int:
    """Side of the square of pixels that one latent stands for: f of the latent diffusion paper."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
