"""Latents at a URL: the samples of the local folder bit for bit, fetched with the shards of their
images into one cache; files that are lost or damaged."""

import json
import pickle
import shutil
from itertools import islice

import numpy as np
import pytest
import torch

from elite.latents import CachedBoxes, cache_latents, shards_of
from elite.loading import load_parts
from elite.open_images import OpenImagesBoxes
from elite.shards import open_source
from elite.stream import TrainingStream, stream_loader
from tests.open_images import make_open_images
from tests.shards import bytes_cached, make_shards, same, served, shard_names
from tests.waiting import wait_until

WINDOW = 2


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Of two rows, so that some shards have one file and some two, and no pauses between tries."""
    monkeypatch.setattr("elite.latents.SHARD_ROWS", 2)
    monkeypatch.setattr("elite.shard_cache.PAUSES", (0, 0.01))


@pytest.fixture(scope="module")
def vae(model_folder):
    return load_parts(model_folder)["vae"]


@pytest.fixture(scope="module", params=["in order", "mixed"])
def shards(request, vae, tmp_path_factory):
    """Shards of pictures, some with two boxes, with their latents beside them."""
    root = make_open_images(tmp_path_factory.mktemp("data"), n=9)
    path = root / "annotations" / "test-annotations-bbox.csv"
    header, *rows = path.read_text().splitlines()
    rows = sorted([*rows, rows[3], rows[0], rows[0]])
    if request.param == "mixed":
        rows = np.random.default_rng(7).permutation(rows)
    path.write_text("\n".join([header, *rows]))
    folder = make_shards(root, tmp_path_factory.mktemp("shards"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elite.latents.SHARD_ROWS", 2)
        assert cache_latents(boxes_of(open_source(folder)), vae, folder / "latents") == []
    return folder


@pytest.fixture
def own_shards(shards, tmp_path):
    """To be spoiled."""
    return shutil.copytree(shards, tmp_path / "shards")


def boxes_of(source):
    return OpenImagesBoxes(source, resolution=32, clip_size=28)


def opened(location, vae, window=WINDOW, **options):
    """The dataset of images and latents of a folder or URL."""
    boxes = boxes_of(open_source(location, window=window, **options))
    return CachedBoxes(boxes, f"{location}/latents", vae)


def latent_names(folder):
    return sorted(path.name for path in folder.glob("latents/*.safetensors"))


# --- which files ----------------------------------------------------------------------------------


def test_no_file_has_rows_of_two_shards_and_all_have_each_row_once(shards, vae):
    boxes = boxes_of(open_source(shards))
    groups = shards_of(boxes, vae)
    assert [part.name for group in groups for part in group] == latent_names(shards)
    assert {len(group) for group in groups} == {1, 2}
    for number, group in enumerate(groups):
        rows = [row for part in group for row in part.rows]
        assert rows == list(boxes.shards.rows([number])) and all(len(p.rows) <= 2 for p in group)
        assert [boxes.shards.find(row) for row in rows] == [(number, n) for n in range(len(rows))]
    assert sorted(row for g in groups for p in g for row in p.rows) == list(range(len(boxes)))


# --- what is shown --------------------------------------------------------------------------------


def test_samples_are_those_of_the_local_folder_bit_for_bit(shards, vae, tmp_path):
    local = TrainingStream(opened(shards, vae), seed=3)
    with served(shards) as server:
        stream = TrainingStream(opened(server.url, vae, cache=tmp_path / "cache"), seed=3)
        for position in range(2 * len(stream.dataset)):
            sample = stream[position]
            assert same(sample, local[position]) and sample["failures"] == []
            assert "latent_mean" in sample and "pixels" not in sample


def take(stream, count, **options):
    return list(islice(stream_loader(stream, **options), count))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_processes_and_workers_change_nothing(workers, shards, vae, tmp_path):
    local = TrainingStream(opened(shards, vae), seed=1)
    whole = take(local, 5, batch_size=4)
    with served(shards) as server:
        stream = TrainingStream(opened(server.url, vae, cache=tmp_path / "cache"), seed=1)
        later = take(stream, 3, batch_size=4, start=8, num_workers=workers)
        assert all(map(same, later, whole[2:]))
        options = {"batch_size": 2, "num_workers": workers, "num_processes": 2}
        parts = [take(stream, 5, process_index=process, **options) for process in range(2)]
        for batch, first, second in zip(whole, *parts, strict=True):
            for key in ("latent_mean", "latent_std", "clip_pixels", "seed"):
                assert torch.cat([first[key], second[key]]).equal(batch[key])


def test_streams_travel_to_processes_that_are_not_forked(shards, vae, tmp_path):
    with served(shards) as server:
        stream = TrainingStream(opened(server.url, vae, cache=tmp_path / "cache"), seed=1)
        before = stream[0]
        again = pickle.loads(pickle.dumps(stream))
        assert same(again[3], stream[3]) and same(again[0], before)
        dataset = again.dataset
        assert dataset._store is dataset.boxes.source.store, "one room for both"


# --- the cache ------------------------------------------------------------------------------------


def needed(dataset, window):
    """The names of the tars and latents of a window."""
    stream = TrainingStream(dataset, 0)
    return {f.name for n in stream.order._shards_of(window) for f in dataset.shards.files[n]}


def asked_for(server):
    names = {name.removeprefix("latents/") for name in server.asked}
    return {name for name in names if name.endswith((".tar", ".safetensors"))}


def test_a_window_needs_its_own_files_and_the_next_is_fetched_ahead(shards, vae, tmp_path):
    with served(shards) as server:
        dataset = opened(server.url, vae, cache=tmp_path / "cache")
        stream = TrainingStream(dataset, 0)
        stream[0]
        wait_until(lambda: asked_for(server) == needed(dataset, 0), "the first window")
        position = 0
        while stream.order.find(position + 1)[0] == 0:
            position += 1
            stream[position]
        both = needed(dataset, 0) | needed(dataset, 1)
        wait_until(lambda: asked_for(server) == both, "the next window")
        assert any(name.endswith(".safetensors") for name in needed(dataset, 1))
        stream[position + 1]
        assert asked_for(server) == both
        assert all(server.asked[f"latents/{name}"] <= 1 for name in both)


def test_what_is_expected_is_each_shard_and_then_its_latents(shards, vae, tmp_path):
    with served(shards) as server:
        dataset, seen = opened(server.url, vae, cache=tmp_path / "cache"), []
        dataset.boxes.source.store.expect = seen.extend
        dataset.shards.expect([2, 0])
        tables = dataset.boxes.source.index.tables.values()
        tars, files = shard_names(shards), [part for n in (2, 0) for part in dataset._files[n]]
        kinds = [(file.name, file.folder) for file in seen[len(tables) :]]
        assert seen[: len(tables)] == list(tables)
        of_two = len(dataset._files[2])
        assert kinds == [
            (tars[2], server.url),
            *((file.name, f"{server.url}/latents") for file in files[:of_two]),
            (tars[0], server.url),
            *((file.name, f"{server.url}/latents") for file in files[of_two:]),
        ]


def smallest_limit(dataset):
    """Bytes of two windows of one shard."""
    sizes = sorted(sum(file.bytes for file in group) for group in dataset.shards.files)
    tables = dataset.boxes.source.index.tables.values()
    return sum(table.bytes for table in tables) + sum(sizes[-2:])


def test_both_kinds_share_a_room_that_keeps_its_bound(shards, vae, tmp_path):
    cache = tmp_path / "cache"
    with served(shards) as server:
        limit = smallest_limit(opened(server.url, vae, cache=tmp_path / "other"))
        with pytest.raises(ValueError) as error:
            opened(server.url, vae, window=1, cache=cache, cache_gb=(limit - 1) / 1e9)
        assert "two windows of 1 shards with their latents and the index take" in str(error.value)
        dataset = opened(server.url, vae, window=1, cache=cache, cache_gb=limit / 1e9)
        stream, largest = TrainingStream(dataset, 0), 0
        for position in range(2 * len(dataset)):
            assert stream[position]["failures"] == []
            largest = max(largest, bytes_cached(cache))
        assert limit / 2 < largest <= limit
        counts = [server.asked[f"latents/{name}"] for name in latent_names(shards)]
        assert min(counts) >= 1 and max(counts) <= 3 and sum(counts) > len(counts)


# --- files that cannot be had ---------------------------------------------------------------------


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "URL"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "latent file is missing"),
        (lambda path: path.write_bytes(flipped(path.read_bytes())), "latent file is damaged"),
    ],
    ids=["missing", "damaged"],
)
def test_a_lost_file_costs_its_samples_alone(
    spoil, reason, remote, shards, own_shards, vae, tmp_path
):
    lost = own_shards / "latents" / latent_names(shards)[1]
    spoil(lost)
    with served(own_shards) as server:
        location = server.url if remote else own_shards
        dataset = opened(location, vae, cache=tmp_path / "cache" if remote else None)
        whole = TrainingStream(opened(shards, vae), seed=0)
        stream = TrainingStream(dataset, seed=0)
        parts = [part for group in shards_of(dataset.boxes, vae) for part in group]
        bad, found = list(parts[1].rows), []
        for position in range(len(dataset)):
            sample, expected = stream[position], whole[position]
            found += sample["failures"]
            if expected["sample_index"][0] not in bad:
                assert same(sample, expected)
        assert {failure.row for failure in found} == set(bad)
        assert {failure.reason for failure in found} == {reason}
        name = f"{location}/latents/{lost.name}: {reason}"
        assert all(failure.message.startswith(name) for failure in found)
        assert all("\n" not in failure.message for failure in found)


def test_a_server_that_errs_is_a_reason_of_its_own(shards, vae, tmp_path):
    with served(shards) as server:
        name = f"latents/{latent_names(shards)[0]}"
        server.spoil[name] = lambda content: None
        dataset = opened(server.url, vae, cache=tmp_path / "cache")
        stream = TrainingStream(dataset, 0)
        found = [failure for n in range(len(dataset)) for failure in stream[n]["failures"]]
        assert {failure.reason for failure in found} == {"latent file cannot be fetched"}
        assert server.asked[name] == 2, "tries, not samples"


# --- what is refused ------------------------------------------------------------------------------


def refusal(boxes, location, vae):
    with pytest.raises(ValueError) as error:
        CachedBoxes(boxes, location, vae)
    text = str(error.value)
    assert "\n" not in text and text.startswith(str(location).rstrip("/"))
    return text


def test_what_does_not_fit_is_refused_before_a_file_is_fetched(own_shards, vae, tmp_path):
    with served(own_shards) as server:
        source = open_source(server.url, cache=tmp_path / "cache")
        larger = OpenImagesBoxes(source, resolution=64, clip_size=28)
        text = refusal(larger, f"{server.url}/latents", vae)
        assert "the latents are of 32 px, not 64" in text and "run python data_scripts" in text
        boxes = boxes_of(source)
        text = refusal(boxes, f"{server.url}/nowhere/", vae)
        assert (
            "index.json: cannot be fetched (no such file); expected the URL of a folder of la"
            in text
        )
        assert "no index of latents of this version; make" in refusal(boxes, server.url, vae)
        path = own_shards / "latents/index.json"
        index = json.loads(path.read_text())
        index["shards"][1]["of"]["images"] = "0" * 64
        path.write_text(json.dumps(index))
        text = refusal(boxes, f"{server.url}/latents", vae)
        assert f"images that have changed since (1 of {len(index['shards'])} shards" in text
        assert not any("safetensors" in name for name in server.asked)


def test_latents_elsewhere_need_shards_and_a_cache(shards, vae, tmp_path):
    root = make_open_images(tmp_path / "single", n=2)
    cache_latents(boxes_of(root), vae, root / "latents")
    with served(root) as server:
        text = refusal(boxes_of(root), f"{server.url}/latents", vae)
        assert "make_shards.py, or copy the latents to this machine" in text
    with served(shards) as server:
        text = refusal(boxes_of(open_source(shards)), f"{server.url}/latents", vae)
        assert "lies elsewhere; give --shard_cache a folder" in text


def test_latents_are_not_written_over_the_index_of_shards(own_shards, vae):
    content = (own_shards / "index.json").read_bytes()
    with pytest.raises(ValueError, match=r"no index of latents .* in a folder of their own"):
        cache_latents(boxes_of(open_source(own_shards)), vae, own_shards)
    assert (own_shards / "index.json").read_bytes() == content
