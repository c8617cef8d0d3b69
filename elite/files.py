"""Files appear whole or not at all: everything is written to a temporary name and renamed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` beside `path`, then renames: the file is there whole or not at all.

    Raises:
        ValueError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if path.is_dir() and temporary.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except Exception as error:
        if not _is_disk_error(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(
            f"{path}: cannot be written ({reason}); free some space or choose another folder"
        ) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary.exists():
            temporary.unlink()


def _is_disk_error(error: Exception) -> bool:
    """torch.save and safetensors have errors of their own for a disk that takes no more."""
    in_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
    in_torch = in_torch or "PytorchStreamWriter" in str(error)
    return in_torch or isinstance(error, OSError | SafetensorError)


def is_file(path: Path | str) -> bool:
    """Whether there is a plain file: a pipe may block and a device never end."""
    return os.path.isfile(path)


def read_text(path: Path | str, most: int = 2**18) -> str:
    """The UTF-8 text of a small file.

    Args:
        most: bytes; what is meant to be written by hand is never longer.

    Raises:
        OSError: it cannot be read.
        ValueError: more than `most` bytes, or no UTF-8; the message does not name the file.
    """
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most // 1024} kB; expected a short text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not text; save it as UTF-8") from None


def digest_files(*paths: Path) -> str:
    """A short name for what is in these files; one that cannot be read counts as empty."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            content = path.read_bytes() if is_file(path) else b""
        except OSError:  # whoever reads the picture in it says why
            content = b""
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def write_json(path: Path | str, value: object) -> None:
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
