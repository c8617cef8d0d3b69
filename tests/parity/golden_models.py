"""Rebuilds the models and inputs of a golden folder from its meta, through this project's public
classes."""

import json
import os
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from elite import GlobalMapper, LocalMapper
from elite.checkpoint import mapper_from_state_dict
from elite.loading import make_scheduler

DEFAULT_FOLDER = Path(__file__).parent / "golden"


def golden_folder() -> Path:
    return Path(os.environ.get("ELITE_GOLDEN") or DEFAULT_FOLDER)


def _normals(tag: str, name: str, shape: list[int]) -> np.ndarray:
    seed = zlib.crc32(f"{tag}/{name}".encode()) & 0x7FFFFFFF
    return np.random.RandomState(seed).standard_normal(tuple(shape))


class Golden:
    """One golden folder: expected outputs, inputs, and models with the recipe's weights."""

    def __init__(self, folder: Path) -> None:
        self.meta = json.loads((folder / "meta.json").read_text())
        with np.load(folder / "golden.npz", allow_pickle=False) as file:
            self.outputs = {key: file[key] for key in file.files}

    def input(self, name: str) -> Tensor:
        entry = self.meta["inputs"][name]
        if entry["kind"] == "literal":
            return torch.tensor(entry["value"], dtype=torch.int64)
        values = _normals(self.meta["input_tag"], name, entry["shape"]) * entry.get("scale", 1.0)
        if entry["kind"] == "mask":
            values = np.repeat(values > entry["thr"], entry.get("repeat", 1), axis=1)
        return torch.from_numpy(values.astype(entry.get("dtype", "float32")))

    def weight(self, model: str, name: str, shape: tuple[int, ...]) -> Tensor:
        values = _normals(self.meta["model_tags"][model], name, list(shape))
        values *= 0.5 / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 1)
        if len(shape) == 1 and name.endswith("weight"):
            values = 1 + 0.1 * values
        for suffix, gain in self.meta["gains"].get(model, []):
            if name.endswith(suffix):
                values *= gain
        return torch.from_numpy(values.astype(np.float32))

    def _filled(self, model: str, module: nn.Module) -> nn.Module:
        state = module.state_dict()
        assert sorted(state) == sorted(self.meta["modern_state_keys"][model])
        module.load_state_dict({k: self.weight(model, k, tuple(v.shape)) for k, v in state.items()})
        return module.eval()

    @property
    def configs(self) -> dict:
        return self.meta["configs"]

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        return self._filled("unet", UNet2DConditionModel(**self.configs["unet"]))

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        return self._filled("text", CLIPTextModel(CLIPTextConfig(**self.configs["text"])))

    @cached_property
    def image_encoder(self) -> CLIPVisionModel:
        return self._filled("vision", CLIPVisionModel(CLIPVisionConfig(**self.configs["vision"])))

    @cached_property
    def vae(self) -> AutoencoderKL:
        return self._filled("vae", AutoencoderKL(**self.configs["vae"]))

    def _mapper(self, cls: type, model: str) -> GlobalMapper | LocalMapper:
        """Through the loader of release checkpoints, so levels and widths come from the tensors."""
        state = {
            key: self.weight(model, key, shape) for key, shape in self._mapper_shapes(model).items()
        }
        return mapper_from_state_dict(cls, state, self.unet, self.image_encoder)

    def _mapper_shapes(self, model: str) -> dict[str, tuple[int, ...]]:
        keys = self.meta["modern_state_keys"][model]
        layers = sorted(
            int(k.split(".")[0].removeprefix("mapping_"))
            for k in keys
            if k.endswith(".6.bias") and "patch" not in k
        )
        config = self.configs["mapper"]
        reference = GlobalMapper.for_models(
            self.unet,
            self.image_encoder,
            hidden_dim=config.get("hidden_dim", 1024),
            hidden_layers=[4 * level for level in layers[1:]],
        )
        shapes = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
        assert sorted(shapes) == sorted(keys)
        return shapes

    @cached_property
    def global_mapper(self) -> GlobalMapper:
        return self._mapper(GlobalMapper, "mapper")

    @cached_property
    def local_mapper(self) -> LocalMapper:
        return self._mapper(LocalMapper, "mapper_local")

    @property
    def parts(self) -> dict:
        return {
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": None,
            "unet": self.unet,
            "image_encoder": self.image_encoder,
            "scheduler": make_scheduler("lms"),
        }


def relative_error(actual: Tensor, expected: np.ndarray) -> float:
    """max|a - b| / max|b|."""
    a = actual.detach().double().numpy()
    assert a.shape == expected.shape, (a.shape, expected.shape)
    return float(np.abs(a - expected).max() / max(np.abs(expected).max(), 1e-30))
