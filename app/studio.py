"""One pipeline for several people at once: look at an object, check prompts, encode, draw. Keeps
nothing of anybody between calls."""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image
from torch import Tensor

from app.marking import folder_hidden
from elite.concept import Concept, ConceptFolder
from elite.defaults import DEFAULT_SAMPLER, DEFAULT_STEPS, GUIDANCE_SCALE, LAMBDA, PLACEHOLDER
from elite.drawing import VERSIONS, Drawing, OnStep, metadata_of_several, write_png
from elite.encoding import batches
from elite.images import from_clip_pixels
from elite.loading import SCHEDULERS, make_scheduler
from elite.named_concepts import Words
from elite.pipeline import Elite
from elite.previews import Preview
from elite.sheets import tile_rows
from elite.speed import speed_of
from elite.text import read_prompt, tokenize
from elite.wording import note

MAX_PROMPTS, MAX_PICTURES, MAX_STEPS, MAX_LAMBDA, MAX_GUIDANCE = 8, 32, 150, 1.5, 20.0
MAX_SEED = 2**31 - 1
UNREAD = np.array((255, 0, 255), np.uint8)  # colour of patches the local branch does not read
HALVES = {
    "left": np.array([[True, False]]),
    "right": np.array([[False, True]]),
    "above": np.array([[True], [False]]),
    "below": np.array([[False], [True]]),
}

PREVIEW_PAUSE = 0.5  # seconds between two previews

# Steps done, steps in all, seconds left.
OnProgress = Callable[[int, int, float], None]
OnPreview = Callable[[np.ndarray], None]  # uint8 (B, h, w, 3)


class Pace:
    """Lets something happen every so many seconds, no matter how often it could."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._last = seconds, -math.inf

    def is_due(self) -> bool:
        """Whether that time is over since this was last so."""
        now = time.monotonic()
        if now - self._last < self.seconds:
            return False
        self._last = now
        return True


@dataclass(frozen=True)
class Order:
    """Every prompt with every seed at every lambda.

    Args:
        lambdas: of the object whose word is the studio's placeholder.
        others: lambda of further objects in the same pictures, by their words.
        regions: names of HALVES by the words of objects that may appear only there.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    lambdas: tuple[float, ...] = (LAMBDA,)
    others: Mapping[str, float] = field(default_factory=dict)
    regions: Mapping[str, str] = field(default_factory=dict)
    words: Words = 0
    num_inference_steps: int = DEFAULT_STEPS
    guidance_scale: float = GUIDANCE_SCALE
    negative_prompt: str = ""
    scheduler: str = DEFAULT_SAMPLER
    speed: str = "exact"

    def __post_init__(self) -> None:
        each = len(self.seeds) * len(self.lambdas)
        if self.count > MAX_PICTURES >= each:
            most = MAX_PICTURES // each
            raise ValueError(f"{len(self.prompts)} prompts of {each} pictures; at most {most} do")
        _check("number of pictures", self.count, 1, MAX_PICTURES)
        _check("steps", self.num_inference_steps, 1, MAX_STEPS)
        _check("guidance", self.guidance_scale, 0, MAX_GUIDANCE)
        for lambda_ in self.lambdas:
            _check("lambda", lambda_, 0, MAX_LAMBDA)
        for word, lambda_ in self.others.items():
            _check(f"lambda of {word}", lambda_, 0, MAX_LAMBDA)
        for word, half in self.regions.items():
            if half not in HALVES:
                raise ValueError(f"region {half!r} of {word}: expected one of {', '.join(HALVES)}")
        for seed in self.seeds:
            _check("seed", seed, 0, MAX_SEED)

    @property
    def count(self) -> int:
        """Pictures in all."""
        return len(self.prompts) * len(self.seeds) * len(self.lambdas)


@dataclass(frozen=True)
class Drawn:
    """A picture and what its PNG says of it."""

    picture: Image.Image = field(repr=False)
    prompt: str
    seed: int
    metadata: dict[str, str] = field(repr=False)


def _check(name: str, value: float, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ValueError(f"{name} {value!r}: expected {low} to {high}")


class Clock:
    """Counts steps and tells the time left."""

    def __init__(self, total: int, tell: OnProgress) -> None:
        self.done, self.total, self.tell = 0, total, tell
        self.begin = time.monotonic()

    def __call__(self) -> None:
        self.done = min(self.done + 1, self.total)
        passed = time.monotonic() - self.begin
        self.tell(self.done, self.total, passed / self.done * (self.total - self.done))


class Studio:
    """What the app does with its one pipeline; draws for one person at a time.

    Args:
        resolution: side of the pictures in pixels; None means what the model draws.
        batch_size: pictures drawn at once.
        model: what the pictures' metadata calls the model.
        preview: shows latents; None shows none.
    """

    def __init__(
        self,
        pipe: Elite,
        *,
        placeholder_token: str = PLACEHOLDER,
        resolution: int | None = None,
        batch_size: int = 1,
        model: str = "",
        preview: Preview | None = None,
    ) -> None:
        self.preview = preview
        self.pipe, self.placeholder_token = pipe, placeholder_token
        self.resolution, self.batch_size, self.model = resolution, batch_size, model
        self._lock = Lock()  # the pipeline holds scheduler and hooks while it draws
        # A tokenizer serves one thread at a time, and prompts are checked while others draw.
        self._tokenizer, self._tokenizer_lock = copy.deepcopy(pipe.tokenizer), Lock()

    @property
    def second_token(self) -> str:
        """The word of a second object in the same picture."""
        return f"{self.placeholder_token}2"

    @property
    def side(self) -> int:
        """Side of the pictures in pixels."""
        return self.resolution or self.pipe.resolution

    @property
    def has_details(self) -> bool:
        """Whether there is a local branch for lambda to weigh."""
        return self.pipe.local_mapper is not None

    def look(self, image: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
        """What the networks see, uint8 (size, size, 3) each: the picture, the object alone, and
        that object with the patches marked that the local branch does not read.

        Args: as `Elite.concept_views`.
        """
        views = self.pipe.concept_views(image, mask)
        picture, cut_out = (
            from_clip_pixels(views[name][0]) for name in ("clip_pixels", "object_pixels")
        )
        grid, size = self.pipe.grid, len(picture)
        cells = views["patch_mask"][0].reshape(grid, grid).numpy() > 0
        row = np.arange(size) * grid // size
        read = cells[row[:, None], row]  # (size, size)
        return [picture, cut_out, np.where(read[..., None], cut_out, UNREAD)]

    def check_prompts(
        self,
        text: str,
        words: Words = 0,
        others: Sequence[str] = (),
        tell: Callable[[str], object] = note,
        negative: str = "",
    ) -> tuple[str, ...]:
        """The prompts of a text, one a line.

        Args:
            others: what stands for further objects, in each prompt too.
            negative: the prompt of what should not be seen: checked, and not among those returned.
            tell: told of text that is too long to be read.

        Raises:
            ValueError: none or too many, or one in which the words have no place.
        """
        lines = (line.strip() for line in text.splitlines())
        prompts = tuple(dict.fromkeys(line for line in lines if line))
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise ValueError(f"{len(prompts)} prompts; write 1 to {MAX_PROMPTS}, one a line")
        num_words = self.pipe.global_mapper.num_levels if words == "all" else 1
        with self._tokenizer_lock:
            names = [self.placeholder_token, *others]
            tokenize(self._tokenizer, prompts, names, num_words, tell)
            read_prompt(negative, self._tokenizer, tell=tell)
        return prompts

    def encode(self, image: np.ndarray, mask: np.ndarray) -> Concept:
        """Arguments and errors as `Elite.encode_concept`."""
        with self._lock:
            return self.pipe.encode_views(**self.pipe.concept_views(image, mask))

    def load_concept(self, path: Path | str) -> Concept:
        """One object of a file of `Concept.save`; notes where lambda has nothing to weigh.

        Raises:
            ValueError: the file is something else, or of other mappers.
        """
        with folder_hidden(path):
            concept = ConceptFolder(path).read(0)
            try:
                self.pipe.check_concept(concept)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            fits = concept.words.shape[1] == self.pipe.global_mapper.num_levels
            if (tokens := concept.feature_tokens) is not None:  # of one picture or several
                fits = fits and not tokens.shape[1] % self.pipe.grid**2
            if not fits:
                raise ValueError(f"{path}: concept of other sizes; encode it again")
            if self.has_details and tokens is None:
                note(f"{Path(path).name}: encoded without the local mapper, so lambda does nothing")
            return concept

    def draw(
        self,
        concepts: Mapping[str, Concept],
        order: Order,
        on_progress: OnProgress,
        on_preview: OnPreview | None = None,
    ) -> Iterator[list[Drawn]]:
        """The pictures of an order, as many at once as the batch size; what `on_progress` raises
        ends the drawing.

        Args:
            concepts: by their words: the placeholder, and those of the order's other objects.
            on_preview: is shown those at work, every PREVIEW_PAUSE seconds.

        Raises:
            ValueError: a prompt does not fit, an object is missing, or the sampler is unknown.
        """
        pairs = list(itertools.product(order.prompts, order.seeds))
        calls = -(-len(pairs) // self.batch_size) * len(order.lambdas)
        evaluations = getattr(SCHEDULERS.get(order.scheduler), "order", 1)  # of the UNet in a step
        clock = Clock(calls * order.num_inference_steps * evaluations, on_progress)
        pace = Pace(PREVIEW_PAUSE)

        def on_step(latents: Tensor) -> None:
            clock()
            if on_preview is not None and self.preview is not None and pace.is_due():
                on_preview(self.preview(latents))

        for lambda_ in order.lambdas:
            drawing = self._drawing(order, lambda_)
            for batch in batches(iter(pairs), self.batch_size):
                yield self._draw_batch(concepts, order, drawing, batch, on_step)

    def _drawing(self, order: Order, lambda_: float) -> Drawing:
        return Drawing(
            words=order.words,
            lambda_=lambda_,
            placeholder_token=self.placeholder_token,
            resolution=self.resolution,
            num_inference_steps=order.num_inference_steps,
            guidance_scale=order.guidance_scale,
            negative_prompt=order.negative_prompt or None,
            speed=speed_of(order.speed),
        )

    def _draw_batch(
        self,
        concepts: Mapping[str, Concept],
        order: Order,
        drawing: Drawing,
        batch: Sequence[tuple[str, int]],
        on_step: OnStep,
    ) -> list[Drawn]:
        prompts, seeds = zip(*batch, strict=True)
        weights = {self.placeholder_token: drawing.lambda_, **order.others}
        regions = {word: HALVES[half] for word, half in order.regions.items()}
        with self._lock:
            self.pipe.scheduler = make_scheduler(order.scheduler, self.pipe.scheduler.config)
            pictures = drawing.with_concepts(
                self.pipe, concepts, weights, regions, prompts, seeds, on_step
            )
        made_by = {"scheduler": order.scheduler, "model": self.model}
        metadata = {**drawing.metadata(self.pipe), **made_by}
        metadata[f"concept {self.placeholder_token}"] = concepts[self.placeholder_token].digest
        if order.others:
            metadata |= metadata_of_several(concepts, weights, order.regions)
        metadata |= self._counts(concepts)
        metadata |= VERSIONS
        return [
            Drawn(picture, prompt, seed, {"prompt": prompt, "seed": str(seed), **metadata})
            for picture, prompt, seed in zip(pictures, prompts, seeds, strict=True)
        ]

    def _counts(self, concepts: Mapping[str, Concept]) -> dict[str, str]:
        """How many pictures show an object, where it is more than one, as its feature tokens
        tell."""
        counts = {
            word: concept.num_tokens // self.pipe.grid**2 for word, concept in concepts.items()
        }
        return {f"pictures of {word}": str(count) for word, count in counts.items() if count > 1}


def save_strip(drawn: Sequence[Drawn], seen: np.ndarray | None, path: Path) -> None:
    """The pictures of a sweep as one PNG: a row per prompt, lambda from left to right, before them
    what the networks see of the object; with the metadata of them all."""
    prompts = list(dict.fromkeys(one.prompt for one in drawn))
    lambdas = [one.metadata["lambda"] for one in drawn if one.prompt == prompts[0]]
    first = [] if seen is None else [Image.fromarray(seen)]
    rows = [[*first, *(one.picture for one in drawn if one.prompt == p)] for p in prompts]
    columns = [*(["object"] if first else []), *(f"lambda {value}" for value in lambdas)]
    metadata = {**drawn[0].metadata, "prompt": "\n".join(prompts), "lambda": "; ".join(lambdas)}
    write_png(path, tile_rows(rows, columns, "; ".join(prompts)), metadata)
