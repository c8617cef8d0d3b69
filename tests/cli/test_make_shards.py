"""`data_scripts/make_shards.py`: what it packs, how it goes on, what it refuses."""

import hashlib
import json
import multiprocessing
import os
import shutil
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from data_scripts import make_shards
from elite.annotations import load_mask_boxes, mask_boxes_path
from elite.files import try_lock
from elite.images import read_image, read_mask
from elite.open_images import OpenImagesBoxes, OpenImagesMasks
from elite.shards import open_source
from tests.conftest import error_of, run_script
from tests.open_images import UNREADABLE, make_open_images
from tests.shards import INDEX, PACK, picture

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


def test_an_interrupted_run_does_not_go_on_with_other_pictures(tmp_path, capsys):
    """Of the same size: the old ones stayed in the shards that were there."""
    source, target = make_open_images(tmp_path / "data", n=8), tmp_path / "shards"
    assert run_script(PACK, source, target, *SMALL) == 0
    (target / "index.json").unlink()
    tars(target)[-1].unlink()
    image = min((source / "images" / "test").iterdir())
    os.utime(image, (1, 1))  # as of another picture
    assert run_script(PACK, source, target, *SMALL) == 2
    assert "holds shards of another source" in error_of(capsys)


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


def test_pairs_are_packed_with_the_boxes_of_their_masks(tmp_path, capsys):
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
    (folder / "my.cat 1.jpg").write_bytes(image[:-1] + b"\0")  # of the same size
    assert run_script(PACK, folder, tmp_path / "shards", *SMALL) == 2
    assert "holds shards of another source" in error_of(capsys)


def test_masks_that_are_none_are_listed_and_left_out(tmp_path, capsys):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in range(3):
        image, mask, _ = picture(number)
        (folder / f"{number}.jpg").write_bytes(image)
        (folder / f"{number}_bg.png").write_bytes(mask)
    Image.new("L", (200, 160)).save(folder / "0_bg.png")
    Image.new("L", (160, 200), 255).save(folder / "1_bg.png")
    assert run_script(PACK, folder, tmp_path / "shards", *SMALL) == 3
    captured = capsys.readouterr()
    assert "1 images, 1 boxes, 1 masks" in captured.out
    assert "0_bg.png: mask has no object pixel" in captured.err
    assert "1_bg.png: mask is 160 x 200, its image 200 x 160" in captured.err
    (folder / "2_bg.png").write_bytes(b"damaged")
    assert run_script(PACK, folder, tmp_path / "none", *SMALL) == 2
    assert "no image of 3 could be packed; " in error_of(capsys)


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
        (("nowhere", "target"), "nowhere: no such folder; expected one of Open Images, or"),
        ((".", "target"), "no pictures in ."),
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
        said = error_of(capsys)
        assert "another process (unknown) packs into it" in said and "another folder" in said
        assert not tars(tmp_path)
    finally:
        holder.kill()
        holder.join()
    assert run_script(PACK, open_images, tmp_path, *SMALL) == 0


def test_indexing_packed_shards_again_gives_the_same_index(shards):
    before = (shards / "index.json").read_text()
    assert run_script(INDEX, shards, "--workers", "1") == 0
    assert (shards / "index.json").read_text() == before
