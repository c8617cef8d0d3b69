"""Draws to files: a folder of image and mask pairs (the release's files, lossless PNGs with
metadata), concept files or prompts, and one contact sheet of each."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from PIL import Image, PngImagePlugin
from torch import Tensor

from elite.concept import Concept, ConceptFolder
from elite.data import PairFolder
from elite.defaults import DEFAULT_STEPS, GUIDANCE_SCALE, LAMBDA, PLACEHOLDER
from elite.encoding import Entry, batches, columns, progress_bar, read_entries, sheet_rows
from elite.files import check_apart, check_writable, write_atomically
from elite.hardware import decodes_in_tiles
from elite.images import read_image
from elite.loading import side_in_pixels
from elite.named_concepts import Words
from elite.pipeline import Elite, initial_noise, make_generators
from elite.sheets import SHEET_COLUMNS, SHEET_ROWS, fit_tile, tile_rows
from elite.speed import EXACT, Speed
from elite.wording import note

REPLACED = (
    "{folder}: another run has replaced {count} of these pictures meanwhile; draw again, each run "
    "with its own --suffix or --output_dir"
)
WRITES_WAITING = 64  # pictures kept in memory until they are written
# Metadata of some pictures, which others must not have.
OPTIONAL = ("lora", "negative_prompt", "speed", "tiled", "weights")
REGION = "region of "  # and the concept's word: metadata of pictures in which it has one
PNG_END = bytes.fromhex("00000000 49454E44 AE426082")
OnStep = Callable[[Tensor], None]  # is given the latents, (B, C, h, w)
VERSIONS = {name: version(name) for name in ("diffusers", "transformers", "torch")}


@dataclass(frozen=True)
class Drawing:
    """How the pictures of one run are drawn with ELITE."""

    words: Words = 0
    lambda_: float = LAMBDA
    placeholder_token: str = PLACEHOLDER
    resolution: int | None = None  # side in pixels; None means what the model draws
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = GUIDANCE_SCALE
    negative_prompt: str | None = None  # of every picture; None means an empty one, in SDXL zeros
    speed: Speed = EXACT

    def __call__(
        self,
        pipe: Elite,
        prompts: Sequence[str],
        concepts: Sequence[Concept],
        seeds: Sequence[int],
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """One picture per prompt, concept and seed; `on_step` is called after each denoising step
        with the latents. Raises ValueError where a prompt does not fit, and what `on_step`
        raises."""
        word = self.placeholder_token
        named, weights = {word: Concept.stack(list(concepts))}, {word: self.lambda_}
        return self.with_concepts(pipe, named, weights, {}, prompts, seeds, on_step)

    def with_concepts(
        self,
        pipe: Elite,
        concepts: Mapping[str, Concept],
        weights: Mapping[str, float],
        regions: Mapping[str, np.ndarray],
        prompts: Sequence[str],
        seeds: Sequence[int],
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """One picture per prompt and seed, with one or several concepts in each.

        Args:
            concepts: by placeholder, one row each for all pictures or one per picture.
            weights: lambda of each concept.
            regions: as for the pipeline.
            on_step: as for a call.
        """

        def step_ended(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict[str, Any]:
            if on_step is not None:
                on_step(tensors["latents"])
            return {}

        def needed(word: str, concept: Concept) -> Concept:
            is_unused = weights.get(word) == 0  # the local branch would add zeros
            return replace(concept, feature_tokens=None) if is_unused else concept

        return pipe(
            list(prompts),
            concepts={word: needed(word, concept) for word, concept in concepts.items()},
            lambda_=weights,
            words=self.words,
            regions=regions,
            seed=list(seeds),
            height=self.resolution,
            width=self.resolution,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            speed=self.speed,
            callback_on_step_end=step_ended,
        ).images

    def metadata(self, pipe: Elite) -> dict[str, str]:
        """What a PNG says of how it was drawn: all that it depends on besides prompt and seed."""
        return {
            "fingerprint": pipe.fingerprint,
            "placeholder_token": self.placeholder_token,
            "lambda": str(self.lambda_),
            "words": str(self.words),
            "resolution": str(self.resolution or pipe.resolution),
            "num_inference_steps": str(self.num_inference_steps),
            "guidance_scale": str(self.guidance_scale),
            "dtype": str(pipe.unet.dtype),
            **({"tiled": "True"} if decodes_in_tiles(pipe, self.resolution) else {}),
            **({} if self.negative_prompt is None else {"negative_prompt": self.negative_prompt}),
            **({"speed": str(self.speed)} if self.speed != EXACT else {}),
            **pipe.named_weights,
        }


def metadata_of_several(
    concepts: Mapping[str, Concept], weights: Mapping[str, float], regions: Mapping[str, str]
) -> dict[str, str]:
    """What a PNG says of several concepts in it, besides `Drawing.metadata`; regions by their
    names."""
    metadata = {f"concept {word}": concept.digest for word, concept in concepts.items()}
    metadata |= {f"{REGION}{word}": region for word, region in regions.items()}
    metadata["placeholder_token"] = ", ".join(concepts)
    lambdas = ", ".join(f"{word} {weight:g}" for word, weight in weights.items())
    return metadata | {"lambda": lambdas}


def stem_of(index: int, seed: int) -> str:
    """A picture's file name in the release."""
    return f"{index:05d}_{seed:05d}"


def _tell_of_replaced(folder: Path, stems: Iterable[str]) -> None:
    """Notes pictures of a folder that are drawn anew."""
    if others := sum((folder / f"{stem}.png").exists() for stem in stems):
        note(
            f"{folder}: pictures of another prompt or setting are replaced ({others}); give "
            "another --suffix or --output_dir to keep them"
        )


def _tell_of_others(folder: Path, count: int, what: str) -> None:
    """Notes pictures of a folder whose numbers are beyond those that are drawn now."""
    stems = (path.stem.partition("_")[0] for path in folder.glob("*_*.png"))
    if beyond := sum(int(stem) >= count for stem in stems if stem.isdecimal()):
        note(
            f"{folder}: {beyond} pictures of other {what} stay there, but not in grid.png; give "
            "another --output_dir to keep them apart"
        )


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    index: int
    seed: int
    name: str  # of the object
    metadata: Mapping[str, str] = field(repr=False)  # all that the picture depends on

    @property
    def stem(self) -> str:
        return stem_of(self.index, self.seed)


def is_drawn(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether the picture is there, whole, and its PNG says all of this metadata, and nothing else
    that it depends on."""
    said = {png_key(key): value for key, value in metadata.items()}
    try:
        with Image.open(path) as picture:
            picture.verify()
            is_whole = path.read_bytes().endswith(PNG_END)  # `verify` stops a little before
            beside = {k for k in picture.info if k in OPTIONAL or str(k).startswith(REGION)}
            return is_whole and beside <= said.keys() and said.items() <= picture.info.items()
    except (OSError, SyntaxError, ValueError):
        return False


def job_batches(
    entries: Iterable[Entry], jobs: Mapping[int, Sequence[Job]], size: int
) -> Iterator[list[tuple[Job, Entry]]]:
    """The jobs of each object beside its concept, `size` at a time; in a batch all concepts are of
    as many pictures, since their feature tokens are stacked."""
    work = ((job, entry) for entry in entries for job in jobs[entry.index])
    for _, alike in groupby(work, lambda pair: pair[1].concept.num_tokens):
        yield from batches(alike, size)


def draw_folder(
    pipe: Elite,
    folder: PairFolder | ConceptFolder,
    output_dir: Path,
    drawing: Drawing,
    *,
    prompt: str,
    seeds: Sequence[int],
    indices: Sequence[int] | None = None,
    batch_size: int = 1,
    skip_existing: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Draws each pair or concept file once per seed; every process of `accelerate launch` takes its
    share of them.

    Writes per picture `INDEX_SEED.png` (settings in its metadata), for pairs `INDEX_SEED.jpg` too
    (generated | input), and at last `grid.png`: name, for pairs input and cut-out, generated.
    Pairs are read ahead of the drawing and files written behind it.

    Args:
        prompt: with the placeholder in it.
        indices: pairs or concepts to draw; None draws all.
        skip_existing: keep pictures whose PNGs are whole and say that they are of this prompt, seed
            and drawing, of these mappers, of the same input and of this metadata.
        metadata: what else a picture depends on; for the PNGs too.

    Returns:
        One line per pair or concept that could not be read, from all processes.

    Raises:
        ValueError: the prompt does not fit, or the disk is full.
    """
    if isinstance(folder, PairFolder):
        check_apart(output_dir, folder.root)
    check_writable(output_dir)
    state = PartialState()
    indices = range(len(folder)) if indices is None else indices
    share = indices[state.process_index :: state.num_processes]
    failures: list[str] = []
    settings = {"prompt": prompt, **drawing.metadata(pipe), **(metadata or {})}

    @cache
    def jobs_of(index: int) -> list[Job]:
        source = {**settings, "source": folder.digest(index)}
        name = folder.name(index)
        return [Job(index, seed, name, {**source, "seed": str(seed)}) for seed in seeds]

    def is_there(job: Job) -> bool:
        path = output_dir / f"{job.stem}.png"
        return is_drawn(path, job.metadata) and (of_files or path.with_suffix(".jpg").exists())

    of_files = isinstance(folder, ConceptFolder)
    mine = jobs = [job for index in share for job in jobs_of(index)]
    if skip_existing:
        jobs = [job for job in mine if not is_there(job)]
        _tell_of_replaced(output_dir, [job.stem for job in jobs])
    _tell_of_others(output_dir, len(folder), "objects")
    left = {index: list(group) for index, group in groupby(jobs, lambda job: job.index)}
    progress = progress_bar("draw", "picture", len(mine), len(jobs))
    with ThreadPoolExecutor(max_workers=2) as pool, progress as bar:

        def failed(message: str) -> None:
            failures.append(message)
            bar.update(len(seeds))

        entries = read_entries(pool, pipe, folder, list(left), batch_size, failed)
        writing: deque[Future] = deque()
        drawn: list[Job] = []
        for batch in job_batches(entries, left, batch_size):
            concepts = [entry.concept for _, entry in batch]
            its_seeds = [job.seed for job, _ in batch]
            pictures = drawing(pipe, [prompt] * len(batch), concepts, its_seeds)
            while len(writing) > WRITES_WAITING:
                writing.popleft().result()
            for (job, entry), picture in zip(batch, pictures, strict=True):
                drawn.append(job)
                writing.append(pool.submit(write_picture, output_dir, job, picture, entry.image))
            bar.update(len(batch))
        for written in writing:
            written.result()
    if lost := sum(not is_there(job) for job in drawn):
        failures.append(REPLACED.format(folder=output_dir, count=lost))
    failures = gather_object(failures)
    if state.is_main_process:
        title = f"{prompt}   lambda {drawing.lambda_}"
        rows = {index: jobs_of(index)[:SHEET_COLUMNS] for index in indices[:SHEET_ROWS]}
        sheet = contact_sheet(folder, rows, output_dir, title)
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
    num_inference_steps: int = DEFAULT_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    negative_prompt: str | None = None,
) -> list[Image.Image]:
    """A stock pipeline's pictures, one seed per prompt.

    Args:
        resolution: side in pixels; None means what the model draws.
    """
    side = resolution or side_in_pixels(pipe.unet, pipe.vae)
    generators = make_generators(seeds)
    return pipe(
        list(prompts),
        generator=generators,
        latents=initial_noise(pipe, generators, side, side),
        height=side,
        width=side,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
    ).images


def draw_prompt_grid(
    draw: Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    output_dir: Path,
    *,
    batch_size: int = 1,
    skip_existing: bool = False,
    metadata: Mapping[str, object],
) -> None:
    """Each prompt once per seed: `PROMPT_SEED.png`, numbered from 0, and `grid.png` of all.

    Args:
        draw: gives one picture per prompt and seed.
        skip_existing: keep pictures whose PNGs are whole and have this metadata.
        metadata: for the PNGs, all that a picture depends on besides prompt and seed; what is None
            is left out.
    """
    settings = {key: str(value) for key, value in metadata.items() if value is not None}
    check_writable(output_dir)
    _tell_of_others(output_dir, len(prompts), "prompts")
    jobs = [
        [Job(number, seed, "", {"prompt": prompt, "seed": str(seed), **settings}) for seed in seeds]
        for number, prompt in enumerate(prompts)
    ]

    def is_there(job: Job) -> bool:
        return is_drawn(output_dir / f"{job.stem}.png", job.metadata)

    left = [[job for job in row if not (skip_existing and is_there(job))] for row in jobs]
    if skip_existing:
        _tell_of_replaced(output_dir, [job.stem for row in left for job in row])
    rows: list[list[Image.Image]] = []
    with progress_bar("draw", "picture", sum(map(len, jobs)), sum(map(len, left))) as progress:
        for prompt, row, its_left in zip(prompts, jobs, left, strict=True):
            for batch in batches(iter(its_left), batch_size):
                pictures = draw([prompt] * len(batch), [job.seed for job in batch])
                for job, picture in zip(batch, pictures, strict=True):
                    write_png(output_dir / f"{job.stem}.png", picture, {**job.metadata, **VERSIONS})
                progress.update(len(batch))
            if len(rows) < SHEET_ROWS:
                shown = [read_image(output_dir / f"{job.stem}.png") for job in row[:SHEET_COLUMNS]]
                rows.append([fit_tile(Image.fromarray(picture)) for picture in shown])
    if lost := sum(not is_there(job) for row in jobs for job in row):
        raise ValueError(REPLACED.format(folder=output_dir, count=lost))
    names = [f"seed {seed}" for seed in seeds[:SHEET_COLUMNS]]
    sheet = tile_rows(rows, names, "; ".join(prompts))
    write_atomically(output_dir / "grid.png", sheet.save)


def write_png(path: Path, picture: Image.Image, metadata: Mapping[str, str]) -> None:
    """Writes a lossless PNG that says this of itself."""
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        info.add_text(png_key(key), value)
    write_atomically(path, partial(picture.save, pnginfo=info))


def png_key(name: str) -> str:
    """The keyword of a PNG for a name: Latin-1 of at most 79 bytes, in which other letters stand as
    their numbers and what is longer is cut."""
    return name.encode("latin-1", "backslashreplace")[:79].decode("latin-1")


def write_picture(folder: Path, job: Job, picture: Image.Image, image: np.ndarray | None) -> None:
    """The JPEG of the picture and the input image, uint8 (H, W, 3), where there is one; then the
    PNG, which so tells that both are there."""
    both = folder / f"{job.stem}.jpg"
    if image is None:
        both.unlink(missing_ok=True)  # of an earlier run on pairs
    else:
        seen = Image.fromarray(image).resize(picture.size, Image.Resampling.BICUBIC)
        side_by_side = Image.fromarray(np.hstack([np.asarray(x) for x in (picture, seen)]))
        write_atomically(both, lambda path: side_by_side.save(path, quality=95, subsampling=0))
    metadata = {**job.metadata, "object": job.name, **VERSIONS}
    write_png(folder / f"{job.stem}.png", picture, metadata)


def contact_sheet(
    folder: PairFolder | ConceptFolder,
    jobs: Mapping[int, Sequence[Job]],
    output_dir: Path,
    title: str,
) -> Image.Image | None:
    """Pairs or concepts by index, with the pictures of these jobs that are there; None if there are
    none. Of an object that failed, pictures of other settings may be."""

    drawn: dict[int, list[Path]] = {}  # where there are any
    for index, of_object in jobs.items():
        paths = [(output_dir / f"{job.stem}.png", job.metadata) for job in of_object]
        if there := [path for path, metadata in paths if is_drawn(path, metadata)]:
            drawn[index] = there
    rows = [
        [*row, *(fit_tile(Image.fromarray(read_image(path))) for path in drawn[index])]
        for index, row in sheet_rows(folder, list(drawn))
    ]
    seeds = next(iter(jobs.values()), ())
    names = [*columns(folder), *(f"seed {job.seed}" for job in seeds)]
    return tile_rows(rows, names, title) if rows else None
