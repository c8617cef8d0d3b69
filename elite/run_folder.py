"""The folder of a training run: log and previews, checkpoints, one writer."""

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from elite.config import save_config
from elite.files import read_rows, sole_writer, write_atomically, write_json, write_text
from elite.run_state import (
    ANOTHER_FOLDER,
    SETTINGS,
    RunState,
    Tally,
    check_settings,
    find_checkpoint,
    prune,
    seal,
)
from elite.stream import Failure, Samples

T = TypeVar("T")

LOCK = "run.lock"
UNREADABLE_TOLERATED = 0.05  # share of the dataset; a larger one stops the run,
MIN_FAILURES_JUDGED = 100  # and after so many failures twice that share of what was tried
SKIPPED_TOLERATED = 10  # steps in a row whose loss or gradient is not finite
UNREADABLE_LISTED = 20


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
        held: Mapping[str, Any],
    ) -> None:
        self.folder, self.logging_dir = folder, folder / logging_dir
        self.accelerator, self.is_main = accelerator, accelerator.is_main_process
        self.dataset, self.samples_per_step, self.config = dataset, samples_per_step, config
        # What all parts of a run have to share, but for `run_state.MAY_CHANGE`.
        self.settings = {
            "samples_per_step": samples_per_step,
            "dataset_size": len(dataset),
            "precision": accelerator.mixed_precision,
            **held,
            **config,
        }
        self.tally = Tally()
        self._open = ExitStack()

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def __enter__(self) -> Self:
        if self.is_main:
            lock, previews = self.folder / LOCK, self.folder / "previews"
            mine = sole_writer(lock, "trains", ANOTHER_FOLDER, also=[previews])
            self._open.enter_context(mine)
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
        self._by_main(lambda: check_settings(self.folder, self.settings, resume is not None))
        step = self._resume(state, resume, max_steps) if resume is not None else 0
        if step > max_steps:
            raise ValueError(
                f"{self.folder}: the checkpoint is of step {step}, the run of {max_steps} steps; "
                "raise --max_train_steps, or resume from an earlier checkpoint"
            )
        if not self.is_main:
            return step
        if self.config:
            # With the file as --config a run would go back to where this one went on from.
            config = {k: v for k, v in self.config.items() if k != "resume_from_checkpoint"}
            save_config(config, self.folder / "config.yaml")
        kept = [line for line in self._logged() if json.loads(line)["step"] <= step]
        write_text(self.metrics_file, "".join(line + "\n" for line in kept))
        self.board = SummaryWriter(str(self.logging_dir), purge_step=step + 1)
        self._open.callback(self.board.close)
        bar = tqdm(total=max_steps, initial=step, desc="train", unit="step")
        self.progress = self._open.enter_context(bar)
        return step

    def _resume(self, state: RunState, resume: str, max_steps: int) -> int:
        def read() -> dict[str, Any]:
            lines = self._logged()
            reached = json.loads(lines[-1])["step"] if lines else None
            return state.read(find_checkpoint(self.folder, resume, reached, self.say))

        saved = self._by_main(read)
        step = state.restore(saved)
        if saved["folder"].parent.resolve() != self.folder.resolve():
            self.tally.load_state_dict(Tally().state_dict())  # the branch's data may be others
        before, here = saved["schedule"]["_last_lr"][0], state.rate
        if step < max_steps and not math.isclose(before, here, rel_tol=1e-6):
            self.say(
                f"learning rate {here:g} at step {step}, where the checkpoint's schedule had "
                f"{before:g}: another rate, schedule or --max_train_steps"
            )
        return step

    def _by_main(self, work: Callable[[], T]) -> T:
        """What the main process finds in the run's folder, which those of other nodes do not have;
        its ValueError is raised in every process, so that none waits for another."""
        found: list[Any] = [None]
        if self.is_main:
            try:
                found = [work()]
            except ValueError as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        return found[0]

    def _logged(self) -> list[str]:
        """The lines of the metrics so far."""
        return read_rows(self.metrics_file) if self.metrics_file.exists() else []

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
        limit = UNREADABLE_TOLERATED
        if bad > limit * size:
            self._stop_for_unreadable(f"{bad} of {size} samples", limit)
        if times > MIN_FAILURES_JUDGED and times > 2 * limit * tried:
            self._stop_for_unreadable(f"{times} of the {tried} samples tried", 2 * limit)

    def _stop_for_unreadable(self, how_many: str, limit: float) -> NoReturn:
        messages, path = list(self.tally.bad_samples.values()), self.folder / "unreadable.txt"
        if self.is_main:
            text = "".join(message + "\n" for message in messages)
            write_text(path, text)
        raise ValueError(
            f"{how_many} could not be read ({self.tally.reasons()}), which is over "
            f"{limit:.0%}; repair or remove them, {path} lists all; the last are: "
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
            write_json(folder / SETTINGS, {"step": step, **self.settings})
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
