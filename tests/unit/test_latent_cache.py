"""The latent cache: training with it equals training without, and no cache that does not fit is
used."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from elite.latents import CachedBoxes, cache_latents, file_states
from elite.loading import load_parts
from elite.objectives import GlobalObjective
from elite.open_images import OpenImagesBoxes
from elite.shards import INDEX
from elite.stream import Failure
from elite.training import fit, make_accelerator
from tests import tiny
from tests.conftest import forget_accelerate
from tests.open_images import UNREADABLE, as_jpeg, make_open_images

SHARD_ROWS = 4
# The VAE sums in another order for another batch size; Adam turns that into a part of a step.
ROUNDING = 1e-5
PICTURE = np.full((160, 200, 3), 90, dtype=np.uint8)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("elite.latents.SHARD_ROWS", SHARD_ROWS)


@pytest.fixture
def root(tmp_path):
    """17 rows, so 5 shards; two of the images cannot be read."""
    return make_open_images(tmp_path / "open_images", n=6, oddities=True)


@pytest.fixture
def boxes(root):
    return boxes_of(root)


@pytest.fixture
def vae(parts):
    return parts["vae"]


@pytest.fixture
def cache(boxes, vae, tmp_path):
    cache_latents(boxes, vae, tmp_path / "cache", batch_size=3)
    return tmp_path / "cache"


def boxes_of(root, resolution=32):
    return OpenImagesBoxes(root, resolution=resolution, clip_size=32)


def row_of(boxes, image_id):
    return boxes.image_ids.tolist().index(image_id.encode())


def shard_files(cache):
    return sorted(cache.glob("*.safetensors"))


def written(cache):
    """What tells whether a file was written anew."""
    states = {path.name: path.stat() for path in shard_files(cache)}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in states.items()}


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def same_contents(a, b):
    (tensors, metadata), (others, other_metadata) = contents(a), contents(b)
    equal = [torch.equal(tensors[key].nan_to_num(7), others[key].nan_to_num(7)) for key in tensors]
    return all(equal) and metadata == other_metadata


# --- what it gives --------------------------------------------------------------------------------


def test_samples_differ_in_nothing_but_the_target(boxes, vae, cache):
    cached = CachedBoxes(boxes, cache, vae)
    assert len(cached) == len(boxes) == 17
    for row in set(range(17)) - {row_of(boxes, name) for name in UNREADABLE}:
        plain = boxes.sample(row, np.random.default_rng(row))
        sample = cached.sample(row, np.random.default_rng(row))
        with torch.no_grad():
            posterior = vae.encode(plain["pixels"][None]).latent_dist
        for key, moment in (("latent_mean", posterior.mean), ("latent_std", posterior.std)):
            torch.testing.assert_close(sample[key], moment[0], rtol=ROUNDING, atol=ROUNDING)
        assert sample.keys() == {"latent_mean", "latent_std", "clip_pixels", "caption"}
        assert sample["clip_pixels"].equal(plain["clip_pixels"])
        assert sample["caption"] == plain["caption"]


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_image_is_the_usual_error(boxes, vae, cache, name):
    row, messages = row_of(boxes, name), []
    for dataset in (boxes, CachedBoxes(boxes, cache, vae)):
        with pytest.raises(ValueError, match=name) as error:
            dataset.sample(row, np.random.default_rng(0))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def train(dataset, model_folder, output_dir):
    """Five steps; the losses."""
    forget_accelerate()
    global_mapper, _ = tiny.build_mappers(model_folder)
    objective = GlobalObjective(load_parts(model_folder), global_mapper)
    if isinstance(dataset, CachedBoxes):
        del objective.vae.encoder  # training has no use for it
    options = {"max_steps": 5, "batch_size": 4, "learning_rate": 1e-4, "seed": 5}
    fit(objective, dataset, make_accelerator("no", cpu=True), output_dir=output_dir, **options)
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["mse"] for line in lines]


def test_training_meets_the_same_samples_noise_and_losses(
    boxes, vae, cache, model_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("elite.run_folder.UNREADABLE_TOLERATED", 0.5)  # two of so few are many
    plain = train(boxes, model_folder, tmp_path / "plain")
    plain_output = capsys.readouterr()
    cached = train(CachedBoxes(boxes, cache, vae), model_folder, tmp_path / "cached")
    cached_output = capsys.readouterr()
    assert len(plain) == 5 and cached == pytest.approx(plain, rel=ROUNDING)
    for output in (plain_output, cached_output):
        text = output.out + output.err
        assert all(f"{name}.jpg: n" in text for name in UNREADABLE), text
        assert "samples were unreadable and replaced" in text
    skipped = [
        [line for line in (output.out + output.err).splitlines() if "skipped: " in line]
        for output in (plain_output, cached_output)
    ]
    assert len(skipped[0]) == len(skipped[1]) >= 2


def test_loader_processes_get_it_by_pickle_where_they_are_spawned(boxes, vae, cache):
    dataset = CachedBoxes(boxes, cache, vae)
    sent = pickle.loads(pickle.dumps(dataset))
    for row in (0, 16):
        here, there = (d.sample(row, np.random.default_rng(0)) for d in (dataset, sent))
        assert all(here[key].equal(there[key]) for key in here if key != "caption")


def test_half_precision_is_half_the_size_and_read_as_float32(boxes, vae, cache, tmp_path):
    cache_latents(boxes, vae, tmp_path / "half", dtype=torch.float16)
    for whole, half in zip(shard_files(cache), shard_files(tmp_path / "half"), strict=True):
        assert half.stat().st_size < 0.6 * whole.stat().st_size
    exact, rounded = (CachedBoxes(boxes, folder, vae) for folder in (cache, tmp_path / "half"))
    for key in ("latent_mean", "latent_std"):
        a, b = (dataset.sample(9, np.random.default_rng(0))[key] for dataset in (exact, rounded))
        assert b.dtype == torch.float32 and not a.equal(b)
        torch.testing.assert_close(b, a, rtol=2**-10, atol=2**-14)  # fp16 has 11 digits


# --- how it is written ----------------------------------------------------------------------------


def test_unreadable_images_are_listed_once_and_the_rest_is_encoded(boxes, vae, tmp_path):
    failures = cache_latents(boxes, vae, tmp_path / "cache")
    assert len(failures) == 2
    assert all(any(f"{name}.jpg: " in text for text in failures) for name in UNREADABLE)
    means = torch.cat([contents(path)[0]["mean"] for path in shard_files(tmp_path / "cache")])
    rows = means.isnan().flatten(1)
    assert rows.all(1).equal(rows.any(1)), "a row is encoded or not"
    bad = [row_of(boxes, name) for name in UNREADABLE]
    assert rows.all(1).nonzero().flatten().tolist() == sorted(bad)


def test_processes_that_read_change_nothing(boxes, vae, cache, tmp_path):
    cache_latents(boxes, vae, tmp_path / "other", batch_size=3, workers=2)
    files, others = shard_files(cache), shard_files(tmp_path / "other")
    assert len(files) == len(others) == 5
    assert all(same_contents(a, b) for a, b in zip(files, others, strict=True))


class SaysWhoReads(OpenImagesBoxes):
    def crop(self, index):
        raise ValueError(f"process {os.getpid()}")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_read_by_as_many_processes_as_asked_for(root, vae, tmp_path, workers):
    boxes = SaysWhoReads(root, resolution=32)
    readers = cache_latents(boxes, vae, tmp_path / "cache", workers=workers)
    assert len(readers) == max(workers, 1)
    assert (f"process {os.getpid()}" in readers) == (workers == 0)


def test_an_interrupted_run_is_finished_to_the_same_files(boxes, vae, cache, tmp_path, monkeypatch):
    calls, encode, other = [], vae.encode, tmp_path / "other"

    def interrupted(pixels):
        calls.append(len(pixels))
        if len(calls) == 6:  # of the third shard
            raise KeyboardInterrupt
        return encode(pixels)

    monkeypatch.setattr(vae, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(boxes, vae, other, batch_size=3)
    assert [path.name for path in shard_files(other)] == [
        "000000.safetensors",
        "000001.safetensors",
    ]
    assert "000000.safetensors is missing (5 of 5 shards" in refusal(boxes, other, vae)

    before = written(other)
    cache_latents(boxes, vae, other, batch_size=3)
    assert sum(calls[6:]) == 9, "rows of the three shards that were missing"
    assert before.items() <= written(other).items()
    pairs = zip(shard_files(cache), shard_files(other), strict=True)
    assert all(same_contents(a, b) for a, b in pairs)

    finished = written(other)
    assert len(cache_latents(boxes, vae, other)) == 2, "unreadable images of kept shards"
    assert written(other) == finished


def test_another_dtype_is_written_anew(boxes, vae, cache):
    cache_latents(boxes, vae, cache, dtype=torch.bfloat16)
    CachedBoxes(boxes, cache, vae).sample(0, np.random.default_rng(0))
    assert {contents(path)[0]["std"].dtype for path in shard_files(cache)} == {torch.bfloat16}


# --- what is refused, and repaired ----------------------------------------------------------------


def refusal(boxes, cache, vae):
    with pytest.raises(ValueError) as error:
        CachedBoxes(boxes, cache, vae)
    text = str(error.value)
    assert "\n" not in text and text.startswith(f"{cache}: ")
    assert "run python data_scripts/cache_latents.py" in text
    return text


def rewrite(path, change):
    tensors, metadata = contents(path)
    save_file({key: value.clone() for key, value in tensors.items()}, path, change(metadata))


def test_another_vae(boxes, vae, cache):
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1)
    CachedBoxes(boxes, cache, vae)  # what decodes plays no part
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert "latents come from another VAE (5 of 5 shards" in refusal(boxes, cache, vae)


def test_another_resolution(root, vae, cache):
    assert "latents are of 32 px, not 64 (5 of" in refusal(boxes_of(root, 64), cache, vae)


def test_other_boxes_and_rows(root, vae, cache):
    path = root / "annotations" / "test-annotations-bbox.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[2:]]))  # every row moves up
    assert "belong to other rows or boxes (4 of 4" in refusal(boxes_of(root), cache, vae)
    path.write_text("\n".join([*lines, lines[1]]))  # one more: the last shard is another
    assert "belong to other rows or boxes (1 of 5" in refusal(boxes_of(root), cache, vae)
    path.write_text("\n".join([*lines, *lines[1:5]]))  # and enough for a sixth
    assert "(2 of 6 shards" in refusal(boxes_of(root), cache, vae)
    for place, text in ((0, "a" * 16), (4, "0.11")):  # image, and left side of its box
        fields = lines[3].split(",")
        fields[place] = text
        path.write_text("\n".join([*lines[:3], ",".join(fields), *lines[4:]]))
        assert "belong to other rows or boxes (1 of 5" in refusal(boxes_of(root), cache, vae)


@pytest.mark.parametrize("change", ["time", "size", "gone"])
def test_changed_image(boxes, vae, cache, change):
    path = Path(boxes.image_name(5))
    state = path.stat()
    if change == "time":
        os.utime(path, (state.st_atime, state.st_mtime + 5))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b" ")
        os.utime(path, (state.st_atime, state.st_mtime))
    else:
        path.unlink()
    text = refusal(boxes, cache, vae)
    assert "the latents are of images that have changed since (1 of 5 shards" in text


def test_states_of_files_follow_rows_of_which_several_share_an_image(root):
    path = root / "annotations" / "test-annotations-bbox.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, *lines[3:0:-1]]))
    boxes = boxes_of(root)
    for row in range(6):
        os.utime(Path(boxes.image_name(row)), (row, row))
    times = file_states(boxes, range(2, len(boxes)))[:, 1].tolist()
    assert len(times) == 18 and times[:4] == [2, 3, 4, 5] and times[-3:] == [2, 1, 0]
    assert -1 in times, "the missing one"


def test_copied_folder_with_times_of_whole_seconds_fits(boxes, vae, cache):
    for row in range(len(boxes)):
        if (path := Path(boxes.image_name(row))).exists():
            os.utime(path, (0, int(path.stat().st_mtime)))
    CachedBoxes(boxes, cache, vae)


def flip(path):
    """One bit of a latent."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "missing"),
        (flip, None),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
        (lambda path: path.write_bytes(b"no tensors"), "damaged"),
        (lambda path: rewrite(path, lambda old: {}), "damaged"),
        (lambda path: rewrite(path, lambda old: {**old, "format": "elite-latents 0"}), None),
    ],
    ids=["missing", "flipped", "cut", "foreign", "bare", "old"],
)
def test_spoiled_file_costs_its_samples_and_is_made_again(boxes, vae, cache, spoil, reason):
    """Of the same size it is noticed by the writer alone (None): of single files none is hashed."""
    before, path = written(cache), cache / "000003.safetensors"
    whole = shutil.copy(path, cache.parent)
    spoil(path)
    cached = CachedBoxes(boxes, cache, vae)
    assert cached.sample(10, np.random.default_rng(0)), "of the file before"
    if reason is not None:
        with pytest.raises(ValueError) as error:
            cached.sample(13, np.random.default_rng(0))
        failure = Failure(13, str(error.value))
        assert failure.message.startswith(f"{path}: ") and "\n" not in failure.message
        assert failure.reason == f"latent file is {reason}"
    cache_latents(boxes, vae, cache, batch_size=3)
    after = written(cache)
    assert [name for name in before if before[name] != after[name]] == ["000003.safetensors"]
    assert same_contents(path, whole)
    CachedBoxes(boxes, cache, vae).sample(13, np.random.default_rng(0))


@pytest.mark.parametrize(
    "tensors",
    [
        {"words": torch.zeros(2)},
        {"mean": torch.zeros(4, 4, 8, 8), "std": torch.zeros(4, 4, 8, 8)},
        {"mean": torch.zeros(3, 4, 16, 16), "std": torch.zeros(3, 4, 16, 16)},
        {"mean": torch.zeros(()), "std": torch.zeros(())},
    ],
    ids=["none", "small", "few", "scalars"],
)
def test_listed_file_of_other_tensors_is_damaged(boxes, vae, cache, tensors):
    path = cache / "000000.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_index(cache, lambda index: index["shards"][0].update(entry))
    with pytest.raises(ValueError, match=r"000000\.safetensors: latent file is damaged") as error:
        CachedBoxes(boxes, cache, vae).sample(0, np.random.default_rng(0))
    assert "\n" not in str(error.value)


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(format="elite-shards 1"),
        lambda index: index.pop("shards"),
        lambda index: index["shards"][0].update(of=7),
        lambda index: index["shards"][0].update(of=None),
        lambda index: index["shards"][0].update(name="../000000.safetensors"),
        lambda index: index["shards"][0].update(folder="/etc"),
    ],
)
def test_index_of_another_kind_is_neither_read_nor_overwritten(boxes, vae, cache, change):
    change_index(cache, change)
    content = (cache / INDEX).read_bytes()
    for work in (lambda: CachedBoxes(boxes, cache, vae), lambda: cache_latents(boxes, vae, cache)):
        with pytest.raises(ValueError) as error:
            work()
        assert str(error.value) == (
            f"{cache}/index.json: damaged, or no index of latents of this version; make them with "
            "python data_scripts/cache_latents.py in a folder of their own"
        )
    assert (cache / INDEX).read_bytes() == content


def test_entry_made_of_other_things_is_refused(boxes, vae, cache):
    change_index(cache, lambda index: index["shards"][1]["of"].update(format="elite-latents 0"))
    assert "were written by another version (1 of 5" in refusal(boxes, cache, vae)
    change_index(cache, lambda index: index["shards"][1].update(of={"images": [["a"]]}))
    assert "were written by another version (1 of 5" in refusal(boxes, cache, vae)
    change_index(cache, lambda index: index["shards"].pop(2))
    assert "(2 of 5 shards" in refusal(boxes, cache, vae)


def test_folder_of_an_earlier_version_is_listed_without_encoding(boxes, vae, cache):
    """Its files are as they were; nothing told their SHA-256."""
    before = written(cache)
    (cache / INDEX).unlink()
    assert "no index.json in it" in refusal(boxes, cache, vae)
    vae.encode = None
    cache_latents(boxes, vae, cache)
    assert written(cache) == before
    CachedBoxes(boxes, cache, vae)


def test_empty_folder(boxes, vae, tmp_path):
    assert "no index.json in it" in refusal(boxes, tmp_path / "nowhere", vae)


@pytest.mark.parametrize("name", UNREADABLE)
def test_repaired_image_asks_for_its_shard_again(boxes, vae, cache, name):
    row = row_of(boxes, name)
    Path(boxes.image_name(row)).write_bytes(as_jpeg(PICTURE))
    assert "images that have changed since (1 of 5" in refusal(boxes, cache, vae)
    assert len(cache_latents(boxes, vae, cache)) == 1, "the other one"
    assert CachedBoxes(boxes, cache, vae).sample(row, np.random.default_rng(0))


def test_row_that_could_not_be_read_then_is_never_given(boxes, vae, tmp_path, monkeypatch):
    crop = boxes.crop

    def locked(row):
        if row == 3:
            raise ValueError("locked")
        return crop(row)

    with monkeypatch.context() as patch:
        patch.setattr(boxes, "crop", locked)
        cache_latents(boxes, vae, tmp_path / "cache")
    cached = CachedBoxes(boxes, tmp_path / "cache", vae)
    cached.sample(2, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"could not be read when latents were cached; delete .*0"):
        cached.sample(3, np.random.default_rng(0))


def test_two_runs_do_not_encode_into_one_folder(boxes, vae, tmp_path, monkeypatch):
    """The index of one stood over the files of the other, and was believed."""
    monkeypatch.setattr("elite.files.try_lock", lambda file: False)
    with pytest.raises(ValueError, match=r"cache: another process .* encodes into it; wait until"):
        cache_latents(boxes, vae, tmp_path / "cache")


def test_a_disk_without_locks_is_one_line(boxes, vae, tmp_path, monkeypatch):
    def refuse(file):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("elite.files.try_lock", refuse)
    with pytest.raises(ValueError, match=r"cache: cannot be locked \(No locks available\); choose"):
        cache_latents(boxes, vae, tmp_path / "cache")
