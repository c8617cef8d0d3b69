"""The checkpoints of a training run: what is in them, which are whole, and which settings they
hold the run to."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from elite.files import remove_whole, sha256_of

HASHES = "hashes.json"
CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")  # and not checkpoint-good-500
SETTINGS = "config.json"  # in every checkpoint
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
    "mixed_precision",  # what it comes to is held as `precision`
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


class Tally:
    """Exact counts, over all parts of a run, of what did not go as it should."""

    def __init__(self) -> None:
        self.unreadable: Counter[str] = Counter()  # by reason, each time it was met
        self.bad_samples: dict[int, str] = {}  # by row, with the last message; repaired ones stay
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
        self.schedule = schedule
        # What has a state of its own, by its name in the file.
        parts = {"optimizer": optimizer, "schedule": schedule, "ema": ema, "scaler": scaler}
        self.parts: dict[str, Any] = {**parts, "tally": tally}

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

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
        """Takes over what `read` gave. Rates and decays stay those of this run, which may have
        branched off to others. Returns the step."""
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
        if len(saved["optimizer"]["param_groups"]) != len(self.parts["optimizer"].param_groups):
            raise ValueError(
                f"{folder}: checkpoint with other weights learning at a rate of their own; resume "
                "with its --kv_learning_rate, or without if it had none"
            )
        states = {**saved, **self._own_rates(saved)}
        for name, part in self.parts.items():
            if part is not None and states[name] is not None:
                part.load_state_dict(states[name])
        return saved["step"]

    def _own_rates(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Saved states of optimizer, schedule and EMA, with the rates and decays of this run."""
        optimizer, schedule, ema = (self.parts[x] for x in ("optimizer", "schedule", "ema"))
        step = saved["schedule"]["last_epoch"]
        bases = schedule.base_lrs
        rates = [x * factor(step) for x, factor in zip(bases, schedule.lr_lambdas, strict=True)]
        groups = [
            {**own, "lr": rate, "params": theirs["params"]}
            for own, rate, theirs in zip(
                optimizer.param_groups, rates, saved["optimizer"]["param_groups"], strict=True
            )
        ]
        return {
            "optimizer": {**saved["optimizer"], "param_groups": groups},
            "schedule": {**saved["schedule"], "base_lrs": bases, "_last_lr": rates},
            "ema": None if ema is None else {**saved["ema"], "decay": ema.decay},
        }


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


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


def find_checkpoint(
    output_dir: Path, resume: str, reached: int | None = None, say: Callable[[str], object] = print
) -> Path:
    """The checkpoint to resume from.

    Args:
        resume: "latest" for the newest whole one of `output_dir`, or a checkpoint folder.
        reached: step that the run has come to, where that is known; what is beyond it is of an
            earlier try, from which the run went back.
        say: called with a line for each one that is passed over.

    Raises:
        ValueError: there is none, or the one named is damaged.
    """
    if resume != "latest":
        return _named_checkpoint(output_dir, resume)
    found = checkpoints(output_dir)
    for checkpoint in reversed(found):
        wrong = fault(checkpoint)
        if reached is not None and _step(checkpoint) > reached:
            wrong = f"is of an earlier try; the run has since gone back, and reached step {reached}"
        if wrong is None:
            return checkpoint
        say(f"{checkpoint}: {wrong}; using the one before")
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
