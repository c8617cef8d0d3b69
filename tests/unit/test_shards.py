"""Training from shards: the order and the samples of the folder they were made of, whatever reads
them; a cache that keeps its bound; shards that are lost, damaged or hostile."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from elite import shards as shards_module
from elite.latents import CachedBoxes, cache_latents
from elite.open_images import OpenImagesBoxes, OpenImagesFolder, OpenImagesMasks
from elite.shard_cache import Listed
from elite.shards import INDEX, open_source
from elite.stream import Order, TrainingStream, stream_loader
from tests.open_images import make_open_images
from tests.shards import bytes_cached, make_shards, served, shard_names
from tests.waiting import wait_until

COUNT = 12
ALL = 1000  # more shards than there are
SIZES = {"resolution": 32, "clip_size": 28}
STAGES = {
    "boxes": lambda source: OpenImagesBoxes(source, **SIZES),
    "masks": lambda source: OpenImagesMasks(source, latent_size=8, **SIZES),
}
both = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("elite.shard_cache.PAUSES", (0, 0.01))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures whose boxes are listed in any order."""
    root = make_open_images(tmp_path_factory.mktemp("data"), n=COUNT)
    path = root / "annotations" / "test-annotations-bbox.csv"
    header, *rows = path.read_text().splitlines()
    mixed = np.random.default_rng(7).permutation([*rows, rows[3], rows[0]])
    path.write_text("\n".join([header, *mixed]))
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    return make_shards(folder, tmp_path_factory.mktemp("shards"))


@pytest.fixture
def own_shards(folder, tmp_path):
    """To be spoiled."""
    return make_shards(folder, tmp_path / "shards")


def same(a, b):
    assert a.keys() == b.keys()
    return all(
        torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a
    )


def take(stream, count, **options):
    return list(islice(stream_loader(stream, **options), count))


def rows_shown(order, start, count):
    return [order.row(position) for position in range(start, start + count)]


def shard_of_row(dataset):
    return dataset.source.images["shard"][dataset.image_ids]


# --- order ----------------------------------------------------------------------------------------


@both
def test_a_window_of_all_shards_shows_what_the_folder_shows_bit_for_bit(stage, folder, shards):
    plain = TrainingStream(STAGES[stage](folder), seed=3)
    sharded = TrainingStream(STAGES[stage](open_source(shards, window=ALL)), seed=3)
    assert len(shard_names(shards)) > 4
    assert len(plain.dataset) == len(sharded.dataset) >= COUNT
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


# --- the cache ------------------------------------------------------------------------------------


def smallest_limit(shards, window):
    index = json.loads((shards / INDEX).read_text())
    sizes = sorted((shard["bytes"] for shard in index["shards"]), reverse=True)
    return sum(t["bytes"] for t in index["tables"].values()) + sum(sizes[: 2 * window])


def test_the_cache_keeps_its_bound_and_fetches_each_shard_once_an_epoch(shards, tmp_path):
    limit, cache = smallest_limit(shards, 1), tmp_path / "cache"
    with served(shards) as server:
        source = open_source(server.url, cache=cache, cache_gb=limit / 1e9, window=1)
        stream = TrainingStream(STAGES["masks"](source), seed=0)
        largest, count = 0, len(stream.dataset)
        for position in range(2 * count):
            assert stream[position]["failures"] == []
            largest = max(largest, bytes_cached(cache))
        assert limit / 2 < largest <= limit
        assert max(server.asked[name] for name in shard_names(shards)) <= 3  # and once ahead
        assert min(server.asked[name] for name in shard_names(shards)) >= 1
        assert sum(server.asked.values()) > len(shard_names(shards)), "nothing was evicted"


def test_expected_shards_stay_and_the_others_leave_by_age(shards, tmp_path):
    limit, cache = smallest_limit(shards, 2), tmp_path / "cache"
    with served(shards) as server:
        source = open_source(server.url, cache=cache, cache_gb=limit / 1e9, window=2)
        *full, one_more = sorted(source.index.shards, key=lambda shard: -shard.bytes)[:5]
        for age, shard in enumerate(full):
            os.utime(source.store.path(shard), (age, age))
        source.store.expect([*source.index.tables.values(), full[0], full[2]])
        source.store.path(one_more)
        left = {path.stem for path in cache.glob("*.tar")}
        assert left == {shard.sha256 for shard in (full[0], full[2], full[3], one_more)}


def test_a_late_fetch_ahead_takes_no_room_from_what_is_expected_now(shards, tmp_path):
    """A thread that was to fetch a shard, and found the room locked until others were expected."""
    limit, cache = smallest_limit(shards, 1), tmp_path / "cache"
    with served(shards) as server:
        source = open_source(server.url, cache=cache, cache_gb=limit / 1e9, window=1)
        late, *expected = sorted(source.index.shards, key=lambda shard: shard.bytes)[-3:]
        for shard in expected:
            source.store.path(shard)
        with source.store._room:
            source.store.expect([late])
            wait_until((cache / f"{late.sha256}.lock").exists, "the fetch")
            source.store.expect([*source.index.tables.values(), *expected])
        with source.store._locks[late]:  # its end
            pass
        assert server.asked[late.name] == 0 and not list(cache.glob("*.part"))
        source.store.path(late)
        left = {path.stem for path in cache.glob("*.tar")}
        assert left == {late.sha256, expected[0].sha256}, "what is needed last made room for it"
        assert len(list(cache.glob("*.npy"))) == 3 and bytes_cached(cache) <= limit


def test_a_file_that_goes_before_it_has_its_name_is_fetched_again(shards, tmp_path, monkeypatch):
    """Another process may have needed its room more."""
    whole = Listed.fault
    with served(shards) as server:
        source = open_source(server.url, cache=tmp_path / "cache", window=ALL)
        shard = source.index.shards[0]

        def fault_then_gone(self, path, hashed=True):
            found = whole(self, path, hashed)
            if server.asked[shard.name] == 1:
                path.unlink()
            return found

        monkeypatch.setattr(Listed, "fault", fault_then_gone)
        assert source.store.path(shard).read_bytes() == (shards / shard.name).read_bytes()
        assert server.asked[shard.name] == 2


def test_the_next_window_is_fetched_while_this_one_is_shown(shards, tmp_path):
    with served(shards) as server:
        source = open_source(server.url, cache=tmp_path / "cache", window=1)
        stream = TrainingStream(STAGES["masks"](source), seed=0)
        for position in range(len(stream.dataset)):
            if stream.order.find(position)[0]:
                break
            stream[position]
        following = stream.order._shards_of(1)[0]
        name = source.index.shards[int(stream.dataset.shards.numbers[following])].name
        wait_until(lambda: server.asked[name], "its fetch")
        assert server.asked[name] == 1
        stream[position]
        assert server.asked[name] == 1


def test_a_second_run_finds_the_shards_there(shards, tmp_path):
    with served(shards) as server:
        for _ in range(2):
            source = open_source(server.url, cache=tmp_path / "cache", window=ALL)
            dataset = STAGES["boxes"](source)
            for row in range(len(dataset)):
                dataset.crop(row)
        assert {server.asked[name] for name in shard_names(shards)} == {1}


def test_processes_share_a_fetch(shards, tmp_path):
    with served(shards) as server:
        source = open_source(server.url, cache=tmp_path / "cache", window=ALL)
        first = shard_names(shards)[0]
        server.spoil[first] = lambda content: time.sleep(0.3) or content
        dataset = STAGES["boxes"](source)
        row = int(np.flatnonzero(shard_of_row(dataset) == 0)[0])
        context = multiprocessing.get_context("fork")
        readers = [context.Process(target=dataset.crop, args=(row,)) for _ in range(3)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
        assert [reader.exitcode for reader in readers] == [0, 0, 0]
        assert server.asked[first] == 1


def test_a_process_forked_in_mid_fetch_waits_for_the_file(shards, tmp_path):
    """Threads and their locks do not come along."""
    with served(shards) as server:
        source = open_source(server.url, cache=tmp_path / "cache", window=ALL)
        shard = source.index.shards[0]
        server.spoil[shard.name] = lambda content: time.sleep(1) or content
        source.store.expect([shard])
        wait_until(lambda: server.asked[shard.name], "its fetch")
        context = multiprocessing.get_context("fork")
        reader = context.Process(target=source.store.path, args=(shard,))
        reader.start()
        reader.join(60)
        reader.kill()
        assert reader.exitcode == 0 and server.asked[shard.name] == 1


def test_what_a_killed_process_left_half_fetched_is_fetched_anew(shards, tmp_path):
    with served(shards) as server:
        source = open_source(server.url, cache=tmp_path / "cache", window=ALL)
        shard = source.index.shards[0]
        half = tmp_path / "cache" / f"{shard.sha256}.{shard.bytes}.part"
        half.write_bytes(b"half")
        assert source.store.path(shard).read_bytes() == (shards / shard.name).read_bytes()
        assert not half.exists()


def test_a_folder_may_be_cached_too(shards, tmp_path):
    dataset = STAGES["boxes"](open_source(shards, cache=tmp_path / "cache", window=ALL))
    dataset.crop(0)
    assert list((tmp_path / "cache").glob("*.tar"))


def test_only_its_own_files_leave_a_cache(shards, tmp_path):
    cache, limit = tmp_path / "cache", smallest_limit(shards, 1)
    (cache / "folder").mkdir(parents=True)
    (cache / "thesis.tar").write_bytes(bytes(limit))
    old = cache / f"{'0' * 64}.tar"
    old.write_bytes(bytes(limit))
    os.utime(old, (0, 0))
    with served(shards) as server:
        source = open_source(server.url, cache=cache, cache_gb=limit / 1e9, window=1)
        source.store.path(source.index.shards[0])
    assert (cache / "thesis.tar").exists() and not old.exists()


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


def test_a_cache_of_another_user_may_be_read(shards, tmp_path, monkeypatch):
    with served(shards) as server:
        source = open_source(server.url, cache=tmp_path / "cache")
        file = source.index.shards[0]
        expected = source.store.path(file).read_bytes()

        def refused(path):
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

        monkeypatch.setattr(os, "utime", refused)
        assert source.store.path(file).read_bytes() == expected


def test_a_cache_that_cannot_be_written_is_one_line(shards, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with served(shards) as server, pytest.raises(ValueError, match="cannot be written"):
        open_source(server.url, cache=tmp_path / "cache")


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


# --- opening --------------------------------------------------------------------------------------


def refusal(location, **options):
    with pytest.raises(ValueError) as caught:
        open_source(location, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


def test_what_is_missing_is_named(shards, tmp_path):
    assert isinstance(open_source(tmp_path), OpenImagesFolder)
    (tmp_path / "000000.tar").touch()
    assert "run python data_scripts/index_shards.py" in refusal(tmp_path)
    assert "give --shard_cache a folder" in refusal("http://127.0.0.1:9")
    assert "cannot be fetched" in refusal("http://127.0.0.1:9", cache=tmp_path)
    assert "cannot be fetched" in refusal("nonsense://bucket", cache=tmp_path)
    with served(tmp_path) as server:
        text = refusal(server.url, cache=tmp_path / "c")
        assert text.startswith(f"{server.url}/index.json: cannot be fetched (no such file)")
    text = refusal(shards, cache=tmp_path / "c", cache_gb=1e-5, window=2)
    assert text.startswith("--shard_cache_gb 1e-05: two windows of 2 shards and the index take")


@pytest.mark.parametrize("stage", STAGES)
def test_shards_without_rows_of_a_stage_are_named(stage, own_shards):
    path = own_shards / f"{stage}.npy"
    np.save(path, np.load(path)[:0])
    relist(own_shards, stage)
    with pytest.raises(ValueError, match="nothing to train stage"):
        STAGES[stage](open_source(own_shards))


def relist(folder, table):
    """Lists a table as it is now."""
    index = json.loads((folder / INDEX).read_text())
    path = folder / f"{table}.npy"
    content = path.read_bytes()
    index["tables"][table] |= {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / INDEX).write_text(json.dumps(index))


def hostile_index(change):
    def edit(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def listed(**changes):
    return hostile_index(lambda index: index["shards"][0].update(changes))


@pytest.mark.parametrize(
    "edit",
    [
        lambda folder: (folder / INDEX).write_bytes(b""),
        lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe"),
        lambda folder: (folder / INDEX).write_text("[" * 100_000),
        lambda folder: (folder / INDEX).write_text("[]"),
        hostile_index(lambda index: index.update(format="elite-shards 99")),
        hostile_index(lambda index: index.pop("tables")),
        hostile_index(lambda index: index.update(shards=7)),
        hostile_index(lambda index: index.update(shards=["a"])),
        listed(name="../../000000.tar"),
        listed(name="/etc/passwd"),
        listed(name="http://elsewhere/a.tar"),
        listed(name=".."),
        listed(name="000000.bin"),
        listed(sha256="../" * 20),
        listed(sha256=5),
        listed(bytes=-1),
        listed(bytes=True),
        listed(more=1),
    ],
)
def test_an_index_that_is_none_is_refused(edit, own_shards):
    edit(own_shards)
    text = refusal(own_shards)
    assert text.startswith(f"{own_shards}/index.json: ")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("table", ["images", "boxes", "masks"])
@pytest.mark.parametrize(
    "content",
    [
        np.zeros(3),
        np.zeros((3, 4), "u4"),
        np.array([RunsCode()], dtype=object),
        np.array([("a", 1)], dtype=[("name", "S4"), ("shard", "u4")]),
    ],
    ids=["floats", "axes", "pickle", "fields"],
)
def test_a_table_of_another_kind_is_refused(table, content, own_shards, monkeypatch):
    monkeypatch.chdir(own_shards)
    np.save(own_shards / f"{table}.npy", content, allow_pickle=True)
    assert "table is damaged" in refusal(own_shards)  # as its hash is another
    relist(own_shards, table)
    assert f"{table}.npy: no table of these shards" in refusal(own_shards)
    assert not (own_shards / "unpickled").exists()


@pytest.mark.parametrize(
    ("table", "column"), [("images", "shard"), ("boxes", "image"), ("masks", "image")]
)
def test_a_table_that_points_beyond_another_is_refused(table, column, own_shards):
    path = own_shards / f"{table}.npy"
    rows = np.load(path)
    rows[column][1] = 10_000
    np.save(path, rows)
    relist(own_shards, table)
    assert f"{table}.npy: no table of these shards" in refusal(own_shards)


def test_a_row_beyond_its_shard_costs_itself(own_shards):
    path = own_shards / "images.npy"
    rows = np.load(path)
    rows["size"] = 2**31
    np.save(path, rows)
    relist(own_shards, "images")
    dataset = STAGES["boxes"](open_source(own_shards))
    with pytest.raises(ValueError, match="lies beyond the end of its shard"):
        dataset.sample(0, np.random.default_rng(0))


def test_a_listed_file_says_what_is_wrong(tmp_path):
    file = Listed("a.tar", 3, "0" * 64)
    assert file.fault(tmp_path / "a.tar") == "shard is missing"
