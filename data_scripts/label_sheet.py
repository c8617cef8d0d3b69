"""The contact sheet of a labelled pile of photos: examples of what was kept, and of what was
dropped for each reason."""

from collections import defaultdict
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_scripts.labelling import OVERLAP, UNREADABLE, Labelled, Thing
from elite.images import read_image, read_mask
from elite.masks import Box
from elite.wording import one_line

TILE, GAP, TEXT = 220, 14, 38  # side of a picture, space around it, height of what is under it
COLUMNS, KEPT_ROWS = 5, 3  # of the pictures that are kept; a reason for dropping has one row
HEADING, MARGIN = 34, 20
KEPT, DROPPED = (0, 158, 96), (205, 62, 36)
PAPER, MAT, INK, FAINT = "white", (240, 240, 240), (30, 30, 30), (110, 110, 110)
FADED = 0.55  # how far what is not kept goes towards the mat
SMALL, USUAL, LARGE = (ImageFont.load_default(size) for size in (12, 13, 18))


def draw_sheet(labelled: Sequence[Labelled], unreadable: int) -> Image.Image:
    """What was kept first, then each reason, the most frequent one first."""
    groups: dict[str, list[Labelled]] = defaultdict(list)
    for one in labelled:
        groups[one.dropped].append(one)
    kept = groups.pop("", [])
    objects = sum(len(one.kept) for one in kept)
    title = f"kept: {count(len(kept), 'photo')} with {count(objects, 'object')}"
    shown = [(title, KEPT, spread(kept, KEPT_ROWS * COLUMNS))]
    for reason, ones in sorted(groups.items(), key=lambda item: -len(item[1])):
        shown.append((f"{reason}: {count(len(ones), 'photo')}", DROPPED, spread(ones, COLUMNS)))
    if unreadable:
        shown.append((f"{UNREADABLE}: {count(unreadable, 'photo')}", DROPPED, []))
    rows = sum(-(-len(ones) // COLUMNS) for _, _, ones in shown)
    height = 2 * MARGIN + HEADING * len(shown) + rows * (TILE + TEXT + GAP)
    sheet = Image.new("RGB", (2 * MARGIN + COLUMNS * (TILE + GAP) - GAP, height), PAPER)
    top = MARGIN
    for title, colour, ones in shown:
        write_heading(sheet, top, title, colour)
        top += HEADING
        for number, one in enumerate(ones):
            row, column = divmod(number, COLUMNS)
            place = MARGIN + column * (TILE + GAP), top + row * (TILE + TEXT + GAP)
            sheet.paste(tile_of(one), place)
        top += -(-len(ones) // COLUMNS) * (TILE + TEXT + GAP)
    return sheet


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def spread(ones: Sequence[Labelled], most: int) -> list[Labelled]:
    """At most so many of them, from the first to the last."""
    numbers = np.linspace(0, len(ones) - 1, min(most, len(ones))).round().astype(int)
    return [ones[number] for number in numbers]


def write_heading(sheet: Image.Image, top: int, text: str, colour: tuple[int, int, int]) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((MARGIN, top + 5, MARGIN + 11, top + 16), colour)
    draw.text((MARGIN + 20, top), text, INK, LARGE)


# --- a photo --------------------------------------------------------------------------------------


def tile_of(one: Labelled) -> Image.Image:
    """The photo, what was found in it, its name, and what is to be said of it."""
    tile = Image.new("RGB", (TILE, TILE + TEXT), PAPER)
    tile.paste(MAT, (0, 0, TILE, TILE))
    if one.twin:
        half = TILE // 2 - 1
        for left, photo in ((0, one.photo), (TILE - half, one.twin)):
            picture = fitted(read_image(photo.path), (half, TILE))
            picture = faded(picture) if photo is one.photo else picture
            tile.paste(picture, (left, (TILE - picture.height) // 2))
    else:
        picture = picture_of(one)
        tile.paste(picture, ((TILE - picture.width) // 2, (TILE - picture.height) // 2))
    draw = ImageDraw.Draw(tile)
    draw.text((0, TILE + 4), shortened(one.photo.name, TILE, USUAL), INK, USUAL)
    draw.text((0, TILE + 20), shortened(said_of(one), TILE, SMALL), FAINT, SMALL)
    return tile


def said_of(one: Labelled) -> str:
    height, width = one.photo.size
    if one.twin:
        bits = (one.photo.hash ^ one.twin.hash).bit_count()
        return f"as {one.twin.name}, {bits} of 64 bits differ"
    return f"{width} x {height}"


def fitted(image: np.ndarray, most: tuple[int, int]) -> Image.Image:
    picture = Image.fromarray(image)
    picture.thumbnail(most, Image.Resampling.LANCZOS)
    return picture


def picture_of(one: Labelled) -> Image.Image:
    """The photo with what was found on it; boxes that overlap a better one would hide that."""
    picture = fitted(read_image(one.photo.path), (TILE, TILE))
    picture = faded(picture) if one.dropped else lit(picture, one.kept)
    scale = picture.width / one.photo.size[1]
    draw = ImageDraw.Draw(picture)
    for thing in reversed(one.things):  # the best on top
        if thing.dropped != OVERLAP:
            draw_box(draw, thing, scale, picture.size)
    return picture


def faded(picture: Image.Image) -> Image.Image:
    return Image.blend(picture, Image.new("RGB", picture.size, MAT), FADED)


def lit(picture: Image.Image, things: Sequence[Thing]) -> Image.Image:
    """The picture faded but for objects, with the borders of their masks."""
    pixels, around = np.asarray(picture), np.array(faded(picture))
    masks = [read_mask(thing.mask_path).astype(np.uint8) for thing in things if thing.mask_path]
    for mask in masks:
        small = cv2.resize(mask, picture.size, interpolation=cv2.INTER_AREA)
        around[small > 0] = pixels[small > 0]
        contours, _ = cv2.findContours(small, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(around, contours, -1, KEPT, 2)
    return Image.fromarray(around)


def draw_box(draw: ImageDraw.ImageDraw, thing: Thing, scale: float, size: tuple[int, int]) -> None:
    """The box of what was found, with its word and score or why it is dropped."""
    box, colour = scaled(thing.found.box, scale, size), DROPPED if thing.dropped else KEPT
    draw.rectangle(box, outline=colour)
    text = f"{thing.found.word} {thing.found.score:.2f}"
    text = f"{text}: {thing.dropped}" if thing.dropped else text
    text = shortened(text, size[0] - 8, SMALL)
    left = max(0, min(box[0], int(size[0] - SMALL.getlength(text) - 8)))
    top = box[1] - 15 if box[1] >= 15 else box[1]  # above it where there is room
    draw.rectangle((left, top, left + SMALL.getlength(text) + 7, top + 15), colour)
    draw.text((left + 4, top), text, "white", SMALL)


def scaled(box: Box, scale: float, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom pixel of a box in the tile."""
    left, top = round(box.left * scale), round(box.top * scale)
    right, bottom = round(box.right * scale) - 1, round(box.bottom * scale) - 1
    return left, top, max(left, min(right, size[0] - 1)), max(top, min(bottom, size[1] - 1))


def shortened(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """The text without its middle where it is wider."""
    text = one_line(text)
    while len(text) > 1 and font.getlength(text) > width:
        half = (len(text) - 1) // 2
        text = text[:half].rstrip("…") + "…" + text[len(text) - half + 1 :].lstrip("…")
    return text
