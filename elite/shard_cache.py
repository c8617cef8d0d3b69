"""The files of shards and latents at hand: where they lie, or fetched ahead of need into a cache of
bounded size that all processes of a machine share. No file is handed out that is not as its index
says; of one that lies in place, where its user wants no hash of it, as to its size.
"""

import math
import os
import re
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import fsspec
from fsspec.callbacks import Callback

from elite.files import flush_file, sha256_of, try_lock

PAUSES = (0, 1, 4, 16)  # seconds before each try to fetch a file
RETRY_AFTER = 600  # seconds after which a file that could not be fetched is tried again
FETCHERS = 2  # threads of each process that fetch ahead
POLL = 0.1  # seconds between two looks at a lock
EVICTED = 5  # times that a file may be gone between its name and its opening
KINDS = {"tar": "shard", "npy": "table", "safetensors": "latent file"}  # of files, by ending
ENDINGS = "|".join(KINDS)
OURS = re.compile(rf"[0-9a-f]{{64}}\.({ENDINGS}|\d+\.part)")  # of the files in a cache
T = TypeVar("T")


@dataclass(frozen=True)
class Listed:
    """A file as the index of a folder lists it.

    Args:
        sha256: in hexadecimal digits.
        of: what it was made of, in words or digests; not of every file.
        folder: that it lies in, or its URL; known to whoever has read the index.
    """

    name: str
    bytes: int
    sha256: str
    of: Mapping[str, str] = field(default_factory=dict, compare=False)
    folder: str = ""

    @property
    def kind(self) -> str:
        return KINDS[self.name.rpartition(".")[2]]

    @property
    def place(self) -> str:
        """Its path or URL."""
        return f"{self.folder}/{self.name}"

    def damage(self, path: Path, hashed: bool = True) -> str:
        """In what a file is not this one, in words, "" for nothing; not hashed, by its size alone.
        Raises OSError where it cannot be read."""
        if path.stat().st_size != self.bytes:
            return f"{self.kind} is damaged (its size is not that of the index)"
        if hashed and sha256_of(path) != self.sha256:
            return f"{self.kind} is damaged (its SHA-256 is not that of the index)"
        return ""

    def fault(self, path: Path, hashed: bool = True) -> str:
        """What keeps a file from being read as this one, in words, "" for nothing."""
        try:
            return self.damage(path, hashed)
        except FileNotFoundError:
            return f"{self.kind} is missing"
        except OSError as error:
            return f"{self.kind} cannot be read ({error.strerror})"


class Store(Protocol):
    """Where the files of shards are taken from."""

    def path(self, file: Listed) -> Path:
        """The file on this machine, whole, for now. Raises ValueError where it cannot be had."""

    def expect(self, files: Sequence[Listed]) -> None:
        """Names the files to keep or to fetch, in the order of need, in place of those named
        before."""


def read_from(store: Store, file: Listed, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file of a store. Raises ValueError where it cannot be had."""
    for _ in range(EVICTED):
        try:
            return read(store.path(file))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ValueError(
                f"{file.place}: {file.kind} cannot be read ({error.strerror})"
            ) from None
    raise ValueError(
        f"{file.place}: {file.kind} is gone as soon as it is fetched; give --shard_cache a folder "
        "that no other program empties"
    )


class InPlace:
    """Files of folders of this machine, each checked when a process first uses it.

    Args:
        hashed: whether that reads them whole; their size alone is checked otherwise.
    """

    def __init__(self, hashed: bool = True) -> None:
        self.hashed = hashed
        self._whole: set[Listed] = set()
        self._faults: dict[Listed, tuple[float, str]] = {}  # since when, and what

    def path(self, file: Listed) -> Path:
        path = Path(file.place)
        if file in self._whole and path.exists():
            return path
        self._whole.discard(file)
        since, fault = self._faults.pop(file, (-math.inf, ""))
        if time.monotonic() - since >= RETRY_AFTER:
            since, fault = time.monotonic(), file.fault(path, self.hashed)
        if fault:
            self._faults[file] = since, fault
            raise ValueError(f"{path}: {fault}; copy it again, or make it and its index anew")
        self._whole.add(file)
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
    """Files of folders or URLs, fetched through fsspec, each checked before it is there.

    A file is kept under its hash, so that several datasets may share a cache, and fetched by one
    process at a time. To make room, those used least recently go first. Expected files go only for
    one that is needed at once, the one needed last first.

    Args:
        folder: of the cache.
        limit: bytes that it may hold.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._start()

    def __reduce__(self) -> tuple:
        return Cache, (self.folder, self.limit)

    def _start(self) -> None:
        """What each process has for itself; threads and locks do not outlive a fork."""
        self._process = os.getpid()
        self._faults: dict[Listed, tuple[float, str]] = {}
        self._whole: set[Listed] = set()  # seen to be so by this process
        self._kept: dict[str, int] = {}  # expected files by name, and when they are needed
        self._wanted: deque[Listed] = deque()
        self._asked = threading.Condition()
        self._fetchers: list[threading.Thread] = []
        self._room = threading.Lock()
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by hash

    def _here(self) -> None:
        if self._process != os.getpid():
            self._start()

    def path(self, file: Listed) -> Path:
        self._here()
        path = self._place(file)
        while True:
            try:
                with suppress(PermissionError):  # of another user, who shares the cache
                    os.utime(path)  # so that it is used most recently
                if self._is_whole(file):
                    return path
            except FileNotFoundError:
                pass
            except OSError as error:
                raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
            self._fetch(file, wait=True)

    def _is_whole(self, file: Listed) -> bool:
        """Whether the file in the cache is what was fetched, which a crash of the machine may have
        undone; seen once by each process. Raises OSError where it cannot be read."""
        if file not in self._whole:
            if file.damage(self._place(file)):
                return False
            self._whole.add(file)
        return True

    def expect(self, files: Sequence[Listed]) -> None:
        self._here()
        with self._asked:
            self._kept = {self._place(file).name: n for n, file in enumerate(files)}
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
        lock_here = self._locks[file.sha256]
        if not lock_here.acquire(blocking=wait):
            return
        try:
            self._check_again(file)
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self.folder / f"{file.sha256}.lock"
            with self._held(lock, wait) as is_mine:
                if is_mine and not self._is_there(file):
                    self._download(file, is_needed=wait)
        except OSError as error:
            self._fail(file, f"{file.kind} cannot be kept in {self.folder} ({error.strerror})")
        finally:
            lock_here.release()

    def _is_there(self, file: Listed) -> bool:
        """Whether the file is in the cache; a damaged one is removed. Its lock is held."""
        place = self._place(file)
        try:
            if self._is_whole(file):
                return place.exists()
        except FileNotFoundError:
            return False
        place.unlink(missing_ok=True)
        return False

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

    def _fail(self, file: Listed, fault: str) -> NoReturn:
        message = f"{file.place}: {fault}; see whether it is there, and whole"
        self._faults[file] = time.monotonic(), message
        raise ValueError(message)

    def _download(self, file: Listed, is_needed: bool) -> None:
        """Has the file in its place; one that is not needed yet, only where there is room."""
        part = self.folder / f"{file.sha256}.{file.bytes}.part"
        fault = ""
        for pause in PAUSES:
            time.sleep(pause)
            if not self._make_room(file, part, is_needed):
                part.unlink(missing_ok=True)
                return
            try:
                system, url = fsspec.url_to_fs(file.place)
                system.get_file(url, str(part), callback=AtMost(file.bytes))
                fault = file.fault(part)
            except FileNotFoundError:
                fault = f"{file.kind} is missing"
                break
            except Exception as error:  # every file system has errors of its own
                fault = f"{file.kind} cannot be fetched ({type(error).__name__}: {error})"
            if not fault:
                with self._room_locked(), suppress(FileNotFoundError):
                    flush_file(part)
                    os.replace(part, self._place(file))
                    self._whole.add(file)
                    return
                fault = f"{file.kind} went from {self.folder} to make room"
        part.unlink(missing_ok=True)
        self._fail(file, fault)

    # --- room -------------------------------------------------------------------------------------

    def _make_room(self, file: Listed, part: Path, is_needed: bool) -> bool:
        """Removes files until one more has room, and reserves it; for one that is not needed yet,
        only if enough of them are not expected. Returns whether it may come."""
        with self._room_locked():
            sizes = {path: self._size(path) for path in self._files() if path != part}
            room = self.limit - sum(sizes.values())
            for path in sorted(sizes, key=self._order_to_go):
                if room >= file.bytes or (path.name in self._kept and not is_needed):
                    break
                path.unlink(missing_ok=True)
                room += sizes[path]
            part.touch()
            return room >= file.bytes or is_needed

    @contextmanager
    def _room_locked(self) -> Iterator[None]:
        """While nothing else comes to stay in the cache, or goes to make room."""
        with self._room, self._held(self.folder / "room.lock"):
            yield

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

    def _order_to_go(self, path: Path) -> tuple[float, bool, float]:
        """Orders files: those used least recently first, then those that are being fetched, or
        were by a process that was killed, and last of all the expected ones, backwards."""
        need = -self._kept.get(path.name, math.inf)
        with suppress(FileNotFoundError):
            return need, path.suffix == ".part", path.stat().st_mtime
        return need, False, 0
