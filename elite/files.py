"""Files appear whole or not at all: everything is written to a temporary name, flushed to the disk
and renamed."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from safetensors import SafetensorError

from elite.wording import brief, note

if TYPE_CHECKING:  # a mistyped flag need not wait for torch
    from torch import Tensor

VALUES_SAMPLED = 64  # of each weight
OWNER_ALONE = 0o600  # permissions that safetensors gives its files
LEFTOVER = re.compile(r"\..+\.\d+\.(tmp|old)(\.\w+)?")  # of a process that was killed


def _hidden(path: Path, kind: str) -> Path:
    """A hidden name beside `path`, of the same ending, by which writers choose the format."""
    return path.with_name(f".{path.stem}.{os.getpid()}.{kind}{path.suffix}")


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` beside `path`, then renames: the file or folder is there whole or
    not at all, even if the power fails.

    Raises:
        ValueError: the disk is full or the folder cannot be written.
        OSError: `write` cannot read some other file.
    """
    path = Path(path)
    path = path if path.name else path.resolve()  # "." has a name, too
    temporary = _hidden(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        give_usual_rights(temporary)
        _flush(temporary)
        if path.is_dir() and temporary.is_dir():
            remove_whole(path)
        os.replace(temporary, path)
        flush_file(path.parent)
    except Exception as error:
        if not _is_disk_error(error, path.parent):
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


def check_writable(folder: Path | str) -> None:
    """Raises ValueError where a folder cannot be made or written into; creates nothing."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(folder), re.IGNORECASE):
        raise ValueError(f"{folder}: a URL; expected a folder of this machine to write to")
    folder = Path(folder).absolute()
    for path in (folder, *folder.parents):
        try:
            reason = "" if stat.S_ISDIR(os.stat(path).st_mode) else "Not a directory"
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            reason = str(error.strerror)
        if not reason and not os.access(path, os.W_OK | os.X_OK):
            reason = "Permission denied"
        if reason:
            raise ValueError(
                f"{folder}: cannot be written ({path}: {reason}); choose another folder"
            )
        return


def check_writable_file(path: Path) -> None:
    """Raises ValueError where a file cannot be written; creates nothing."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; expected the name of a file to write")
    check_writable(path.parent)


def check_apart(folder: Path | str, data: Path | str) -> None:
    """Raises ValueError where pictures written into a folder would be taken for those of the data,
    in which each folder is an object."""
    place, among = Path(folder).resolve(), Path(data).resolve()
    if among in (place, place.parent):
        raise ValueError(f"{folder}: lies among the pictures of {data}; choose another folder")


def give_usual_rights(path: Path) -> None:
    """Gives a safetensors file, or all those in a folder, the permissions of any other new file;
    safetensors itself lets nobody but their owner read them."""
    files = [path] if path.suffix == ".safetensors" else [*path.rglob("*.safetensors")]
    for file in files:
        if stat.S_IMODE(file.stat().st_mode) != OWNER_ALONE:
            continue  # they are right already
        probe = _hidden(file, "tmp")
        probe.touch()
        os.chmod(file, stat.S_IMODE(probe.stat().st_mode))
        probe.unlink()


def _flush(path: Path) -> None:
    """Waits until a file, or a folder with all in it, is on the disk."""
    for inside in path.rglob("*"):
        flush_file(inside)
    flush_file(path)


def flush_file(path: Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk."""
    if sys.platform == "win32" and path.is_dir():
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def with_text_names(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Those of a folder's files that JSON, CSV and PNG can name. A note tells of the others, whose
    names hold bytes that are no UTF-8, as those of old archives may."""
    texts: list[Path] = []
    others: list[str] = []
    for path in paths:
        if is_text(path.name):
            texts.append(path)
        else:
            others.append(path.name)
    if others:
        note(f"{folder}: left out {brief(others)}; names with bytes that are no UTF-8, rename them")
    return texts


def is_text(name: str) -> bool:
    """Whether a file name is Unicode, and no stand-in for bytes that are none."""
    return name.encode(errors="replace").decode() == name


def remove_whole(folder: Path) -> None:
    """Removes a folder so that it is never seen half-removed under its name."""
    doomed = _hidden(folder, "old")
    os.replace(folder, doomed)
    _remove(doomed)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes have left half-written or half-removed in a folder."""
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    """A file, a folder with all in it, or a link to either, whose target stays."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_disk_error(error: Exception, folder: Path) -> bool:
    """Whether a file in the folder cannot be written. Where something else cannot be read, the
    error names that file, or is of PIL and has no number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.filename is None or _is_around(str(error.filename), folder)
    # torch.save, numpy and safetensors have errors of their own for a disk that takes no more.
    told = ("inline_container", "PytorchStreamWriter", "iostream error", "requested and")
    is_told = isinstance(error, RuntimeError | OSError) and any(t in str(error) for t in told)
    return is_told or isinstance(error, SafetensorError)


def _is_around(path: str, folder: Path) -> bool:
    """Whether a path lies in the folder, or is one that the folder lies in."""
    one, other = Path(path).absolute(), folder.absolute()
    return one.is_relative_to(other) or other.is_relative_to(one)


def check_archive(path: Path | str) -> None:
    """Raises ValueError where a file of torch.save is compressed, and so may grow without bound as
    it is read; torch itself never compresses."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its entries are compressed")


def is_file(path: Path | str) -> bool:
    """Whether there is a plain file: a pipe may block and a device never end."""
    return os.path.isfile(path)


def read_text(path: Path | str, remedy: str, most: int = 2**18) -> str:
    """The UTF-8 text of a small file.

    Args:
        remedy: how a message about the file ends, such as "expected captions".
        most: bytes; what is meant to be written by hand is never longer.

    Raises:
        ValueError: it cannot be read, has more than `most` bytes, or is no UTF-8.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
        if len(content) <= most:
            return content.decode("utf-8-sig")
        reason = f"more than {most // 1024} kB; expected a short text"
    except UnicodeDecodeError:
        reason = "not text; save it as UTF-8"
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
    raise ValueError(f"{path}: {reason}; {remedy}")


def read_rows(path: Path) -> list[str]:
    """The lines of a file of JSON objects, one a line, without what a kill or a full disk has cut
    off."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.endswith("}")]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_lock(file: IO) -> bool:
    """Locks an open file against other processes until it is closed, or its process ends, however
    that happens. Returns whether it could. Raises OSError where the disk knows no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            # Far beyond what is written into it; Windows forbids reading what is locked.
            file.seek(2**20)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # Not flock: loader processes would inherit that and keep it when this one is killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


@contextmanager
def sole_writer(
    lock: Path, does: str, remedy: str = "choose another folder", also: Iterable[Path] = ()
) -> Iterator[None]:
    """Within it this process alone "packs" or "encodes" into the folder of the lock file, which
    holds its number; what a killed one left half-written there, and in the folders given also, is
    removed. The system frees the lock with the process, however that ends.

    Raises:
        ValueError: another process does, or the disk knows no locks.
    """
    folder = lock.parent
    folder.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+", encoding="utf-8") as file:
        try:
            is_mine = try_lock(file)
        except OSError as error:
            raise ValueError(f"{folder}: cannot be locked ({error.strerror}); {remedy}") from None
        if not is_mine:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ValueError(
                f"{folder}: another process ({owner}) {does} into it; wait until it has ended, or "
                f"{remedy}"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        for written in (folder, *also):
            if written.is_dir():
                remove_leftovers(written)
        yield


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


def digest_weights(*states: Mapping[str, "Tensor"]) -> str:
    """The SHA-256 of tensors by name, in hexadecimal digits, whatever dtype holds their values.

    It is of their bytes in float32: a sum would depend on the number of threads.
    """
    digest = hashlib.sha256()
    for name, tensor in (item for state in states for item in sorted(state.items())):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def quick_digest(states: Iterable[Mapping[str, "Tensor"]], files: Iterable[Path] = ()) -> str:
    """A short name for weights, and for files beside them: of each tensor by a few values and a
    checksum of all, in two seconds for Stable Diffusion."""
    import torch

    digest = hashlib.sha256(digest_files(*files).encode())
    for name, tensor in (item for state in states for item in sorted(state.items())):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // VALUES_SAMPLED)]
        content = flat.cpu().contiguous().view(torch.uint8).numpy()
        digest.update(name.encode())
        digest.update(some.cpu().float().contiguous().numpy().data)
        digest.update(zlib.crc32(content.data).to_bytes(4))
    return digest.hexdigest()[:16]


def write_text(path: Path | str, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all. Raises ValueError as `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path | str, value: object) -> None:
    """Writes a JSON file for people to read, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")
