"""Both stages on a miniature Open Images folder: what is trained, and what must not matter."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from elite import ElitePipeline, GlobalMapper, LocalMapper
from elite.checkpoint import load_mapper
from elite.loading import load_parts
from elite.objectives import EliteObjective, GlobalObjective, LocalObjective
from elite.open_images import OpenImagesBoxes, OpenImagesMasks
from elite.run_state import checkpoints
from elite.stream import TrainingStream, collate
from elite.training import fit, make_accelerator
from tests import tiny
from tests.conftest import forget_accelerate, run_script
from tests.faults.toy import Numbers
from tests.faults.toy import train as train_toy
from tests.open_images import make_open_images

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("global", "local")
# The same sums in another order. Adam divides by the size of a gradient, so rounding grows to some
# part of a step; at this learning rate that stays below the tolerance.
SAME = 1e-5
LEARNING_RATE = 1e-4


@pytest.fixture(scope="module")
def open_images(tmp_path_factory) -> Path:
    return make_open_images(tmp_path_factory.mktemp("data"), n=6)


def make_dataset(stage: str, root: Path) -> OpenImagesBoxes | OpenImagesMasks:
    if stage == "global":
        return OpenImagesBoxes(root, resolution=32, clip_size=32)
    return OpenImagesMasks(root, resolution=32, clip_size=32, latent_size=16)


def make_objective(stage: str, model_folder: Path) -> EliteObjective:
    global_mapper, local_mapper = tiny.build_mappers(model_folder)
    parts = load_parts(model_folder)
    if stage == "global":
        return GlobalObjective(parts, global_mapper)
    return LocalObjective(parts, global_mapper, local_mapper)


class Trainer:
    """Runs of one stage on the tiny models; every run starts from the same weights."""

    def __init__(self, stage: str, model_folder: Path, open_images: Path) -> None:
        self.stage, self.model_folder = stage, model_folder
        self.dataset = make_dataset(stage, open_images)

    def __call__(
        self, output_dir: Path, precision: str = "no", accumulation: int = 1, **options
    ) -> EliteObjective:
        fresh = {"max_steps": 3, "batch_size": 2, "learning_rate": LEARNING_RATE, "seed": 5}
        forget_accelerate()
        objective = make_objective(self.stage, self.model_folder)
        accelerator = make_accelerator(precision, accumulation, cpu=True)
        fit(objective, self.dataset, accelerator, output_dir=output_dir, **{**fresh, **options})
        return objective


@pytest.fixture(params=STAGES)
def train(request, model_folder, open_images) -> Trainer:
    return Trainer(request.param, model_folder, open_images)


@pytest.fixture
def train_global(model_folder, open_images) -> Trainer:
    return Trainer("global", model_folder, open_images)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest max|a - b| / max|b| of a tensor."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-3)) for k in b)


def metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(output_dir)]


# --- what training does ---------------------------------------------------------------------------


def test_loss_falls_on_the_samples_trained_on(train, tmp_path):
    """Measured on the same samples, noise and timesteps before and after."""
    stream = TrainingStream(train.dataset, seed=5)
    batch = collate([stream[position] for position in range(12)])
    del batch["failures"], batch["sample_index"]
    with torch.no_grad():
        before = make_objective(train.stage, train.model_folder)(batch)["mse"]
    trained = train(tmp_path, max_steps=25, batch_size=6, learning_rate=3e-3)
    with torch.no_grad():
        after = trained(batch)["mse"]
    assert after < 0.99 * before


def test_only_the_mapper_of_the_stage_changes(train, tmp_path):
    start, trained = make_objective(train.stage, train.model_folder), train(tmp_path)
    own = f"{train.stage}_mapper."
    end = weights(trained)
    for key, value in weights(start).items():
        # K and V are reached through the UNet's processors, everything else by its own name.
        assert torch.equal(value, end[key]) == (not key.startswith(own)), key


def test_gradients_exist_for_the_mapper_alone(train):
    objective = make_objective(train.stage, train.model_folder)
    batch = collate([TrainingStream(train.dataset, seed=5)[0]])
    objective(batch)["loss"].backward()
    for name, parameter in objective.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == name.startswith(f"{train.stage}_mapper."), name


def test_result_is_a_mapper_that_the_pipeline_loads(train, tmp_path):
    objective = train(tmp_path)
    name, kind = (
        f"{train.stage}_mapper",
        {"global": GlobalMapper, "local": LocalMapper}[train.stage],
    )
    parts = load_parts(train.model_folder)
    loaded = load_mapper(kind, tmp_path / name, parts["unet"], parts["image_encoder"])
    assert identical(weights(loaded), weights(objective.trained))
    assert not list(tmp_path.glob(".*")), "temporary files were left"


def test_what_is_logged(train, tmp_path):
    train(tmp_path, config={"learning_rate": LEARNING_RATE}, save_steps=2)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["loss"] == pytest.approx(line["mse"] + line["penalty"], rel=1e-5)
        assert line["grad_norm"] > 0 and line["samples_per_second"] > 0
        assert line["lr"] == LEARNING_RATE and 0 < line["waiting_for_data"] < 1
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    saved = json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())
    assert saved == {
        **{"step": 2, "samples_per_step": 2, "dataset_size": 6, "precision": "no"},
        "learning_rate": LEARNING_RATE,
    }
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))


def test_logged_rate_is_that_of_the_step(tmp_path):
    train_toy(tmp_path, max_steps=4, learning_rate=1.0, lr_scheduler="linear", save_steps=2)
    assert [line["lr"] for line in metrics(tmp_path)] == [1.0, 0.75, 0.5, 0.25]
    resumed = {"resume": "checkpoint-2", "lr_scheduler": "linear", "learning_rate": 1.0}
    train_toy(tmp_path, max_steps=4, save_steps=2, **resumed)
    assert [line["lr"] for line in metrics(tmp_path)] == [1.0, 0.75, 0.5, 0.25]


def test_a_polynomial_schedule_ends_where_diffusers_ends_it(tmp_path):
    train_toy(tmp_path, max_steps=4, learning_rate=1e-6, lr_scheduler="polynomial")
    expected = pytest.approx([1e-6, 7.75e-7, 5.5e-7, 3.25e-7])
    assert [line["lr"] for line in metrics(tmp_path)] == expected


def test_waiting_for_slow_samples_is_logged(tmp_path):
    class SlowNumbers(Numbers):
        def sample(self, index, rng):
            time.sleep(0.1)
            return super().sample(index, rng)

    train_toy(tmp_path, SlowNumbers(100), max_steps=2)
    assert all(0.5 < line["waiting_for_data"] < 1 for line in metrics(tmp_path))


def test_checkpoint_limit_keeps_the_newest(train_global, tmp_path):
    train_global(tmp_path, max_steps=12, save_steps=1, batch_size=1, checkpoints_total_limit=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-12"]


@pytest.mark.parametrize("sharded", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_shards_is_refused(sharded, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{sharded}", "true")  # as `accelerate launch` does
    with pytest.raises(ValueError, match=f"distributed_type {sharded} .* use MULTI_GPU"):
        make_accelerator(cpu=True)


# --- what must not matter -------------------------------------------------------------------------


def test_same_seed_same_run_other_seed_other_run(train_global, tmp_path):
    first, second = train_global(tmp_path / "a"), train_global(tmp_path / "b")
    other = train_global(tmp_path / "c", seed=6)
    assert identical(weights(first), weights(second))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert not identical(weights(first), weights(other))


def test_latest_checkpoint_continues_bit_for_bit(train, tmp_path):
    options = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "save_steps": 2, "ema_decay": 0.9}
    whole = train(tmp_path / "whole", max_steps=4, **options)
    train(tmp_path / "parts", max_steps=4, **options)  # stopped between steps 2 and 3:
    (tmp_path / "parts" / "checkpoint-4" / "training_state.pt").unlink()
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "parts" / "metrics.jsonl").write_text("".join(lines[:3]) + '{"step": 4, "lo')
    torch.manual_seed(99)  # the process's own random state plays no part

    resumed = train(tmp_path / "parts", max_steps=4, resume="latest", **options)
    assert identical(weights(resumed), weights(whole))
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [1, 2, 3, 4]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name in ("weights.safetensors", "training_state.pt"):
        a, b = (tmp_path / run / "checkpoint-4" / name for run in ("parts", "whole"))
        if name.endswith(".pt"):
            states = [torch.load(path, weights_only=True) for path in (a, b)]
            assert str(states[0]) == str(states[1])
        else:
            assert identical(load_file(a), load_file(b))


@pytest.mark.parametrize("which", ["checkpoint-2", "path"])
def test_resume_from_a_named_checkpoint(train_global, tmp_path, which):
    whole = train_global(tmp_path, save_steps=2)
    resume = which if which == "checkpoint-2" else str(tmp_path / "checkpoint-2")
    assert identical(weights(train_global(tmp_path, resume=resume)), weights(whole))


def test_nothing_to_resume(train_global, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        train_global(tmp_path, resume="latest")
    with pytest.raises(ValueError, match="checkpoint-7: not a checkpoint"):
        train_global(tmp_path, resume="checkpoint-7")


def test_checkpoint_of_another_stage_or_without_ema(
    train_global, model_folder, open_images, tmp_path
):
    train_global(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="checkpoint of another model or stage"):
        Trainer("local", model_folder, open_images)(tmp_path, resume="latest")
    with pytest.raises(ValueError, match="checkpoint without EMA"):
        train_global(tmp_path, resume="latest", ema_decay=0.9)


def test_previews_leave_the_run_untouched(train, tmp_path):
    plain = train(tmp_path / "plain")
    drawn = []

    def preview() -> Image.Image:
        torch.rand(5)  # a preview that uses the process's random numbers
        drawn.append(torch.is_grad_enabled())
        return Image.new("RGB", (8, 8))

    previewed = train(tmp_path / "previewed", preview=preview, validation_steps=1)
    assert drawn == [False] * 3
    assert identical(weights(plain), weights(previewed))
    assert losses(tmp_path / "plain") == losses(tmp_path / "previewed")
    names = sorted(path.name for path in (tmp_path / "previewed" / "previews").iterdir())
    assert names == ["000001.png", "000002.png", "000003.png"]


def test_drawing_with_the_models_in_training_leaves_the_run_untouched(
    train, tmp_path, model_folder
):
    """The preview of the scripts composes a pipeline of the very models that are trained."""
    plain = train(tmp_path / "plain")
    objective = make_objective(train.stage, model_folder)
    parts = load_parts(model_folder) | {
        name: getattr(objective, name) for name in ("unet", "vae", "image_encoder")
    }
    parts["text_encoder"] = objective.text_encoders[0]

    def preview() -> Image.Image:
        pipe = ElitePipeline(
            **parts, global_mapper=objective.global_mapper, local_mapper=objective.local_mapper
        )
        pipe.set_progress_bar_config(disable=True)
        concept = pipe.encode_concept(*tiny.picture(0))
        return pipe("a S", concept=concept, seed=1, num_inference_steps=2).images[0]

    options = {"max_steps": 3, "batch_size": 2, "learning_rate": LEARNING_RATE, "seed": 5}
    accelerator = make_accelerator("no", 1, cpu=True)
    options |= {"output_dir": tmp_path / "drawn", "preview": preview, "validation_steps": 1}
    fit(objective, train.dataset, accelerator, **options)
    assert identical(weights(objective), weights(plain))
    assert losses(tmp_path / "plain") == losses(tmp_path / "drawn")


def test_loader_processes_change_nothing(train_global, tmp_path):
    here = train_global(tmp_path / "here", max_steps=2)
    elsewhere = train_global(tmp_path / "elsewhere", max_steps=2, num_workers=1)
    assert identical(weights(here), weights(elsewhere))


def test_accumulation_equals_a_larger_batch(train, tmp_path):
    accumulated = train(tmp_path / "accumulated", accumulation=2, batch_size=2)
    at_once = train(tmp_path / "at_once", batch_size=4)
    assert losses(tmp_path / "accumulated") == pytest.approx(losses(tmp_path / "at_once"), rel=SAME)
    assert distance(weights(accumulated), weights(at_once)) < SAME
    other = train(tmp_path / "other", batch_size=3)
    assert distance(weights(other), weights(at_once)) > SAME


def test_bf16_keeps_the_trained_weights_in_float32(train, tmp_path):
    objective = train(tmp_path, precision="bf16", max_steps=2)
    assert {p.dtype for p in objective.trained.parameters()} == {torch.float32}
    saved = load_file(tmp_path / "checkpoint-2" / "weights.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    # Steps of 1e-4 of the weight vanish in bf16, whose numbers are 4e-3 apart.
    start = weights(make_objective(train.stage, train.model_folder).trained)
    moved = weights(objective.trained)
    share = [float((start[key] != moved[key]).float().mean()) for key in start]
    assert min(share) > 0.5
    train(tmp_path / "exact", max_steps=2)
    assert losses(tmp_path) != losses(tmp_path / "exact"), "autocast had no effect"
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "exact"), rel=0.05)


@pytest.mark.parametrize(
    ("precision", "positions", "fused"),
    [("bf16", 64, False), ("bf16", 4096, True), ("bf16", None, True), ("no", 64, True)],
)
def test_attention_is_fused_but_over_few_positions_in_bf16(
    precision, positions, fused, train_global, tmp_path, monkeypatch
):
    """The plain formula took 2.5 times as long as the fused kernel at Stable Diffusion's sizes."""
    seen, forward = [], GlobalObjective.forward
    monkeypatch.setattr(
        GlobalObjective,
        "forward",
        lambda *args: seen.append(torch.backends.cuda.flash_sdp_enabled()) or forward(*args),
    )
    train_global(tmp_path, precision, max_steps=1, attention_positions=positions)
    assert seen == [fused]


# --- averages and trouble -------------------------------------------------------------------------


def test_moving_average_becomes_the_mapper(train_global, tmp_path):
    plain = train_global(tmp_path / "plain", learning_rate=1e-2)
    averaged = train_global(tmp_path / "averaged", learning_rate=1e-2, ema_decay=0.9)
    assert not identical(weights(averaged), weights(plain))
    plain_end, averaged_end = (
        load_file(tmp_path / run / "checkpoint-3" / "weights.safetensors")
        for run in ("plain", "averaged")
    )
    assert identical(plain_end, averaged_end), "the average must not feed back into the run"


# --- processes ------------------------------------------------------------------------------------


def settings(stage: str, model_folder: Path, mapper_folder: Path, open_images: Path) -> dict:
    mappers = {"global_mapper_path": mapper_folder / "global_mapper"}
    if stage == "local":
        mappers["local_mapper_path"] = mapper_folder / "local_mapper"
    return {
        "pretrained_model_name_or_path": model_folder,
        "train_data_dir": open_images,
        "max_train_steps": 3,
        "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE,
        "validation_steps": 0,
        **mappers,
    }


def command_line(stage: str, settings: dict) -> list[str]:
    flags = [str(text) for name, value in settings.items() for text in (f"--{name}", value)]
    return [f"train_{stage}.py", *flags]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, model_folder, mapper_folder, open_images) -> Path:
    """Folder with `global/` and `local/`, trained by two real processes of batch 2."""
    folder = tmp_path_factory.mktemp("two")
    calls = []
    for stage in STAGES:
        own = settings(stage, model_folder, mapper_folder, open_images)
        own |= {"output_dir": folder / stage, "train_batch_size": 2}
        calls += ["--", *command_line(stage, own)]
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", "configs/cpu_2.json", "tests/run_scripts.py", *calls[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(launch, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("samples, 4 per step") == 2, run.stdout  # said once, by one process
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one_of_twice_the_batch(
    stage, tmp_path, two_processes, model_folder, mapper_folder, open_images
):
    own = settings(stage, model_folder, mapper_folder, open_images)
    own |= {"output_dir": tmp_path, "train_batch_size": 4}
    assert run_script(*command_line(stage, own)) == 0
    two = two_processes / stage
    assert len(losses(two)) == 3 and losses(two) == pytest.approx(losses(tmp_path), rel=SAME)
    trained = [load_file(run / "checkpoint-3" / "weights.safetensors") for run in (two, tmp_path)]
    assert distance(*trained) < SAME
    start, final = (
        load_file(folder / f"{stage}_mapper" / "diffusion_pytorch_model.safetensors")
        for folder in (mapper_folder, tmp_path)
    )
    assert distance(final, start) > 10 * SAME
