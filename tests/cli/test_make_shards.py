"""`data_scripts/make_shards.py` and `index_shards.py`: what they write, how they go on, what they
refuse; and training from a URL of it as from the folder."""

import hashlib
import io
import json
import multiprocessing
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from accelerate.utils.other import get_free_port
from PIL import Image

from data_scripts import make_shards
from data_scripts.index_shards import index_shard
from elite.annotations import load_mask_boxes, mask_boxes_path
from elite.files import try_lock
from elite.images import read_image, read_mask
from elite.open_images import OpenImagesBoxes, OpenImagesMasks
from elite.run_state import checkpoints
from elite.shards import open_source
from tests import tiny
from tests.cli.test_docs import commands
from tests.conftest import REPOSITORY, run_script
from tests.faults.runs import metrics
from tests.open_images import UNREADABLE, as_jpeg, draw_object, encoded, make_open_images
from tests.shards import served

PACK, INDEX = "data_scripts/make_shards.py", "data_scripts/index_shards.py"
SMALL = ("--shard_mb", "0.04", "--workers", "1")


@pytest.fixture(scope="module")
def open_images(tmp_path_factory):
    return make_open_images(tmp_path_factory.mktemp("data"), n=8)


@pytest.fixture
def shards(open_images, tmp_path):
    assert run_script(PACK, open_images, tmp_path / "shards", *SMALL) == 0
    return tmp_path / "shards"


def tars(folder):
    return sorted(folder.glob("[!.]*.tar"))


def samples(folder):
    """The files of all tars by key and ending, as a reader of WebDataset groups them."""
    found = {}
    for path in tars(folder):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                found.setdefault(key, {})[ending] = tar.extractfile(member).read()
    return found


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tars(folder)}


def written(folder):
    return {path.name: path.stat().st_mtime_ns for path in tars(folder)}


def add(tar, name, content=b"", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def picture(seed=0, size=(160, 200)):
    """An image as JPEG, its mask as PNG, its box."""
    image, mask, box = draw_object(np.random.default_rng(seed), *size)
    return as_jpeg(image), encoded(Image.fromarray(mask), "PNG"), box


def error_of(capsys):
    return capsys.readouterr().err.splitlines()[-1]


# --- packing --------------------------------------------------------------------------------------


def test_the_files_are_those_of_the_folder(open_images, shards):
    boxes = OpenImagesBoxes(open_images, resolution=32)
    index = load_mask_boxes(mask_boxes_path(open_images))
    found = samples(shards)
    assert len(tars(shards)) > 2 and len(found) == 8
    for row, image_id in enumerate(boxes.image_ids.tolist()):
        files = found[image_id.decode()]
        assert files.keys() == {"jpg", "json", "mask.0.png"}
        assert files["jpg"] == boxes.source.image_path(image_id).read_bytes()
        labels = json.loads(files["json"])
        assert np.array_equal(np.float32(labels["boxes"]), boxes.boxes[row : row + 1])
        (mask,) = labels["masks"]
        assert files["mask.0.png"] == (open_images / "segs/test" / mask).read_bytes()
        (entry,) = index[index["name"] == mask]
        assert labels["mask_boxes"] == [[int(entry[side]) for side in ("hs", "he", "ws", "we")]]


def test_larger_images_are_made_smaller_and_their_boxes_stay(open_images, tmp_path, capsys):
    target = tmp_path / "shards"
    assert run_script(PACK, open_images, target, *SMALL, "--side", "100") == 0
    for files in samples(target).values():
        assert read_image("a.jpg", content=files["jpg"]).shape == (80, 100, 3)
        assert read_mask("a.png", content=files["mask.0.png"]).shape == (160, 200)
    plain, small = (
        OpenImagesMasks(source, resolution=32, clip_size=28, latent_size=8)
        for source in (open_images, open_source(target))
    )
    rng = np.random.default_rng(0)
    assert len(plain) == len(small) and small.sample(0, rng)["object_mask"].any()
    assert np.array_equal(small.index["hs"], plain.index["hs"])


def test_the_tars_depend_on_neither_workers_nor_time(open_images, shards, tmp_path):
    options = ("--shard_mb", "0.04", "--workers", "2")
    assert run_script(PACK, open_images, tmp_path / "again", *options) == 0
    assert digests(tmp_path / "again") == digests(shards)
    assert (tmp_path / "again/index.json").read_text() == (shards / "index.json").read_text()


def test_an_interrupted_run_goes_on_with_what_is_missing(
    open_images, shards, tmp_path, monkeypatch, capsys
):
    target, write, calls = tmp_path / "again", make_shards.write_shard, []

    def interrupted(task, side):
        if len(calls) == 2:
            (target / ".000002.1.tmp.tar").write_bytes(b"half")
            raise KeyboardInterrupt
        calls.append(task)
        return write(task, side)

    with monkeypatch.context() as patch:
        patch.setattr(make_shards, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_shards.main([str(open_images), str(target), *SMALL])
    before = written(target)
    assert len(before) == 2 and not (target / "index.json").exists()
    assert run_script(PACK, open_images, target, *SMALL) == 0
    assert before.items() <= written(target).items()
    assert digests(target) == digests(shards)
    assert not list(target.glob(".*"))
    finished = written(target)
    assert run_script(PACK, open_images, target, *SMALL) == 0
    assert written(target) == finished
    capsys.readouterr()
    assert run_script(PACK, open_images, target, *SMALL, "--side", "90") == 2
    assert "holds shards of another source, or made with other options" in error_of(capsys)


def test_unreadable_images_are_listed_and_left_out(tmp_path, capsys):
    root = make_open_images(tmp_path / "data", n=2, oddities=True)
    for said in ("readable", "left out of"):  # the second time from shards that are kept
        assert run_script(PACK, root, tmp_path / "shards", *SMALL) == 3
        captured = capsys.readouterr()
        assert "2 images could not be read:" in captured.err
        assert all(f"{name}.jpg: " in captured.err for name in UNREADABLE)
        assert said in captured.err
        assert "24 images, 11 boxes" not in captured.out and "boxes" in captured.out
    plain, sharded = (
        OpenImagesBoxes(source, resolution=32)
        for source in (root, open_source(tmp_path / "shards"))
    )
    kept = [not name.decode().startswith(UNREADABLE) for name in plain.image_ids]
    assert np.array_equal(plain.boxes[kept], sharded.boxes)


def test_pairs_are_packed_with_the_boxes_of_their_masks(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    image, mask, box = picture(3)
    (folder / "my.cat 1.jpg").write_bytes(image)
    (folder / "my.cat 1_bg.png").write_bytes(mask)
    assert run_script(PACK, folder, tmp_path / "shards", *SMALL) == 0
    (files,) = samples(tmp_path / "shards").values()
    assert (files["jpg"], files["mask.0.png"]) == (image, mask)
    boxes = OpenImagesBoxes(open_source(tmp_path / "shards"), resolution=32)
    assert boxes.boxes[0] == pytest.approx(box, abs=0.013)  # even sides: two pixels of 160
    assert boxes.image_name(0).endswith("000000.tar/my%2Ecat 1.jpg")
    assert len(OpenImagesMasks(open_source(tmp_path / "shards"))) == 1


def test_pictures_of_one_object_are_all_packed(tmp_path, capsys):
    cat = tmp_path / "pairs" / "cat"
    cat.mkdir(parents=True)
    for number in (1, 2):
        image, mask, _ = picture(number)
        (cat / f"{number}.jpg").write_bytes(image)
        (cat / f"{number}_bg.png").write_bytes(mask)
    assert run_script(PACK, tmp_path / "pairs", tmp_path / "shards", *SMALL) == 0
    assert "2 images, 2 boxes, 2 masks" in capsys.readouterr().out
    boxes = OpenImagesBoxes(open_source(tmp_path / "shards"), resolution=32)
    names = [boxes.image_name(row).partition(".tar/")[2] for row in range(2)]
    assert names == ["cat/1.jpg", "cat/2.jpg"]
    shutil.copy(cat / "1.jpg", cat / "1.webp")
    assert run_script(PACK, tmp_path / "pairs", tmp_path / "again", *SMALL) == 2
    assert "cat/1.webp: has the name of 1.jpg; rename one of them" in capsys.readouterr().err


def test_a_folder_of_one_stage_is_packed(open_images, tmp_path, capsys):
    for folder in ("images", "annotations"):
        (tmp_path / folder).symlink_to(open_images / folder)
    assert run_script(PACK, tmp_path, tmp_path / "shards", *SMALL) == 0
    assert "8 images, 8 boxes, 0 masks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "target"), "nowhere: neither test-annotations-bbox.csv nor masks; expected"),
        ((".", "target"), "no image + mask pairs in ."),
        (("nowhere", "target", "--side", "9"), "--side 9: expected 64 or more"),
        (("nowhere", "target", "--shard_mb", "0"), "--shard_mb 0.0: expected a number above 0"),
        (("nowhere", "target", "--shard_mb", "nan"), "--shard_mb nan: expected a number above 0"),
        (("nowhere", "target", "--workers", "0"), "--workers 0: expected 1 or more"),
    ],
)
def test_mistakes_give_one_line_and_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_script(PACK, *arguments) == 2
    assert error_of(capsys).startswith(f"error: {message}")
    assert not (tmp_path / "target").exists()


def test_other_shards_are_not_mixed_in(open_images, tmp_path, capsys):
    (tmp_path / "000000.tar").touch()
    assert run_script(PACK, open_images, tmp_path, *SMALL) == 2
    assert "holds shards made elsewhere" in error_of(capsys)


def hold(path, held):
    with open(path, "ab") as file:
        assert try_lock(file)
        held.set()
        time.sleep(600)


def test_two_processes_do_not_pack_into_one_folder(open_images, tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "pack.lock", held))
    holder.start()
    try:
        assert held.wait(60)
        assert run_script(PACK, open_images, tmp_path, *SMALL) == 2
        assert "another process packs into it" in error_of(capsys)
        assert not tars(tmp_path)
    finally:
        holder.kill()
        holder.join()
    assert run_script(PACK, open_images, tmp_path, *SMALL) == 0


# --- shards made elsewhere ------------------------------------------------------------------------


def foreign(path, with_boxes=True):
    """As img2dataset writes them: text, and JSON of its own."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for seed in range(3):
            image, _, (x0, x1, y0, y1) = picture(seed)
            labels = {"url": "http://a/b.jpg", "status": "success", "width": 200}
            labels |= {"boxes": [[x0, x1, y0, y1]]} if with_boxes else {}
            add(tar, f"00000000{seed}.jpg", image)
            add(tar, f"00000000{seed}.txt", b"a mug")
            add(tar, f"00000000{seed}.json", json.dumps(labels).encode())


def test_boxes_of_the_json_are_taken(tmp_path, capsys):
    foreign(tmp_path / "00000.tar")
    (tmp_path / "._00000.tar").write_bytes(b"what macOS puts beside a file")
    assert run_script(INDEX, tmp_path, "--workers", "1") == 0
    assert "1 shards, 3 images, 3 boxes, 0 masks" in capsys.readouterr().out
    boxes = OpenImagesBoxes(open_source(tmp_path), resolution=32)
    assert boxes.boxes[2] == pytest.approx(picture(2)[2])
    assert np.array_equal(
        boxes.source.read_image(boxes.image_ids[2]), read_image("a.jpg", content=picture(2)[0])
    )


def test_pictures_without_boxes_are_one_box_each_on_request(tmp_path, capsys):
    foreign(tmp_path / "00000.tar", with_boxes=False)
    assert run_script(INDEX, tmp_path, "--workers", "1") == 2
    assert "--whole takes each picture as a box" in error_of(capsys)
    assert run_script(INDEX, tmp_path, "--workers", "1", "--whole") == 0
    boxes = OpenImagesBoxes(open_source(tmp_path), resolution=32)
    assert boxes.boxes.tolist() == [[0, 1, 0, 1]] * 3
    assert boxes.crop(0).shape == (160, 200, 3)


def test_a_whole_picture_is_a_box_but_no_other_that_is_too_large(tmp_path):
    """Such as boxes in pixels, of which crops were made outside the picture."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, boxes in (("a", None), ("b", [[20, 120, 10, 90], [0.2, 0.6, 0.2, 0.6]])):
            add(tar, f"{key}.jpg", picture(0)[0])
            add(tar, f"{key}.json", json.dumps({} if boxes is None else {"boxes": boxes}).encode())
    assert run_script(INDEX, tmp_path, "--workers", "1", "--whole") == 0
    boxes = OpenImagesBoxes(open_source(tmp_path), resolution=32).boxes
    assert np.allclose(boxes, [[0, 1, 0, 1], [0.2, 0.6, 0.2, 0.6]])


def test_masks_give_their_boxes(tmp_path):
    image, mask, box = picture(5)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "folder/a.png", encoded(Image.open(io.BytesIO(image)), "PNG"))
        add(tar, "folder/a.mask.3.png", mask)
    assert run_script(INDEX, tmp_path, "--workers", "1") == 0
    masks = OpenImagesMasks(open_source(tmp_path), resolution=32, clip_size=28, latent_size=8)
    assert masks.name(0) == f"{tmp_path}/a.tar/folder/a.mask.3.png"
    assert masks.sample(0, np.random.default_rng(0))["object_mask"].any()
    boxes = OpenImagesBoxes(open_source(tmp_path), resolution=32)
    assert boxes.boxes[0] == pytest.approx(box, abs=0.013)


def test_indexing_packed_shards_again_gives_the_same_index(shards):
    before = (shards / "index.json").read_text()
    assert run_script(INDEX, shards, "--workers", "1") == 0
    assert (shards / "index.json").read_text() == before


# --- hostile tars ---------------------------------------------------------------------------------


def everything(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_names_and_links_of_a_tar_reach_no_file(tmp_path, capsys):
    (tmp_path / "secret.jpg").write_bytes(picture(0)[0])
    folder = tmp_path / "in" / "shards"
    folder.mkdir(parents=True)
    image, _, box = picture(1)
    labels = json.dumps({"boxes": [box]}).encode()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for key in ("../../climbs", str(tmp_path / "absolute"), "..", "fine"):
            add(tar, f"{key}.jpg", image)
            add(tar, f"{key}.json", labels)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            key = f"link{kind.decode()}"
            add(tar, f"{key}.jpg", type=kind, linkname=str(tmp_path / "secret.jpg"))
            add(tar, f"{key}.json", labels)
        for kind in (tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            add(tar, f"device{kind.decode()}.jpg", type=kind)
    before = everything(tmp_path)
    assert run_script(INDEX, folder, "--workers", "1") == 0
    names = ("boxes.npy", "images.npy", "index.json", "masks.npy")
    after = sorted([*before, *(f"in/shards/{name}" for name in names)])
    assert everything(tmp_path) == after
    boxes = OpenImagesBoxes(open_source(folder), resolution=32, clip_size=28)
    names = [Path(boxes.image_name(row)).name for row in range(len(boxes))]
    assert "fine.jpg" in names and not any(name[:4] in ("link", "devi") for name in names)
    for row in range(len(boxes)):
        boxes.sample(row, np.random.default_rng(0))
    assert everything(tmp_path) == after


BIG = b"[" + b"1," * 3_000_000 + b"1]"


@pytest.mark.parametrize(
    "labels",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b"[" * 100_000,
        BIG,
        b'{"boxes": 7}',
        b'{"boxes": [["a", 1, 2, 3]]}',
        b'{"boxes": [[0, 1, 0]]}',
        b'{"boxes": [[0, NaN, 0, 1]]}',
        b'{"boxes": [[0, 1e300, 0, 1]]}',
        b'{"mask_boxes": [[0, 9, 0, 9]]}',
    ],
    ids=str,
)
def test_json_that_is_none_costs_its_sample(labels, tmp_path):
    path = tmp_path / "0.tar"
    image, _, box = picture(1)
    with tarfile.open(path, "w") as tar:
        add(tar, "bad.jpg", image)
        add(tar, "bad.json", labels)
        add(tar, "good.jpg", image)
        add(tar, "good.json", json.dumps({"boxes": [box], "box_rows": ["x"]}).encode())
    contents = index_shard(path, whole=False)
    (failure,) = contents.failures
    assert failure.startswith(f"{path}/bad: ") and "pack it again" in failure
    assert contents.tables["images"]["name"].tolist() == [b"good.jpg"]
    assert contents.tables["boxes"]["place"].tolist() == [-1]


def test_masks_and_names_that_are_none_cost_their_sample(tmp_path):
    image, mask, _ = picture(1)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.jpg", image)
        add(tar, "a.mask.0.png", mask[: len(mask) // 2])
        add(tar, "b" * 300 + ".jpg", image)
        add(tar, "c.jpg", image)
        add(tar, "c.mask.99999999999.png", mask)
        add(tar, "c.mask.x.png", mask)
    contents = index_shard(tmp_path / "0.tar", whole=False)
    assert ["not a readable image" in f or "more than 250" in f for f in contents.failures] == [
        True,
        True,
    ]
    assert contents.tables["images"]["name"].tolist() == [b"c.jpg"]
    assert len(contents.tables["masks"]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: b"no tar",
        lambda content: content[: len(content) // 2],
        lambda content: content[: -(-len(content.rstrip(b"\0")) // 512) * 512],
        lambda content: b"\x1f\x8b" + content,
        lambda content: content[:100] + b"\xff" * 400 + content[500:],
        lambda content: np.random.default_rng(0).bytes(20_000),
    ],
    ids=["empty", "text", "cut", "cut after a member", "gz", "header", "noise"],
)
def test_a_file_that_is_no_whole_tar_is_named(change, tmp_path, capsys):
    foreign(tmp_path / "00000.tar")
    path = tmp_path / "00000.tar"
    path.write_bytes(change(path.read_bytes()))
    assert run_script(INDEX, tmp_path, "--workers", "1") == 2
    line = error_of(capsys)
    assert line.startswith(f"error: {path}: no whole tar file") and line.endswith("copy it again")
    assert not (tmp_path / "index.json").exists()


def test_a_member_of_negative_size_is_no_endless_loop(tmp_path, capsys):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "a.jpg", picture(1)[0])
        add(tar, "b.jpg", pax_headers={"size": "-1024"})
    assert run_script(INDEX, tmp_path, "--workers", "1") == 2
    assert "no whole tar file (a member of negative size)" in error_of(capsys)


def test_a_shard_whose_name_is_none_for_urls_is_named(tmp_path, capsys):
    foreign(tmp_path / "my shard.tar")
    assert run_script(INDEX, tmp_path, "--workers", "1") == 2
    assert "'my shard.tar' has other letters than a to z" in error_of(capsys)


def test_a_folder_without_tars_is_named(tmp_path, capsys):
    assert run_script(INDEX, tmp_path) == 2
    assert error_of(capsys).startswith(f"error: {tmp_path}: no *.tar in it; ")


# --- training -------------------------------------------------------------------------------------


def train(stage, data, output_dir, model_folder, mapper_folder, *options):
    local = ("--local_mapper_path", mapper_folder / "local_mapper") if stage == "local" else ()
    return run_script(
        f"train_{stage}.py",
        *("--pretrained_model_name_or_path", model_folder, "--train_data_dir", data),
        *("--global_mapper_path", mapper_folder / "global_mapper", "--output_dir", output_dir),
        *("--max_train_steps", "3", "--train_batch_size", "2", "--save_steps", "1"),
        *("--gradient_accumulation_steps", "1", "--validation_steps", "0", *local, *options),
    )


def outcome(output_dir):
    weights = checkpoints(output_dir)[-1] / "weights.safetensors"
    return metrics(output_dir), weights.read_bytes()


@pytest.mark.parametrize("stage", ["global", "local"])
def test_training_from_a_url_is_training_from_the_folder(
    stage, open_images, shards, model_folder, mapper_folder, tmp_path
):
    own = (model_folder, mapper_folder)
    assert train(stage, open_images, tmp_path / "plain", *own) == 0
    with served(shards) as server:
        options = ("--shard_cache", tmp_path / "cache", "--shard_window", "1000")
        assert train(stage, server.url, tmp_path / "sharded", *own, *options) == 0
    assert outcome(tmp_path / "sharded") == outcome(tmp_path / "plain")


def test_latents_are_cached_from_a_url_and_at_one_train_as_the_local_ones(
    shards, model_folder, mapper_folder, tmp_path, capsys
):
    with served(shards) as server:
        fetched = ("--shard_cache", tmp_path / "cache")
        assert run_script(
            "data_scripts/cache_latents.py", server.url, tmp_path / "latents", *fetched,
            *("--pretrained_model_name_or_path", model_folder, "--device", "cpu"),
        ) == 0  # fmt: skip
    shutil.copytree(tmp_path / "latents", shards / "latents")
    own = (model_folder, mapper_folder)
    with served(shards) as server:
        for name, latents in (("local", tmp_path / "latents"), ("remote", f"{server.url}/latents")):
            options = (*fetched, "--cache_latents", latents)
            assert train("global", server.url, tmp_path / name, *own, *options) == 0
        assert any(name.endswith(".safetensors") for name in server.asked)
        assert outcome(tmp_path / "remote") == outcome(tmp_path / "local")
        shutil.rmtree(checkpoints(tmp_path / "remote")[-1])
        options += ("--resume_from_checkpoint", "latest", "--dataloader_num_workers", "1")
        assert train("global", server.url, tmp_path / "remote", *own, *options) == 0
    assert outcome(tmp_path / "remote")[1] == outcome(tmp_path / "local")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "lies elsewhere; give --shard_cache a folder"),
        (("--shard_cache", "cache"), "cannot be fetched (no such file); expected the URL of a"),
        (("--shard_cache", "cache", "--cache_latents", "nowhere"), "cannot be fetched (no such"),
        (("--shard_window", "0"), "shard_window: got 0, expected at least 1"),
        (("--shard_cache_gb", "0"), "shard_cache_gb: got 0.0, expected more than 0"),
    ],
)
def test_training_mistakes_give_one_line_and_2(
    options, message, model_folder, mapper_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with served(tmp_path / "empty") as server:
        own = (model_folder, mapper_folder)
        assert train("global", server.url, tmp_path / "run", *own, *options) == 2
    captured = capsys.readouterr().err
    assert message in captured.splitlines()[-1] and "Traceback" not in captured


def test_pairs_train(model_folder, mapper_folder, tmp_path):
    pairs = tiny.save_pairs(tmp_path / "pairs", count=4)
    assert run_script(PACK, pairs, tmp_path / "shards", *SMALL) == 0
    assert train("global", tmp_path / "shards", tmp_path / "run", model_folder, mapper_folder) == 0


# --- the page -------------------------------------------------------------------------------------


def test_the_commands_of_the_page_run(tmp_path, capsys):
    """As they stand, on four pictures and one process; the server is Python's own."""
    page = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
    found = commands(page.split("## From shards\n")[1].split("\n## ")[0])
    make_open_images(tmp_path / "small_world/open_images", n=4)
    port = str(get_free_port())
    servers, ran = [], []
    try:
        for words in found:
            if words[0] == "accelerate":  # launch --config_file FILE
                words = ["python", *words[4:], "--train_batch_size", "2"]
            words = [re.sub("^runs/", f"{tmp_path}/", word).replace("8000", port) for word in words]
            if "http.server" in words:
                command = [sys.executable, *words[1:]]
                servers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
                wait_for_port(int(port))
            else:
                more = ("--workers", "1") if words[1] in (PACK, INDEX) else ()
                assert run_script(*words[1:], *more) == 0, capsys.readouterr().err
                ran.append(words[1])
    finally:
        for server in servers:
            server.kill()
            server.wait()
    both = ["train_global.py", "train_local.py"]
    latents = ["data_scripts/cache_latents.py", "train_global.py"]
    assert ran == [PACK, *both, INDEX, "train_global.py", *latents]
    assert list((tmp_path / "shard_cache").glob("*.tar"))
    assert list((tmp_path / "shard_cache").glob("*.safetensors"))


def wait_for_port(port):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("no server came")
