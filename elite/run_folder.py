"""What a training run relies on in its folder: whole checkpoints, one set of settings, one
writer."""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from elite.files import remove_leftovers, remove_whole

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
    "train_batch_size",
    "validation_data_dir",
    "validation_steps",
}
ANOTHER_FOLDER = "choose another --output_dir"


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def seal(checkpoint: Path) -> None:
    """Writes the hashes by which `fault` knows later that every file is as it is now."""
    hashes = {path.name: _sha256(path) for path in sorted(checkpoint.iterdir())}
    (checkpoint / HASHES).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")


def fault(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being used, in words; None where it is whole."""
    try:
        hashes = json.loads((checkpoint / HASHES).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if _sha256(checkpoint / name) != expected:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
    except (ValueError, AttributeError):  # no JSON, or not of a mapping
        return f"{HASHES} is damaged"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_checkpoint(output_dir: Path, resume: str, say: Callable[[str], object] = print) -> Path:
    """The checkpoint to resume from.

    Args:
        resume: "latest" for the newest whole one of `output_dir`, or a checkpoint folder.
        say: is told of each damaged one that is passed over.

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


def _lock(file: IO[str]) -> None:
    """Raises OSError where another process has the lock."""
    if sys.platform == "win32":
        import msvcrt

        # Far beyond the owner's name, which others read; Windows forbids reading what is locked.
        file.seek(2**20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        # Not flock: loader processes would inherit that and keep it when this one is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
            _lock(file)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{folder}: cannot be locked ({error.strerror}); {ANOTHER_FOLDER}"
                ) from None
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ValueError(
                f"{folder}: another run writes into it (process {owner}); wait for its end or "
                f"{ANOTHER_FOLDER}"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        remove_leftovers(folder)
        yield
