"""The tables of Open Images: its CSV files of any length, and our index of mask boxes."""

import csv
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from elite.files import write_atomically
from elite.wording import brief, note

CSV_BLOCK = 16384  # rows held as text at a time
LONGEST_TEXT = 250  # characters; a longer one would widen the array of all rows
BOX_FIELDS = ("name", "hs", "he", "ws", "we")  # of the index of mask boxes
REBUILD = "python data_scripts/cal_bbox_by_seg.py DIR"
INDEX_ENDING = "_bbox_dict.npy"


# --- CSV files ------------------------------------------------------------------------------------


@contextmanager
def csv_opened(path: Path) -> Iterator[tuple[list[str], Iterator[bytes]]]:
    """The header of a CSV file and the lines below it, blank ones left out.

    Raises:
        ValueError: no such file, or whatever is wrong with its lines while it is open.
    """
    try:
        with open(path, "rb") as file:
            lines = filter(bytes.strip, file)
            yield next(csv.reader([next(lines, b"").decode("utf-8-sig")]), []), lines
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; "
            "expected the Open Images V6 layout (annotations/, images/, segs/)"
        ) from None
    except KeyError as error:
        raise ValueError(
            f"{path}: no column {error.args[0]}; expected the CSV of Open Images V6"
        ) from None
    except (ValueError, IndexError, csv.Error) as error:
        reason = str(error).partition(" at row")[0]  # which is counted from the block
        raise ValueError(f"{path}: not a readable CSV file ({reason}); download it again") from None


def read_blocks(
    path: Path, texts: Sequence[str], numbers: Sequence[str] = ()
) -> Iterator[list[np.ndarray]]:
    """The named columns of a CSV file (rows,), byte strings and then float32 numbers, some rows at
    a time, so that fifteen million take little memory; first a block of none.

    Raises:
        ValueError: no such file, a column is missing, or a row is damaged.
    """
    names = [*texts, *numbers]
    kinds = np.dtype([*((t, f"S{LONGEST_TEXT + 1}") for t in texts), *((n, "f4") for n in numbers)])
    with csv_opened(path) as (header, lines):
        if missing := [name for name in names if name not in header]:
            raise KeyError(", ".join(missing))
        yield [np.zeros(0, "S1" if name in texts else "f4") for name in names]
        while block := list(itertools.islice(lines, CSV_BLOCK)):
            table = np.loadtxt(
                *(block, kinds),
                delimiter=",",
                usecols=[header.index(name) for name in names],
                quotechar='"',
                comments=None,
                encoding="latin1",  # bytes as they are
                ndmin=1,
            )
            yield [_narrowed(table[name]) for name in names]


def _narrowed(column: np.ndarray) -> np.ndarray:
    """A copy of a column of a block; texts as wide as the longest. Raises ValueError where that is
    too long, or no UTF-8."""
    if column.dtype.kind != "S":
        return column.copy()
    letters = np.ascontiguousarray(column).view(np.uint8).reshape(len(column), -1)
    width = int(np.flatnonzero(letters.any(axis=0)).max(initial=0)) + 1
    if width > LONGEST_TEXT:
        raise ValueError(f"a text of more than {LONGEST_TEXT} characters")
    texts = column.astype(f"S{width}")
    texts.tobytes().decode()
    return texts


def read_boxes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image names (N,) and boxes float32 (N, 4) x0 x1 y0 y1 that cover 2 to 80 % of their image.

    Boxes are cut to the image first; how many are left out is noted.
    """
    kept, listed = [], 0
    for image_ids, *sides in read_blocks(path, ["ImageID"], ["XMin", "XMax", "YMin", "YMax"]):
        boxes = np.stack(sides, axis=1).clip(0, 1)
        usable = usable_boxes(boxes)
        kept.append((image_ids[usable], boxes[usable]))
        listed += len(usable)
    image_ids, boxes = map(np.concatenate, zip(*kept, strict=True))
    if 0 < len(boxes) < listed:
        left_out = f"{listed - len(boxes):,} of {listed:,} boxes are left out"
        note(f"{path}: {left_out}; they do not cover 2 to 80 % of their image")
    return image_ids, boxes


def usable_boxes(boxes: np.ndarray) -> np.ndarray:
    """Which boxes (N, 4), x0 x1 y0 y1 in [0, 1], cover 2 to 80 % of their image, bool (N,)."""
    width, height = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    area = np.where((width > 0) & (height > 0), width * height, 0)
    return (area >= 0.02) & (area <= 0.8)


# --- the index of mask boxes ----------------------------------------------------------------------


def mask_boxes_path(root: Path | str, set_name: str = "test") -> Path:
    """Where the index of mask boxes of an Open Images folder lies."""
    return Path(root) / "segs" / f"{set_name}{INDEX_ENDING}"


def for_set(command: str, set_name: str) -> str:
    """The command of a remedy with the set that it is about."""
    return command if set_name == "test" else f"{command} --set_name {set_name}"


def save_mask_boxes(path: Path, boxes: Mapping[str, tuple[int, int, int, int]]) -> None:
    """Writes the index: per mask file its box, so that `mask[hs:he, ws:we]` is the object.

    A structured array ordered by name, no pickle; the file appears whole or not at all.

    Raises:
        ValueError: the disk is full or the folder cannot be written.
    """
    rows = [(name, *boxes[name]) for name in sorted(boxes)]
    width = max(map(len, boxes), default=1)
    table = np.array(rows, dtype=_box_type(width))
    write_atomically(path, lambda temporary: np.save(temporary, table, allow_pickle=False))


def load_mask_boxes(path: Path) -> np.ndarray:
    """The index of mask boxes: structured array (N,) of name, hs, he, ws, we.

    Raises:
        ValueError: no such file, or not ours (the release's is pickled and never opened).
    """
    rebuild = for_set(REBUILD, path.name.removesuffix(INDEX_ENDING))
    try:
        # Mapped, since reading would first allocate whatever size the file claims.
        boxes = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make it with {rebuild}") from None
    except Exception:  # numpy's reader raises errors of parsers, too
        raise ValueError(f"{path}: pickled or damaged; rebuild it with {rebuild}") from None
    if not isinstance(boxes, np.ndarray) or boxes.ndim != 1 or not _is_box_type(boxes.dtype):
        raise ValueError(f"{path}: not an index of mask boxes; rebuild it with {rebuild}")
    return np.array(boxes)


def _box_type(width: int) -> np.dtype:
    """A row of the index, with names of up to `width` characters."""
    return np.dtype(list(zip(BOX_FIELDS, (f"U{width}", *4 * ("i4",)), strict=True)))


def _is_box_type(dtype: np.dtype) -> bool:
    if dtype.names != BOX_FIELDS:
        return False
    kinds = [(dtype[name].kind, dtype[name].itemsize) for name in BOX_FIELDS]
    return kinds[0][0] == "U" and set(kinds[1:]) == {("i", 4)}


def usable_masks(boxes: np.ndarray) -> np.ndarray:
    """Which rows of the index have both sides of at least 100 px and an aspect of 0.5 to 2, bool
    (N,)."""
    height, width = boxes["he"] - boxes["hs"], boxes["we"] - boxes["ws"]
    large = (height >= 100) & (width >= 100)
    return large & (height <= 2 * width) & (width <= 2 * height)


def file_key(path: bytes) -> bytes:
    """A path's file name in small letters, the same whatever folder the file was unzipped to."""
    return path.rpartition(b"/")[2].lower()


def same_masks(
    listed: Sequence[bytes], image_ids: np.ndarray, known: Sequence[bytes]
) -> tuple[list[int], list[int]]:
    """Rows of the table of masks and of the index that are of the same file, ordered by its name:
    by the path where both say the same, else by the file's own name in small letters, among those
    that no row names by their path.

    Raises:
        ValueError: a row may mean two files, or a file is listed for two images.
    """
    places = {name: entry for entry, name in enumerate(known)}
    named = {places[name] for name in listed if name in places}
    by_key: dict[bytes, int] = {}
    doubtful: dict[bytes, int] = {}
    for entry, name in enumerate(known):
        if entry not in named and by_key.setdefault(key := file_key(name), entry) != entry:
            doubtful[key] = entry
    row_of: dict[int, int] = {}
    for row, name in enumerate(listed):
        key = file_key(name)
        entry = places[name] if name in places else by_key.get(key, -1)
        if entry < 0:  # of a file that is not there
            continue
        if name not in places and key in doubtful:
            both = (brief(known[by_name[key]].decode()) for by_name in (by_key, doubtful))
            raise ValueError(
                f"{brief(name.decode())} may be {' or '.join(both)}; write its folder into "
                "MaskPath, or rename one of them"
            )
        first = row_of.setdefault(entry, row)
        if image_ids[first] != image_ids[row]:
            images = (brief(image_ids[n].decode()) for n in (first, row))
            raise ValueError(
                f"{brief(name.decode())} is listed for {' and '.join(images)}; leave one out"
            )
    entries = sorted(row_of, key=lambda entry: (file_key(known[entry]), known[entry]))
    return [row_of[entry] for entry in entries], entries
