"""Mapper weights in our format (safetensors + config.json) and in the release's (`.pt` state
dicts)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPVisionModel

from elite.files import check_archive, is_file
from elite.loading import FLOATS, may_be_on_hub
from elite.mappers import HIDDEN_LAYERS, Mapper
from elite.wording import brief, first_line

M = TypeVar("M", bound=Mapper)
MOST_KEYS_SHOWN = 6
TORCH_FILES = (".pt", ".pth", ".bin")  # endings of what torch.save writes
WANTED = ["config.json", "*.safetensors"]  # of a mapper on the hub
WIDEST, MOST_LAYERS = 16_384, 1024  # of a mapper that is worth building


def check_mapper(cls: type[Mapper], path: Path | str) -> None:
    """Raises ValueError where there is no such file or folder, nor a hub name of its form."""
    if Path(path).suffix.lower() in TORCH_FILES:
        if not is_file(path):
            raise ValueError(
                f"{path}: no such file; expected a mapper of the release, which "
                "https://github.com/csyxwei/ELITE links"
            )
    elif not Path(path).exists() and not may_be_on_hub(path):
        raise ValueError(
            f"{path}: no such folder; expected the {cls.__name__} that training writes "
            "(config.json with safetensors), or a .pt file of the release"
        )


def load_mapper(
    cls: type[M], path: Path | str, unet: UNet2DConditionModel, image_encoder: CLIPVisionModel
) -> M:
    """A mapper from our folder (safetensors + config.json), a hub name, or a release `.pt` state
    dict.

    Raises:
        ValueError: no such file, or its tensors do not fit these models; one message lists them.
    """
    check_mapper(cls, path)
    if Path(path).suffix.lower() in TORCH_FILES:
        return mapper_from_state_dict(cls, load_official(path), unet, image_encoder, name=str(path))
    folder = Path(path)
    try:
        if not folder.exists():  # a name on the hub
            folder = Path(snapshot_download(str(path), allow_patterns=WANTED))
        _check_config(cls.load_config(folder), cls)
        _check_files(folder)
        mapper, report = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # a config of any shape
        raise ValueError(
            f"{path}: not a {cls.__name__} folder ({first_line(error)}); expected config.json "
            "with safetensors, or a .pt file of the release"
        ) from None
    sizes = mapper.config.hidden_dim, mapper.config.hidden_layers
    with torch.device("meta"):  # no memory used
        reference = cls.shaped_for(unet, image_encoder, *sizes)
    found = _shapes(mapper.state_dict()) | dict.fromkeys(report["unexpected_keys"], ())
    for key in report["missing_keys"]:
        del found[key]
    _check_keys(found, reference, name=str(path))
    _check_values(mapper.state_dict(), name=str(path))
    return mapper


def load_torch(path: Path | str) -> Any:
    """What a file of `torch.save` holds, if that is tensors in plain containers; nothing else in it
    is ever executed.

    Raises:
        ValueError: no such file, or it holds anything else.
    """
    if not is_file(path):
        raise ValueError(f"{path}: no such file; expected one that torch.save wrote")
    try:
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Torch's own message says how to load it all the same.
        holds_more = type(error).__name__ == "UnpicklingError"
        reason = "it holds other objects" if holds_more else first_line(error)
        raise ValueError(
            f"{path}: not plain tensors ({reason}); it is refused, since loading "
            "anything else could run code; save it as safetensors where it comes from"
        ) from None


def load_official(path: Path | str) -> dict[str, Tensor]:
    """The plain state dict of a `.pt` file, read as `load_torch` does."""
    state = load_torch(path)
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"{path}: expected a flat state dict of tensors as the release writes it")
    return state


def mapper_from_state_dict(
    cls: type[M],
    state: dict[str, Tensor],
    unet: UNet2DConditionModel,
    image_encoder: CLIPVisionModel,
    name: str = "state dict",
) -> M:
    """A mapper for these models with the release's tensors, bit for bit (their dtype kept)."""
    with torch.device("meta"):  # no memory used
        mapper = cls.shaped_for(unet, image_encoder, *_release_sizes(state))
    _check_keys(_shapes(state), mapper, name)
    _check_values(state, name)
    mapper.load_state_dict(state, assign=True)
    return mapper.requires_grad_(True).eval()


def _release_sizes(state: dict[str, Tensor]) -> tuple[int, tuple[int, ...]]:
    """Width of the MLPs and hidden layers of a release file, which says nothing of them: the width
    and number of levels of its tensors, and the release's levels, every fourth hidden state."""
    levels = {key.split(".")[0] for key in state if key.startswith("mapping_patch_")}
    first = state.get("mapping_0.0.weight")
    hidden_dim = 1024
    if first is not None and first.ndim == 2 and first.shape[0] <= WIDEST:
        hidden_dim = first.shape[0]
    hidden_layers = tuple(4 * (i + 1) for i in range(len(levels) - 1)) if levels else HIDDEN_LAYERS
    return hidden_dim, hidden_layers


def _check_files(folder: Path) -> None:
    """Raises ValueError where the weights of a folder are of a kind that loading would convert."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        if not found <= {"F32", "F16", "BF16"}:
            raise ValueError(f"{path.name}: holds {', '.join(sorted(found))}")


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _check_config(config: dict, cls: type) -> None:
    """Raises ValueError where a mapper's config.json is of another one, or holds anything but sizes
    worth trying."""
    if (kind := config.get("_class_name", cls.__name__)) != cls.__name__:
        raise ValueError(f"its config.json is of a {brief(kind)}")
    attention = config.get("attention") or {}
    layers = config["hidden_layers"]
    widths = [config.get(name) for name in ("input_dim", "output_dim", "hidden_dim")]
    numbers = [*widths, *attention.values(), *layers]
    if not all(isinstance(number, int) and 0 <= number <= WIDEST for number in numbers):
        raise ValueError(f"config.json: expected whole numbers from 0 to {WIDEST}")
    if len(layers) > MOST_LAYERS or len(attention) > MOST_LAYERS:
        raise ValueError(f"config.json: more than {MOST_LAYERS} layers")


def _check_values(state: dict[str, Tensor], name: str) -> None:
    """Raises ValueError where tensors of the right shapes cannot be computed with."""
    kinds = {value.dtype for value in state.values()}
    if (
        len(kinds) > 1
        or not kinds <= set(FLOATS)
        or any(value.layout != torch.strided for value in state.values())
    ):
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ValueError(
            f"{name}: holds {found}; expected plain tensors, all float32, all float16 or all "
            "bfloat16"
        )
    known = {key: value for key, value in state.items() if not value.is_meta}
    wrong = [key for key, value in known.items() if not value.isfinite().all()]
    if wrong:
        raise ValueError(f"{name}: not a number in {_listed(wrong)}; it is damaged, train it again")


def _check_keys(found: dict[str, tuple[int, ...]], reference: Mapper, name: str) -> None:
    """Raises ValueError where shapes are not those of the reference."""
    expected = _shapes(reference.state_dict())
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing {_listed(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected {_listed(extra)}")
    wrong = [
        f"{key} is {found[key]}, expected {expected[key]}"
        for key in sorted(expected.keys() & found.keys())
        if found[key] != expected[key]
    ]
    if wrong:
        problems.append(f"wrong shape: {_listed(wrong)}")
    if problems:
        raise ValueError(
            f"{name}: does not fit this model: {'; '.join(problems)}; it is damaged or was "
            "trained for another model"
        )


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - MOST_KEYS_SHOWN} more" if len(items) > MOST_KEYS_SHOWN else ""
    return f"{len(items)}: " + ", ".join(items[:MOST_KEYS_SHOWN]) + more
