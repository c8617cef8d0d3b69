"""Shards: an Open Images dataset as tar files of some hundred megabytes, and their index.

A folder, or its URL, of WebDataset tars and, written last, `index.json`, which lists them and three
tables of numbers with size and SHA-256:

    images.npy  (I,) shard, and offset and size in bytes there, name in the tar
    boxes.npy   (N,) image, box: float32 x0 x1 y0 y1 in [0, 1]
    masks.npy   (M,) image, number, offset, size, and hs he ws we: rows and columns of the object

So every sample is addressable, and opening takes no time: the tables are mapped, not read. Their
rows are in the order of the dataset the shards were made from.
"""

import itertools
import json
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import fsspec
import numpy as np

from elite.files import check_writable, read_text, sha256_of, write_atomically, write_json
from elite.images import read_image, read_mask
from elite.open_images import OpenImagesFolder, Source
from elite.shard_cache import ENDINGS, Cache, InPlace, Listed, Store, read_from
from elite.wording import brief, one_line

INDEX = "index.json"
REINDEX = "python data_scripts/index_shards.py"
MOST_INDEX = 2**26  # bytes of index.json, which has some 150 for each shard, 500 for latents
BLOCK = 2**22  # rows of a table read at a time
LONGEST_NAME = 250  # bytes of a name in a tar
ELSEWHERE = "lies elsewhere; give --shard_cache a folder that it is fetched to"
# Names of files that are no paths, the same in URLs, and known to the cache.
PLAIN = re.compile(rf"\w[\w.\-]*\.({ENDINGS})", re.ASCII)
TABLES: Mapping[str, list[tuple]] = {
    "images": [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4")],  # and name, S1 or wider
    "boxes": [("image", "<u4"), ("box", "<f4", (4,))],
    "masks": [
        *((name, "<u4") for name in ("image", "number")),
        *(("offset", "<u8"), ("size", "<u4")),
        *((side, "<i4") for side in ("hs", "he", "ws", "we")),
    ],
}


# --- the index ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What an index may be of.

    Args:
        files: in words.
        format: to be counted up when the index changes.
        tables: that it lists besides.
        remedy: how a message about it ends.
    """

    files: str
    format: str
    tables: Sequence[str]
    remedy: str


SHARDS = Kind(
    "shards", "elite-shards 1", tuple(TABLES), f"index the shards again with {REINDEX} FOLDER"
)


@dataclass(frozen=True)
class Index:
    """What `index.json` lists."""

    shards: list[Listed]
    tables: dict[str, Listed]


def table_type(name: str, width: int = 1) -> np.dtype:
    """A row of a table, with names of images of up to `width` bytes."""
    return np.dtype([*TABLES[name], *([("name", f"S{width}")] if name == "images" else [])])


def save_index(
    folder: Path, shards: Sequence[Listed], tables: Mapping[str, np.ndarray], kind: Kind = SHARDS
) -> None:
    """Writes tables and index of the shards in a folder.

    Raises:
        ValueError: the name of a shard is none for URLs, the disk is full or the folder cannot be
            written.
    """
    for shard in shards:
        if not PLAIN.fullmatch(shard.name):
            raise ValueError(
                f"{folder}: {brief(shard.name)} has other letters than a to z, digits, . _ and -; "
                "rename it"
            )
    listed = {}
    for name, table in tables.items():
        path = folder / f"{name}.npy"
        write_atomically(path, partial(np.save, arr=table, allow_pickle=False))
        listed[name] = _entry(list_file(path))
    index = {"format": kind.format, "tables": listed, "shards": [_entry(file) for file in shards]}
    write_json(folder / INDEX, index)


def shards_in(folder: Path) -> list[Path]:
    """The shards of a folder by name; what is half-written has a name that begins with a dot."""
    return sorted(path for path in folder.glob("*.tar") if path.name[0] != ".")


def list_file(path: Path, of: Mapping[str, str] | None = None) -> Listed:
    """A file as an index lists it."""
    return Listed(path.name, path.stat().st_size, sha256_of(path), of or {}, str(path.parent))


def _entry(file: Listed) -> dict[str, Any]:
    of = {"of": dict(file.of)} if file.of else {}
    return {"name": file.name, "bytes": file.bytes, "sha256": file.sha256, **of}


def is_url(location: str) -> bool:
    return "://" in location


def read_index(location: str, kind: Kind) -> Index:
    """The index in a folder or at the URL of one. Raises ValueError where there is none."""
    name = f"{location}/{INDEX}"
    if is_url(location):
        return parse_index(_fetch_text(name, kind), name, kind)
    return parse_index(read_text(Path(name), kind.remedy, most=MOST_INDEX), name, kind)


def parse_index(text: str, name: str, kind: Kind = SHARDS) -> Index:
    """Raises ValueError where the text is none of ours; the message begins with `name`."""
    try:
        content, folder = json.loads(text), name.removesuffix(f"/{INDEX}")
        if content["format"] != kind.format:
            raise ValueError
        tables = {table: _parse_listed(content["tables"][table], folder) for table in kind.tables}
        return Index([_parse_listed(file, folder) for file in content["shards"]], tables)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{name}: damaged, or no index of {kind.files} of this version; {kind.remedy}"
        ) from None


def _parse_listed(entry: Mapping[str, Any], folder: str) -> Listed:
    """Raises ValueError where it is no plain file name, or could not be one of the cache."""
    file = Listed(**entry, folder=folder)
    if not PLAIN.fullmatch(file.name) or not re.fullmatch("[0-9a-f]{64}", file.sha256):
        raise ValueError
    if type(file.bytes) is not int or file.bytes < 0 or not isinstance(file.of, dict):
        raise ValueError
    return file


# --- rows by shard --------------------------------------------------------------------------------


class ShardRows:
    """`stream.Shards` of a dataset; shards that hold none of its rows play no part.

    Args:
        shard_of_row: (N,) numbers of shards.
        window: shards whose rows are shuffled together.
        source: what they are of.

    Attributes:
        numbers: (S,) of the shards that play a part.
        files: what the rows of each of them are read from.
    """

    def __init__(self, shard_of_row: np.ndarray, window: int, source: "OpenImagesShards") -> None:
        counts = np.zeros(len(source.index.shards), dtype=np.int64)
        for block in in_blocks(shard_of_row):
            counts += np.bincount(block, minlength=len(counts))
        self.numbers = np.flatnonzero(counts)
        self.sizes, self.window, self._source = counts[self.numbers], window, source
        self.files = [[source.index.shards[number]] for number in self.numbers.tolist()]
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        is_sorted = bool((shard_of_row[1:] >= shard_of_row[:-1]).all())
        self._shard_of_row = None if is_sorted else shard_of_row
        self._by_shard = None if is_sorted else np.argsort(shard_of_row, kind="stable")

    def beside(self, files: Sequence[Sequence[Listed]]) -> Self:
        """The same rows, which need more files of each shard."""
        rows = copy(self)
        rows.files = [[*own, *more] for own, more in zip(self.files, files, strict=True)]
        return rows

    def rows(self, shards: Sequence[int]) -> Sequence[int]:
        if len(shards) == len(self.sizes):
            return range(int(self._starts[-1]))
        return np.sort(np.concatenate([self._rows_of(shard) for shard in shards]))  # type: ignore[return-value]

    def _rows_of(self, shard: int) -> np.ndarray:
        start, stop = int(self._starts[shard]), int(self._starts[shard + 1])
        return np.arange(start, stop) if self._by_shard is None else self._by_shard[start:stop]

    def find(self, row: int) -> tuple[int, int]:
        if self._shard_of_row is None:
            shard = int(np.searchsorted(self._starts, row, "right")) - 1
        else:
            shard = int(np.searchsorted(self.numbers, self._shard_of_row[row]))
        return shard, int(np.searchsorted(self._rows_of(shard), row))

    def expect(self, shards: Sequence[int]) -> None:
        self._source.expect([file for shard in shards for file in self.files[shard]])


# --- the source -----------------------------------------------------------------------------------


class OpenImagesShards:
    """Shards of Open Images, or of pairs, as a `Source`.

    Args:
        location: folder or URL, for messages.
        store: where its files are taken from.
        index: what it lists.
        window: shards whose rows are shuffled together.

    Raises:
        ValueError: a table is missing, damaged or does not fit.
    """

    def __init__(self, location: str, store: Store, index: Index, window: int) -> None:
        self.location, self.store, self.index, self.window = location, store, index, window
        tables = {name: self._open_table(name) for name in TABLES}
        self.images, self._boxes, self._masks = (tables[name] for name in TABLES)
        for rows, of, most in (
            (self.images["shard"], "images", len(index.shards)),
            (self._boxes["image"], "boxes", len(self.images)),
            (self._masks["image"], "masks", len(self.images)),
        ):
            if any(int(block.max()) >= most for block in in_blocks(rows)):
                raise self._misfit(of)

    def _open_table(self, name: str) -> np.ndarray:
        path = self.store.path(self.index.tables[name])
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception:  # numpy's reader raises errors of parsers, too
            raise self._misfit(name) from None
        width = getattr(table, "dtype", np.dtype("S1")).itemsize - table_type(name, 0).itemsize
        fits = name != "images" or 0 < width <= LONGEST_NAME
        if not fits or getattr(table, "ndim", 0) != 1 or table.dtype != table_type(name, width):
            raise self._misfit(name)
        return table

    def _misfit(self, table: str) -> ValueError:
        name = self.index.tables[table].name
        return ValueError(
            f"{self.location}/{name}: no table of these shards; index them with {REINDEX} FOLDER"
        )

    # --- as a Source ------------------------------------------------------------------------------

    def boxes(self) -> tuple[np.ndarray, np.ndarray]:
        """Raises ValueError where there is none."""
        if not len(self._boxes):
            raise ValueError(
                f"{self.location}: no box of 2 to 80 % of its image; nothing to train stage 1 on"
            )
        return self._boxes["image"], self._boxes["box"]

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Raises ValueError where there is none."""
        if not len(self._masks):
            raise ValueError(
                f"{self.location}: no mask of 100 px or more with an aspect of 0.5 to 2; nothing "
                "to train stage 2 on"
            )
        return self._masks["image"], self._masks

    def image_name(self, image_id: int) -> str:
        row = self.images[image_id]
        return f"{self._shard_name(row)}/{_shown(row['name'])}"

    def image_keys(self, image_ids: np.ndarray) -> np.ndarray:
        return self.images["name"][image_ids]

    def image_state(self, image_id: int) -> tuple[int, int]:
        """Its place in its shard, and the first digits of the shard's hash."""
        row = self.images[image_id]
        return int(row["offset"]), int(self.index.shards[int(row["shard"])].sha256[:15], 16)

    def read_image(self, image_id: int) -> np.ndarray:
        row = self.images[image_id]
        name = self.image_name(image_id)
        return read_image(name, content=self._read(row["shard"], row["offset"], row["size"], name))

    def mask_name(self, row: np.void) -> str:
        image = self.images[row["image"]]
        key = key_of(_shown(image["name"]))
        return f"{self._shard_name(image)}/{key}.mask.{int(row['number'])}.png"

    def read_mask(self, row: np.void) -> np.ndarray:
        shard, name = self.images[row["image"]]["shard"], self.mask_name(row)
        return read_mask(name, content=self._read(shard, row["offset"], row["size"], name))

    def shards_of(self, image_ids: np.ndarray) -> ShardRows:
        shard_of_image = np.concatenate([block.copy() for block in in_blocks(self.images["shard"])])
        shard_of_row = np.concatenate([shard_of_image[block] for block in in_blocks(image_ids)])
        return ShardRows(shard_of_row, self.window, self)

    # --- bytes ------------------------------------------------------------------------------------

    def expect(self, files: Sequence[Listed]) -> None:
        """Says which files are to be at hand beside the tables, in the order of need."""
        self.store.expect([*self.index.tables.values(), *files])

    def _shard_name(self, image: np.void) -> str:
        return f"{self.location}/{self.index.shards[int(image['shard'])].name}"

    def _read(self, shard: int, offset: int, size: int, name: str) -> bytes:
        """Bytes of a shard. Raises ValueError where it cannot be had, or ends before them."""
        file = self.index.shards[int(shard)]
        if int(offset) + int(size) > file.bytes:
            raise ValueError(f"{name}: lies beyond the end of its shard; index the shards again")
        return read_from(self.store, file, partial(_read_part, offset=int(offset), size=int(size)))


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def in_blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows (N, ...), some at a time. Those of a mapped table leave no pages behind, so that a pass
    over a hundred million takes little memory."""
    mapped: Any = rows
    while not (mapped is None or isinstance(mapped, mmap.mmap)):
        mapped = getattr(mapped, "base", None)
    for start in range(0, len(rows), BLOCK):
        yield rows[start : start + BLOCK]
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def key_of(name: str) -> str:
    """What the files of a sample have in common, by WebDataset's rule: all but the endings."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _shown(name: bytes) -> str:
    return one_line(name.decode("utf-8", "backslashreplace"))


# --- opening --------------------------------------------------------------------------------------


def open_source(
    location: str | Path,
    *,
    cache: Path | str | None = None,
    cache_gb: float = 20.0,
    window: int = 8,
) -> Source:
    """The data of a folder in Open Images layout, or of shards in a folder or at a URL.

    Args:
        cache: folder that shards are fetched to; None reads those of a folder where they lie.
        cache_gb: most that it may hold, in GB.
        window: shards whose samples are shuffled together.

    Raises:
        ValueError: no index, or a damaged one; a URL without a cache; a cache that cannot be
            written, or that two windows and the tables do not fit into.
    """
    location = plain_location(location)
    if not is_url(location) and not (Path(location) / INDEX).exists():
        if shards_in(Path(location)):
            raise ValueError(f"{location}: shards without {INDEX}; run {REINDEX} {location}")
        return OpenImagesFolder(location)
    if is_url(location) and cache is None:
        raise ValueError(f"{location}: {ELSEWHERE}")
    index = read_index(location, SHARDS)
    if cache is None:
        return OpenImagesShards(location, InPlace(), index, window)
    limit = round(cache_gb * 1e9)
    check_room([[shard] for shard in index.shards], index, window, limit)
    check_writable(cache)
    return OpenImagesShards(location, Cache(Path(cache), limit), index, window)


def plain_location(location: str | Path) -> str:
    """A folder or URL without slashes at the end."""
    return str(location).rstrip("/") if is_url(str(location)) else str(Path(location))


def check_room(
    files: Sequence[Sequence[Listed]], index: Index, window: int, limit: int, what: str = "shards"
) -> None:
    """Raises ValueError where a cache is too small for the tables and two windows, the one shown
    and the next.

    Args:
        files: those of each shard.
        limit: bytes that the cache may hold.
        what: the files of a window in words.
    """
    sizes = sorted((sum(file.bytes for file in group) for group in files), reverse=True)
    tables = sum(table.bytes for table in index.tables.values())
    needed = tables + sum(sizes[: 2 * window])
    if needed > limit:
        remedy = "raise it, or lower --shard_window" if window > 1 else "raise it"
        raise ValueError(
            f"--shard_cache_gb {limit / 1e9:g}: two windows of {window} {what} and the index take "
            f"{needed / 1e9:.3g} GB; {remedy}"
        )


def _fetch_text(url: str, kind: Kind) -> str:
    try:
        with fsspec.open(url, "rb") as file:
            parts = iter(lambda: file.read(2**20), b"")
            content = b"".join(itertools.islice(parts, MOST_INDEX // 2**20))
        return content.decode()
    except Exception as error:  # every file system has errors of its own
        reason = "no such file" if isinstance(error, FileNotFoundError) else brief(str(error))
        raise ValueError(
            f"{url}: cannot be fetched ({reason}); expected the URL of a folder of {kind.files}"
        ) from None
