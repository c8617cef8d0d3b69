"""Image and mask files to arrays, and arrays to the views the networks see: the one preprocessing
path of ELITE.

Scripts, app, training data and previews all go through here.
"""

import io
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from elite.files import is_file

ImageLike = Image.Image | np.ndarray | Path | str
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ENDINGS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),  # with pillow-heif
}
with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
Image.init()
FORMATS = [name for name in ENDINGS if name in Image.OPEN]  # no other decoder is handed a file
MAX_PIXELS = 64_000_000  # of a file that nobody bounds tighter; its arrays stay below 2 GB
# Relative difference of aspect ratios up to which a mask is resized to its image.
SAME_ASPECT = 0.02


def _open(
    path: Path | str, max_pixels: int | None = None, content: bytes | None = None
) -> Image.Image:
    """The decoded picture, upright (EXIF rotation applied)."""
    if content is None and not is_file(path):  # a pipe would block, a device never end
        raise ValueError(f"{path}: no such file; expected an image")
    most = max_pixels or MAX_PIXELS
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height <= most:
                image.load()
                return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a readable image; save it again as PNG or JPEG") from None
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(
            f"{path}: not a readable image ({error}); save it again as PNG or JPEG"
        ) from None
    raise ValueError(
        f"{path}: {image.width} x {image.height} is more than {most / 1e6:g} million pixels; "
        "make it smaller"
    )


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any PIL mode to uint8 (H, W, 3): grey of 16 bits or from 0 to 1 is scaled, transparency lies
    on white. Raises ValueError for numbers that are no grey."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        largest = values.max(initial=0)  # NaN where one is
        if not largest <= 65535:
            raise ValueError(f"grey values up to {largest:g}; save it with 8 or 16 bits")
        tops = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        top = next(top for top in tops if largest <= top)
        rows = [np.clip(row / top * 255, 0, 255).round().astype(np.uint8) for row in values]
        return np.repeat(np.stack(rows)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def to_mask(image: Image.Image) -> np.ndarray:
    """Any PIL mode to bool (H, W): every pixel that is neither black nor fully transparent is
    object; of a cut-out, whose alpha varies, every pixel that is not fully transparent."""
    if image.mode == "P" or image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        alpha = rgba[..., 3]
        if alpha.min(initial=255) < alpha.max(initial=0):
            return alpha > 0
        return np.any(rgba[..., :3] > 0, axis=2) & (alpha > 0)
    if image.mode in ("CMYK", "YCbCr", "HSV"):  # where black is not all zeros
        image = image.convert("RGB")
    values = np.asarray(image)
    return np.any(values != 0, axis=2) if values.ndim == 3 else values != 0


def read_image(
    path: Path | str, max_pixels: int | None = None, content: bytes | None = None
) -> np.ndarray:
    """RGB picture, uint8 (H, W, 3), upright.

    Args:
        max_pixels: a file of more is not decoded; None means MAX_PIXELS.
        content: the bytes of the file, where it lies in another one; `path` then only names it.

    Raises:
        ValueError: it cannot be read, or has too many pixels; the message names it.
    """
    image = _open(path, max_pixels, content)
    try:
        return to_rgb(image)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_mask(
    path: Path | str, max_pixels: int | None = None, content: bytes | None = None
) -> np.ndarray:
    """Object mask, bool (H, W), upright. Arguments and errors as those of `read_image`."""
    return to_mask(_open(path, max_pixels, content))


def as_image(image: ImageLike) -> np.ndarray:
    """A file, a PIL image or such an array to uint8 (H, W, 3), upright. Raises ValueError where it
    is none."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(ImageOps.exif_transpose(image))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,) or not pixels.size:
        raise ValueError(
            f"image is {pixels.dtype} of shape {pixels.shape}; expected a path, a PIL image, or "
            "uint8 of shape (H, W, 3) in RGB"
        )
    return pixels


def as_mask(mask: ImageLike, name: str = "mask") -> np.ndarray:
    """A file, a PIL image or an array, (H, W) or (H, W, 3), to bool (H, W), upright: all that is
    not zero is object. Raises ValueError, which begins with `name`, where it is none."""
    if isinstance(mask, str | Path):
        return read_mask(mask)
    if isinstance(mask, Image.Image):
        return to_mask(ImageOps.exif_transpose(mask))
    values = np.asarray(mask)
    is_shaped = values.ndim > 1 and values.shape[2:] in ((), (1,), (3,)) and values.size
    if values.dtype.kind not in "biuf" or not is_shaped:
        raise ValueError(
            f"{name} is {values.dtype} of shape {values.shape}; expected a path, a PIL image, or "
            "numbers of shape (H, W)"
        )
    return np.any((values != 0).reshape(*values.shape[:2], -1), axis=2)


def fit_mask(mask: np.ndarray, image: np.ndarray, name: str = "mask") -> np.ndarray:
    """The mask at the image's size.

    A mask of the same aspect ratio is resized (nearest neighbour); any other shape, or a mask
    without a single object pixel, is a ValueError that begins with `name`.
    """
    (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
    if (mask_height, mask_width) != (height, width):
        if abs(mask_width * height / (mask_height * width) - 1) > SAME_ASPECT:
            raise ValueError(
                f"{name}: mask is {mask_width} x {mask_height}, its image {width} x {height}; "
                "draw the mask on the image itself"
            )
        pixels = mask.astype(np.uint8)
        mask = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_NEAREST) > 0
    if not mask.any():
        raise ValueError(f"{name}: mask has no object pixel; paint the object in white on black")
    return mask


def doubt(mask: np.ndarray) -> str:
    """What looks wrong with a mask, bool (H, W), that a person has made; else nothing."""
    if mask.all():
        return "every pixel is object; paint what is not object black"
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    if border.mean() > 0.9:
        return "the object is all around the picture's border; if the mask is inverted, swap it"
    return ""


def normalise(image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W), `(x / 255 - mean) / std` per channel."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def to_pixels(image: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    return normalise(image, (0.5,) * 3, (0.5,) * 3)


def from_pixels(pixels: Tensor) -> np.ndarray:
    """`to_pixels` backwards, for one or several: (..., 3, H, W) to uint8 (..., H, W, 3)."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return values.movedim(-3, -1).cpu().numpy()


def to_clip_pixels(image: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W) with CLIP's mean and deviation."""
    return normalise(image, CLIP_MEAN, CLIP_STD)


def from_clip_pixels(clip_pixels: Tensor) -> np.ndarray:
    """`to_clip_pixels` backwards: float32 (3, H, W) to uint8 (H, W, 3)."""
    pixels = clip_pixels.permute(1, 2, 0) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bicubic with antialiasing (Pillow's), uint8 in and out."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def cut_out(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The object alone on black: image * mask, uint8 (H, W, 3)."""
    return image * mask[..., None].astype(np.uint8)


def patch_mask(masks: Tensor, grid: int) -> Tensor:
    """m of the paper: masks (B, 1, H, W), bool or float, to float32 (B, grid * grid, 1); the
    top-left pixel of each cell decides."""
    cells = torch.nn.functional.interpolate(masks.float(), size=(grid, grid), mode="nearest")
    return cells.flatten(2).transpose(1, 2)


def object_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the object of a mask, (H, W), that is not empty."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def object_views(
    image: np.ndarray, mask: np.ndarray, size: int, grid: int, crop_to_object: bool = False
) -> dict[str, Tensor]:
    """The views ELITE encodes a concept from (paper section 3).

    Args:
        image: uint8 (H, W, 3).
        mask: bool (H, W), not empty.
        size: side of the CLIP input in pixels.
        grid: side of the CLIP patch grid.
        crop_to_object: whether the box of the object is seen alone, as in training; see
            `mappers.Mapper`.

    Returns:
        `clip_pixels` and `object_pixels`, float32 (3, size, size), the picture and the object alone
        on black, both CLIP-normalised; `patch_mask`, float32 (grid * grid, 1).
    """
    if crop_to_object:
        box = object_box(mask)
        image, mask = image[box], mask[box]
    return {
        "clip_pixels": to_clip_pixels(resize(image, size, size)),
        "object_pixels": to_clip_pixels(resize(cut_out(image, mask), size, size)),
        "patch_mask": patch_mask(torch.as_tensor(mask)[None, None], grid)[0],
    }
