"""Datasets on miniature Open Images folders."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_scripts.cal_bbox_by_seg import main as index_masks
from elite.annotations import mask_boxes_path, same_masks, save_mask_boxes
from elite.images import resize, to_clip_pixels, to_pixels
from elite.open_images import (
    PHOTO_TEMPLATES,
    OpenImagesBoxes,
    OpenImagesFolder,
    OpenImagesMasks,
    image_file,
    padded,
    with_framing,
)
from tests.open_images import (
    BACKGROUND,
    MASK_COLUMNS,
    OBJECT,
    ODD_ENCODINGS,
    UNFIT_MASK,
    UNREADABLE,
    boxes_folder,
    make_open_images,
    write_csv,
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


@pytest.mark.parametrize("columns", [slice(-1, None), slice(100, 122), slice(0, 117)])
def test_mask_that_changed_after_indexing_is_named(columns, tmp_path):
    """Of one that was painted larger the rest was cut off without a word; one that was painted
    smaller was a small object."""
    root = make_open_images(tmp_path, n=1)
    path = next((root / "segs" / "test").iterdir())
    moved = np.zeros((160, 200), dtype=bool)
    moved[:120, columns] = True
    boxes = {path.name: (0, 120, 0, 120)}
    save_mask_boxes(mask_boxes_path(root), boxes)
    Image.fromarray(moved).save(path)
    with pytest.raises(ValueError, match=rf"{path.name}: mask has changed"):
        OpenImagesMasks(root).sample(0, np.random.default_rng(0))


SAME = [  # table, image ids, index, rows and entries or what is wrong
    (["b.png", "a.png"], "xy", ["a.png", "b.png"], ([1, 0], [0, 1])),
    (["B.PNG", "lost.png"], "xy", ["1/b.png"], ([0], [0])),
    (["2/b.png", "1/b.png"], "xy", ["1/b.png", "2/b.png"], ([1, 0], [0, 1])),
    (["cat.png", "Cat.png"], "xy", ["Cat.png", "cat.png"], ([1, 0], [0, 1])),
    (["a.png", "a.png"], "xx", ["a.png"], ([0], [0])),
    (
        ["b.png"],
        "x",
        ["1/b.png", "2/b.png"],
        "'b.png' may be '1/b.png' or '2/b.png'; write its fol",
    ),
    (["a.png", "A.png", "2/a.png"], "xyz", ["a.png"], ([0], [0])),
    (["A.png", "2/a.png"], "xy", ["a.png"], "'2/a.png' is listed for 'x' and 'y'; leave one out"),
]


@pytest.mark.parametrize(("listed", "images", "known", "expected"), SAME)
def test_masks_find_their_rows(listed, images, known, expected):
    """Of two masks of the same name in two folders one had the other's image."""
    names, paths = ([name.encode() for name in each] for each in (listed, known))
    given = names, np.array(list(images), dtype="S1"), paths
    if isinstance(expected, tuple):
        assert same_masks(*given) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            same_masks(*given)


def test_a_small_mask_takes_nothing_from_one_of_its_name(tmp_path):
    root = make_open_images(tmp_path, n=1)
    name = next((root / "images" / "test").iterdir()).stem
    table = root / "annotations" / "test-annotations-object-segmentation.csv"
    rows = [("1/x.png", name), ("2/x.png", "b")]
    write_csv(table, ("MaskPath", "ImageID"), rows)
    index = {"1/x.png": (0, 120, 0, 120), "2/x.png": (0, 40, 0, 40)}
    for known in (index, {"1/x.png": index["1/x.png"]}):  # the other one is small, or not there
        save_mask_boxes(mask_boxes_path(root), known)
        dataset = OpenImagesMasks(root)
        assert dataset.image_ids.tolist() == [name.encode()]
        assert dataset.index["name"].tolist() == ["1/x.png"]


def test_names_of_screenshots_are_file_names(tmp_path):
    """macOS writes a narrow space that may not be broken before PM."""
    root = boxes_folder(tmp_path, [("at 1.00.00\u202fPM", 0.1, 0.9, 0.2, 0.4)])
    name = image_file(root / "images" / "test", "at 1.00.00\u202fPM").name
    assert name == "at 1.00.00\u202fPM.jpg"
    for wrong in ("a\nb", "a/../b", "\x1b[1m"):
        with pytest.raises(ValueError, match="is no file name; correct the annotations"):
            image_file(root, wrong)
    assert OpenImagesFolder(root).image_state(b"a/../b") == (-1, -1)


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
