"""The one training loop: accumulate, clip, step, log, preview, save, resume. It knows nothing of
what it trains.

Everything random about a sample comes from the sample's own seed (see `stream.TrainingStream` and
`objectives.seeded_noise`), so the loop has no random state to keep: resuming, previews, other batch
sizes and more processes all see the same samples and the same noise.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from elite.files import write_atomically, write_json
from elite.stream import Samples, TrainingStream, stream_loader

FAILURES_TOLERATED = 0.1  # share of unreadable samples that stops a run ...
FAILURES_IGNORED = 20  # ... once there are more than these


class Objective(Protocol):
    """What `fit` trains: a module whose forward gives {"loss": scalar, other scalars to log}."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def train(self) -> Any: ...

    def save_pretrained(self, folder: Path) -> None:
        """Exports what was trained into `folder`, for users."""


def make_accelerator(
    mixed_precision: str | None = None, accumulation: int = 1, cpu: bool = False
) -> Accelerator:
    """An Accelerator for `fit`; None takes the precision that `accelerate launch` was given."""
    return Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulation,
        cpu=cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def fit(
    objective: Objective,
    dataset: Samples,
    accelerator: Accelerator,
    *,
    output_dir: Path,  # checkpoints, metrics, previews, and at the end the trained parts
    max_steps: int,  # optimiser steps
    batch_size: int,  # samples per micro-batch and process
    seed: int = 0,  # of the order of samples and of all that is random in them
    num_workers: int = 0,  # loader processes, 0 loads in this one
    learning_rate: float,  # as the optimiser gets it
    lr_scheduler: str = "constant",  # a name of diffusers.optimization
    lr_warmup_steps: int = 0,
    adam_betas: tuple[float, float] = (0.9, 0.999),
    adam_epsilon: float = 1e-8,
    weight_decay: float = 1e-2,
    max_grad_norm: float = 1.0,
    save_steps: int = 500,  # 0 saves at the end only
    checkpoints_total_limit: int | None = None,  # None keeps all
    resume: str | None = None,  # "latest", a checkpoint folder, or None to start anew
    ema_decay: float | None = None,  # None trains without EMA
    preview: Callable[[], Image.Image] | None = None,
    validation_steps: int = 0,  # optimiser steps between previews, 0 for none
    logging_dir: str = "logs",
    config: Mapping[str, Any] | None = None,  # embedded in every checkpoint
) -> None:
    """Trains the parameters of `objective` that require gradients.

    Args:
        objective: see `Objective`.
        dataset: shown in an endless shuffled stream that every process reads its share of.
        accelerator: precision, devices, accumulation and processes.

    Raises:
        ValueError: nothing to resume, a checkpoint of another model, a loss that is not finite, or
            too many unreadable samples (the message lists them).
    """
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(),
        lr=learning_rate,
        betas=adam_betas,
        eps=adam_epsilon,
        weight_decay=weight_decay,
        fused=True,
    )
    schedule = get_scheduler(
        lr_scheduler, optimizer, num_warmup_steps=lr_warmup_steps, num_training_steps=max_steps
    )
    ema = None
    if ema_decay is not None:
        ema = EMAModel(trained.values(), decay=ema_decay, use_ema_warmup=True, power=0.75)
    run = _Run(output_dir, logging_dir, accelerator.is_main_process, dict(config or {}))
    state = _State(trained, optimizer, schedule, ema)
    step = state.load(find_checkpoint(output_dir, resume)) if resume else 0
    run.start(step)

    model, optimizer = accelerator.prepare(objective, optimizer)
    model.train()
    accumulation = accelerator.gradient_accumulation_steps
    samples_per_step = batch_size * accumulation * accelerator.num_processes
    loader = stream_loader(
        TrainingStream(dataset, seed),
        batch_size=batch_size,
        start=step * samples_per_step,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    batches = iter(loader)
    progress = tqdm(
        total=max_steps,
        initial=step,
        desc="train",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    while step < max_steps:
        # Accumulate.
        started, logs = time.monotonic(), []
        for _ in range(accumulation):
            batch = _to_device(next(batches), accelerator.device)
            run.note_failures(batch.pop("failures", []), step * samples_per_step + batch_size)
            with accelerator.accumulate(model):
                out = model(batch)
                accelerator.backward(out["loss"])  # divides by the accumulation
            logs.append({key: value.detach().float() for key, value in out.items()})

        # Clip and step.
        norm = accelerator.clip_grad_norm_(trained.values(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if ema is not None:
            ema.step(trained.values())
        step += 1

        # Log.
        metrics = _reduce(logs, accelerator)
        if not math.isfinite(metrics["loss"]):
            raise ValueError(
                f"loss is {metrics['loss']} at step {step}; lower --learning_rate or use "
                "--mixed_precision no"
            )
        metrics |= {
            "grad_norm": float(norm),
            "lr": schedule.get_last_lr()[0],
            "samples_per_second": samples_per_step / (time.monotonic() - started),
        }
        run.log(step, metrics)
        progress.update()
        progress.set_postfix(loss=f"{metrics['loss']:.4f}")

        # Preview and save.
        if accelerator.is_main_process:
            if preview is not None and validation_steps and step % validation_steps == 0:
                with accelerator.autocast():
                    run.preview(step, preview, objective)
            if step == max_steps or (save_steps and step % save_steps == 0):
                run.save(step, state, checkpoints_total_limit)
    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            ema.copy_to(trained.values())
        objective.save_pretrained(output_dir)
        run.close()
    accelerator.wait_for_everyone()


def find_checkpoint(output_dir: Path, resume: str) -> Path:
    """The folder to resume from. Raises ValueError if there is none."""
    if resume != "latest":
        folder = Path(resume) if Path(resume).is_dir() else output_dir / resume
        if not (folder / "training_state.pt").exists():
            raise ValueError(
                f"{resume}: not a checkpoint; expected 'latest' or a checkpoint-N folder"
            )
        return folder
    found = checkpoints(output_dir)
    if not found:
        raise ValueError(
            f"{output_dir}: no checkpoint to resume from; leave out --resume_from_checkpoint to "
            "start anew"
        )
    return found[-1]


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[-1]))


class _State:
    """All that a run is: trained weights, optimiser, schedule, EMA, step."""

    def __init__(
        self,
        trained: dict[str, nn.Parameter],
        optimizer: Optimizer,
        schedule: LRScheduler,
        ema: EMAModel | None,
    ) -> None:
        self.trained, self.optimizer, self.schedule, self.ema = trained, optimizer, schedule, ema

    def save(self, folder: Path, step: int) -> None:
        weights = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}
        save_file(weights, folder / "weights.safetensors")
        state = {
            "step": step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        torch.save(state, folder / "training_state.pt")

    def load(self, folder: Path) -> int:
        """Returns the step."""
        weights = load_file(folder / "weights.safetensors")
        if {k: v.shape for k, v in weights.items()} != {
            k: v.shape for k, v in self.trained.items()
        }:
            raise ValueError(
                f"{folder}: checkpoint of another model or stage; resume with its own config"
            )
        state = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            if state["ema"] is None:
                raise ValueError(f"{folder}: checkpoint without EMA; resume without --ema")
            self.ema.load_state_dict(state["ema"])
        return state["step"]


class _Run:
    """The run's folder: metrics.jsonl, TensorBoard, previews, checkpoints. Only the main process
    writes."""

    def __init__(self, folder: Path, logging_dir: str, is_main: bool, config: dict) -> None:
        self.folder, self.is_main, self.config = folder, is_main, config
        self.logging_dir = folder / logging_dir
        self.failures: list[str] = []
        self.board: SummaryWriter | None = None

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def start(self, step: int) -> None:
        """Opens the logs; lines of an earlier try beyond the step resumed from are dropped."""
        if not self.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        text = "".join(line + "\n" for line in kept)
        write_atomically(
            self.metrics_file, lambda temporary: temporary.write_text(text, encoding="utf-8")
        )
        self.board = SummaryWriter(str(self.logging_dir), purge_step=step + 1)

    def _lines(self) -> Iterator[str]:
        if self.metrics_file.exists():
            yield from (
                line
                for line in self.metrics_file.read_text(encoding="utf-8").splitlines()
                if line.endswith("}")
            )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.board is None:
            return
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for key, value in metrics.items():
            self.board.add_scalar(key, value, step)

    def note_failures(self, failures: list[str], seen: int) -> None:
        for failure in failures:
            tqdm.write(f"skipped: {failure}")
        self.failures += failures
        count = len(self.failures)
        if count > FAILURES_IGNORED and count > FAILURES_TOLERATED * seen:
            listed = "\n  ".join(self.failures[-FAILURES_IGNORED:])
            raise ValueError(
                f"{count} of about {seen} samples could not be read; the last are\n  {listed}"
            )

    def preview(self, step: int, preview: Callable[[], Image.Image], objective: Objective) -> None:
        """A picture of what the model does now; the training stream does not notice."""
        with torch.no_grad(), torch.random.fork_rng():
            picture = preview()
        objective.train()
        path = self.folder / "previews" / f"{step:06d}.png"
        write_atomically(path, picture.save)

    def save(self, step: int, state: _State, limit: int | None) -> None:
        def write(folder: Path) -> None:
            folder.mkdir()
            state.save(folder, step)
            write_json(folder / "config.json", {"step": step, **self.config})

        write_atomically(self.folder / f"checkpoint-{step}", write)
        if limit is not None:
            for old in checkpoints(self.folder)[:-limit]:
                shutil.rmtree(old)

    def close(self) -> None:
        if self.failures:
            tqdm.write(f"{len(self.failures)} samples were unreadable and replaced")
        if self.board is not None:
            self.board.close()


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def _reduce(logs: list[dict[str, Tensor]], accelerator: Accelerator) -> dict[str, float]:
    """Means over the micro-batches and the processes."""
    means = {key: torch.stack([log[key] for log in logs]).mean() for key in logs[0]}
    reduced = accelerator.reduce(means, reduction="mean")
    return {key: float(value) for key, value in reduced.items()}
