"""What the page of app_gradio.py does, without its layout: values of controls by name in, new
values by name out. A mistake comes back as a message."""

import base64
import html
import io
import math
import secrets
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from app.marking import Shown, read_marks
from app.notes import noted
from app.several import CONTROLS, NEW, Several, names, numbered
from app.studio import MAX_PICTURES, MAX_SEED, Drawn, OnProgress, Order, Studio, save_strip
from elite.concept import Concept
from elite.data import PairFolder
from elite.drawing import VERSIONS, stem_of, write_png
from elite.images import doubt, read_image
from elite.masks import Find, find_object
from elite.named_concepts import Words
from elite.text import whole_word
from elite.wording import note

Values = dict[str, Any]
Tell = Callable[..., Any]  # gr.Progress: (steps done, steps in all), desc=, unit=

EDITOR_SIDE, THUMB_SIDE = 512, 128  # pixels of the picture that is marked, and of its thumbnail
DIMMED = (0.3 * np.arange(256)).astype(np.uint8)  # what is left of values that are not object
SWEEP = (0.0, 0.3, 0.6, 0.8, 1.0, 1.2, 1.5)
VIEWS = ("picture", "object", "patches read")
DRAWN_SEEDS = 100_000  # easy to write down
BROKEN = "something went wrong in the program; its terminal says what"


class Stopped(Exception):
    """Somebody pressed Stop."""


@dataclass
class Stop:
    """Whether the work of one page has begun, and is to end; a new one for each piece of work."""

    requested: bool = False
    begun: bool = False


def message(text: str, error: bool = False) -> str:
    """HTML of a line below a control, read aloud by screen readers."""
    role = "alert" if error else "status"
    return f'<p class="message" role="{role}">{html.escape(text)}</p>'


def lines(notes: list[str]) -> str:
    """HTML of notes, a line each."""
    return "".join(map(message, notes))


def problem(error: Exception) -> str:
    """What the person is told of an exception; what is no mistake of theirs goes to the
    terminal."""
    if isinstance(error, ValueError):
        return message(f"{error}", error=True)
    if isinstance(error, torch.OutOfMemoryError):
        return message("the device's memory is full; draw fewer pictures at once", error=True)
    traceback.print_exception(error)
    return message(BROKEN, error=True)


def data_url(picture: np.ndarray | None, side: int = EDITOR_SIDE) -> str:
    """The picture for an <img>, at most so many pixels a side; "" of none."""
    if picture is None:
        return ""
    image, stream = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((side, side))
    image.save(stream, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def example_pictures(examples: PairFolder) -> list[tuple[str, str]]:
    """Picture files and names of the examples."""
    return [(str(pair.image_path), pair.name.replace("_", " ")) for pair in examples.pairs]


def example_views(examples: PairFolder, most: int = 8) -> list[np.ndarray]:
    """Some examples' pictures, uint8 (H, W, 3), without those that cannot be read."""
    views = []
    for pair in examples.pairs[:most]:
        with suppress(ValueError):
            views.append(read_image(pair.image_path))
    return views


def whole(name: str, value: Any) -> int:
    """A whole number from a control. Raises ValueError."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value != round(value):
        raise ValueError(f"{name} {value!r}: expected a whole number")
    return int(value)


def words_of(value: Any) -> Words:
    return "all" if value == "all" else 0


def dimmed(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with what is not object dark."""
    return np.where(mask[..., None], picture, DIMMED[picture])


class AppHandlers:
    """Handlers of one app; what a person shows and gets is never kept between two calls.

    Args:
        examples: pairs to pick from; None offers none.
        max_pixels: of uploaded pictures; None means any number.
        find: what finds the object in the middle or in a box; None means GrabCut, others take a
            click, too.
    """

    def __init__(
        self,
        studio: Studio,
        examples: PairFolder | None = None,
        max_pixels: int | None = None,
        find: Find | None = None,
    ) -> None:
        self.studio, self.examples, self.max_pixels = studio, examples, max_pixels
        self.find, self.takes_clicks = find or find_object, find is not None
        self._at_work: list[Stop] = []

    def close(self) -> None:
        """Ends all drawing, which would keep the process otherwise."""
        for stop in tuple(self._at_work):
            stop.requested = True

    # --- the object -------------------------------------------------------------------------------

    def look(self, values: Values) -> Values:
        """What the model sees, and the picture to mark, dark where there is no object."""
        method, views, said, oblong = values["method"], [], "", False
        marked = None
        with noted() as notes:
            try:
                if values["picture"]:
                    shown, picture, marked = self._read(values)  # stays where no object is found
                    oblong = picture.shape[0] != picture.shape[1]
                    mask = shown.read_mask(picture)
                    views = list(zip(self.studio.look(marked, mask), VIEWS, strict=True))
                    marked = dimmed(marked, mask)
                    doubtful = doubt(mask) if method == "file" else ""
                    said = message(f"mask: {doubtful}") if doubtful else ""
                if values["concept_file"]:
                    self.studio.load_concept(values["concept_file"])
                    said += message("the object of the file below is drawn, not the picture's")
            except Exception as error:
                said = problem(error)
        return {
            "marks": gr.update(picture=data_url(marked), method=method),
            "several": gr.update(here=bool(values["picture"]), now=data_url(marked, THUMB_SIDE)),
            "views": views,
            "object_message": said + lines(notes),
            "square": gr.update(visible=oblong),
            "mask_part": gr.update(visible=method == "file"),
            "saved": None,  # which is of what was shown before
        }

    def new_picture(self, values: Values) -> Values:
        """Takes away marks and mask of the picture before. At once, and then the new one is looked
        at: what the person chooses meanwhile stays."""
        answer: Values = {"dropped": "", "earlier": values["picture"] or ""}
        if not is_turned_to(values):  # which brought its own marks
            answer["marks"] = ""
        if values["mask"] and not self._is_own_mask(values):
            was = "your mask was of another picture, and was taken away"
            answer |= {"mask": None, "dropped": message(was)}
            if values["method"] == "file":
                answer["method"] = NEW["method"]
        if (merged := values["several"].merged(values)) != values["several"]:
            again = f"{names([values['picture']])}: among the pictures of the object already"
            answer |= held(merged, message(again))
        return answer

    def _is_own_mask(self, values: Values) -> bool:
        """Whether the mask is of the picture: it came before any, or with an example or a turn."""
        earlier, picture = values["earlier"], values["picture"]
        if not earlier or earlier == picture or is_turned_to(values):
            return True
        try:
            example, _ = self._example(values["example"])
            return bool(picture) and np.array_equal(read_image(picture, self.max_pixels), example)
        except ValueError:
            return False

    def new_square(self, values: Values) -> Values:
        """Takes away marks, which lie on another part of the picture."""
        if not values["marks"]:
            return {"marks": gr.skip()}
        told = "your marks lay on another part of the picture, and were cleared"
        return {"marks": "", "dropped": message(told)}

    def _example(self, index: Any) -> tuple[np.ndarray, np.ndarray]:
        """An example's picture and mask. Raises ValueError where there is none."""
        index = whole("example", index)
        if self.examples is None or not 0 <= index < len(self.examples):
            raise ValueError(f"example {index}: no such example")
        return self.examples.read(index)

    def pick_example(self, index: Any) -> Values:
        """An example's picture and mask."""
        try:
            picture, mask = self._example(index)
        except Exception as error:
            return {"object_message": problem(error)}
        mask = mask.astype(np.uint8) * 255
        shown = {"picture": picture, "mask": mask, "method": "file", "marks": ""}
        return {**shown, "example": index, **held(Several())}

    def rearrange(self, values: Values) -> Values:
        """Adds pictures of the object, turns to another or removes one, as is wanted."""
        try:
            several, shown = values["several"].rearranged(values)
        except Exception as error:
            return held(values["several"], problem(error))
        return {**{name: shown[name] for name in CONTROLS}, **held(several), "saved": None}

    def glance(self, values: Values) -> Values:
        """Thumbnails of the pictures that nobody has looked at yet, and what is wrong with them."""
        thumbs, said = {}, ""
        pictures = values["several"].pictures(values)
        for number, one in enumerate(pictures, 1):
            if one["thumb"] or one["picture"] == values["picture"]:
                continue
            marked = None
            try:
                with numbered(number, len(pictures)):
                    shown, picture, marked = self._read(one)  # stays where no object is found
                    marked = dimmed(marked, shown.read_mask(picture))
            except Exception as error:
                said += problem(error)
            thumbs[one["picture"]] = data_url(marked, THUMB_SIDE)
        more = {"several_message": said} if said else {}  # another message stays
        return {"several": gr.update(thumbs=thumbs), **more}

    def _read(self, values: Values) -> tuple[Shown, np.ndarray, np.ndarray]:
        """How an object is shown, the picture it is in, and that picture made square."""
        shown = Shown(
            picture=values["picture"],
            squaring=values["squaring"],
            position=values["position"],
            method=values["method"],
            marks=read_marks(values["marks"]),
            mask=values["mask"],
            max_pixels=self.max_pixels,
            find=self.find,
        )
        picture = shown.read_picture()
        return shown, picture, shown.square(picture)

    def new_second(self, values: Values) -> Values:
        """What is wrong with the file of the second object, and with prompts now that there is one
        or none."""
        said = ""
        with noted() as notes:
            try:
                self._second(values)
            except Exception as error:
                said = problem(error)
        return {"second_message": said + lines(notes), **self.check(values)}

    def _second(self, values: Values) -> dict[str, Concept]:
        """The second object by its word, if there is one."""
        path = values["second_file"]
        return {self.studio.second_token: self.studio.load_concept(path)} if path else {}

    def _concept(self, values: Values) -> tuple[Concept, list[np.ndarray]]:
        """The object to draw, and what the model sees of it in each picture, if there are any."""
        if values["concept_file"]:
            return self.studio.load_concept(values["concept_file"]), []
        pictures = values["several"].pictures(values) or [values]  # none is a mistake, too
        concepts, seen = [], []
        for number, one in enumerate(pictures, 1):
            with numbered(number, len(pictures)):
                shown, picture, square = self._read(one)
                mask = shown.read_mask(picture)
                concepts.append(self.studio.encode(square, mask))
                seen.append(self.studio.look(square, mask)[0])
        return Concept.stack(concepts).as_one(), seen

    def save_concept(self, values: Values, folder: Path) -> Iterator[Values]:
        """The object as a file in the folder, which the page copies."""
        try:
            concept, _ = self._concept(values)
            path = folder / "object.safetensors"
            concept.save(path)
        except Exception as error:
            yield {"saved": None, "object_message": problem(error)}
            return
        yield {"saved": str(path), "saved_of": object_of(values)}

    def check_saved(self, values: Values) -> Values:
        """Takes a file away whose making has waited until the page showed another object."""
        return {"saved": gr.skip() if values["saved_of"] == object_of(values) else None}

    # --- pictures ---------------------------------------------------------------------------------

    def check(self, values: Values) -> Values:
        """Says what is wrong with the prompts, as they are typed."""
        told: list[str] = []
        try:
            self._prompts(values, told.append)
        except Exception as error:
            return {"prompt_message": problem(error)}
        second = self.studio.second_token
        if not values["second_file"] and whole_word(second).search(values["prompts"] or ""):
            told.append(f"{second} is read as a plain word until the other object's file is loaded")
        return {"prompt_message": message("; ".join(told)) if told else ""}

    def _others(self, values: Values) -> dict[str, float]:
        """Likeness to the second object by its word, if there is one."""
        word, lambda_ = self.studio.second_token, values["second_lambda"]
        return {word: lambda_} if values["second_file"] else {}

    def _prompts(self, values: Values, tell: Callable[[str], object] = note) -> tuple[str, ...]:
        """Raises ValueError."""
        text, words = values["prompts"] or "", words_of(values["words"])
        others, negative = list(self._others(values)), values["negative"] or ""
        return self.studio.check_prompts(text, words, others, tell, negative)

    def _order(self, values: Values, sweep: bool) -> Order:
        others = self._others(values)
        halves = (values["where"] or "").split() if others else ()
        count = 1 if sweep else whole("number of pictures", values["count"])
        seed, last = whole("seed", values["seed"]), MAX_SEED - min(count, MAX_PICTURES) + 1
        if seed == -1:
            seed = secrets.randbelow(DRAWN_SEEDS)
        if not 0 <= seed <= last:
            raise ValueError(f"seed {seed}: expected 0 to {last}, or -1, which picks one")
        return Order(
            prompts=self._prompts(values),
            seeds=tuple(range(seed, seed + min(count, MAX_PICTURES + 1))),
            lambdas=SWEEP if sweep else (values["lambda_"],),
            others=others,
            regions=dict(zip((self.studio.placeholder_token, *others), halves, strict=False)),
            words=words_of(values["words"]),
            num_inference_steps=whole("steps", values["steps"]),
            guidance_scale=values["guidance"],
            negative_prompt=(values["negative"] or "").strip(),
            scheduler=values["scheduler"],
            speed=values["speed"],
        )

    def draw(
        self, values: Values, folder: Path, tell: Tell, sweep: bool = False
    ) -> Iterator[Values]:
        """The pictures, as they come; the page is told of every step.

        Args:
            folder: receives the files, which the page copies.
            sweep: each prompt at growing lambda, and at last all of them as one strip.
        """
        drawn: list[Drawn] = []
        tiles: list[Any] = []
        notes: list[str] = []
        values["stop"].begun = True
        try:
            order = self._order(values, sweep)
            yield {"gallery": [], "strip_part": gr.update(visible=False), "status": ""}
            with noted():  # of files, which were said when those were chosen
                concept, seen = self._concept(values)
                concepts = {self.studio.placeholder_token: concept, **self._second(values)}
            metadata = {f"concept {self.studio.placeholder_token}": concept.digest, **VERSIONS}
            for number, (picture, said) in enumerate(own_tiles(seen), 1):
                path = folder / f"object_{number}.png"
                write_png(path, Image.fromarray(picture), metadata)
                tiles.append((str(path), said))
            self._at_work.append(values["stop"])
            told = teller(values["stop"], tell)

            def work(give: Callable[[Values], None]) -> None:
                with noted() as told_of:
                    draw(give)
                notes.extend(told_of)

            def draw(give: Callable[[Values], None]) -> None:
                def show(pictures: np.ndarray) -> None:
                    give({"preview": preview(pictures)})

                for batch in self.studio.draw(concepts, order, told, show):
                    for one in batch:
                        path = folder / f"{stem_of(len(drawn), one.seed)}.png"
                        write_png(path, one.picture, one.metadata)
                        tiles.append((str(path), caption(one, order)))
                        drawn.append(one)
                    give({"gallery": list(tiles), "preview": ""})

            yield from in_background(work, values["stop"])
            said = message(f"{len(drawn)} pictures, {seeds_of(order)}") + lines(notes)
            done: Values = {"status": said}
            if sweep:
                path = folder / f"sweep_{order.seeds[0]:05d}.png"
                save_strip(drawn, seen[0] if seen else None, path)
                done |= {"strip": str(path), "strip_part": gr.update(visible=True)}
        except Stopped:
            yield {"status": message(f"stopped after {len(drawn)} pictures"), "preview": ""}
            return
        except Exception as error:
            yield {"status": problem(error), "preview": ""}
            return
        finally:
            self._at_work = [stop for stop in self._at_work if stop is not values["stop"]]
        yield done


def is_turned_to(values: Values) -> bool:
    """Whether the picture is one of several that was put into the controls, marks, mask and all."""
    return bool(values["picture"]) and values["picture"] == values["several"].given


def object_of(values: Values) -> list[Any]:
    """What tells the object of a page from others."""
    shown = ({**one, "thumb": ""} for one in values["several"].pictures(values))
    return [values["concept_file"], *shown]


def held(several: Several, said: str = "") -> Values:
    """What the page holds of several pictures now, and a message about them.

    A plain value, as of the other controls: the browser takes updates later, and what it asks as
    soon as the picture changes would come with the former pictures.
    """
    return {"several": several.text, "several_message": said}


def in_background(work: Callable[[Callable[[Values], None]], None], stop: Stop) -> Iterator[Values]:
    """What `work` gives away, as it does so: it runs in a thread of its own, which ends before this
    does. Raises what it raises; who looks no more has it stopped."""
    given: SimpleQueue[Values | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        # With this thread's context, by which Gradio knows whom progress is for.
        working = pool.submit(copy_context().run, work, given.put)
        working.add_done_callback(lambda _: given.put(None))
        try:
            yield from iter(given.get, None)
        except GeneratorExit:
            stop.requested = True
            raise
        working.result()


def preview(pictures: np.ndarray) -> str:
    """HTML of what pictures look like so far, uint8 (B, h, w, 3), side by side."""
    url = data_url(np.concatenate(list(pictures), axis=1))
    return f'<img alt="what is being drawn, so far" src="{url}">'


def teller(stop: Stop, tell: Tell) -> OnProgress:
    """Tells the page of each step, and ends the drawing once that is wanted."""

    def on_progress(done: int, total: int, seconds: float) -> None:
        if stop.requested:
            raise Stopped
        tell((done, total), desc=f"about {math.ceil(seconds)} s left", unit="steps")

    if stop.requested:
        raise Stopped
    return on_progress


def caption(drawn: Drawn, order: Order) -> str:
    """Below a thumbnail: the prompt where there are several, lambda and seed."""
    prompt = f"{drawn.prompt}: " if len(order.prompts) > 1 else ""
    return f"{prompt}\u03bb {drawn.metadata['lambda']}, seed {drawn.seed}"


def own_tiles(seen: list[np.ndarray]) -> list[tuple[np.ndarray, str]]:
    """What the model sees of the object, with captions."""
    if len(seen) == 1:
        return [(seen[0], "your object")]
    return [(one, f"your object, picture {number}") for number, one in enumerate(seen, 1)]


def seeds_of(order: Order) -> str:
    first, last = order.seeds[0], order.seeds[-1]
    return f"seed {first}" if first == last else f"seeds {first} to {last}"
