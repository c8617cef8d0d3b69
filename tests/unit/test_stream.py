"""The training stream: order, replacement of broken samples, processes, resuming, workers."""

import numpy as np
import pytest
import torch

from elite.open_images import OpenImagesMasks
from elite.stream import Order, TrainingStream, stream_loader
from tests.open_images import make_open_images


class Numbers:
    """A dataset that gives its index and a draw; those in `broken` cannot be read."""

    def __init__(self, length: int, broken: tuple[int, ...] = ()) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def sample(self, index, rng):
        draw = rng.random()
        if index in self.broken:
            raise ValueError(f"{index}.jpg: broken")
        return {"index": torch.tensor(index), "draw": torch.tensor(draw), "caption": f"a {index}"}


def take(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order():
    stream = TrainingStream(Numbers(50), seed=3)
    epochs = [[int(stream[n]["index"]) for n in range(e * 50, e * 50 + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(50))


def test_a_position_depends_on_seed_and_position_alone():
    forward, backward = TrainingStream(Numbers(7), 5), TrainingStream(Numbers(7), 5)
    ahead = [forward[n] for n in range(30)]
    behind = [backward[n] for n in reversed(range(30))][::-1]
    assert ahead == behind
    assert len({float(sample["draw"]) for sample in ahead}) == 30
    assert len({int(sample["seed"]) for sample in ahead}) == 30
    assert ahead[0]["seed"].dtype == torch.int64 and ahead[0]["seed"].shape == ()
    other = [TrainingStream(Numbers(7), 6)[n] for n in range(30)]
    assert not {int(s["seed"]) for s in ahead} & {int(s["seed"]) for s in other}
    assert [int(s["index"]) for s in ahead] != [int(s["index"]) for s in other]


def test_the_order_is_that_of_earlier_versions():
    """A dataset that lies in no shards: runs of theirs are resumed."""
    order = Order(Numbers(50), seed=3)
    for epoch in range(3):
        expected = np.random.default_rng((1, 3, epoch)).permutation(50).tolist()
        assert [order.row(epoch * 50 + place) for place in range(50)] == expected
        substitutes = [np.random.default_rng(n).integers(50) for n in range(4)]
        found = [order.substitute(epoch * 50, 1, np.random.default_rng(n)) for n in range(4)]
        assert found == substitutes


def test_broken_samples_are_replaced_and_recorded():
    stream = TrainingStream(Numbers(10, broken=(2, 5)), seed=0)
    samples = [stream[n] for n in range(10)]
    assert [len(sample["failures"]) > 0 for sample in samples].count(True) == 2
    assert {failure for s in samples for failure in s["failures"]} == {
        (2, "2.jpg: broken"),
        (5, "5.jpg: broken"),
    }
    assert not {2, 5} & {int(sample["index"]) for sample in samples}
    assert samples == [TrainingStream(Numbers(10, broken=(2, 5)), seed=0)[n] for n in range(10)]


def test_a_hopeless_dataset_stops_with_the_list(monkeypatch):
    monkeypatch.setattr("elite.stream.MAX_ATTEMPTS", 4)
    stream = TrainingStream(Numbers(3, broken=(0, 1, 2)), seed=0)
    with pytest.raises(
        ValueError, match=r"4 samples in a row could not be read.*\.jpg: broken; \d"
    ):
        stream[0]


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed -1"):
        TrainingStream(Numbers(3), -1)


def test_two_processes_see_what_one_of_twice_the_batch_sees():
    stream = TrainingStream(Numbers(11), seed=1)
    one = take(stream_loader(stream, batch_size=4, start=6), 5)
    two = [
        take(stream_loader(stream, batch_size=2, start=6, process_index=p, num_processes=2), 5)
        for p in range(2)
    ]
    for whole, first, second in zip(one, *two, strict=True):
        for key in ("index", "draw", "seed"):
            assert torch.cat([first[key], second[key]]).equal(whole[key])
        assert first["caption"] + second["caption"] == whole["caption"]


def test_resuming_continues_the_stream():
    stream = TrainingStream(Numbers(11), seed=1)
    whole = take(stream_loader(stream, batch_size=3), 6)
    rest = take(stream_loader(TrainingStream(Numbers(11), seed=1), batch_size=3, start=9), 3)
    assert all(a["draw"].equal(b["draw"]) for a, b in zip(whole[3:], rest, strict=True))


def test_workers_change_nothing(tmp_path):
    folder = make_open_images(tmp_path, n=6)
    dataset = OpenImagesMasks(folder, resolution=32, clip_size=28, latent_size=8)
    alone = take(stream_loader(TrainingStream(dataset, seed=2), batch_size=2), 4)
    helped = take(stream_loader(TrainingStream(dataset, seed=2), batch_size=2, num_workers=2), 4)
    for first, second in zip(alone, helped, strict=True):
        assert all(
            torch.equal(first[key], second[key])
            if torch.is_tensor(first[key])
            else first[key] == second[key]
            for key in first
        )


def test_batches_stack_tensors_and_flatten_failures():
    stream = TrainingStream(Numbers(6, broken=(1, 4)), seed=0)
    (batch,) = take(stream_loader(stream, batch_size=6), 1)
    assert batch["index"].shape == batch["seed"].shape == (6,)
    assert len(batch["caption"]) == 6 and all(isinstance(text, str) for text in batch["caption"])
    assert set(batch["failures"]) == {(1, "1.jpg: broken"), (4, "4.jpg: broken")}
    assert batch["sample_index"] == batch["index"].tolist()
