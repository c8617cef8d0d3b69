"""Bad images and masks, made here: no file of them is kept."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from elite.data import Pair, PairFolder, pair_of
from tests.hostile.harness import Case, World
from textual_inversion.pictures import PictureFolder

GOOD = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8), "RGB"
)


def encoded(image: Image.Image = GOOD, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- pieces of formats ----------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    """Of a PNG."""
    checksum = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def header(width: int, height: int, depth: int = 8, colour: int = 0, interlace: int = 0) -> bytes:
    values = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", values)


def zeros(count: int) -> bytes:
    """That many zero bytes, deflated a piece at a time."""
    press, parts = zlib.compressobj(9), []
    piece = bytes(1 << 20)
    for _ in range(count >> 20):
        parts.append(press.compress(piece))
    return b"".join([*parts, press.compress(bytes(count & (1 << 20) - 1)), press.flush()])


def png(width: int, height: int, data: bytes, colour: int = 0, extra: bytes = b"", **k) -> bytes:
    parts = extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return header(width, height, colour=colour, **k) + parts


def png_bomb(width: int, height: int, colour: int = 0) -> bytes:
    """Promises so many pixels and holds the first 16 MB of them."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    return png(width, height, zeros(min((width * channels + 1) * height, 16 << 20)), colour)


def jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG whose header says this size."""
    content = bytearray(encoded(kind="JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def gif_of_size(width: int, height: int) -> bytes:
    content = bytearray(encoded(kind="GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def webp_of_size(side: int) -> bytes:
    """A lossless WebP of one colour: some kB whatever its size."""
    return encoded(Image.new("RGB", (side, side), "red"), "WEBP", lossless=True, method=0)


def bmp_of_size(width: int, height: int) -> bytes:
    content = bytearray(encoded(kind="BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def tiff_of_size(width: int, height: int) -> bytes:
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (279, 4)]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)


def exif(orientation: int, kind: int = 3, count: int = 1) -> bytes:
    """EXIF of an orientation, of that type and count."""
    entry = struct.pack("<HHIHH", 0x112, kind, count, orientation, 0)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)


def with_text(kind: bytes, content: bytes) -> bytes:
    whole = encoded()
    return whole[:33] + chunk(kind, content) + whole[33:]


def animated(kind: str, frames: int = 30) -> bytes:
    rest = [GOOD.rotate(i) for i in range(1, frames)]
    return encoded(GOOD, kind, save_all=True, append_images=rest)


def eps_that_writes(canary: Path) -> bytes:
    """PostScript that Ghostscript would run."""
    return (
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n"
        f"({canary}) (w) file dup (ran) writestring closefile\nshowpage\n%%EOF\n"
    ).encode()


# --- images ---------------------------------------------------------------------------------------


def taken_images() -> Iterator[tuple[str, bytes]]:
    """Odd, but pictures."""
    rng = np.random.default_rng(1)
    yield "one_pixel.png", encoded(Image.new("RGB", (1, 1), "red"))
    yield "one_pixel.jpg", encoded(Image.new("RGB", (1, 1), "red"), "JPEG")
    yield "line.png", encoded(Image.new("L", (4000, 1), 9))
    yield "column.png", encoded(Image.new("L", (1, 4000), 9))
    yield "grey16.png", encoded(Image.fromarray(rng.integers(0, 65536, (40, 40)).astype("uint16")))
    yield "palette.png", encoded(GOOD.quantize(16))
    yield "palette_clear.png", encoded(GOOD.quantize(16), transparency=0)
    yield "bits.png", encoded(GOOD.convert("1"))
    yield "grey_alpha.png", encoded(GOOD.convert("LA"))
    yield "clear.png", encoded(Image.new("RGBA", (40, 40)))
    yield "cmyk.jpg", encoded(GOOD.convert("CMYK"), "JPEG")
    yield "grey.jpg", encoded(GOOD.convert("L"), "JPEG")
    yield "animated.png", animated("PNG")
    yield "animated.webp", animated("WEBP")
    yield "alpha.webp", encoded(GOOD.convert("RGBA"), "WEBP")
    yield "jpeg_called.png", encoded(kind="JPEG")
    yield "png_called.jpg", encoded()
    yield "webp_called.jpeg", encoded(kind="WEBP")
    yield "gif_called.png", encoded(kind="GIF")
    yield "bmp_called.jpg", encoded(kind="BMP")
    yield "tiff_called.png", encoded(kind="TIFF")
    yield "sixteen_bits.tif", encoded(Image.new("I;16", (40, 40), 999), "TIFF")
    yield "packed.tif", encoded(kind="TIFF", compression="tiff_lzw")
    yield "animated.gif", animated("GIF")
    yield "with_a_zip_behind.png", encoded() + b"PK\3\4" + bytes(100)
    yield "with_html_behind.jpg", encoded(kind="JPEG") + b"<script>alert(1)</script>"
    yield "script_in_comment.jpg", encoded(kind="JPEG", comment=b"<?php system('id'); ?>")
    for number in (0, 2, 6, 9, 255, 65535):
        yield f"exif_{number}.jpg", encoded(kind="JPEG", exif=exif(number))
    yield "exif_text.jpg", encoded(kind="JPEG", exif=exif(6, kind=2))
    yield "exif_long.jpg", encoded(kind="JPEG", exif=exif(6, count=2**31))
    yield "exif_cut.jpg", encoded(kind="JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    yield "exif_noise.jpg", encoded(kind="JPEG", exif=b"Exif\0\0" + bytes(range(200)))
    yield "largest.png", png(8000, 8000, zeros((4 * 8000 + 1) * 8000), 6)
    yield "largest_grey.png", png(8000, 8000, zeros((2 * 8000 + 1) * 8000), depth=16)
    yield "density.jpg", encoded(kind="JPEG", dpi=(65535, 1))


def refused_images(world: World) -> Iterator[tuple[str, bytes]]:
    """No pictures, or larger than anyone's."""
    whole, jpeg, webp = encoded(), encoded(kind="JPEG"), encoded(kind="WEBP")
    yield "empty.png", b""
    yield "zeros.png", bytes(5000)
    yield "noise.jpg", np.random.default_rng(2).bytes(5000)
    yield "text.png", b"not a picture\n"
    yield "html.jpg", b"<html><script>alert(1)</script></html>"
    yield (
        "svg.png",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    )
    yield "pdf.jpg", b"%PDF-1.4\n%%EOF\n"
    yield "zip.png", b"PK\3\4" + bytes(200)
    yield "eps.png", eps_that_writes(world.canary)
    yield "only_signature.png", whole[:8]
    yield "only_header.png", whole[:33]
    for share in (40, 60, 80, 95):
        yield f"cut_at_{share}.png", whole[: len(whole) * share // 100]
        yield f"cut_at_{share}.jpg", jpeg[: len(jpeg) * share // 100]
        yield f"cut_at_{share}.webp", webp[: len(webp) * share // 100]
        for kind in ("BMP", "GIF", "TIFF", "AVIF"):
            other = encoded(kind=kind)
            yield f"{kind}_cut_at_{share}.png", other[: len(other) * share // 100]
    yield "zero_wide.png", png(0, 40, zlib.compress(b""))
    yield "zero_high.jpg", jpeg_of_size(40, 0)
    yield "wrong_checksum.png", header(40, 40)[:-4] + b"\0\0\0\0" + whole[33:]
    yield "depth_3.png", png(40, 40, zeros(1640), depth=3)
    yield "colour_5.png", png(40, 40, zeros(1640), colour=5)
    yield "negative_chunk.png", header(40, 40) + b"\xff\xff\xff\xffIDAT"
    yield "no_data.png", header(40, 40) + chunk(b"IEND", b"")
    yield "bad_zlib.png", png(40, 40, b"\x78\x9c" + b"\xaa" * 50)
    yield "bomb_50k_grey.png", png_bomb(50_000, 50_000)
    yield "bomb_50k_rgb.png", png_bomb(50_000, 50_000, 2)
    yield "bomb_50k_rgba.png", png_bomb(50_000, 50_000, 6)
    yield "bomb_interlaced.png", png(50_000, 50_000, zeros(1 << 20), interlace=1)
    yield "bomb_2_31.png", png_bomb(2**31 - 1, 2**31 - 1)
    yield "bomb_below_pillows_limit.png", png(13_000, 13_000, zeros(1 << 20), 6)
    yield "bomb_wide.png", png_bomb(100_000_000, 1)
    yield "bomb_high.png", png_bomb(1, 100_000_000)
    yield "bomb_50k.jpg", jpeg_of_size(50_000, 50_000)
    yield "bomb_65k.jpg", jpeg_of_size(65_500, 65_500)
    yield "bomb_8k.webp", webp_of_size(8_100)
    yield "bomb_gif.png", gif_of_size(50_000, 50_000)
    yield "bomb_bmp.png", bmp_of_size(50_000, 50_000)
    yield "bomb_tiff.png", tiff_of_size(50_000, 50_000)
    yield "bomb_text.png", with_text(b"zTXt", b"key\0\0" + zeros(200 << 20))
    yield "bomb_profile.png", with_text(b"iCCP", b"key\0\0" + zeros(200 << 20))
    yield "icon_called.png", encoded(kind="ICO")
    yield "ppm_called.jpg", b"P6 99999999 99999999 255 "


def read_pair(world: World, name: str, content: bytes) -> None:
    """The reader of every script takes a picture with a mask that is all object."""
    path = world.write(name, content)
    image, mask = pair_of(path, whole=True).read()
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert mask.shape == image.shape[:2]
    views = world.pipe.concept_views(image, mask)
    assert all(view.isfinite().all() for view in views.values())


def image_case(name: str, content: bytes, refused: bool | None) -> Case:
    return Case("image", name, lambda world: read_pair(world, name, content), refused)


def special(name: str, make: Callable[[Path], object]) -> Case:
    """A picture that is no plain file."""

    def action(world: World) -> None:
        make(world.folder / name)
        pair = pair_of(world.folder / name)
        world.write("a.png", encoded())
        assert [p.name for p in PairFolder(world.folder).pairs] in (["a"], ["a", pair.name])
        assert isinstance(pair.digest, str)
        pair.read()

    return Case("image", name, action)


def narrow_picture(world: World) -> None:
    """A picture one pixel high would be made 512 px high, and as many times wider."""
    world.write("narrow.png", encoded(Image.new("RGB", (60_000, 1))))
    folder = PictureFolder(world.folder, resolution=512, placeholder="<x>")
    folder.sample(0, np.random.default_rng(0))


# --- masks ----------------------------------------------------------------------------------------


def square(mode: str, background: object, ink: object, size: int = 40) -> Image.Image:
    image = Image.new(mode, (size, size), background)  # type: ignore[arg-type]
    image.paste(ink, (size // 4, size // 4, size * 3 // 4, size * 3 // 4))  # type: ignore[arg-type]
    return image


def masks_taken() -> Iterator[tuple[str, bytes]]:
    """Each shows the same square of object."""
    yield "grey", encoded(square("L", 0, 255))
    yield "faint", encoded(square("L", 0, 1))
    yield "bits", encoded(square("1", 0, 1))
    yield "colour", encoded(square("RGB", "black", "red"))
    yield "alpha_only", encoded(square("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)))
    yield "grey_alpha", encoded(square("LA", (255, 0), (255, 255)))
    yield "black_on_clear", encoded(square("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)))
    yield "gif", encoded(square("L", 0, 255), "GIF")
    yield "sixteen", encoded(square("I;16", 0, 300))
    palette = square("P", 0, 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    yield "palette", encoded(palette)
    yield "palette_clear", encoded(square("L", 0, 255).convert("P"), transparency=0)
    yield "twice_the_size", encoded(square("L", 0, 255, 80))
    yield "half_the_size", encoded(square("L", 0, 255, 20))
    labels = np.asarray(square("L", 0, 1)).copy()
    labels[labels > 0] = 1 + np.arange((labels > 0).sum()) % 250
    yield "multi_label", encoded(Image.fromarray(labels))
    yield (
        "animated",
        encoded(square("L", 0, 255), save_all=True, append_images=[Image.new("L", (40, 40))]),
    )
    yield "jpeg_called_png", encoded(square("L", 0, 255), "JPEG", quality=100)
    yield "webp_called_png", encoded(square("RGB", 0, "white"), "WEBP", lossless=True)


def masks_refused(world: World) -> Iterator[tuple[str, bytes]]:
    yield "empty_file", b""
    yield "black", encoded(Image.new("L", (40, 40)))
    yield "black_rgb", encoded(Image.new("RGB", (40, 40)))
    yield "clear", encoded(Image.new("RGBA", (40, 40), (255, 255, 255, 0)))
    yield "other_shape", encoded(Image.new("L", (40, 20), 255))
    yield "line", encoded(Image.new("L", (4000, 1), 255))
    yield "bomb", png_bomb(50_000, 50_000)
    yield "bomb_of_same_shape", png(13_000, 13_000, zeros(1 << 20), 6)
    yield "cut", encoded(square("L", 0, 255))[:60]
    yield "text", b"mask"
    yield "eps", eps_that_writes(world.canary)
    yield "npy", b"\x93NUMPY" + bytes(100)


def read_mask_of(world: World, content: bytes, taken: bool) -> None:
    world.write("a.png", encoded())
    world.write("a_bg.png", content)
    _, mask = PairFolder(world.folder).read(0)
    expected = np.zeros((40, 40), bool)
    expected[10:30, 10:30] = True
    if taken:
        assert np.mean(mask == expected) > 0.85 and mask[20, 20] and not mask[0, 39] | mask.all()


def special_mask(name: str, make: Callable[[Path], object]) -> Case:
    def action(world: World) -> None:
        pair: Pair = pair_of(world.write("a.png", encoded()))
        make(pair.mask_path)
        assert isinstance(pair.digest, str)
        pair.read()

    return Case("mask", name, action)


def folder_case(world: World) -> None:
    """All of them in one folder with two good pairs: those are drawn, each other has its line."""
    bad = [*refused_images(world)]
    for name, content in bad:
        world.write(f"in/bad_{name}", content)
        stem = Path(f"bad_{name}").stem
        world.write(f"in/{stem}_bg.png", encoded(Image.new("L", (40, 40), 255)))
    for i in (0, 1):
        world.write(f"in/good{i}.png", encoded())
        world.write(f"in/good{i}_bg.png", encoded(square("L", 0, 255)))
    given = "--test_data_dir", world.folder / "in", "--output_dir", world.folder / "out"
    fast = "--num_inference_steps", "1", "--device", "cpu"
    status = world.script("inference_local.py", *world.model_flags, *given, *fast)
    drawn = list((world.folder / "out" / "object_l0p8").glob("[0-9]*.png"))
    assert status == 3 and len(drawn) == 2, (status, drawn)


def cases(world: World) -> Iterator[Case]:
    for name, content in taken_images():
        yield image_case(name, content, refused=False)
    for name, content in refused_images(world):
        yield image_case(name, content, refused=True)
    yield special("folder.png", Path.mkdir)
    yield special("pipe.png", os.mkfifo)
    yield special("zero.png", lambda path: path.symlink_to("/dev/zero"))
    yield special("nowhere.png", lambda path: path.symlink_to("nowhere"))
    yield special("loop.png", lambda path: path.symlink_to(path))
    yield Case("image", "narrow", narrow_picture)
    yield Case("image", "all in one folder", folder_case, refused=False)
    for name, content in masks_taken():
        yield Case("mask", name, lambda w, c=content: read_mask_of(w, c, True), refused=False)
    yield Case(
        "mask",
        "all_white",
        lambda w: read_mask_of(w, encoded(Image.new("L", (40, 40), 255)), False),
        refused=False,
    )
    for name, content in masks_refused(world):
        yield Case("mask", name, lambda w, c=content: read_mask_of(w, c, False))
    yield special_mask("folder", Path.mkdir)
    yield special_mask("pipe", os.mkfifo)
    yield special_mask("endless", lambda path: path.symlink_to("/dev/zero"))
    yield special_mask("missing", lambda path: None)
