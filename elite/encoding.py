"""Folders to concepts: pairs are read ahead and encoded together, concept files just read; and the
files of what was encoded."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from elite.concept import Concept, ConceptFolder, is_saved
from elite.data import PairFolder
from elite.files import check_apart, quick_digest, write_atomically
from elite.images import cut_out
from elite.pipeline import Elite, stack_views
from elite.sheets import SHEET_ROWS, fit_tile, label_tile, tile_rows
from elite.wording import note

T = TypeVar("T")
ReadPair = tuple[int, np.ndarray, list[dict[str, Tensor]]]  # index, picture, views of each


@dataclass(frozen=True)
class Entry:
    """One object of a folder, ready to be drawn."""

    index: int
    concept: Concept = field(repr=False)
    image: np.ndarray | None = field(default=None, repr=False)  # None for a concept file


def ahead(
    pool: Executor, function: Callable[[int], T], items: Iterable[int], count: int
) -> Iterator[Future[T]]:
    """Results in the order of the items, `count` of them begun before they are asked for."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def read_entries(
    pool: Executor,
    pipe: Elite,
    folder: PairFolder | ConceptFolder,
    indices: Sequence[int],
    batch_size: int,
    failed: Callable[[str], None],
) -> Iterator[Entry]:
    """The objects of a folder in order, each read once ahead of its use, `batch_size` together.

    Args:
        failed: called with one line for each that cannot be read or was made by other mappers.
    """
    read: Callable[[int], Any]
    encode: Callable[[list[Any]], Iterable[Entry]]
    if isinstance(folder, ConceptFolder):
        read, encode = partial(_read_concept, pipe, folder), list[Entry]
    else:
        read, encode = partial(_read_pair, pipe, folder), partial(_encode_pairs, pipe)
    for futures in batches(ahead(pool, read, indices, batch_size), batch_size):
        done: list[Any] = []
        for future in futures:
            try:
                done.append(future.result())
            except ValueError as error:
                failed(str(error))
        if done:
            yield from encode(done)


def _read_concept(pipe: Elite, folder: ConceptFolder, index: int) -> Entry:
    concept = folder.read(index)
    try:
        pipe.check_concept(concept)
    except ValueError as error:
        raise ValueError(f"{folder.paths[index]}: {error}") from None
    return Entry(index, concept)


def _read_pair(pipe: Elite, pairs: PairFolder, index: int) -> ReadPair:
    pictures = pairs.read_all(index)
    return index, pictures[0][0], [pipe.concept_views(*picture) for picture in pictures]


def _encode_pairs(pipe: Elite, pairs: list[ReadPair]) -> Iterator[Entry]:
    encoded = pipe.encode_views(**stack_views([view for _, _, views in pairs for view in views]))
    rows = (encoded[row] for row in range(len(encoded)))
    for index, image, views in pairs:
        pictures = Concept.stack(list(itertools.islice(rows, len(views))))
        yield Entry(index, pictures.as_one(), image)


def encode_folder(
    pipe: Elite,
    pairs: PairFolder,
    output_dir: Path,
    *,
    skip_existing: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Encodes each pair on its own, so that a concept does not depend on its neighbours; every
    process of `accelerate launch` takes its share.

    Writes `NAME.safetensors` per pair, and at last `grid.png`: name, picture, cut-out.

    Args:
        skip_existing: keep files that say they are of this pair, these mappers and this metadata.
        metadata: what else a concept depends on.

    Returns:
        One line per pair that could not be read, from all processes.

    Raises:
        ValueError: two pictures of one name, a folder among the pictures, or the disk is full.
    """
    check_apart(output_dir, pairs.root)
    pairs.check_names()
    state = PartialState()
    share = range(len(pairs))[state.process_index :: state.num_processes]
    failures: list[str] = []
    paths = [output_dir / f"{pair.name}.safetensors" for pair in pairs.pairs]
    made_by = {**(metadata or {}), "fingerprint": pipe.fingerprint, "dtype": str(pipe.unet.dtype)}
    made_by["image_encoder_weights"] = quick_digest([pipe.image_encoder.state_dict()])
    origins = {index: {**made_by, "source": pairs.digest(index)} for index in share}
    left = [i for i in share if not (skip_existing and is_saved(paths[i], origins[i]))]
    progress = progress_bar("encode", "pair", len(share), len(left))
    with ThreadPoolExecutor(max_workers=2) as pool, progress as bar:

        def failed(message: str) -> None:
            failures.append(message)
            bar.update()

        for entry in read_entries(pool, pipe, pairs, tuple(left), 1, failed):
            entry.concept.save(paths[entry.index], origins[entry.index])
            left.remove(entry.index)
            bar.update()
    for path in (paths[index] for index in left):  # those that could not be read
        if path.exists():
            note(f"{path}: is of an earlier picture or model; remove it, or mend the pair")
    failures = gather_object(failures)
    if state.is_main_process:
        _write_sheet(pairs, output_dir / "grid.png")
    state.wait_for_everyone()
    return failures


def progress_bar(what: str, unit: str, total: int, left: int) -> tqdm:
    """A bar of the main process's share, with what an earlier run has done; others show none."""
    done = total - left
    return tqdm(
        desc=what,
        unit=unit,
        total=total,
        initial=done,
        postfix=f"{done} there already" if done else None,
        disable=not PartialState().is_main_process,
    )


def _write_sheet(pairs: PairFolder, path: Path) -> None:
    """The first pairs as they were read; no sheet where none could be."""
    rows = [row for _, row in sheet_rows(pairs, range(len(pairs)))]
    if rows:
        write_atomically(path, tile_rows(rows, columns(pairs)).save)


def sheet_rows(
    folder: PairFolder | ConceptFolder, indices: Sequence[int]
) -> Iterator[tuple[int, list[Image.Image]]]:
    """The first objects of a contact sheet with their tiles: name, and what `shown` gives. Pairs
    that cannot be read are left out."""
    for index in indices[:SHEET_ROWS]:
        try:
            row = [label_tile(folder.name(index)), *shown(folder, index)]
        except ValueError:
            continue
        yield index, row


def shown(folder: PairFolder | ConceptFolder, index: int) -> list[Image.Image]:
    """What a contact sheet shows of an object besides its name, as tiles: picture and cut-out of a
    pair, nothing of a concept file.

    Raises:
        ValueError: the pair cannot be read.
    """
    if isinstance(folder, ConceptFolder):
        return []
    image, mask = folder.read(index)
    return [fit_tile(Image.fromarray(picture)) for picture in (image, cut_out(image, mask))]


def columns(folder: PairFolder | ConceptFolder) -> list[str]:
    """The names of what `sheet_rows` gives."""
    return ["name"] if isinstance(folder, ConceptFolder) else ["name", "input", "object"]
