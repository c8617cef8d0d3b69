"""`data_scripts/index_shards.py`: shards made elsewhere, hostile ones among them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_scripts.index_shards import index_shard
from elite.images import read_image
from elite.open_images import OpenImagesBoxes, OpenImagesMasks
from elite.shards import open_source
from tests.conftest import error_of, run_script
from tests.open_images import encoded
from tests.shards import INDEX, picture


def add(tar, name, content=b"", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


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


def test_of_two_pictures_with_one_name_the_second_is_told(tmp_path, capsys):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for ending, seed in (("jpg", 0), ("png", 1)):
            add(tar, f"a.{ending}", picture(seed)[0])
    assert run_script(INDEX, tmp_path, "--workers", "1", "--whole") == 3
    captured = capsys.readouterr()
    assert "1 shards, 1 images" in captured.out
    assert "00000.tar/a.png: another picture has its name; rename it" in captured.err
    source = open_source(tmp_path)
    boxes = OpenImagesBoxes(source, resolution=32)
    first = read_image("a.jpg", content=picture(0)[0])
    assert np.array_equal(source.read_image(boxes.image_ids[0]), first)


def test_boxes_are_cut_to_the_picture(tmp_path):
    boxes = [[0.1, 0.6, 0.1, 0.6], [1.2, 1.7, 0.1, 0.6], [-0.3, 0.7, -0.3, 0.7]]
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        add(tar, "a.jpg", picture(0)[0])
        add(tar, "a.json", json.dumps({"boxes": boxes}).encode())
    assert run_script(INDEX, tmp_path, "--workers", "1") == 0
    kept = OpenImagesBoxes(open_source(tmp_path), resolution=32).boxes
    assert kept == pytest.approx(np.array([boxes[0], [0, 0.7, 0, 0.7]]))


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


def test_pictures_with_dots_in_their_names_are_told(tmp_path, capsys):
    """They were left out without a word; a thumbnail beside its picture is meant."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.jpg", "a.thumb.jpg", "photo.2020.jpg", "._a.jpg"):
            add(tar, name, picture(0)[0])
    assert run_script(INDEX, tmp_path, "--workers", "1", "--whole") == 3
    captured = capsys.readouterr()
    assert "1 shards, 1 images" in captured.out
    assert captured.err.count("a.tar/") == 1
    assert "a.tar/photo.2020.jpg: the first dot ends its key" in captured.err
