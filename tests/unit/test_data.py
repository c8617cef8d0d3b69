"""Datasets on miniature Open Images folders, and the pair folder."""

import csv
import errno
import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image

from data_scripts.cal_bbox_by_seg import main as index_masks
from data_scripts.keep_downloaded import main as keep_downloaded
from elite.annotations import load_mask_boxes, mask_boxes_path, read_boxes, save_mask_boxes
from elite.data import PairFolder, pictures_in
from elite.images import FORMATS, read_image, resize, to_clip_pixels, to_pixels
from elite.open_images import (
    PHOTO_TEMPLATES,
    OpenImagesBoxes,
    OpenImagesMasks,
    padded,
    with_framing,
)
from elite.wording import Note
from tests.open_images import (
    BACKGROUND,
    BOX_COLUMNS,
    MASK_COLUMNS,
    OBJECT,
    ODD_ENCODINGS,
    UNFIT_MASK,
    UNREADABLE,
    Record,
    draw_object,
    make_open_images,
    write_csv,
    write_image,
)

SIZES = {"resolution": 32, "clip_size": 28}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return make_open_images(tmp_path_factory.mktemp("clean"), n=6)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return make_open_images(tmp_path_factory.mktemp("odd"), n=2, oddities=True)


def sample_of(dataset, image_id, seed=0):
    index = [name.decode() for name in dataset.image_ids].index(image_id)
    return dataset.sample(index, np.random.default_rng(seed))


def boxes_folder(root, rows):
    """Only the CSV of boxes, from (id, x0, x1, y0, y1)."""
    (root / "annotations").mkdir()
    lines = [(name, "xclick", "/m/0", 1, *box, 0, 0, 0, 0, 0) for name, *box in rows]
    write_csv(root / "annotations" / "test-annotations-bbox.csv", BOX_COLUMNS, lines)
    return root


# --- captions -------------------------------------------------------------------------------------


def test_templates_are_27_with_one_place_and_an_article_in_front():
    assert len(set(PHOTO_TEMPLATES)) == 27
    assert all(template.count("{}") == 1 for template in PHOTO_TEMPLATES)
    assert all(template.split()[0] in ("a", "the") for template in PHOTO_TEMPLATES)


@pytest.mark.parametrize(
    ("caption", "phrase", "framed"),
    [
        ("the photo of a S", "a", "a photo of a S"),
        ("a photo of a S", "a far away", "a far away photo of a S"),
        ("a photo of the S", "very small", "very small photo of the S"),
        ("an old photo of a S", "zoomed in", "zoomed in old photo of a S"),
        ("theatre of a S", "a", "a theatre of a S"),
    ],
)
def test_leading_article_is_replaced_as_a_word(caption, phrase, framed):
    assert with_framing(caption, phrase) == framed


# --- stage 1 --------------------------------------------------------------------------------------


def test_boxes_between_2_and_80_percent_are_kept_and_cut_to_the_image(tmp_path):
    root = boxes_folder(
        tmp_path,
        [
            ("too_small", 0.1, 0.2, 0.1, 0.29),
            ("small", 0.1, 0.3, 0.1, 0.21),
            ("large", 0.0, 1.0, 0.0, 0.79),
            ("too_large", 0.0, 1.0, 0.0, 0.81),
            ("outside", -0.5, 0.5, 0.5, 1.5),
            ("beyond", 1.1, 1.9, 0.0, 1.0),
            ("inverted", 0.9, 0.1, 0.9, 0.1),
            ("nan", "nan", 0.5, 0.1, 0.5),
        ],
    )
    dataset = OpenImagesBoxes(root)
    assert dataset.image_ids.tolist() == [b"small", b"large", b"outside"]
    np.testing.assert_allclose(dataset.boxes[2], (0, 0.5, 0.5, 1))


def test_box_sample_is_the_padded_box(clean):
    dataset = OpenImagesBoxes(clean, **SIZES, placeholder_token="dog")
    sample = dataset.sample(1, np.random.default_rng(0))
    path = clean / "images" / "test" / f"{dataset.image_ids[1].decode()}.jpg"
    image = np.asarray(Image.open(path))
    x0, x1, y0, y1 = (dataset.boxes[1] * (200, 200, 160, 160)).round().astype(int)
    rows, columns = (slice(max(a - 10, 0), b + 10) for a, b in ((y0, y1), (x0, x1)))
    expected = to_pixels(resize(image[rows, columns], 32, 32))
    # float32 relative coordinates may move a side by one pixel of about 130
    assert (sample["pixels"] - expected).abs().mean() < 0.02
    assert sample["clip_pixels"].shape == (3, 28, 28)
    assert sample["caption"].replace("dog", "{}") in PHOTO_TEMPLATES


def test_box_target_depends_on_the_box_alone_and_the_view_on_the_generator(clean):
    dataset = OpenImagesBoxes(clean, **SIZES)
    samples = [dataset.sample(0, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3)]
    assert all(sample["pixels"].equal(samples[0]["pixels"]) for sample in samples)
    assert samples[1]["clip_pixels"].equal(samples[0]["clip_pixels"])
    assert not all(s["clip_pixels"].equal(samples[0]["clip_pixels"]) for s in samples[2:])
    assert len({sample["caption"] for sample in samples}) > 1


def test_padding_stays_inside_the_image():
    assert padded((5, 50.5, 0, 195), 10, 100, 200) == (slice(0, 61), slice(0, 200))
    assert padded((95.0, 100.0, 50.5, 60), 10, 100, 200) == (slice(85, 100), slice(40, 70))


def test_odd_files_are_read_and_broken_ones_named(odd):
    dataset = OpenImagesBoxes(odd, **SIZES)
    ids = {name.decode() for name in dataset.image_ids}
    assert ids >= {*ODD_ENCODINGS, "outside"} and not ids & {"empty", "tiny", "full"}
    for name in ODD_ENCODINGS:
        if name in UNREADABLE:
            with pytest.raises(ValueError, match=rf"{name}\.jpg"):
                sample_of(dataset, name)
        else:
            centre = sample_of(dataset, name)["pixels"][:, 12:20, 12:20].mean(dim=(1, 2))
            grey = name in ("grey", "16bit")
            expected = torch.tensor([OBJECT_GREY] * 3 if grey else OBJECT) / 127.5 - 1
            assert (centre - expected).abs().max() < 0.15, name  # shade of +-20 and JPEG


OBJECT_GREY = 0.299 * OBJECT[0] + 0.587 * OBJECT[1] + 0.114 * OBJECT[2]


def test_folders_without_a_usable_index_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"test-annotations-bbox\.csv: .*expected the Open Images"):
        OpenImagesBoxes(tmp_path)
    with pytest.raises(ValueError, match="no box covers 2 to 80 %"):
        OpenImagesBoxes(boxes_folder(tmp_path, [("a", 0, 1, 0, 1)]))


def test_damaged_csv_files_are_refused(tmp_path):
    root = boxes_folder(tmp_path, [("a", "left", 1, 0, 1)])
    with pytest.raises(ValueError, match=r"bbox\.csv: not a readable .* string 'left' to"):
        OpenImagesBoxes(root)
    path = root / "annotations" / "test-annotations-bbox.csv"
    path.write_text("ImageID,XMin\na,0\n")
    with pytest.raises(ValueError, match=r"bbox\.csv: no column XMax, YMin, YMax"):
        OpenImagesBoxes(root)
    path.write_text("ImageID,XMin,XMax,YMin,YMax\na,0,1\n")
    with pytest.raises(ValueError, match=r"bbox\.csv: not a readable CSV"):
        OpenImagesBoxes(root)


def test_blank_lines_are_no_rows(tmp_path):
    root = boxes_folder(tmp_path, [("a", 0.1, 0.9, 0.2, 0.4)])
    path = root / "annotations" / "test-annotations-bbox.csv"
    path.write_text(path.read_text() + "\n\n")
    assert len(OpenImagesBoxes(root)) == 1


def test_many_rows_are_read_in_blocks(tmp_path, monkeypatch):
    rows = [
        (f"{number:0{number % 5 + 1}d}", 0.1, 0.9, 0.2, 0.4 + number / 100) for number in range(23)
    ]
    root = boxes_folder(tmp_path, rows)
    whole = OpenImagesBoxes(root)
    monkeypatch.setattr("elite.annotations.CSV_BLOCK", 4)
    blocks = OpenImagesBoxes(root)
    assert blocks.image_ids.tolist() == [row[0].encode() for row in rows]
    np.testing.assert_array_equal(blocks.boxes, whole.boxes)


def test_tables_as_others_write_them(tmp_path):
    root = boxes_folder(tmp_path, [])
    path = root / "annotations" / "test-annotations-bbox.csv"
    rows = '"a,b",0.1,0.6,0.1,0.6\r\n\r\nl\u00e4ngst, .2 ,7e-1,0.1,0.6'
    path.write_bytes(("ImageID,XMin,XMax,YMin,YMax\r\n" + rows).encode("utf-8-sig"))
    boxes = OpenImagesBoxes(root)
    assert [name.decode() for name in boxes.image_ids] == ["a,b", "l\u00e4ngst"]
    np.testing.assert_allclose(boxes.boxes[1], (0.2, 0.7, 0.1, 0.6), rtol=1e-6)
    for name, reason in (("n" * 251, "a text of more than 250"), ("caf\xe9", "can't decode byte")):
        path.write_bytes(f"ImageID,XMin,XMax,YMin,YMax\n{name},0,1,0,1\n".encode("latin-1"))
        with pytest.raises(ValueError, match=rf"bbox\.csv: not a readable CSV file \(.*{reason}"):
            OpenImagesBoxes(root)


def test_opening_takes_little_more_than_reading_the_rows(tmp_path):
    """Beside csv.reader in one process: 1.1 times its time; read in Python, it was 4.4 times."""
    root = boxes_folder(tmp_path, [(f"{n:016x}", 0.1, 0.6, 0.1, 0.6) for n in range(50_000)])
    path = root / "annotations" / "test-annotations-bbox.csv"

    def python() -> None:
        with open(path, encoding="utf-8", newline="") as file:
            assert sum(1 for _ in csv.reader(file)) == 50_001

    def seconds(work) -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    ours, theirs = (
        min(seconds(work) for _ in range(5)) for work in (lambda: read_boxes(path), python)
    )
    assert ours < 2.5 * theirs


# --- stage 2 --------------------------------------------------------------------------------------


def test_mask_sample_has_what_the_objective_reads(clean):
    dataset = OpenImagesMasks(clean, **SIZES, latent_size=8)
    assert len(dataset) == 6
    for index in range(len(dataset)):
        sample = dataset.sample(index, np.random.default_rng(index))
        shapes = {key: tuple(value.shape) for key, value in sample.items() if key != "caption"}
        assert shapes == {
            "pixels": (3, 32, 32),
            "loss_mask": (1, 8, 8),
            "clip_pixels": (3, 28, 28),
            "object_pixels": (3, 28, 28),
            "object_mask": (1, 28, 28),
        }
        for key in ("loss_mask", "object_mask"):
            assert sample[key].dtype == torch.float32 and sample[key].any()
            assert set(sample[key].unique().tolist()) <= {0.0, 1.0}
        assert "S" in sample["caption"].split()


def test_object_is_alone_in_its_view_and_not_in_the_plain_one(clean):
    dataset = OpenImagesMasks(clean, **SIZES, latent_size=8)
    black = to_clip_pixels(np.zeros((1, 1, 3), np.uint8)).flatten()
    ground = to_clip_pixels(np.full((1, 1, 3), BACKGROUND, np.uint8)).flatten()
    sample = dataset.sample(0, np.random.default_rng(1))
    assert (sample["clip_pixels"][:, 0, 0] - ground).abs().max() < 0.5
    outside = sample["object_pixels"][:, sample["object_mask"][0] == 0]
    assert (outside - black[:, None]).abs().mean() < 0.2  # but for the resized edge
    inside = sample["object_pixels"][0, sample["object_mask"][0] == 1]
    assert inside.mean() > 1  # red


def test_caption_tells_the_framing(clean):
    dataset = OpenImagesMasks(clean, **SIZES, latent_size=8)
    seen = set()
    for seed in range(40):
        sample = dataset.sample(0, np.random.default_rng(seed))
        black_border = bool((sample["pixels"] == -1).all(dim=0).any())
        far = sample["caption"].startswith(("a far away ", "very small "))
        assert far == black_border == (not sample["loss_mask"].all())
        seen.add(far)
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["small_mask", "large_mask", "turned", "cmyk", "rgba"])
def test_masks_of_another_size_still_lie_on_their_object(odd, name):
    dataset = OpenImagesMasks(odd, **SIZES, latent_size=8)
    index = [image_id.decode() for image_id in dataset.image_ids].index(name)
    crop, mask = dataset._crop(index, np.random.default_rng(0))
    red = crop[..., 0] > 130
    assert (red & mask).sum() / (red | mask).sum() > 0.93  # JPEG and a resized edge
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    border = 21  # 10 to 19 px and one for even sides, one for rounding; less at the image's edge
    assert max(rows[0], columns[0], mask.shape[0] - 1 - rows[-1]) <= border


def test_padding_of_objects_is_10_to_19_pixels(clean):
    dataset = OpenImagesMasks(clean)
    hs, he, ws, we = (int(dataset.index[side][0]) for side in ("hs", "he", "ws", "we"))
    heights = set()
    for seed in range(60):
        crop, _ = dataset._crop(0, np.random.default_rng(seed))
        heights.add(crop.shape[0])
    possible = {min(he + p, 160) - max(hs - p, 0) for p in range(10, 20)}
    assert heights == possible and we > ws


def test_unfit_and_broken_samples_are_named(odd):
    dataset = OpenImagesMasks(odd, **SIZES, latent_size=8)
    with pytest.raises(ValueError, match=rf"{UNFIT_MASK}_.*\.png: mask is"):
        sample_of(dataset, UNFIT_MASK)
    for name in UNREADABLE:
        with pytest.raises(ValueError, match=rf"{name}\.jpg"):
            sample_of(dataset, name)


def test_mask_that_changed_after_indexing_is_named(tmp_path):
    root = make_open_images(tmp_path, n=1)
    path = next((root / "segs" / "test").iterdir())
    moved = np.zeros((160, 200), dtype=bool)
    moved[:, -1] = True
    boxes = {path.name: (0, 120, 0, 120)}
    save_mask_boxes(mask_boxes_path(root), boxes)
    Image.fromarray(moved).save(path)
    with pytest.raises(ValueError, match=rf"{path.name}: mask has changed"):
        OpenImagesMasks(root).sample(0, np.random.default_rng(0))


def test_only_masks_of_100_px_and_moderate_aspect_are_used(tmp_path):
    sizes = {
        "a": (100, 200),
        "b": (100, 202),
        "c": (98, 150),
        "d": (200, 100),
        "e": (202, 100),
        "f": (150, 98),
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "segs").mkdir()
    rows = [(f"{name}.png", f"id_{name}", *[""] * 8) for name in reversed("abcdefx")]
    write_csv(
        tmp_path / "annotations" / "test-annotations-object-segmentation.csv", MASK_COLUMNS, rows
    )
    boxes = {f"{name}.png": (5, 5 + h, 7, 7 + w) for name, (h, w) in sizes.items()}
    save_mask_boxes(mask_boxes_path(tmp_path), {**boxes, "unlisted.png": (0, 150, 0, 150)})
    dataset = OpenImagesMasks(tmp_path)
    assert dataset.image_ids.tolist() == [b"id_a", b"id_d"]
    assert dataset.index["name"].tolist() == ["a.png", "d.png"]


def test_masks_are_found_as_their_archives_unzip(tmp_path):
    """In subfolders, with capitals, beside macOS's own files, and named with another folder."""
    root = make_open_images(tmp_path, n=4)
    masks = sorted((root / "segs" / "test").iterdir())
    for number, mask in enumerate(masks):
        folder = mask.parent / f"test-masks-{number % 2}"
        folder.mkdir(exist_ok=True)
        mask.rename(folder / (mask.with_suffix(".PNG") if number == 3 else mask).name)
        (folder / f"._{mask.name}").write_bytes(b"\0\5\26\7")
    image = root / "images" / "test" / "0000000000000001.jpg"
    image.rename(image.with_suffix(".JPG"))
    image = root / "images" / "test" / "0000000000000002.jpg"
    (root / "images" / "test" / "test_0").mkdir()
    image.rename(root / "images" / "test" / "test_0" / image.name)
    table = root / "annotations" / "test-annotations-object-segmentation.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *(f"elsewhere/{row}" for row in rows)]))
    assert index_masks([str(root), "--workers", "1"]) == 0
    dataset = OpenImagesMasks(root, **SIZES, latent_size=8)
    assert len(dataset) == 4
    for index in range(4):
        assert dataset.sample(index, np.random.default_rng(0))["object_mask"].any()
    boxes = OpenImagesBoxes(root, **SIZES)
    assert all(boxes.sample(index, np.random.default_rng(0)) for index in range(len(boxes)))


def test_table_of_other_masks_is_named(tmp_path):
    root = make_open_images(tmp_path, n=1)
    table = root / "annotations" / "test-annotations-object-segmentation.csv"
    table.write_text("MaskPath,ImageID\nother.png,0000000000000000\n")
    message = (
        r"segmentation\.csv: names none of the 1 masks of .*npy, such as '0+_m02jvh9_.*cal_bbox"
    )
    with pytest.raises(ValueError, match=message):
        OpenImagesMasks(root)


@pytest.mark.parametrize("name", ["../m.png", "/m.png", "a//m.png", "a/./m.png", ""])
def test_masks_outside_the_folder_are_refused(tmp_path, name):
    root = make_open_images(tmp_path, n=1)
    table = root / "annotations" / "test-annotations-object-segmentation.csv"
    table.write_text("MaskPath,ImageID\n" + (name or '""') + ",0000000000000000\n")
    save_mask_boxes(mask_boxes_path(root), {name: (0, 120, 0, 120)})
    with pytest.raises(ValueError, match="is no file name; correct the annotations"):
        OpenImagesMasks(root).sample(0, np.random.default_rng(0))


# --- a partial download ---------------------------------------------------------------------------


def test_annotations_of_what_is_there_are_kept(tmp_path, capsys):
    root = make_open_images(tmp_path, n=4)
    images, masks = (sorted((root / part / "test").iterdir()) for part in ("images", "segs"))
    images[0].unlink()
    masks[3].unlink()
    with pytest.raises(
        ValueError, match=r"0\.jpg: no such file; .*python data_scripts/keep_downloaded"
    ):
        OpenImagesBoxes(root).sample(0, np.random.default_rng(0))
    tables = sorted((root / "annotations").glob("test-*.csv"))
    before = [table.read_text() for table in tables]
    assert keep_downloaded([str(root)]) == 0
    assert "bbox.csv: 3 rows kept" in capsys.readouterr().out
    assert [len(OpenImagesBoxes(root)), len(OpenImagesMasks(root))] == [3, 2]
    assert [t.with_suffix(".all.csv").read_text() for t in tables] == before

    write_image(root, Record(images[0].stem, *draw_object(np.random.default_rng(0), 160, 200)))
    assert keep_downloaded([str(root)]) == 0
    assert [len(OpenImagesBoxes(root)), len(OpenImagesMasks(root))] == [4, 3]


def test_nothing_downloaded_changes_nothing(tmp_path):
    root = make_open_images(tmp_path, n=2)
    for image in (root / "images" / "test").iterdir():
        image.unlink()
    names = sorted((root / "annotations").iterdir())
    for folder in (root, tmp_path / "nowhere"):
        with pytest.raises(
            ValueError, match=r"bbox\.csv with an image in images/test/; expected an"
        ):
            keep_downloaded([str(folder)])
    assert sorted((root / "annotations").iterdir()) == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("MaskPath\nx\n", "no column ImageID"),
        ("Source,ImageID\na,b\nc\n", "not a readable CSV"),
        ("Source,ImageID\n" + "x" * 200_000 + "\n", "not a readable CSV"),
    ],
)
def test_damaged_tables_are_not_filtered(tmp_path, content, message):
    root = make_open_images(tmp_path, n=1)
    path = root / "annotations" / "test-annotations-bbox.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"bbox\.csv: {message}"):
        keep_downloaded([str(root)])
    assert path.read_text() == content


# --- the index of mask boxes ----------------------------------------------------------------------


def test_mask_boxes_round_trip(tmp_path):
    path = tmp_path / "test_bbox_dict.npy"
    save_mask_boxes(path, {"b.png": (1, 2, 3, 4), "längst.png": (5, 6, 7, 8)})
    boxes = load_mask_boxes(path)
    assert boxes.tolist() == [("b.png", 1, 2, 3, 4), ("längst.png", 5, 6, 7, 8)]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_interrupted_writing_leaves_the_old_index(tmp_path, monkeypatch):
    path = tmp_path / "test_bbox_dict.npy"
    save_mask_boxes(path, {"a.png": (1, 2, 3, 4)})

    def full_disk(file, *_, **__):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(ValueError, match=r"test_bbox_dict\.npy: cannot be written \(No space"):
        save_mask_boxes(path, {})
    assert load_mask_boxes(path)["name"].tolist() == ["a.png"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


class Bomb:
    """Raises when unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize(
    "kind", ["object array", "raw pickle", "other array", "empty", "other fields"]
)
def test_foreign_index_is_refused_with_the_command_that_rebuilds_it(tmp_path, kind):
    path = tmp_path / "test_bbox_dict.npy"
    if kind == "object array":
        np.save(path, np.array({"a.png": Bomb()}, dtype=object), allow_pickle=True)
    elif kind == "raw pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "other array":
        np.save(path, np.zeros(3))
    elif kind == "other fields":
        np.save(path, np.zeros(3, dtype=[("x", "i4")]))
    else:
        path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"rebuild it with python data_scripts/cal_bbox_by_seg\.py DIR"
    ):
        load_mask_boxes(path)


def test_missing_index_names_the_command(tmp_path):
    with pytest.raises(
        ValueError, match=r"no such file; make it with python data_scripts/cal_bbox"
    ):
        OpenImagesMasks(tmp_path)


# --- pairs ----------------------------------------------------------------------------------------


def picture(path, size=(8, 6)):
    Image.new("RGB", size, "white").save(path)


def test_pairs_are_sorted_and_read(tmp_path):
    for name in ("c.webp", "a.JPG", "b.jpeg", "d.png"):
        picture(tmp_path / name)
    for name in ("a_bg.png", "c_bg.png", "d_bg.png", "._a.jpg", "notes.txt"):
        picture(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_text("x")
    folder = PairFolder(tmp_path)
    assert [pair.name for pair in folder.pairs] == ["a", "b", "c", "d"]
    assert len(folder) == 4
    image, mask = folder.read(3)
    assert image.shape == (6, 8, 3) and image.dtype == np.uint8
    assert mask.shape == (6, 8) and mask.dtype == bool
    with pytest.raises(ValueError, match=r"b_bg\.png: no such file; expected the mask of b\.jpeg"):
        folder.read(1)


def test_a_folder_of_pictures_is_one_object(tmp_path):
    for name in ("b.png", "b_bg.png", "a/1.png", "a/1_bg.png", "a/2.jpg", "a/2_bg.png", "a/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(tmp_path / name)
    for name in (".hidden", "empty", "no_mask"):
        (tmp_path / name).mkdir()
    picture(tmp_path / "no_mask/1.png")
    with pytest.warns(Note, match=r"a: left out \['3.png'\]; expected a mask"):
        folder = PairFolder(tmp_path)
    assert [pair.name for pair in folder.pairs] == ["a", "b"]
    assert [len(folder.read_all(i)) for i in range(2)] == [2, 1]
    assert folder.pairs[0].image_path == tmp_path / "a/1.png"
    before = [folder.digest(i) for i in range(2)]
    picture(tmp_path / "a/2_bg.png", size=(6, 8))
    assert folder.digest(0) != before[0] and folder.digest(1) == before[1]
    with pytest.raises(ValueError, match=r"2_bg\.png: mask is 6 x 8"):
        folder.read_all(0)
    whole = PairFolder(tmp_path, whole=True)
    assert [pair.name for pair in whole.pairs] == ["a", "b", "no_mask"]
    assert [len(whole.read_all(i)) for i in range(3)] == [3, 1, 1]
    assert [pair.name for pair in PairFolder(tmp_path, folders=False).pairs] == ["b"]


def test_masks_are_found_by_their_name_and_are_no_pictures(tmp_path):
    for name in ("upper.jpg", "upper_bg.PNG", "lossy.jpg", "lossy_bg.jpg", "b.bmp", "b_BG.png"):
        picture(tmp_path / name)
    with pytest.warns(Note, match=r"left out \['lossy_bg.jpg'\]; expected .*masks as NAME_bg.png"):
        folder = PairFolder(tmp_path)
    assert [pair.name for pair in folder.pairs] == ["b", "lossy", "upper"]
    assert folder.read(2)[1].all() and folder.read(0)[1].all()
    with pytest.raises(ValueError, match=r"the mask of lossy\.jpg as PNG, not lossy_bg\.jpg"):
        folder.read(1)


def test_what_pillow_reads_is_taken_and_the_rest_is_named(tmp_path):
    for name in ("a.bmp", "b.gif", "c.tif", "d.TIFF", "e.avif", "f.jpg", "g_bg.png"):
        picture(tmp_path / name)
    for name in ("raw.dng", "drawing.svg", ".hidden.dng", "notes.txt", "table.csv"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.dng").mkdir()
    with pytest.warns(Note, match=r"left out \['drawing.svg', 'raw.dng'\]"):
        found = pictures_in(tmp_path)
    assert [path.name for path in found] == [
        *("a.bmp", "b.gif", "c.tif", "d.TIFF", "e.avif", "f.jpg")
    ]
    assert all(read_image(path).shape == (6, 8, 3) for path in found)


def test_pictures_of_phones_are_taken_or_named(tmp_path):
    path = tmp_path / "phone.HEIC"
    if "HEIF" in FORMATS:
        picture(path)
        assert pictures_in(tmp_path) == [path] and read_image(path).shape == (6, 8, 3)
    else:
        path.write_bytes(b"0")
        with pytest.warns(Note, match=r"left out \['phone.HEIC'\].*pip install pillow-heif"):
            assert pictures_in(tmp_path) == []


def test_pair_of_unfit_mask_is_named(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "a_bg.png", size=(6, 8))
    with pytest.raises(ValueError, match=r"a_bg\.png: mask is 6 x 8"):
        PairFolder(tmp_path).read(0)


def test_empty_and_missing_folders_are_refused(tmp_path):
    picture(tmp_path / "only_bg.png")
    with pytest.raises(
        ValueError, match=r"no image \+ mask pairs in .*; expected NAME\.jpg with NAME_bg\.png"
    ):
        PairFolder(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        PairFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no such folder"):
        PairFolder("")
