"""Miniature Open Images folders for tests: real layout and columns, oddities on request.

Each picture has one object, a flat ellipse or rectangle, with one box and one mask of it.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from data_scripts.cal_bbox_by_seg import tight_box
from data_scripts.make_small_world import BOX_COLUMNS, MASK_COLUMNS
from elite.annotations import mask_boxes_path, save_mask_boxes

CLASSES = (("/m/02jvh9", "Mug"), ("/m/01g317", "Person"))
BACKGROUND, OBJECT = (40, 90, 60), (220, 60, 30)
TURNED = 6  # EXIF orientation: the camera was held sideways


@dataclass
class Record:
    """A picture with its object, before it becomes files."""

    image_id: str
    image: np.ndarray  # uint8 (H, W, 3)
    mask: np.ndarray  # bool (H, W)
    box: tuple[float, float, float, float]  # x0, x1, y0, y1 relative to the image
    mask_size: tuple[int, int] | None = None  # width, height of the mask file; None: the image's
    encode: Callable[[np.ndarray], bytes | None] | None = None  # None: an ordinary JPEG


def draw_object(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float, float]]:
    """A picture, the mask of its object and its relative box: 0.7 to 0.8 of the shorter side."""
    side = int(min(height, width) * rng.uniform(0.7, 0.8))
    top, left = (int(rng.integers(0, size - side)) for size in (height, width))
    canvas = np.zeros((height, width), dtype=np.uint8)
    if rng.random() < 0.5:
        canvas[top : top + side, left : left + side] = 1
    else:
        middle = (left + side // 2, top + side // 2)
        cv2.ellipse(canvas, middle, (side // 2, side // 2), 0, 0, 360, 1, thickness=-1)
    mask = canvas > 0
    shade = rng.integers(-20, 20, size=(height, width, 1))
    image = np.where(mask[..., None], OBJECT, BACKGROUND) + shade
    box = (left / width, (left + side) / width, top / height, (top + side) / height)
    return image.astype(np.uint8), mask, box


# --- encodings ------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def as_jpeg(image: np.ndarray) -> bytes:
    return encoded(Image.fromarray(image), "JPEG", quality=95)


def as_turned_jpeg(image: np.ndarray) -> bytes:
    """Stored lying on its side, with the EXIF tag that sets it upright."""
    exif = Image.Exif()
    exif[0x0112] = TURNED
    return encoded(Image.fromarray(np.rot90(image)), "JPEG", quality=95, exif=exif)


def as_grey_jpeg(image: np.ndarray) -> bytes:
    return encoded(Image.fromarray(image).convert("L"), "JPEG", quality=95)


def as_cmyk_jpeg(image: np.ndarray) -> bytes:
    return encoded(Image.fromarray(image).convert("CMYK"), "JPEG", quality=95)


def as_rgba_png(image: np.ndarray) -> bytes:
    return encoded(Image.fromarray(image).convert("RGBA"), "PNG")


def as_16_bit_png(image: np.ndarray) -> bytes:
    grey = np.asarray(Image.fromarray(image).convert("L"), dtype=np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


def as_cut_jpeg(image: np.ndarray) -> bytes:
    """The first half of the file."""
    whole = as_jpeg(image)
    return whole[: len(whole) // 2]


ODD_ENCODINGS: dict[str, Callable[[np.ndarray], bytes | None]] = {
    "turned": as_turned_jpeg,
    "grey": as_grey_jpeg,
    "cmyk": as_cmyk_jpeg,
    "rgba": as_rgba_png,
    "16bit": as_16_bit_png,
    "truncated": as_cut_jpeg,
    "missing": lambda image: None,
}
UNREADABLE = ("truncated", "missing")  # ids that no dataset can read
UNFIT_MASK = "wrong_shape"  # id of a readable picture whose mask is that of another


# --- the folder -----------------------------------------------------------------------------------


def make_open_images(
    root: Path | str,
    n: int = 8,
    oddities: bool = False,
    size: tuple[int, int] = (160, 200),
    seed: int = 0,
) -> Path:
    """Write an Open Images folder with boxes, masks and their index.

    Args:
        root: folder to make.
        n: clean pictures, with ids as in Open Images (16 hexadecimal digits).
        oddities: add one picture per oddity; its id is the oddity's name (see `odd_records`).
        size: height and width of the pictures; 160 and more keeps masks at 100 px and more.

    Returns:
        root.
    """
    root, rng = Path(root), np.random.default_rng(seed)
    records = [Record(f"{number:016x}", *draw_object(rng, *size)) for number in range(n)]
    if oddities:
        records += odd_records(rng, size)
    for folder in ("images/test", "segs/test", "annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    boxes = {}
    for record in records:
        write_image(root, record)
        boxes[mask_name(record)] = tight_box(write_mask(root, record))
    save_mask_boxes(mask_boxes_path(root), boxes)
    write_annotations(root / "annotations", records)
    return root


def odd_records(rng: np.random.Generator, size: tuple[int, int]) -> list[Record]:
    """One record per way in which real folders surprise."""
    height, width = size
    records = [
        Record(name, *draw_object(rng, *size), encode=encode)
        for name, encode in ODD_ENCODINGS.items()
    ]
    halved = Record(
        "small_mask", *draw_object(rng, *size), mask_size=(width * 19 // 20, height * 19 // 20)
    )
    doubled = Record("large_mask", *draw_object(rng, *size), mask_size=(width * 2, height * 2))
    unfit = Record(UNFIT_MASK, *draw_object(rng, *size), mask_size=(height * 2, width * 2))
    outside = Record("outside", *draw_object(rng, *size))
    outside.box = (-0.25, 0.5, 0.5, 1.25)
    empty, tiny, full = (
        Record(name, *draw_object(rng, *size)) for name in ("empty", "tiny", "full")
    )
    empty.box, tiny.box, full.box = (1.1, 1.4, 0, 1), (0.4, 0.5, 0.4, 0.5), (0, 1, 0, 1)
    return [*records, halved, doubled, unfit, outside, empty, tiny, full]


def mask_name(record: Record) -> str:
    return f"{record.image_id}_{CLASSES[0][0].strip('/').replace('/', '')}_0a1b2c3d.png"


def write_image(root: Path, record: Record) -> None:
    content = (record.encode or as_jpeg)(record.image)
    if content is not None:
        (root / "images" / "test" / f"{record.image_id}.jpg").write_bytes(content)


def write_mask(root: Path, record: Record) -> np.ndarray:
    """The mask file, 1 bit as in Open Images; returns what was written, bool (h, w)."""
    image = Image.fromarray(record.mask)
    if record.mask_size is not None:
        image = image.resize(record.mask_size, Image.Resampling.NEAREST)
    image.save(root / "segs" / "test" / mask_name(record))
    return np.asarray(image)


def write_annotations(folder: Path, records: list[Record]) -> None:
    label = CLASSES[0][0]
    boxes = [(r.image_id, "xclick", label, 1, *r.box, 0, 0, 0, 0, 0) for r in records]
    masks = [
        (mask_name(r), r.image_id, label, "0a1b2c3d", *r.box, "0.9", "0.1 0.2 0;0.3 0.4 1")
        for r in records
    ]
    write_csv(folder / "oidv6-class-descriptions.csv", ("LabelName", "DisplayName"), list(CLASSES))
    write_csv(folder / "test-annotations-bbox.csv", BOX_COLUMNS, boxes)
    write_csv(folder / "test-annotations-object-segmentation.csv", MASK_COLUMNS, masks)


def write_csv(path: Path, header: Sequence[str], rows: list[tuple]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def boxes_folder(root, rows):
    """Only the CSV of boxes, from (id, x0, x1, y0, y1)."""
    (root / "annotations").mkdir()
    lines = [(name, "xclick", "/m/0", 1, *box, 0, 0, 0, 0, 0) for name, *box in rows]
    write_csv(root / "annotations" / "test-annotations-bbox.csv", BOX_COLUMNS, lines)
    return root
