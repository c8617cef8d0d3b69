"""LoRA files in a pipeline's weights: the few-step distillations (LCM, TCD, Hyper-SD), styles.

Diffusers and peft read them. They are fused and gone before anything is drawn, so that a step costs
what it did without them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import is_peft_available
from huggingface_hub import hf_hub_download
from safetensors import safe_open

from elite.adapters import lora_weights
from elite.attention import is_installed
from elite.files import digest_files, is_file
from elite.mappers import cross_attention_layers
from elite.pipeline import Elite
from elite.wording import brief, first_line

WEIGHTS = "pytorch_lora_weights.safetensors"  # in the folders and repositories of diffusers
GIVEN = re.compile(r"(?P<source>.+?)(?::(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)))?")
ON_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<file>.+\.safetensors))?")
DOWN = re.compile(r"(down|lora_A)\.weight")  # one of each layer, in every program's files
EXPECTED = (
    "expected a .safetensors file, a folder of diffusers, or OWNER/REPOSITORY or "
    "OWNER/REPOSITORY/FILE on the hub"
)


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how much of it is added."""

    name: str
    path: Path
    weight: float = 1.0

    def __str__(self) -> str:
        """Name, weight and a digest of the file, for metadata."""
        return f"{self.name} {self.weight:g} ({digest_files(self.path)})"


def find_lora(given: str) -> Lora:
    """The file of SOURCE or SOURCE:WEIGHT, fetched from the hub if need be.

    Args:
        given: its source is a .safetensors file, a folder that diffusers has saved one in, or on
            the hub OWNER/REPOSITORY or OWNER/REPOSITORY/FILE.

    Raises:
        ValueError: there is none, or it is a file of another kind, which could run code.
    """
    match = GIVEN.fullmatch(given)
    if match is None:
        raise ValueError(f"LoRA {brief(given)}: {EXPECTED}")
    source, weight = match["source"], float(match["weight"] or 1)
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS
    elif not path.exists() and (on_hub := ON_HUB.fullmatch(source)):
        try:
            path = Path(hf_hub_download(on_hub["repository"], on_hub["file"] or WEIGHTS))
        except Exception as error:  # the hub's errors are of many kinds
            reason = first_line(error)
            raise ValueError(
                f"{source}: no such LoRA file here, nor on the hub ({reason})"
            ) from None
    if not is_file(path):
        raise ValueError(f"{path}: no such LoRA file; {EXPECTED}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: LoRA files are read as .safetensors alone")
    return Lora(Path(source).name.removesuffix(".safetensors"), path, weight)


def fuse_loras(
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, given: Sequence[str]
) -> tuple[str, ...]:
    """Adds LoRA files to the weights of a pipeline's UNet and text encoders, and what they add to
    the projections that ELITE replaces to K_g and V_g.

    Args:
        pipe: best in float32 still, so that the sums are rounded once.
        given: as for `find_lora`; their parts add up.

    Returns:
        What metadata calls them.

    Raises:
        ValueError: peft is missing; no LoRA, one of another model, or with values that are no
            numbers. The pipeline is then to be loaded anew.
    """
    if not is_peft_available():
        raise ValueError("LoRA files are read by peft, which is not installed; pip install peft")
    loras = [find_lora(one) for one in given]
    names = [f"lora_{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        _load(pipe, lora.path, name)
    pipe.set_adapters(names, [lora.weight for lora in loras])
    try:
        pipe.fuse_lora(safe_fusing=True)
    except ValueError as error:
        of = ", ".join(str(lora.path) for lora in loras)
        raise ValueError(f"{of}: cannot be added to the weights ({first_line(error)})") from None
    if isinstance(pipe, Elite):
        pipe.take_unet()
    if is_installed(pipe.unet):
        _add_to_mappers(pipe.unet)
    pipe.unload_lora_weights()
    return tuple(str(lora) for lora in loras)


def _load(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, path: Path, name: str) -> None:
    """Loads a file as an adapter of this name. Raises ValueError where it does not fit as a
    whole: diffusers alone leaves out what it does not find."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
        pipe.load_lora_weights(
            str(path.parent), weight_name=path.name, use_safetensors=True, adapter_name=name
        )
    except Exception as error:  # what a stranger's file provokes
        raise ValueError(f"{path}: not a LoRA of this model ({first_line(error)})") from None
    expected = sum(DOWN.search(key) is not None for key in keys)
    parts = [part for part in pipe.components.values() if hasattr(part, "named_modules")]
    found = sum(
        name in getattr(module, "lora_A", ()) for part in parts for module in part.modules()
    )
    if not found or found != expected:
        raise ValueError(
            f"{path}: {found} of its {expected} layers are in this model; it is a LoRA of another"
        )
    if any("dora_scale" in key for key in keys):
        raise ValueError(f"{path}: is a DoRA, which diffusers reads as if it were a LoRA")


@torch.no_grad()
def _add_to_mappers(unet: UNet2DConditionModel) -> None:
    """Adds what the active LoRA adapters of the UNet's to_k and to_v add there to the weights of
    K_g and V_g, so that the adapters may be fused and unloaded."""
    for attn in cross_attention_layers(unet).values():
        processor = attn.processor
        for layer, projection in ((attn.to_k, processor.K_g), (attn.to_v, processor.V_g)):
            for weight in lora_weights(layer):
                projection.weight += weight.to(projection.weight)
