"""Training from shards: the order and the samples of the folder they were made of, whatever reads
them; shards that are lost or damaged."""

import errno
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from elite import shards as shards_module
from elite.latents import CachedBoxes, cache_latents
from elite.open_images import OpenImagesBoxes
from elite.shards import INDEX, open_source
from elite.stream import Order, TrainingStream
from tests.shards import ALL, STAGES, both, same, served, shard_names, shard_of_row, take


def rows_shown(order, start, count):
    return [order.row(position) for position in range(start, start + count)]


# --- order ----------------------------------------------------------------------------------------


@both
def test_a_window_of_all_shards_shows_what_the_folder_shows_bit_for_bit(stage, folder, shards):
    plain = TrainingStream(STAGES[stage](folder), seed=3)
    sharded = TrainingStream(STAGES[stage](open_source(shards, window=ALL)), seed=3)
    assert len(shard_names(shards)) > 4
    assert len(plain.dataset) == len(sharded.dataset) >= 12
    for position in range(2 * len(plain.dataset) + 1):
        assert same(plain[position], sharded[position]), position
        assert [plain.order.substitute(position, n, np.random.default_rng(n)) for n in (1, 2)] == [
            sharded.order.substitute(position, n, np.random.default_rng(n)) for n in (1, 2)
        ]


@both
def test_rows_are_those_of_the_folder_exactly(stage, folder, shards):
    plain, sharded = STAGES[stage](folder), STAGES[stage](open_source(shards))
    if stage == "boxes":
        assert np.array_equal(plain.boxes, sharded.boxes)
    for row in range(len(plain)):
        image, mask = plain.image_ids[row], sharded.image_ids[row]
        content = plain.source.image_path(image).read_bytes()
        entry = sharded.source.images[mask]
        assert sharded.source._read(entry["shard"], entry["offset"], entry["size"], "x") == content


@both
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_takes_some_shards_at_a_time_and_an_epoch_all_rows_once(stage, window, shards):
    dataset = STAGES[stage](open_source(shards, window=window))
    order, sizes = Order(dataset, 5), Counter(shard_of_row(dataset).tolist())
    orders = []
    for epoch in range(3):
        shown = rows_shown(order, epoch * len(dataset), len(dataset))
        assert sorted(shown) == list(range(len(dataset)))
        numbers = [int(shard_of_row(dataset)[row]) for row in shown]
        while numbers:
            block = set(list(dict.fromkeys(numbers))[:window])
            length = sum(sizes[number] for number in block)
            assert set(numbers[:length]) == block
            numbers = numbers[length:]
        orders.append(shown)
    assert orders[0] != orders[1] != orders[2]


def test_a_position_depends_on_seed_and_position_alone(shards):
    dataset = STAGES["boxes"](open_source(shards, window=2))
    forward = rows_shown(Order(dataset, 1), 0, 40)
    backward = Order(dataset, 1)
    assert [backward.row(n) for n in reversed(range(40))][::-1] == forward
    assert rows_shown(Order(dataset, 1), 17, 5) == forward[17:22]
    assert rows_shown(Order(dataset, 2), 0, 40) != forward
    assert len({tuple(Order(dataset, seed)._read_epoch(0)[0]) for seed in range(5)}) > 1


@both
def test_batches_processes_and_workers_change_nothing(stage, shards, tmp_path):
    with served(shards) as server:
        source = open_source(server.url, cache=tmp_path / "cache", window=2)
        stream = TrainingStream(STAGES[stage](source), seed=1)
        one = take(stream, 4, batch_size=4, start=6)
        whole = TrainingStream(STAGES[stage](open_source(shards, window=2)), seed=1)
        assert all(map(same, one, take(whole, 4, batch_size=4, start=6)))
        assert all(map(same, one, take(stream, 4, batch_size=4, start=6, num_workers=2)))
        parts = [
            take(stream, 4, batch_size=2, start=6, process_index=p, num_processes=2)
            for p in range(2)
        ]
        for batch, first, second in zip(one, *parts, strict=True):
            assert torch.cat([first["seed"], second["seed"]]).equal(batch["seed"])
            assert torch.cat([first["pixels"], second["pixels"]]).equal(batch["pixels"])
            assert first["sample_index"] + second["sample_index"] == batch["sample_index"]


def test_streams_travel_to_processes_that_are_not_forked(shards, tmp_path):
    with served(shards) as server:
        source = open_source(server.url, cache=tmp_path / "cache", window=2)
        stream = TrainingStream(STAGES["masks"](source), seed=1)
        before = stream[0]
        again = pickle.loads(pickle.dumps(stream))
        assert same(again[3], stream[3]) and same(again[0], before)


# --- shards that cannot be had --------------------------------------------------------------------


def spoil(path):
    """One bit of a picture."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def failures_of(stream, count):
    return [failure for n in range(count) for failure in stream[n]["failures"]]


@both
@pytest.mark.parametrize(
    ("change", "reason"),
    [(spoil, "shard is damaged"), (lambda path: path.unlink(), "shard is missing")],
    ids=["damaged", "missing"],
)
@pytest.mark.parametrize("remote", [False, True], ids=["folder", "URL"])
def test_a_lost_shard_costs_its_samples_alone(
    stage, change, reason, remote, shards, own_shards, tmp_path
):
    lost = own_shards / shard_names(own_shards)[1]
    change(lost)
    with served(own_shards) as server:
        location = server.url if remote else own_shards
        cache = tmp_path / "cache" if remote else None
        dataset = STAGES[stage](open_source(location, cache=cache, window=1))
        stream = TrainingStream(dataset, seed=0)
        whole = TrainingStream(STAGES[stage](open_source(shards, window=1)), seed=0)
        bad = np.flatnonzero(shard_of_row(dataset) == 1).tolist()
        found = []
        for n in range(len(dataset)):
            sample, expected = stream[n], whole[n]
            if expected["sample_index"][0] in bad:
                found += sample["failures"]
                assert sample["sample_index"][0] not in bad
            else:
                assert same(sample, expected)
        assert sorted(failure.row for failure in found) == bad
        assert {failure.reason for failure in found} == {reason}
        name = f"{location}/{lost.name}: {reason}"
        assert all(failure.message.startswith(name) for failure in found)
        assert all("\n" not in failure.message for failure in found)


def test_a_server_that_errs_once_costs_nothing(own_shards, shards, tmp_path):
    answers = iter([None])
    with served(own_shards) as server:
        first = shard_names(own_shards)[0]
        server.spoil[first] = lambda content: next(answers, content)
        dataset = STAGES["boxes"](open_source(server.url, cache=tmp_path / "c", window=ALL))
        assert failures_of(TrainingStream(dataset, 0), len(dataset)) == []
        assert server.asked[first] == 2


def test_a_server_that_errs_costs_the_shard_and_is_not_asked_for_each_sample(own_shards, tmp_path):
    with served(own_shards) as server:
        first = shard_names(own_shards)[0]
        server.spoil[first] = lambda content: None
        dataset = STAGES["boxes"](open_source(server.url, cache=tmp_path / "c", window=ALL))
        found = failures_of(TrainingStream(dataset, 0), len(dataset))
        assert {failure.reason for failure in found} == {"shard cannot be fetched"}
        assert "500" in found[0].message and server.asked[first] == 2, "tries, not samples"


@pytest.mark.parametrize(
    "spoiled", [lambda content: content[:-1], lambda content: content[:99] + b"x" + content[100:]]
)
def test_what_arrives_otherwise_than_listed_is_never_shown(spoiled, own_shards, tmp_path):
    with served(own_shards) as server:
        first = shard_names(own_shards)[0]
        server.spoil[first] = spoiled
        dataset = STAGES["boxes"](open_source(server.url, cache=tmp_path / "c", window=ALL))
        found = failures_of(TrainingStream(dataset, 0), len(dataset))
        assert {failure.reason for failure in found} == {"shard is damaged"}
        assert not list((tmp_path / "c").glob("*.part"))


def test_a_server_that_sends_without_end_is_cut_off(own_shards, tmp_path):
    with served(own_shards) as server:
        first = shard_names(own_shards)[0]
        server.spoil[first] = lambda content: content + bytes(20_000_000)
        source = open_source(server.url, cache=tmp_path / "c", window=ALL)
        with pytest.raises(ValueError, match=r"cannot be fetched .*more bytes than the index"):
            source.store.path(source.index.shards[0])
    assert not list((tmp_path / "c").glob("*.part"))


@pytest.mark.parametrize("rows", [1, 3])
def test_tables_read_in_blocks_are_the_same(rows, shards, monkeypatch):
    whole = STAGES["boxes"](open_source(shards, window=2))
    monkeypatch.setattr("elite.shards.BLOCK", rows)
    source = open_source(shards, window=2)
    blocks = STAGES["boxes"](source)
    assert len(blocks) > 6 and len(source.images) > 3
    assert np.array_equal(whole.shards.sizes, blocks.shards.sizes)
    assert [whole.shards.find(row) for row in range(len(whole))] == [
        blocks.shards.find(row) for row in range(len(blocks))
    ]


def test_a_shard_that_cannot_be_read_costs_its_samples_alone(own_shards, shards, monkeypatch):
    """As on a network's disk that comes and goes."""
    stream = TrainingStream(
        OpenImagesBoxes(open_source(own_shards, window=1), resolution=32), seed=0
    )
    bad = own_shards / shard_names(own_shards)[1]

    def broken(path, offset, size):
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return read_part(path, offset, size)

    read_part = shards_module._read_part
    monkeypatch.setattr(shards_module, "_read_part", broken)
    found = [failure for n in range(len(stream.dataset)) for failure in stream[n]["failures"]]
    assert {failure.message for failure in found} == {
        f"{bad}: shard cannot be read (Input/output error)"
    }


# --- latents --------------------------------------------------------------------------------------


def test_latents_of_shards_are_those_of_the_folder(folder, own_shards, parts, tmp_path):
    plain, sharded = (
        OpenImagesBoxes(source, resolution=32, clip_size=28)
        for source in (folder, open_source(own_shards, window=2))
    )
    for name, boxes in (("plain", plain), ("sharded", sharded)):
        assert cache_latents(boxes, parts["vae"], tmp_path / name) == []
    a, b = (
        CachedBoxes(boxes, tmp_path / name, parts["vae"])
        for name, boxes in (("plain", plain), ("sharded", sharded))
    )
    assert b.shards is sharded.shards, "the order is that of the shards"
    assert all(same(a.sample(n, np.random.default_rng(n)), b.sample(n, np.random.default_rng(n)))
               for n in range(len(a)))  # fmt: skip
    path = own_shards / INDEX
    index = json.loads(path.read_text())
    index["shards"][2]["sha256"] = "0" * 64
    path.write_text(json.dumps(index))
    changed = OpenImagesBoxes(open_source(own_shards), resolution=32, clip_size=28)
    with pytest.raises(ValueError, match="changed since"):
        CachedBoxes(changed, tmp_path / "sharded", parts["vae"])
