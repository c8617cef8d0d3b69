"""What the scripts that encode or draw share: a configuration's pipeline, the objects it names, how
they are drawn, and the report of what failed."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from elite.concept import Concept, ConceptFolder
from elite.console import BAD_INPUT, OK, PARTLY_FAILED, complain
from elite.data import PairFolder
from elite.drawing import Drawing, draw_prompt_grid
from elite.files import quick_digest
from elite.gallery import push_gallery, repository_of, save_gallery
from elite.hardware import (
    FP8,
    compile_blocks,
    decode_in_parts,
    note_emulation,
    offload_in_groups,
    order_channels_last,
    pick_device,
    store_in_fp8,
)
from elite.loading import DTYPES, MOST_STEPS, image_encoder_sizes, make_scheduler
from elite.lora import fuse_loras
from elite.named_concepts import Words
from elite.pipeline import Elite
from elite.settings import (
    ConceptConfig,
    DrawConfig,
    DrawingModelConfig,
    EliteConfig,
    EncodeConfig,
    InferenceConfig,
    ModelConfig,
)
from elite.speed import speed_of

NO_MASK_COST = (
    "note: with --no_mask a picture's background becomes part of its concept and is drawn with it "
    "in every scene; python data_scripts/make_masks.py makes masks"
)


def model_name(config: ModelConfig) -> str:
    """What a file calls the Stable Diffusion that made it."""
    variant = f", variant {config.variant}" if config.variant else ""
    return config.pretrained_model_name_or_path + variant


def publish_concepts(config: EncodeConfig, pairs: PairFolder, fingerprint: str) -> None:
    """Uploads the concepts of these pairs as a gallery. Raises ValueError where that fails."""
    folder, model = Path(config.output_dir), config.pretrained_model_name_or_path
    files = save_gallery(pairs, folder, fingerprint, model)
    repository = repository_of(config.hub_model_id, folder)
    print(f"uploaded: {push_gallery(folder, files, repository, config.hub_token)}")


def model_metadata(config: ConceptConfig) -> dict[str, str]:
    """What a file says of the models that made it; mappers are known by their fingerprint."""
    encoder = config.image_encoder_name_or_path
    return {"model": model_name(config), "image_encoder": str(encoder)}


def device_and_dtype(config: ModelConfig) -> tuple[torch.device, torch.dtype]:
    """Where a configuration wants to compute, and in which number type."""
    device = pick_device(config.device)
    precision = config.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    note_emulation(device, precision)
    return device, DTYPES[precision]


def prepare_to_draw(pipe: DiffusionPipeline, config: DrawingModelConfig) -> None:
    """Adds a configuration's LoRA files to the pipeline's weights, and places it as told: whole, in
    little memory, compiled.

    Metadata then says what of this changed its weights by `pipe.named_weights`.

    Raises:
        ValueError: as `fuse_loras` and `pick_device`, or settings that do not go together.
    """
    saves = [name for name in ("low_memory", "fp8_weights") if getattr(config, name)]
    if config.compile and saves:
        raise ValueError(
            f"--compile and --{saves[0]} are both given, but weights that come and go cannot be "
            "compiled with; leave one of them out"
        )
    changed = {"lora": ", ".join(fuse_loras(pipe, config.lora))} if config.lora else {}
    device, dtype = device_and_dtype(config)
    pipe.to(dtype=dtype)
    if config.channels_last:
        order_channels_last(pipe)
    if config.fp8_weights:
        store_in_fp8(pipe.unet)
        changed["weights"] = str(FP8)
    if config.low_memory:
        decode_in_parts(pipe)
    if config.low_memory and device.type != "cpu":
        offload_in_groups(pipe, device)
    else:
        pipe.to(device)
    if config.compile:
        compile_blocks(pipe.unet)
    pipe.named_weights = {**getattr(pipe, "named_weights", {}), **changed}


def load_pipeline(
    config: ConceptConfig, local_mapper: str | Literal[False] | None = None, encodes: bool = True
) -> Elite:
    """The pipeline of a configuration's models, to be placed.

    Args:
        local_mapper: path; None means the model folder's own, False no local branch.
        encodes: False leaves out the image encoder, which concept files do not need.
    """
    model, encoder = config.pretrained_model_name_or_path, config.image_encoder_name_or_path
    pipe = Elite.from_stable_diffusion(
        model,
        global_mapper=config.global_mapper_path,
        local_mapper=local_mapper,
        image_encoder=encoder if encodes else image_encoder_sizes(model, encoder),
        **config.model_files,
    )
    if not encodes:
        pipe.register_modules(image_encoder=None)
    named = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    # The mappers have their fingerprint.
    base = [named[name].state_dict() for name in sorted(named) if not name.endswith("_mapper")]
    configs = [path for folder in (model, encoder) for path in config_files(folder)]
    pipe.named_weights = {"base": quick_digest(base, configs)}
    pipe.set_progress_bar_config(disable=True)
    return pipe


def config_files(folder: str | None) -> list[Path]:
    """What decides besides the weights how the models of a folder compute: configs, scheduler,
    vocabulary. None of a hub name or a single file."""
    inside = sorted(Path(folder).rglob("*.*")) if folder and Path(folder).is_dir() else []
    configs = ("config.json", "scheduler_config.json", "vocab.json", "merges.txt", "tokenizer.json")
    return [path for path in inside if path.name in configs]


def build_pipeline(
    config: EliteConfig, local_mapper: str | Literal[False] | None = None, encodes: bool = True
) -> Elite:
    """`load_pipeline` with the sampler of the configuration, ready to draw. Raises ValueError where
    that takes fewer steps."""
    most = MOST_STEPS.get(config.scheduler, config.num_inference_steps)
    if config.num_inference_steps > most:
        raise ValueError(
            f"--scheduler {config.scheduler}: takes {most} steps at most, for adapters that need "
            f"few; got --num_inference_steps {config.num_inference_steps}"
        )
    pipe = load_pipeline(config, local_mapper, encodes)
    prepare_to_draw(pipe, config)
    pipe.scheduler = make_scheduler(config.scheduler, pipe.scheduler.config)
    return pipe


def drawing_of(config: EliteConfig, words: Words, lambda_: float) -> Drawing:
    """How a configuration wants its pictures drawn."""
    return Drawing(
        words=words,
        lambda_=lambda_,
        placeholder_token=config.placeholder_token,
        resolution=config.resolution,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        negative_prompt=config.negative_prompt,
        speed=speed_of(config.speed, config.guidance_stop, config.deep_every, config.deep_first),
    )


def read_pairs(config: EncodeConfig | InferenceConfig) -> PairFolder:
    """The configuration's folder of pairs.

    Raises:
        ValueError: no folder, no picture, or not a single mask though masks are to be read.
    """
    pairs = PairFolder(config.test_data_dir, whole=config.no_mask)
    if config.no_mask and PartialState().is_main_process:
        print(NO_MASK_COST, file=sys.stderr)
    if not config.no_mask and not any(pair.mask_path.exists() for pair in pairs.pairs):
        raise ValueError(
            f"{config.test_data_dir}: no picture has a mask, {pairs.pairs[0].mask_path.name} for "
            f"{pairs.pairs[0].image_path.name}; make masks with python data_scripts/make_masks.py "
            f"{config.test_data_dir}, or take whole pictures as objects with --no_mask"
        )
    return pairs


def read_objects(config: InferenceConfig) -> PairFolder | ConceptFolder:
    """What the configuration wants drawn: its pairs, or its concept files.

    Raises:
        ValueError: flags that do not go together, or what `read_pairs` and `ConceptFolder` raise.
    """
    if config.concept_path is None:
        return read_pairs(config)
    if config.no_mask:
        raise ValueError(
            "--no_mask: concept files hold no pictures; leave it out, or give it to encode.py"
        )
    return ConceptFolder(config.concept_path)


def read_concept(word: str, path: str) -> Concept:
    """The concept of --concept: of a file, or of a folder with one. Raises ValueError where it is
    none, or holds more."""
    folder = ConceptFolder(path)
    if len(folder) > 1:
        raise ValueError(
            f"--concept {word}={path}: holds {len(folder)} concept files; name one of them"
        )
    return folder.read(0)


def kind_of(config: InferenceConfig) -> str:
    return "concepts" if config.concept_path else "pairs"


def what_to_draw(config: InferenceConfig, objects: PairFolder | ConceptFolder) -> dict[str, Any]:
    """What `draw_folder` is told besides pipeline, objects, drawing and folder.

    Raises:
        ValueError: there is no such object.
    """
    if config.selected_data >= len(objects):
        raise ValueError(
            f"--selected_data {config.selected_data}: "
            f"{config.concept_path or config.test_data_dir} has {len(objects)} {kind_of(config)}; "
            f"choose {'0' if len(objects) == 1 else f'0 to {len(objects) - 1}'}, or -1 for all"
        )
    return {
        "prompt": config.template.replace("{}", config.placeholder_token),
        "seeds": range(config.seed, config.seed + config.num_images),
        "indices": None if config.selected_data < 0 else [config.selected_data],
        "batch_size": config.batch_size,
        "skip_existing": config.skip_existing,
        "metadata": {"scheduler": config.scheduler, **model_metadata(config)},
    }


def report_drawn(
    config: InferenceConfig,
    objects: PairFolder | ConceptFolder,
    failures: list[str],
    output_dir: Path,
) -> int:
    """Says which objects could not be drawn, and where the pictures are. Returns the exit
    status."""
    chosen = 1 if config.selected_data >= 0 else len(objects)
    done = f"pictures in {output_dir}; look at {output_dir / 'grid.png'} first"
    return report_failures(failures, chosen, f"{kind_of(config)} could not be drawn", done)


def draw_grid(
    config: DrawConfig,
    draw: Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]],
    prompts: Sequence[str],
    output_dir: Path,
    metadata: Mapping[str, object],
    skip_existing: bool = False,
) -> int:
    """Draws each prompt once per seed, by the main process alone. Returns the exit status."""
    if not PartialState().is_main_process:
        return OK
    seeds = range(config.seed, config.seed + config.num_images)
    draw_prompt_grid(
        draw,
        prompts,
        seeds,
        output_dir,
        batch_size=config.batch_size,
        skip_existing=skip_existing,
        metadata=metadata,
    )
    print(f"pictures in {output_dir}; look at {output_dir / 'grid.png'} first")
    return OK


def report_failures(failures: list[str], total: int, failed: str, done: str) -> int:
    """Says what failed, and then what was done. Returns the exit status."""
    if not PartialState().is_main_process:
        return OK  # the main process speaks for all
    for failure in failures:
        complain(failure)
    if failures:
        print(f"{len(failures)} of {total} {failed}", file=sys.stderr)
    if len(failures) == total:
        return BAD_INPUT
    print(done)
    return PARTLY_FAILED if failures else OK
