"""What makes training cheaper must not make it another training: frozen parts in half precision,
one pass for both views, a compiled UNet."""

import warnings

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from elite.hardware import BF16_INSTRUCTIONS
from elite.inference import device_and_dtype
from elite.loading import load_parts
from elite.mappers import clip_levels, clip_levels_of_views
from elite.objectives import EliteObjective, GlobalObjective, LocalObjective
from elite.settings import InferenceLocalConfig
from elite.training import make_accelerator
from elite.wording import Note
from tests import tiny
from tests.conftest import forget_accelerate, run_script
from tests.open_images import make_open_images

BATCH = {
    "seed": torch.tensor([1, 2]),
    "caption": ["a S", "the S"],
    "object_mask": torch.ones(2, 1, 32, 32),
    "loss_mask": torch.ones(2, 1, 16, 16),
    **{
        name: torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        for seed, name in enumerate(("pixels", "clip_pixels", "object_pixels"))
    },
}


def make_objective(stage: str, model_folder) -> EliteObjective:
    global_mapper, local_mapper = tiny.build_mappers(model_folder)
    parts = load_parts(model_folder)
    if stage == "global":
        return GlobalObjective(parts, global_mapper)
    return LocalObjective(parts, global_mapper, local_mapper)


def loss_and_gradient(objective: EliteObjective) -> tuple[float, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(BATCH)["loss"]
    loss.backward()
    gradients = [p.grad for p in objective.trained.parameters() if p.grad is not None]
    return float(loss), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("stage", ["global", "local"])
def test_frozen_parts_in_half_precision_train_alike(stage, model_folder):
    """Autocast computes in bf16 either way; only who rounds the weights differs."""
    masters, cast = (make_objective(stage, model_folder) for _ in range(2))
    cast.cast_frozen(torch.bfloat16)
    dtypes = {name: p.dtype for name, p in cast.named_parameters()}
    assert {dtypes[name] for name, p in cast.named_parameters() if p.requires_grad} == {
        torch.float32
    }
    assert {dtypes[name] for name, p in cast.named_parameters() if not p.requires_grad} == {
        torch.bfloat16
    }
    expected, expected_gradient = loss_and_gradient(masters)
    loss, gradient = loss_and_gradient(cast)
    assert loss == pytest.approx(expected, rel=5e-3)
    assert gradient.dtype == torch.float32
    # Rounding is some 4e-3 of each of the values on the way.
    assert nn.functional.cosine_similarity(gradient, expected_gradient, dim=0) > 0.99


@torch.no_grad()
def test_latents_stay_in_float32(model_folder):
    """So that the noise, which is the target, is not rounded."""
    objective = make_objective("global", model_folder)
    expected = objective.encode_pixels(BATCH["pixels"], BATCH["seed"])
    objective.cast_frozen(torch.bfloat16)
    latents = objective.encode_pixels(BATCH["pixels"], BATCH["seed"])
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_views_in_one_pass_equal_views_apart(parts):
    views, layers = [BATCH["clip_pixels"], BATCH["object_pixels"][:1]], [(4, 8), (2, 4)]
    encoder, calls = parts["image_encoder"], []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    together = clip_levels_of_views(encoder, views, layers)
    assert len(calls) == 1
    for view, chosen, levels in zip(views, layers, together, strict=True):
        for ours, alone in zip(levels, clip_levels(encoder, view, chosen), strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)


def test_compiled_training_is_the_same_training(tmp_path, model_folder, capsys, monkeypatch):
    """Compiled by a backend that changes nothing, so that no C++ compiler is needed."""
    compiled: list[nn.Module] = []

    def compile_eagerly(unet: UNet2DConditionModel) -> None:
        compiled.append(unet)
        nn.Module.compile(unet, backend="eager")

    monkeypatch.setattr(UNet2DConditionModel, "compile", compile_eagerly)
    data = make_open_images(tmp_path / "data", n=4)
    results = []
    for flags in ([], ["--compile"]):
        run_folder = tmp_path / f"run{len(results)}"
        status = run_script(
            "train_global.py",
            *("--pretrained_model_name_or_path", model_folder, "--train_data_dir", data),
            *("--output_dir", run_folder, "--max_train_steps", 1, "--train_batch_size", 1),
            *("--gradient_accumulation_steps", 1, "--validation_steps", 0),
            *("--hidden_layers", 4, 8, *flags),
        )
        assert status == 0, capsys.readouterr().err
        results.append((run_folder / "metrics.jsonl").read_text().split('"grad_norm"')[0])
    assert len(compiled) == 1 and results[0] == results[1]


def with_instructions(monkeypatch, *names: str) -> None:
    """The CPU says that it has these instructions alone."""
    capabilities = {name: name in names for name in ("avx2", *BF16_INSTRUCTIONS)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)


@pytest.mark.parametrize(
    ("instruction", "precision"),
    [("avx2", "no"), ("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("bf16", "bf16")],
)
def test_auto_is_bf16_where_the_cpu_computes_in_it(instruction, precision, monkeypatch):
    with_instructions(monkeypatch, instruction)
    forget_accelerate()
    assert make_accelerator("auto", cpu=True).mixed_precision == precision


def test_auto_asks_the_device_that_the_run_is_on(monkeypatch):
    """A launch with `use_cpu` beside a GPU that computes in bf16 emulated it on the CPU."""
    with_instructions(monkeypatch, "avx2")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: gpu)
    forget_accelerate()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert make_accelerator("auto").mixed_precision == "no"


@pytest.mark.parametrize("asked", [{"config": "bf16"}, {"launch": "bf16"}])
def test_emulated_bf16_is_noted_in_training(asked, monkeypatch):
    """It took thirteen times as long as float32, without a word."""
    with_instructions(monkeypatch, "avx2")
    forget_accelerate()
    if "launch" in asked:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked["launch"])
    with pytest.warns(Note, match="bf16: this CPU only emulates it.*--mixed_precision no"):
        make_accelerator(asked.get("config"), cpu=True)


def test_emulated_bf16_is_noted_in_drawing(monkeypatch):
    config = InferenceLocalConfig(mixed_precision="bf16", device="cpu")
    with_instructions(monkeypatch, "avx2")
    with pytest.warns(Note, match="this CPU only emulates it"):
        assert device_and_dtype(config)[1] == torch.bfloat16
    with_instructions(monkeypatch, "amx_bf16")
    with warnings.catch_warnings(action="error"):
        device_and_dtype(config)
