"""The one preprocessing path: every kind of file to the same arrays."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elite.images import (
    CLIP_MEAN,
    CLIP_STD,
    as_image,
    as_mask,
    cut_out,
    doubt,
    fit_mask,
    object_box,
    object_views,
    patch_mask,
    read_image,
    read_mask,
    resize,
    to_clip_pixels,
    to_mask,
    to_pixels,
)
from tests.open_images import (
    as_16_bit_png,
    as_cmyk_jpeg,
    as_cut_jpeg,
    as_grey_jpeg,
    as_rgba_png,
    as_turned_jpeg,
)


@pytest.fixture
def picture() -> np.ndarray:
    """Smooth, (40, 60, 3), no two corners alike: JPEG keeps it within a few grey levels."""
    rows, columns = np.mgrid[:40, :60]
    return np.stack([rows * 5, columns * 4, 200 - rows * 2 - columns], axis=2).astype(np.uint8)


def written(folder: Path, content: bytes) -> Path:
    path = folder / "picture.jpg"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("encode", "tolerance"),
    [
        (as_turned_jpeg, 12),  # JPEG with halved chroma
        (as_cmyk_jpeg, 12),
        (as_rgba_png, 0),
    ],
)
def test_colour_files_give_the_picture(tmp_path, picture, encode, tolerance):
    image = read_image(written(tmp_path, encode(picture)))
    assert image.dtype == np.uint8 and image.shape == picture.shape
    assert np.abs(image.astype(int) - picture).max() <= tolerance


@pytest.mark.parametrize(("encode", "tolerance"), [(as_grey_jpeg, 4), (as_16_bit_png, 1)])
def test_grey_files_give_three_equal_channels(tmp_path, picture, encode, tolerance):
    image = read_image(written(tmp_path, encode(picture)))
    grey = np.asarray(Image.fromarray(picture).convert("L"), dtype=int)
    assert image.shape == picture.shape
    assert np.abs(image - grey[..., None]).max() <= tolerance


def test_opened_pictures_are_turned_upright_as_files_are(tmp_path, picture):
    path = written(tmp_path, as_turned_jpeg(picture))
    with Image.open(path) as image:
        assert np.array_equal(as_image(image), as_image(path))
        assert np.array_equal(as_mask(image), as_mask(path))


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()


def test_missing_and_cut_files_are_named(tmp_path, picture):
    with pytest.raises(ValueError, match=r"nowhere\.jpg: no such file"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match=r"picture\.jpg: not a readable image"):
        read_image(written(tmp_path, as_cut_jpeg(picture)))
    with pytest.raises(ValueError, match=r"picture\.jpg: not a readable image"):
        read_mask(written(tmp_path, b"not a picture"))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16"])
def test_any_non_zero_pixel_of_any_mode_is_object(tmp_path, mode):
    expected = np.zeros((6, 8), dtype=bool)
    expected[1:3, 2:7] = True
    value = 1 if mode in ("L", "I;16", "P") else 255
    if mode == "1":
        image = Image.fromarray(expected)
    elif mode == "I;16":
        image = Image.fromarray(expected.astype(np.uint16) * value)
    elif mode == "P":
        image = Image.fromarray(expected.astype(np.uint8) * value, "P")
        image.putpalette([0, 0, 0, 200, 0, 0])
    else:
        image = Image.fromarray(expected.astype(np.uint8) * value).convert(mode)
    image.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), expected)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_black_is_black_in_modes_where_it_is_not_all_zeros(mode):
    expected = np.zeros((6, 8), dtype=bool)
    expected[1:3, 2:7] = True
    grey = Image.fromarray(expected.astype(np.uint8) * 255).convert("RGB")
    np.testing.assert_array_equal(to_mask(grey.convert(mode)), expected)


def test_negative_numbers_of_a_mask_are_object():
    assert as_mask(np.array([[0, -1], [0, 127]], dtype=np.int8)).tolist() == [[False, True]] * 2


def test_transparent_mask_pixels_are_not_object(tmp_path):
    rgba = np.full((4, 4, 4), 255, dtype=np.uint8)
    rgba[:, 2:, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png")
    assert mask[:, :2].all() and not mask[:, 2:].any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_alpha_that_varies_is_the_mask(tmp_path, mode):
    """What background removers write of an object with black parts; RGB names a clear colour."""
    expected = np.zeros((6, 8), dtype=bool)
    expected[1:5, 2:7] = True
    rgba = np.full((6, 8, 4), (40, 90, 60, 0), dtype=np.uint8)
    rgba[expected] = (0, 0, 0, 255)
    rgba[2, 3:5] = (255, 255, 255, 128)
    image = Image.fromarray(rgba)
    if mode == "P":
        image = image.quantize(4)
    elif mode == "RGB":
        image = image.convert("RGB")
    else:
        image = image.convert(mode)
    image.save(tmp_path / "mask.png", **({"transparency": (40, 90, 60)} if mode == "RGB" else {}))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), expected)


def test_alpha_that_says_nothing_leaves_the_colours(tmp_path):
    rgba = np.full((4, 4, 4), 255, dtype=np.uint8)
    rgba[:, 2:, :3] = 0
    Image.fromarray(rgba).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png").tolist() == [[True, True, False, False]] * 4


def test_masks_that_may_not_be_meant_are_doubted():
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:15, :20] = True
    assert not doubt(mask)
    assert "inverted" in doubt(~np.pad(mask[5:15, 5:20], 8))
    assert "every pixel is object" in doubt(np.ones((20, 30), dtype=bool))


def test_mask_of_the_same_aspect_is_resized():
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:10, 6:12] = True
    fitted = fit_mask(mask, np.zeros((40, 60, 3), dtype=np.uint8))
    np.testing.assert_array_equal(fitted, mask.repeat(2, axis=0).repeat(2, axis=1))


def test_unfit_and_empty_masks_are_refused():
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"cat_bg\.png: mask is 40 x 60, its image 60 x 40"):
        fit_mask(np.ones((60, 40), dtype=bool), image, "cat_bg.png")
    with pytest.raises(ValueError, match=r"cat_bg\.png: mask has no object pixel"):
        fit_mask(np.zeros((40, 60), dtype=bool), image, "cat_bg.png")


def test_pixels_are_in_range_and_in_order(picture):
    pixels = to_pixels(picture)
    assert pixels.shape == (3, 40, 60) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[1, 7, 9], torch.tensor(picture[7, 9, 1] / 127.5 - 1).float())
    assert to_pixels(np.full((2, 2, 3), 255, np.uint8)).eq(1).all()
    assert to_pixels(np.zeros((2, 2, 3), np.uint8)).eq(-1).all()


def test_clip_pixels_have_clips_mean_and_deviation(picture):
    expected = [
        (picture[7, 9, channel] / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        for channel in range(3)
    ]
    torch.testing.assert_close(to_clip_pixels(picture)[:, 7, 9], torch.tensor(expected).float())


def test_resize_averages_when_it_shrinks():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # without antialiasing all black or all white
    assert np.abs(resize(stripes, 16, 8).astype(int) - 128).max() < 16  # bicubic ripple at edges
    assert resize(stripes, 16, 8).shape == (8, 16, 3)


def test_top_left_pixel_of_a_cell_decides():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0, 0] = mask[5, 5] = True  # corner of cell (0, 0); inside cell (1, 1), not its corner
    assert patch_mask(mask[None, None], 2).flatten().tolist() == [1, 0, 0, 0]


def test_the_box_of_an_object_is_tight():
    mask = np.zeros((40, 60), dtype=bool)
    mask[10, 15] = mask[29, 44] = True
    assert object_box(mask) == (slice(10, 30), slice(15, 45))


def test_object_views_agree_with_each_other(picture):
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:30, 15:45] = True
    views = object_views(picture, mask, size=32, grid=4)
    assert views["clip_pixels"].shape == views["object_pixels"].shape == (3, 32, 32)
    assert views["patch_mask"].shape == (16, 1)
    torch.testing.assert_close(
        views["object_pixels"], to_clip_pixels(resize(cut_out(picture, mask), 32, 32))
    )
    middle = (slice(None), slice(14, 18), slice(14, 18))
    torch.testing.assert_close(views["object_pixels"][middle], views["clip_pixels"][middle])
    assert views["object_pixels"][:, 0, 0].equal(
        to_clip_pixels(np.zeros((1, 1, 3), np.uint8))[:, 0, 0]
    )


def test_float_pictures_from_0_to_1_are_no_black_ones(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for top in (1, 255, 65535):
        Image.fromarray(ramp * top).save(tmp_path / "grey.tif")
        grey = read_image(tmp_path / "grey.tif")
        np.testing.assert_allclose(grey[..., 0], ramp * 255, atol=0.51)


@pytest.mark.parametrize("value", [1e6, np.nan, np.inf])
def test_numbers_that_are_no_grey_are_refused(tmp_path, value):
    Image.fromarray(np.full((8, 8), value, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a.tif: grey values up to .*; save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif")
