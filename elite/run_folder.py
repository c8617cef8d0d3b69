"""The folder of a training run: state, log and previews, whole checkpoints, one set of settings,
one writer."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from elite.config import save_config
from elite.files import (
    remove_leftovers,
    remove_whole,
    sha256_of,
    try_lock,
    write_atomically,
    write_json,
    write_text,
)
from elite.stream import Failure, Samples

HASHES = "hashes.json"
SETTINGS = "config.json"  # in every checkpoint
LOCK = "run.lock"
# Settings that parts of one run may differ in: they say where, how long and with what it runs, and
# change what is learned by rounding at most. The product of batch, accumulation and processes is
# held fast as samples_per_step.
MAY_CHANGE = {
    "cache_latents",
    "checkpoints_total_limit",
    "compile",
    "dataloader_num_workers",
    "dry_run",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "hub_model_id",
    "infer_during_train",
    "infer_interval",
    "infer_prompt",
    "logging_dir",
    "max_train_steps",
    "num_infer_images",
    "num_train_epochs",
    "num_validation_images",
    "output_dir",
    "push_to_hub",
    "resume_from_checkpoint",
    "save_steps",
    "shard_cache",
    "shard_cache_gb",
    "shard_optimizer",
    "train_batch_size",
    "validation_data_dir",
    "validation_steps",
}
ANOTHER_FOLDER = "choose another --output_dir"
UNREADABLE_TOLERATED = 0.05  # share of the dataset; a larger one stops the run,
MIN_FAILURES_JUDGED = 100  # and after so many failures twice that share of what was tried
SKIPPED_TOLERATED = 10  # steps in a row whose loss or gradient is not finite
UNREADABLE_LISTED = 20


# --- the run --------------------------------------------------------------------------------------


class Tally:
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


class RunState:
    """All that a run is: trained weights, optimiser, schedule, EMA, loss scaler, tally, step."""

    def __init__(
        self,
        trained: dict[str, nn.Parameter],
        optimizer: Optimizer,
        schedule: LRScheduler,
        ema: EMAModel | None,
        scaler: torch.amp.GradScaler | None,
        tally: Tally,
    ) -> None:
        self.trained = trained
        # What has a state of its own, by its name in the file.
        parts = {"optimizer": optimizer, "schedule": schedule, "ema": ema, "scaler": scaler}
        self.parts: dict[str, Any] = {**parts, "tally": tally}

    def gather(self) -> None:
        """Brings what is sharded to the main process, which saves. For all processes."""
        if isinstance(self.parts["optimizer"], ZeroRedundancyOptimizer):
            self.parts["optimizer"].consolidate_state_dict()

    def save(self, folder: Path, step: int) -> None:
        """Files that are the same whether the optimizer is sharded or not."""
        weights = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}
        save_file(weights, folder / "weights.safetensors")
        states = {
            name: None if part is None else part.state_dict() for name, part in self.parts.items()
        }
        torch.save({"step": step, **states}, folder / "training_state.pt")

    @staticmethod
    def read(folder: Path) -> dict[str, Any]:
        """What `save` wrote."""
        state = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
        return {**state, "weights": load_file(folder / "weights.safetensors"), "folder": folder}

    def restore(self, saved: dict[str, Any]) -> int:
        """Takes over what `read` gave. Returns the step."""
        weights, folder = saved["weights"], saved["folder"]
        if {k: v.shape for k, v in weights.items()} != {
            k: v.shape for k, v in self.trained.items()
        }:
            raise ValueError(
                f"{folder}: checkpoint of another model or stage; resume with its own config"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])
        if self.parts["ema"] is not None and saved["ema"] is None:
            raise ValueError(f"{folder}: checkpoint without EMA; resume without --ema")
        for name, part in self.parts.items():
            if part is not None and saved[name] is not None:
                part.load_state_dict(saved[name])
        return saved["step"]


class RunFolder:
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
        self.tally = Tally()
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
        """Calls this when the run ends, well or not."""
        self._open.callback(call)

    def say(self, line: str) -> None:
        if self.is_main:
            tqdm.write(line)

    def start(self, state: RunState, resume: str | None, max_steps: int) -> int:
        """Loads the checkpoint to go on from, if any, and opens the logs; their lines beyond it are
        dropped. Returns the step."""
        settings = {"samples_per_step": self.samples_per_step, **self.config}
        check_settings(self.folder, settings, resumes=resume is not None)
        step = self._resume(state, resume) if resume else 0
        if step > max_steps:
            raise ValueError(
                f"{self.folder}: the checkpoint is of step {step}, the run of {max_steps} steps; "
                "raise --max_train_steps, or resume from an earlier checkpoint"
            )
        if not self.is_main:
            return step
        if self.config:
            save_config(self.config, self.folder / "config.yaml")
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        write_text(self.metrics_file, "".join(line + "\n" for line in kept))
        self.board = SummaryWriter(str(self.logging_dir), purge_step=step + 1)
        self._open.callback(self.board.close)
        bar = tqdm(total=max_steps, initial=step, desc="train", unit="step")
        self.progress = self._open.enter_context(bar)
        return step

    def _resume(self, state: RunState, resume: str) -> int:
        """The main process reads the checkpoint for all, whose nodes may not have its folder."""
        saved: list[Any] = [None]
        if self.is_main:
            try:
                saved = [state.read(find_checkpoint(self.folder, resume, self.say))]
            except ValueError as error:
                saved = [error]
        broadcast_object_list(saved)
        if isinstance(saved[0], ValueError):
            raise saved[0]  # in every process, so that none waits for another
        return state.restore(saved[0])

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
        if times > MIN_FAILURES_JUDGED and times > 2 * UNREADABLE_TOLERATED * tried:
            self._stop_for_unreadable(f"{times} of the {tried} samples tried")

    def _stop_for_unreadable(self, how_many: str) -> NoReturn:
        messages, path = list(self.tally.bad_samples.values()), self.folder / "unreadable.txt"
        if self.is_main:
            text = "".join(message + "\n" for message in messages)
            write_text(path, text)
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

    def preview(self, step: int, preview: Callable[[], Image.Image]) -> None:
        """A picture of what the model draws now, outside the training stream; where it fails,
        training goes on."""
        if not self.is_main:
            return
        try:
            with torch.no_grad(), torch.random.fork_rng(), self.accelerator.autocast():
                picture = preview()
            write_atomically(self.folder / "previews" / f"{step:06d}.png", picture.save)
        except Exception as error:  # whatever it is, training does not depend on it
            self.say(f"preview of step {step} failed ({type(error).__name__}: {error})")

    def save(self, step: int, state: RunState, limit: int | None) -> None:
        state.gather()
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
        """Says how the run went."""
        if summary := str(self.tally):
            self.say(f"by step {step} {summary}")


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def seal(checkpoint: Path) -> None:
    """Writes the hashes by which `fault` knows later that every file is as it is now."""
    hashes = {path.name: sha256_of(path) for path in sorted(checkpoint.iterdir())}
    (checkpoint / HASHES).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")


def fault(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being used, in words; None where it is whole."""
    try:
        hashes = json.loads((checkpoint / HASHES).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if sha256_of(checkpoint / name) != expected:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
    except (ValueError, AttributeError):  # no JSON, or not of a mapping
        return f"{HASHES} is damaged"
    return None


def find_checkpoint(output_dir: Path, resume: str, say: Callable[[str], object] = print) -> Path:
    """The checkpoint to resume from.

    Args:
        resume: "latest" for the newest whole one of `output_dir`, or a checkpoint folder.
        say: called with a line for each damaged one that is passed over.

    Raises:
        ValueError: there is none, or the one named is damaged.
    """
    if resume != "latest":
        return _named_checkpoint(output_dir, resume)
    found = checkpoints(output_dir)
    for checkpoint in reversed(found):
        if (wrong := fault(checkpoint)) is None:
            return checkpoint
        say(f"{checkpoint}: {wrong}; it is passed over for the one before")
    none = f"none of {len(found)} checkpoints is whole" if found else "no checkpoint"
    raise ValueError(
        f"{output_dir}: {none} to resume from; leave out --resume_from_checkpoint to start anew"
        + (f" and {ANOTHER_FOLDER}" if found else "")
    )


def _named_checkpoint(output_dir: Path, name: str) -> Path:
    checkpoint = Path(name) if Path(name).is_dir() else output_dir / name
    if not checkpoint.is_dir():
        raise ValueError(f"{name}: not a checkpoint; expected 'latest' or a checkpoint-N folder")
    if (wrong := fault(checkpoint)) is not None:
        raise ValueError(f"{name}: not a whole checkpoint, {wrong}; resume from another one")
    return checkpoint


def prune(folder: Path, newest: Path, limit: int, say: Callable[[str], object] = print) -> None:
    """Leaves `limit` checkpoints up to the newest, once that one is seen to be whole.

    Those beyond it, of an earlier try, stay until the run has passed them.
    """
    if (wrong := fault(newest)) is not None:
        say(f"{newest}: {wrong}; older checkpoints are kept")
        return
    for old in [p for p in checkpoints(folder) if _step(p) <= _step(newest)][:-limit]:
        remove_whole(old)


# --- settings -------------------------------------------------------------------------------------


def check_settings(folder: Path, settings: Mapping[str, Any], resumes: bool) -> None:
    """Refuses a folder whose checkpoints are of a run with other settings, or would be overwritten.

    Raises:
        ValueError: names the keys that differ.
    """
    whole = next((p for p in reversed(checkpoints(folder)) if fault(p) is None), None)
    if whole is None:
        return
    saved = json.loads((whole / SETTINGS).read_text(encoding="utf-8"))
    differing = [
        f"{key} is {saved[key]!r} there, {settings[key]!r} here"
        for key in sorted(saved.keys() & settings.keys() - MAY_CHANGE)
        if saved[key] != settings[key]
    ]
    if differing:
        raise ValueError(
            f"{folder}: holds a run of other settings: {'; '.join(differing)}; {ANOTHER_FOLDER}, "
            f"and to branch off there add --resume_from_checkpoint {whole}"
        )
    if not resumes:
        raise ValueError(
            f"{folder}: holds {_step(whole)} steps of such a run; go on with "
            f"--resume_from_checkpoint latest, or {ANOTHER_FOLDER}"
        )


# --- one writer -----------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes this process the one that writes a run into the folder, and clears away what a killed
    one left half-written. The system frees the lock with the process, however that ends.

    Raises:
        ValueError: another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            is_mine = try_lock(file)
        except OSError as error:
            raise ValueError(
                f"{folder}: cannot be locked ({error.strerror}); {ANOTHER_FOLDER}"
            ) from None
        if not is_mine:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ValueError(
                f"{folder}: another run writes into it (process {owner}); wait for its end or "
                f"{ANOTHER_FOLDER}"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        remove_leftovers(folder)
        yield
