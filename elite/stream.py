"""The endless stream of training samples: what position n shows depends on the seed and n alone."""

import itertools
import re
import signal
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ORDER, SAMPLES, SHARDS = 1, 2, 3  # separate random streams of one seed
MAX_ATTEMPTS = 10  # samples tried for one position before the run is stopped
AT_HAND = 3  # windows whose rows are kept: the one shown and those it takes substitutes from


class Samples(Protocol):
    """What a training stream needs of a dataset; one that lies in shards has `shards`, too."""

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor | str]: ...

    def name(self, index: int) -> str:
        """What a user knows the sample by: its file, say."""


class Shards(Protocol):
    """Which rows of a dataset lie in which of its S shards."""

    sizes: np.ndarray  # (S,) rows of each, none of them 0
    window: int  # shards whose rows are shuffled together

    def rows(self, shards: Sequence[int]) -> Sequence[int]:
        """Those of some shards, ascending."""

    def find(self, row: int) -> tuple[int, int]:
        """The shard of a row, and its place among the rows there."""

    def expect(self, shards: Sequence[int]) -> None:
        """Says which shards are to be at hand, now or soon, in the order of need."""


class Failure(NamedTuple):
    """A sample that could not be read."""

    row: int  # of the dataset
    message: str  # "FILE: what is wrong; what to do"

    @property
    def reason(self) -> str:
        """What is wrong, the same words for every file: "not a readable image"."""
        wrong = self.message.partition(": ")[2] or self.message
        return re.sub(r"\d+", "N", re.split(r"; | \(", wrong)[0])


class OneShard:
    """`Shards` of a dataset that does not lie in any."""

    window = 1

    def __init__(self, length: int) -> None:
        self.sizes = np.array([length])

    def rows(self, shards: Sequence[int]) -> Sequence[int]:
        return range(int(self.sizes[0]))

    def find(self, row: int) -> tuple[int, int]:
        return 0, row

    def expect(self, shards: Sequence[int]) -> None:
        pass


def rows_by_shard(dataset: Samples) -> Shards:
    """Of a dataset without shards, one of all rows."""
    return getattr(dataset, "shards", None) or OneShard(len(dataset))


class Order:
    """Which row of a dataset each position shows, a function of (seed, position) alone.

    Every epoch takes the shards in another order, a window of them at a time, and shuffles the
    rows of a window. Windows are counted through the epochs.
    """

    def __init__(self, dataset: Samples, seed: int) -> None:
        self.shards = rows_by_shard(dataset)
        self.seed, self.length = seed, len(dataset)
        self.windows = -(-len(self.shards.sizes) // self.shards.window)  # of an epoch
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._rows: dict[int, Sequence[int]] = {}
        self._shown, self._order, self._ahead = -1, np.zeros(0, dtype=np.int64), False

    def row(self, position: int) -> int:
        """The row at a position. Says what is needed next once a quarter of a window is through:
        until then other processes may still be in the window before."""
        window, place = self.find(position)
        if window != self._shown:
            self._shown, self._order, self._ahead = window, self._shuffled(window), False
            self.shards.expect(self._shards_of(window))
        if not self._ahead and 4 * place >= len(self._order):
            self._ahead = True
            self.shards.expect(self._shards_of(window) + self._shards_of(window + 1))
        return int(self._rows_of(window)[int(self._order[place])])

    def substitute(self, position: int, attempt: int, rng: np.random.Generator) -> int:
        """A row to show where that of the position cannot be read: each attempt draws from a
        window further on, so that a lost shard does not offer itself."""
        rows = self._rows_of(self.find(position)[0] + attempt)
        return int(rows[int(rng.integers(len(rows)))])

    def find(self, position: int) -> tuple[int, int]:
        """The window of a position, and its place there."""
        epoch, place = divmod(position, self.length)
        starts = self._read_epoch(epoch)[1]
        number = int(np.searchsorted(starts, place, "right")) - 1
        return epoch * self.windows + number, place - int(starts[number])

    def _read_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards in an epoch, (S,), and the places where its windows start."""
        if self._epoch is None or self._epoch[0] != epoch:
            sizes, step = self.shards.sizes, self.shards.window
            order = np.random.default_rng((SHARDS, self.seed, epoch)).permutation(len(sizes))
            ends = np.cumsum(np.add.reduceat(sizes[order], np.arange(0, len(sizes), step)))
            self._epoch = epoch, order, np.concatenate([[0], ends[:-1]])
        return self._epoch[1:]

    def _shards_of(self, window: int) -> list[int]:
        epoch, number = divmod(window, self.windows)
        start = number * self.shards.window
        return self._read_epoch(epoch)[0][start : start + self.shards.window].tolist()

    def _rows_of(self, window: int) -> Sequence[int]:
        if window not in self._rows:
            while len(self._rows) >= AT_HAND:
                del self._rows[min(self._rows)]
            self._rows[window] = self.shards.rows(self._shards_of(window))
        return self._rows[window]

    def _shuffled(self, window: int) -> np.ndarray:
        """A permutation of the rows of a window; with one window an epoch, that of all rows."""
        epoch, number = divmod(window, self.windows)
        key = (ORDER, self.seed, epoch) + ((number,) if number else ())
        return np.random.default_rng(key).permutation(len(self._rows_of(window)))


class TrainingStream(Dataset):
    """An endless, shuffled stream: the sample at position n depends on (seed, n) alone.

    So workers, processes and resuming change nothing. Each epoch of `len(dataset)` positions
    shows every sample once.

    Args:
        dataset: what to show.
        seed: of order and augmentations, not negative.
    """

    def __init__(self, dataset: Samples, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed {seed}: expected 0 or more; choose another")
        self.dataset, self.seed = dataset, seed
        self.order = Order(dataset, seed)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The dataset's sample with three more keys.

        Returns:
            seed: int64 (), for whatever the objective draws.
            sample_index: its place in the dataset; list of one int.
            failures: the samples that could not be read and that this one stands in for; list of
                `Failure`.

        Raises:
            ValueError: MAX_ATTEMPTS samples in a row could not be read; lists them.
        """
        failures: list[Failure] = []
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng((SAMPLES, self.seed, position, attempt))
            noise_seed = torch.tensor(int(rng.integers(2**63 - 1)))
            if attempt == 0:
                index = self.order.row(position)
            else:
                index = self.order.substitute(position, attempt, rng)
            try:
                sample = self.dataset.sample(index, rng)
            except ValueError as error:
                failures.append(Failure(index, str(error)))
            else:
                own = {"seed": noise_seed, "sample_index": [index], "failures": failures}
                return {**sample, **own}
        raise ValueError(
            f"{len(failures)} samples in a row could not be read; repair or remove them: "
            + "; ".join(failure.message for failure in failures)
        )


def stream_loader(
    stream: TrainingStream,
    *,
    batch_size: int,
    start: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of the stream without end, from position `start` on; to be read once.

    Micro-batch k of process p holds positions `start + k * B * P + p * B` and the B - 1 after it,
    so P processes of batch B see together what one process of batch P * B sees.
    """
    firsts = itertools.count(start + process_index * batch_size, batch_size * num_processes)
    return DataLoader(
        stream,
        batch_sampler=(list(range(first, first + batch_size)) for first in firsts),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
    )


def read_batches(loader: DataLoader) -> Generator[dict[str, Any], None, None]:
    """The loader's batches; errors of its processes are raised as if they happened here. Close it
    when done: its processes ignore the signal with which Python would end them at exit.

    Raises:
        ValueError: the stream's own, or a loader process has ended.
    """
    try:
        yield from loader
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"a loader process has ended ({str(error).splitlines()[0]}); if memory ran out, lower "
            "--dataloader_num_workers"
        ) from None


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples to a batch: tensors stacked (B, ...), texts in a list of B, lists joined."""
    batch: dict[str, Any] = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(first, Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(first, list):
            batch[key] = list(itertools.chain.from_iterable(values))
        else:
            batch[key] = values
    return batch


def _start_worker(worker: int) -> None:
    """Each worker of a loader uses one core, and leaves it to the training process to answer a
    signal that reaches them all."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
