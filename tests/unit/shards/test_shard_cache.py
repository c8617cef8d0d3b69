"""The cache of shards: it keeps its bound, and its files are whole."""

import errno
import json
import multiprocessing
import os
import time

import numpy as np
import pytest

from elite.shard_cache import Listed
from elite.shards import INDEX, open_source
from elite.stream import TrainingStream
from tests.shards import ALL, STAGES, bytes_cached, served, shard_names, shard_of_row
from tests.waiting import wait_until


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


@pytest.mark.parametrize("spoil", ["cut off", "other bytes"])
def test_a_cached_file_that_is_damaged_is_fetched_anew(shards, tmp_path, spoil):
    """After a crash of the machine all samples of a shard were lost, or came with other pixels."""
    with served(shards) as server:

        def cached():
            source = open_source(server.url, cache=tmp_path / "cache", window=ALL)
            files = [*source.index.shards, *source.index.tables.values()]
            return {source.store.path(file): file for file in files}

        before = cached()
        for path in before:
            content = path.read_bytes()
            path.write_bytes(content[:-1] if spoil == "cut off" else bytes(len(content)))
        for path, file in cached().items():
            assert path.read_bytes() == (shards / file.name).read_bytes()
        assert cached() == before
        assert {server.asked[file.name] for file in before.values()} == {2}


def test_a_cached_file_that_cannot_be_read_now_stays(shards, tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with served(shards) as server:
        cache = {"cache": tmp_path / "cache", "window": ALL}
        path = open_source(server.url, **cache).store.path(
            shard := open_source(server.url, **cache).index.shards[0]
        )
        again = open_source(server.url, **cache)
        with monkeypatch.context() as patch:
            patch.setattr("elite.shard_cache.sha256_of", refuse)
            with pytest.raises(ValueError, match=r"cannot be read \(Too many open files\)"):
                again.store.path(shard)
        assert again.store.path(shard) == path and server.asked[shard.name] == 1


def test_a_damaged_file_is_fetched_once_for_all(shards, tmp_path):
    """Each that had found it damaged removed what another had just fetched."""
    with served(shards) as server:
        cache = {"cache": tmp_path / "cache", "window": ALL}
        shard = open_source(server.url, **cache).index.shards[0]
        place = open_source(server.url, **cache).store.path(shard)
        place.write_bytes(bytes(shard.bytes))
        store = open_source(server.url, **cache).store
        context = multiprocessing.get_context("fork")
        meet = context.Barrier(4)

        def use():
            assert not store._is_whole(shard)
            meet.wait()
            store._fetch(shard, wait=True)
            assert store.path(shard).read_bytes() == (shards / shard.name).read_bytes()

        readers = [context.Process(target=use) for _ in range(meet.parties)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
        assert [reader.exitcode for reader in readers] == [0] * len(readers)
        assert server.asked[shard.name] == 2


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


def test_a_shard_in_its_place_that_is_missing_is_looked_for_again(
    own_shards, tmp_path, monkeypatch
):
    """It counted as missing for as long as the process lived, as one gone later did as fetched."""
    source = open_source(own_shards, window=ALL)
    dataset, shard = STAGES["boxes"](source), source.index.shards[0]
    row = int(np.flatnonzero(shard_of_row(dataset) == 0)[0])
    dataset.crop(row)
    (own_shards / shard.name).rename(tmp_path / "elsewhere.tar")
    with pytest.raises(ValueError, match=r"tar: shard is missing; copy it again"):
        dataset.crop(row)
    (tmp_path / "elsewhere.tar").rename(own_shards / shard.name)
    with pytest.raises(ValueError, match="shard is missing"):
        dataset.crop(row)
    monkeypatch.setattr("elite.shard_cache.RETRY_AFTER", 0)
    dataset.crop(row)
