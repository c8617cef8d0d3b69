"""The folder of pairs: pictures and their masks."""

import numpy as np
import pytest
from PIL import Image

from elite.data import PairFolder, pictures_in
from elite.images import FORMATS, read_image
from elite.wording import Note


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
    with pytest.warns(Note) as told:
        folder = PairFolder(tmp_path)
    for name, left_out in (("a", "3.png"), ("no_mask", "1.png")):
        expected = f"{tmp_path / name}: left out ['{left_out}']; expected a mask NAME_bg.png for"
        assert any(expected in str(note.message) for note in told), name
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


def test_a_folder_and_a_picture_of_one_name_are_told_apart(tmp_path):
    for name in ("mug.png", "mug_bg.png", "mug/0.png", "mug/0_bg.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(tmp_path / name)
    with pytest.raises(ValueError, match=f"{tmp_path / 'mug.png'}: has the name of mug; rename"):
        PairFolder(tmp_path).check_names()


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
        ValueError, match=r"no pictures in .*; expected NAME\.jpg with NAME_bg\.png"
    ):
        PairFolder(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        PairFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no such folder"):
        PairFolder("")
