"""The one training loop: accumulate, clip, step, log, preview, save, resume, stop. It knows nothing
of what it trains.

Everything random about a sample comes from the sample's own seed (see `stream.TrainingStream` and
`objectives.seeded_noise`), so the loop has no random state to keep: resuming, previews, other batch
sizes and more processes all see the same samples and the same noise.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from elite.config import save_config
from elite.console import Stopped, StopSignals
from elite.files import write_atomically, write_json
from elite.run_folder import SETTINGS, check_settings, find_checkpoint, locked, prune, seal
from elite.stream import Failure, Samples, TrainingStream, read_batches, stream_loader

UNREADABLE_TOLERATED = 0.05  # share of the dataset; a larger one stops the run
HOPELESS_AFTER = 100  # failures, from which on twice that share of what was tried stops it, too
SKIPPED_TOLERATED = 10  # steps in a row whose loss or gradient is not finite
UNREADABLE_LISTED = 20


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
        ValueError: nothing to resume, a checkpoint of another model, a folder that holds a run of
            other settings or is in use, a loss that stays not finite, too many unreadable samples
            (the message lists them), or a disk that takes no more.
        Stopped: SIGTERM or SIGINT came; the step it came in is finished and saved.
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
    accumulation = accelerator.gradient_accumulation_steps
    samples_per_step = batch_size * accumulation * accelerator.num_processes
    run = _Run(output_dir, logging_dir, accelerator, dataset, samples_per_step, config or {})
    state = _State(trained, optimizer, schedule, ema, accelerator.scaler, run.tally)
    with StopSignals() as stop, run:
        step = run.start(state, resume, max_steps)
        model, optimizer = accelerator.prepare(objective, optimizer)
        model.train()
        loader = stream_loader(
            TrainingStream(dataset, seed),
            batch_size=batch_size,
            start=step * samples_per_step,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_workers=num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        batches = read_batches(loader)
        run.at_end(batches.close)  # and with it the loader's processes
        while step < max_steps:
            # Accumulate.
            started, logs, shown, failures = time.monotonic(), [], [], []
            for _ in range(accumulation):
                batch = _to_device(next(batches), accelerator.device)
                failures += batch.pop("failures")
                shown.append(batch.pop("sample_index"))
                with accelerator.accumulate(model):
                    out = model(batch)
                    accelerator.backward(out["loss"])  # divides by the accumulation
                logs.append({key: value.detach().float() for key, value in out.items()})
            norm = float(accelerator.clip_grad_norm_(trained.values(), max_grad_norm))
            step += 1

            # Agree among the processes on what happened.
            happened = {"unreadable": len(failures), "stop": stop.asked is not None}
            metrics, anywhere = _reduce(logs, happened, accelerator)
            if anywhere["unreadable"]:
                run.note_unreadable(failures, step)
            finite = math.isfinite(metrics["loss"]) and math.isfinite(norm)
            run.note_finite(finite, step, metrics["loss"], logs, shown)

            # Step.
            if finite or accelerator.scaler is not None:  # a scaler skips by itself, and adapts
                optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if ema is not None and finite:
                ema.step(trained.values())

            # Log.
            metrics |= {
                "grad_norm": norm,
                "lr": schedule.get_last_lr()[0],
                "samples_per_second": samples_per_step / (time.monotonic() - started),
            }
            run.log(step, metrics)

            # Preview, save and stop.
            ends = step == max_steps or anywhere["stop"]
            if preview is not None and validation_steps and step % validation_steps == 0:
                run.preview(step, preview, objective)
            if ends or (finite and save_steps and step % save_steps == 0):
                run.save(step, state, checkpoints_total_limit)
            if ends:
                break
        run.sum_up(step)
        accelerator.wait_for_everyone()
        if step < max_steps:
            raise Stopped
        if accelerator.is_main_process:
            if ema is not None:
                ema.copy_to(trained.values())
            objective.save_pretrained(output_dir)
        accelerator.wait_for_everyone()


class _State:
    """All that a run is: trained weights, optimiser, schedule, EMA, loss scaler, tally, step."""

    def __init__(
        self,
        trained: dict[str, nn.Parameter],
        optimizer: Optimizer,
        schedule: LRScheduler,
        ema: EMAModel | None,
        scaler: torch.amp.GradScaler | None,
        tally: "_Tally",
    ) -> None:
        self.trained, self.optimizer, self.schedule, self.ema = trained, optimizer, schedule, ema
        self.scaler, self.tally = scaler, tally

    def save(self, folder: Path, step: int) -> None:
        weights = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}
        save_file(weights, folder / "weights.safetensors")
        state = {
            "step": step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "tally": self.tally.state_dict(),
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
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.tally.load_state_dict(state["tally"])
        return state["step"]


class _Tally:
    """Exact counts, over all parts of a run, of what did not go as it should."""

    def __init__(self) -> None:
        self.unreadable: Counter[str] = Counter()  # by reason, each time it was met
        self.bad_samples: dict[int, str] = {}  # the samples it was met in, with the message
        self.skipped = 0  # steps
        self.skipped_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "unreadable": dict(self.unreadable)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.unreadable = Counter(self.unreadable)

    def reasons(self) -> str:
        """E.g. "3 x no such file, 1 x not a readable image"."""
        counted = sorted(self.unreadable.items())
        return ", ".join(f"{count} x {reason}" for reason, count in counted)

    def __str__(self) -> str:
        parts = []
        if self.unreadable:
            parts.append(
                f"{len(self.bad_samples)} samples were unreadable and replaced, "
                f"{self.unreadable.total()} times in all: {self.reasons()}"
            )
        if self.skipped:
            parts.append(f"{self.skipped} steps were skipped, loss or gradient not finite")
        return "; ".join(parts)


class _Run:
    """The run's folder: metrics.jsonl, TensorBoard, previews, checkpoints. Only the main process
    writes."""

    def __init__(
        self,
        folder: Path,
        logging_dir: str,
        accelerator: Accelerator,
        dataset: Samples,
        samples_per_step: int,
        config: Mapping[str, Any],
    ) -> None:
        self.folder, self.logging_dir = folder, folder / logging_dir
        self.accelerator, self.is_main = accelerator, accelerator.is_main_process
        self.dataset, self.samples_per_step, self.config = dataset, samples_per_step, config
        self.tally = _Tally()
        self._open = ExitStack()

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def __enter__(self) -> Self:
        if self.is_main:
            self._open.enter_context(locked(self.folder))
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def at_end(self, call: Callable[[], object]) -> None:
        """To be called when the run ends, well or not."""
        self._open.callback(call)

    def say(self, line: str) -> None:
        if self.is_main:
            tqdm.write(line)

    def start(self, state: _State, resume: str | None, max_steps: int) -> int:
        """Loads the checkpoint to go on from, if any, and opens the logs; their lines beyond it are
        dropped. Returns the step."""
        settings = {"samples_per_step": self.samples_per_step, **self.config}
        check_settings(self.folder, settings, resumes=resume is not None)
        step = state.load(find_checkpoint(self.folder, resume, self.say)) if resume else 0
        if not self.is_main:
            return step
        if self.config:
            save_config(self.config, self.folder / "config.yaml")
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        text = "".join(line + "\n" for line in kept)
        write_atomically(
            self.metrics_file, lambda temporary: temporary.write_text(text, encoding="utf-8")
        )
        self.board = SummaryWriter(str(self.logging_dir), purge_step=step + 1)
        self._open.callback(self.board.close)
        bar = tqdm(total=max_steps, initial=step, desc="train", unit="step")
        self.progress = self._open.enter_context(bar)
        return step

    def _lines(self) -> Iterator[str]:
        if self.metrics_file.exists():
            yield from (
                line
                for line in self.metrics_file.read_text(encoding="utf-8").splitlines()
                if line.endswith("}")
            )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Values that are not finite are left out; counts of what went wrong are added."""
        if not self.is_main:
            return
        known = {key: value for key, value in metrics.items() if math.isfinite(value)}
        counts = {"unreadable": self.tally.unreadable.total(), "skipped": self.tally.skipped}
        known |= {key: count for key, count in counts.items() if count}
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **known}) + "\n")
            for key, value in known.items():
                self.board.add_scalar(key, value, step)
        except OSError as error:
            raise ValueError(
                f"{self.folder}: logs cannot be written ({error.strerror}); free some space and "
                "resume"
            ) from None
        self.progress.update()
        self.progress.set_postfix(loss=f"{metrics['loss']:.4f}")

    def note_unreadable(self, failures: list[Failure], step: int) -> None:
        """Counts what any process could not read. Raises ValueError where that is too much."""
        failures = gather_object(failures)
        for failure in failures:
            self.say(f"skipped: {failure.message}")
        tally = self.tally
        tally.unreadable.update(failure.reason for failure in failures)
        tally.bad_samples.update(failures)
        bad, size, times = len(tally.bad_samples), len(self.dataset), tally.unreadable.total()
        tried = step * self.samples_per_step + times
        if bad > UNREADABLE_TOLERATED * size:
            self._stop_for_unreadable(f"{bad} of {size} samples")
        if times > HOPELESS_AFTER and times > 2 * UNREADABLE_TOLERATED * tried:
            self._stop_for_unreadable(f"{times} of the {tried} samples tried")

    def _stop_for_unreadable(self, how_many: str) -> NoReturn:
        messages, path = list(self.tally.bad_samples.values()), self.folder / "unreadable.txt"
        if self.is_main:
            text = "".join(message + "\n" for message in messages)
            write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        raise ValueError(
            f"{how_many} could not be read ({self.tally.reasons()}), which is over "
            f"{UNREADABLE_TOLERATED:.0%}; repair or remove them, {path} lists all; the last are: "
            + "; ".join(messages[-UNREADABLE_LISTED:])
        )

    def note_finite(
        self,
        finite: bool,
        step: int,
        loss: float,
        logs: list[dict[str, Tensor]],
        shown: list[list[int]],
    ) -> None:
        """Counts a step that is skipped and names its samples, where known those at fault. Raises
        ValueError after too many in a row."""
        tally = self.tally
        if finite:
            tally.skipped_in_a_row = 0
            return
        tally.skipped += 1
        tally.skipped_in_a_row += 1
        micro_batches = gather_object(
            [(bool(log["loss"].isfinite()), some) for log, some in zip(logs, shown, strict=True)]
        )
        faulty = [some for is_finite, some in micro_batches if not is_finite]
        named = [i for some in faulty or [some for _, some in micro_batches] for i in some]
        what = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
        self.say(
            f"step {step}: {what}; skipped ({tally.skipped} so far), samples "
            + ", ".join(self.dataset.name(index) for index in named)
        )
        if tally.skipped_in_a_row == SKIPPED_TOLERATED:
            raise ValueError(
                f"{what} at step {step}, in {SKIPPED_TOLERATED} steps in a row; lower "
                "--learning_rate or use --mixed_precision no, and resume from a checkpoint before"
            )

    def preview(self, step: int, preview: Callable[[], Image.Image], objective: Objective) -> None:
        """A picture of what the model does now; the training stream does not notice, and a preview
        that fails is only told of."""
        if not self.is_main:
            return
        try:
            with torch.no_grad(), torch.random.fork_rng(), self.accelerator.autocast():
                picture = preview()
            write_atomically(self.folder / "previews" / f"{step:06d}.png", picture.save)
        except Exception as error:  # whatever it is, training does not depend on it
            self.say(f"preview of step {step} failed ({type(error).__name__}: {error})")
        objective.train()

    def save(self, step: int, state: _State, limit: int | None) -> None:
        if not self.is_main:
            return

        def write(folder: Path) -> None:
            folder.mkdir()
            state.save(folder, step)
            settings = {"step": step, "samples_per_step": self.samples_per_step, **self.config}
            write_json(folder / SETTINGS, settings)
            seal(folder)

        with self.metrics_file.open(encoding="utf-8") as file:
            os.fsync(file.fileno())
        checkpoint = self.folder / f"checkpoint-{step}"
        write_atomically(checkpoint, write)
        if limit is not None:
            prune(self.folder, checkpoint, limit, self.say)

    def sum_up(self, step: int) -> None:
        """Says how the run has gone."""
        if summary := str(self.tally):
            self.say(f"by step {step} {summary}")


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def _reduce(
    logs: list[dict[str, Tensor]], happened: Mapping[str, int], accelerator: Accelerator
) -> tuple[dict[str, float], dict[str, bool]]:
    """Means over the micro-batches and the processes, and what happened in any of them."""
    means = [torch.stack([log[key] for log in logs]).mean() for key in logs[0]]
    flags = torch.tensor([float(bool(value)) for value in happened.values()])
    both = torch.cat([torch.stack(means), flags.to(means[0])])
    reduced = accelerator.reduce(both, reduction="mean").tolist()
    anywhere = [value > 0 for value in reduced[len(means) :]]
    return (
        dict(zip(logs[0], reduced, strict=False)),
        dict(zip(happened, anywhere, strict=True)),
    )
