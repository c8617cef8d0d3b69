"""Indices and tables of shards that are missing, of another kind, or hostile."""

import hashlib
import json
import os

import numpy as np
import pytest

from elite.open_images import OpenImagesFolder
from elite.shard_cache import Listed
from elite.shards import INDEX, open_source
from tests.shards import STAGES, served


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
    index["tables"][table] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
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
