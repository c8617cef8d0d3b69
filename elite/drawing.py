"""Draws to files: a folder of image and mask pairs (the release's files, lossless PNGs with
metadata) or prompts, and one contact sheet of each."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, PngImagePlugin
from tqdm import tqdm

from elite.concept import Concept
from elite.data import PairFolder
from elite.files import write_atomically
from elite.images import cut_out
from elite.loading import side_in_pixels
from elite.pipeline import ElitePipeline, Words, initial_noise

T = TypeVar("T")
TILE = 160  # side of a contact sheet's pictures in pixels
HEADER = 18
SHEET_ROWS = 48  # a longer sheet is no longer looked at


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    index: int
    seed: int
    image: np.ndarray = field(repr=False)
    concept: Concept = field(repr=False)

    @property
    def stem(self) -> str:
        """File name of the release: index and seed."""
        return f"{self.index:05d}_{self.seed:05d}"


def draw_folder(
    pipe: ElitePipeline,
    pairs: PairFolder,
    output_dir: Path,
    *,
    prompt: str,
    placeholder_token: str,
    seeds: Sequence[int],
    words: Words = 0,
    lambda_: float = 0.8,
    indices: Sequence[int] | None = None,
    batch_size: int = 1,
    resolution: int | None = None,
    num_inference_steps: int = 100,
    guidance_scale: float = 5.0,
    metadata: dict[str, str] | None = None,
) -> list[str]:
    """Draws each pair once per seed; every process of `accelerate launch` takes its share of the
    pairs.

    Writes per picture `INDEX_SEED.jpg` (generated | input) and `INDEX_SEED.png` (generated alone,
    settings in its metadata), and at last `grid.png`: input, cut-out, generated.

    Args:
        indices: pairs to draw; None draws all.
        metadata: more text for the PNGs.

    Returns:
        One line per pair that could not be read, from all processes.

    Raises:
        ValueError: the prompt does not fit, or the disk is full.
    """
    state = PartialState()
    indices = range(len(pairs)) if indices is None else indices
    share = indices[state.process_index :: state.num_processes]
    failures: list[str] = []
    settings = {
        "prompt": prompt,
        "lambda": str(lambda_),
        "words": str(words),
        "num_inference_steps": str(num_inference_steps),
        "guidance_scale": str(guidance_scale),
        **(metadata or {}),
        **{name: version(name) for name in ("diffusers", "transformers", "torch")},
    }
    bar = tqdm(
        total=len(share) * len(seeds),
        desc="draw",
        unit="picture",
        disable=not state.is_main_process,
    )
    with bar as progress:  # ends its line before an error is told
        for batch in _batches(_jobs(pipe, pairs, share, seeds, failures, progress), batch_size):
            pictures = pipe(
                [prompt] * len(batch),
                concept=[job.concept for job in batch],
                lambda_=lambda_,
                words=words,
                placeholder_token=placeholder_token,
                seed=[job.seed for job in batch],
                height=resolution,
                width=resolution,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            ).images
            for job, picture in zip(batch, pictures, strict=True):
                write_picture(output_dir, job, picture, settings)
            progress.update(len(batch))
    failures = gather_object(failures)
    if state.is_main_process:
        sheet = contact_sheet(pairs, indices, seeds, output_dir, f"{prompt}   lambda {lambda_}")
        if sheet is not None:
            write_atomically(output_dir / "grid.png", sheet.save)
    state.wait_for_everyone()
    return failures


def draw_prompts(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    resolution: int | None = None,
    num_inference_steps: int = 100,
    guidance_scale: float = 5.0,
) -> list[Image.Image]:
    """A stock pipeline's pictures, one seed per prompt.

    Args:
        resolution: side in pixels; None means what the model draws.
    """
    side = resolution or side_in_pixels(pipe.unet, pipe.vae)
    return pipe(
        list(prompts),
        latents=initial_noise(pipe, seeds, side, side),
        height=side,
        width=side,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    ).images


def draw_prompt_grid(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    output_dir: Path,
    *,
    batch_size: int = 1,
    **options: Any,  # as for `draw_prompts`
) -> None:
    """Each prompt once per seed: `PROMPT_SEED.png`, numbered from 0, and `grid.png` of all."""
    rows: list[list[Image.Image]] = []
    with tqdm(total=len(prompts) * len(seeds), desc="draw", unit="picture") as progress:
        for number, prompt in enumerate(prompts):
            row: list[Image.Image] = []
            for batch in _batches(iter(seeds), batch_size):
                pictures = draw_prompts(pipe, [prompt] * len(batch), batch, **options)
                for seed, picture in zip(batch, pictures, strict=True):
                    info = png_text({"prompt": prompt, "seed": str(seed)})
                    path = output_dir / f"{number:05d}_{seed:05d}.png"
                    write_atomically(path, partial(picture.save, pnginfo=info))
                row += pictures
                progress.update(len(batch))
            rows.append(row)
    sheet = tile_rows(rows[:SHEET_ROWS], [f"seed {seed}" for seed in seeds], "; ".join(prompts))
    write_atomically(output_dir / "grid.png", sheet.save)


def png_text(values: Mapping[str, str]) -> PngImagePlugin.PngInfo:
    """What a picture's PNG says of how it was made."""
    info = PngImagePlugin.PngInfo()
    for key, value in values.items():
        info.add_text(key, value)
    return info


def _jobs(
    pipe: ElitePipeline,
    pairs: PairFolder,
    share: Sequence[int],
    seeds: Sequence[int],
    failures: list[str],
    progress: tqdm,
) -> Iterator[Job]:
    """Reads and encodes each pair once; unreadable ones go to `failures`."""
    for index in share:
        try:
            image, mask = pairs.read(index)
        except ValueError as error:
            failures.append(str(error))
            progress.update(len(seeds))
            continue
        concept = pipe.encode_concept(image, mask)
        yield from (Job(index, seed, image, concept) for seed in seeds)


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def write_picture(folder: Path, job: Job, picture: Image.Image, settings: dict[str, str]) -> None:
    """The two files of one picture."""
    info = png_text({**settings, "seed": str(job.seed)})
    write_atomically(folder / f"{job.stem}.png", partial(picture.save, pnginfo=info))
    side_by_side = Image.new("RGB", (2 * picture.width, picture.height))
    side_by_side.paste(picture, (0, 0))
    shown = Image.fromarray(job.image).resize(picture.size, Image.Resampling.BICUBIC)
    side_by_side.paste(shown, (picture.width, 0))
    write_atomically(
        folder / f"{job.stem}.jpg", lambda path: side_by_side.save(path, quality=95, subsampling=0)
    )


def contact_sheet(
    pairs: PairFolder, indices: Sequence[int], seeds: Sequence[int], folder: Path, title: str
) -> Image.Image | None:
    """Input, cut-out and pictures of the first pairs that were drawn; None if there is none."""
    rows = []
    for index in indices[:SHEET_ROWS]:
        drawn = [folder / f"{index:05d}_{seed:05d}.png" for seed in seeds]
        drawn = [path for path in drawn if path.exists()]
        if not drawn:
            continue
        try:
            image, mask = pairs.read(index)
        except ValueError:
            continue
        row = [Image.fromarray(image), Image.fromarray(cut_out(image, mask))]
        for path in drawn:
            with Image.open(path) as picture:
                row.append(picture.convert("RGB"))
        rows.append(row)
    return (
        tile_rows(rows, ["input", "object", *(f"seed {seed}" for seed in seeds)], title)
        if rows
        else None
    )


def tile_rows(rows: list[list[Image.Image]], columns: list[str], title: str = "") -> Image.Image:
    """Rows of pictures as one sheet with a title and column names; small pictures keep their pixels
    visible."""
    top = HEADER * (2 if title else 1)
    sheet = Image.new("RGB", (len(columns) * TILE, top + len(rows) * TILE), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), title, fill="black")
    for i, name in enumerate(columns):
        draw.text((i * TILE + 4, top - HEADER + 3), name, fill="black")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(fit_tile(picture), (x * TILE, top + y * TILE))
    return sheet


def fit_tile(picture: Image.Image) -> Image.Image:
    """The picture as a TILE x TILE square, letterboxed."""
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    tile = Image.new("RGB", (TILE, TILE), "white")
    tile.paste(picture.resize(size, method), ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile
