"""The files of shards at hand: where they lie, or fetched ahead of need into a cache of bounded
size that all processes of a machine share. No file is handed out that is not as its index says.
"""

import os
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import fsspec
from fsspec.callbacks import Callback

from elite.files import sha256_of, try_lock

PAUSES = (0, 1, 4, 16)  # seconds before each try to fetch a file
RETRY_AFTER = 600  # seconds after which a file that could not be fetched is tried again
FETCHERS = 2  # threads of each process that fetch ahead
POLL = 0.1  # seconds between two looks at a lock
OURS = re.compile(r"[0-9a-f]{64}\.(tar|npy|\d+\.part)")  # of the files in a cache


@dataclass(frozen=True)
class Listed:
    """A file as the index of shards lists it."""

    name: str
    bytes: int
    sha256: str  # hexadecimal digits

    @property
    def kind(self) -> str:
        return "shard" if self.name.endswith(".tar") else "table"

    def fault(self, path: Path) -> str | None:
        """What keeps a file from being this one, in words."""
        try:
            if path.stat().st_size != self.bytes or sha256_of(path) != self.sha256:
                return f"{self.kind} is damaged (its SHA-256 is not that of the index)"
        except FileNotFoundError:
            return f"{self.kind} is missing"
        except OSError as error:
            return f"{self.kind} cannot be read ({error.strerror})"
        return None


class Store(Protocol):
    """Where the files of shards are taken from."""

    def path(self, file: Listed) -> Path:
        """The file on this machine, whole, for now. Raises ValueError where it cannot be had."""

    def expect(self, files: Sequence[Listed]) -> None:
        """Says which files are to stay or to be fetched, in the order of need; no others are."""


class InPlace:
    """The files of a folder of this machine, each checked when a process first uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._faults: dict[str, str | None] = {}

    def path(self, file: Listed) -> Path:
        path = self.folder / file.name
        if file.name not in self._faults:
            self._faults[file.name] = file.fault(path)
        if fault := self._faults[file.name]:
            raise ValueError(f"{path}: {fault}; copy it again, or index the folder anew")
        return path

    def expect(self, files: Sequence[Listed]) -> None:
        pass


class AtMost(Callback):
    """Ends a fetch that brings more bytes than it may."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self.most:
            raise ValueError("more bytes than the index lists")


class Cache:
    """Files of a folder or URL, fetched through fsspec, each checked before it is there.

    A file is kept under its hash, so that several datasets may share a cache, and fetched by one
    process at a time. To make room those used least recently go, but for the expected ones.

    Args:
        url: of the folder.
        folder: of the cache.
        limit: bytes that it may hold.
    """

    def __init__(self, url: str, folder: Path, limit: int) -> None:
        self.url, self.folder, self.limit = url.rstrip("/"), folder, limit
        self._start()

    def __reduce__(self) -> tuple:
        return Cache, (self.url, self.folder, self.limit)

    def _start(self) -> None:
        """What each process has for itself; threads and locks do not outlive a fork."""
        self._process = os.getpid()
        self._faults: dict[Listed, tuple[float, str]] = {}
        self._kept: set[str] = set()
        self._wanted: deque[Listed] = deque()
        self._asked = threading.Condition()
        self._fetchers: list[threading.Thread] = []
        self._room = threading.Lock()
        self._locks: defaultdict[Listed, threading.Lock] = defaultdict(threading.Lock)

    def _here(self) -> None:
        if self._process != os.getpid():
            self._start()

    def path(self, file: Listed) -> Path:
        self._here()
        path = self._place(file)
        while True:
            try:
                os.utime(path)  # so that it is used most recently
                return path
            except FileNotFoundError:
                self._fetch(file, wait=True)

    def expect(self, files: Sequence[Listed]) -> None:
        self._here()
        with self._asked:
            self._kept = {self._place(file).name for file in files}
            self._wanted = deque(file for file in files if not self._place(file).exists())
            self._asked.notify_all()
        while self._wanted and len(self._fetchers) < FETCHERS:
            thread = threading.Thread(target=self._fetch_ahead, daemon=True)
            self._fetchers.append(thread)
            thread.start()

    def _place(self, file: Listed) -> Path:
        return self.folder / f"{file.sha256}{Path(file.name).suffix}"

    # --- fetching ---------------------------------------------------------------------------------

    def _fetch_ahead(self) -> None:
        while True:
            with self._asked:
                while not self._wanted:
                    self._asked.wait()
                file = self._wanted.popleft()
            with suppress(ValueError):  # whoever needs it is told
                self._fetch(file, wait=False)

    def _fetch(self, file: Listed, wait: bool) -> None:
        """Has the file in its place; without `wait`, only if nobody else is at it."""
        if not self._locks[file].acquire(blocking=wait):
            return
        try:
            self._check_again(file)
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self.folder / f"{file.sha256}.lock"
            with self._held(lock, wait) as is_mine:
                if is_mine and not self._place(file).exists():
                    self._download(file)
        except OSError as error:
            self._fail(file, f"{file.kind} cannot be kept in {self.folder} ({error.strerror})")
        finally:
            self._locks[file].release()

    @contextmanager
    def _held(self, path: Path, wait: bool = True) -> Iterator[bool]:
        """Holds a lock between processes, if it can be had or waited for."""
        with open(path, "ab") as file:
            while not (is_mine := try_lock(file)) and wait:
                time.sleep(POLL)
            yield is_mine

    def _check_again(self, file: Listed) -> None:
        """A file that just could not be fetched is not tried for each of its samples."""
        since, message = self._faults.get(file, (-RETRY_AFTER, ""))
        if message and time.monotonic() - since < RETRY_AFTER:
            raise ValueError(message)

    def _fail(self, file: Listed, fault: str) -> None:
        message = f"{self.url}/{file.name}: {fault}; see whether it is there, and whole"
        self._faults[file] = time.monotonic(), message
        raise ValueError(message)

    def _download(self, file: Listed) -> None:
        part = self.folder / f"{file.sha256}.{file.bytes}.part"
        self._make_room(file, part)
        fault: str | None = None
        for pause in PAUSES:
            time.sleep(pause)
            try:
                system, url = fsspec.url_to_fs(f"{self.url}/{file.name}")
                system.get_file(url, str(part), callback=AtMost(file.bytes))
                fault = file.fault(part)
            except FileNotFoundError:
                fault = f"{file.kind} is missing"
                break
            except Exception as error:  # every file system has errors of its own
                fault = f"{file.kind} cannot be fetched ({type(error).__name__}: {error})"
            if fault is None:
                os.replace(part, self._place(file))
                return
        part.unlink(missing_ok=True)
        self._fail(file, str(fault))

    # --- room -------------------------------------------------------------------------------------

    def _make_room(self, file: Listed, part: Path) -> None:
        """Removes files until one more has room, and reserves it."""
        with self._room, self._held(self.folder / "room.lock"):
            sizes = {path: self._size(path) for path in self._files() if path != part}
            room = self.limit - sum(sizes.values())
            for path in sorted(sizes, key=self._age):
                if room >= file.bytes:
                    break
                if path.name not in self._kept:
                    path.unlink(missing_ok=True)
                    room += sizes[path]
            part.touch()

    def _files(self) -> list[Path]:
        """Those of the cache, and no others that lie in its folder."""
        return [path for path in self.folder.iterdir() if OURS.fullmatch(path.name)]

    def _size(self, path: Path) -> int:
        """Of a file that is being fetched, what it will have."""
        if path.suffix == ".part":
            return int(path.name.split(".")[1])
        with suppress(FileNotFoundError):
            return path.stat().st_size
        return 0

    def _age(self, path: Path) -> tuple[bool, float]:
        """Orders files: those used least recently first, and last of all those that are being
        fetched, or were by a process that was killed."""
        with suppress(FileNotFoundError):
            return path.suffix == ".part", path.stat().st_mtime
        return False, 0
