"""The page of app_gradio.py: its controls, and what wires them to `AppHandlers`."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from app.controls import (
    KEEP_FILES,
    DrawnImage,
    UploadedFile,
    gallery,
    picture_input,
    uploaded_several,
)
from app.handlers import AppHandlers, Stop, Tell, Values, example_pictures, message
from app.several import CONTROLS, MAX_SHOWN
from app.studio import MAX_GUIDANCE, MAX_LAMBDA, MAX_STEPS, Pace
from elite.defaults import DEFAULT_SAMPLER, DEFAULT_STEPS, GUIDANCE_SCALE, LAMBDA
from elite.settings import SAMPLERS
from elite.speed import RUNGS

ASSETS = Path(__file__).with_name("assets")
PAUSE = 0.2  # seconds between two messages of a drawing
SMALL = 128  # pictures of a side below this are shown with their pixels
INTRODUCTION = (
    "# ELITE\n"
    "One picture of an object becomes a word, `{word}`; write it into a prompt and the object "
    "appears there."
)
OBJECT = (*CONTROLS, "several", "concept_file", "example", "earlier")
SECOND = ("second_file", "second_lambda", "where")
DRAWING = (
    *("prompts", "lambda_", "count", "guidance", "negative"),
    *("steps", "scheduler", "speed", "seed", "words"),
    *SECOND,
)
LOOKED = ("marks", "several", "views", "object_message", "square", "mask_part", "saved")
DROPPED = ("mask", "method", "marks", "earlier", "dropped", "several", "several_message")
NEW_SQUARE = (("squaring", "input"), ("position", "input"))  # not "change": turning does that, too
LOOK_AGAIN = (
    ("concept_file", "change"),
    ("method", "change"),
    ("mask", "change"),
    ("marks", "input"),
)
HELD = ("several", "several_message")
# The picture last: its change is answered with what the others hold by then.
ARRANGED = (*HELD, "saved", *reversed(CONTROLS))
PICKED = (*HELD, "example", "object_message", "marks", "method", "mask", "picture")
SAVED = ("saved", "saved_of", "object_message")
CHECKED = ("second_message", "prompt_message")
DRAWN = ("gallery", "preview", "status", "strip", "strip_part")
BUTTONS = ("draw", "sweep", "stop_button")


def build_page(handlers: AppHandlers) -> gr.Blocks:
    """The page over these handlers, with a bounded queue still to be set."""
    controls: dict[str, Any] = {}
    word = handlers.studio.placeholder_token
    with gr.Blocks(
        title="ELITE", analytics_enabled=False, delete_cache=KEEP_FILES, fill_width=True
    ) as page:
        gr.Markdown(INTRODUCTION.format(word=word))
        controls["stop"], controls["saved_of"] = gr.State(Stop()), gr.State()
        controls["given_up"] = gr.Number(visible=False)  # anew with each drawing that only waited
        # The example picked last and the picture before this one, kept by the browser: so they come
        # with picture and mask of the same moment.
        controls["example"], controls["earlier"] = (
            gr.Number(visible=False),
            gr.Textbox(visible=False),
        )
        with gr.Row():
            with gr.Column(min_width=320):
                _object_part(controls, handlers)
            with gr.Column(min_width=320):
                _prompt_part(controls, handlers)
        for name, control in controls.items():
            control.elem_id = name  # for the style sheet and the tests
        _wire(controls, handlers)
    return page


def seldom(tell: Tell) -> Tell:
    """Passes on every PAUSE seconds what is told, and the last of it: a browser that redraws the
    page for each of a hundred steps a second falls behind the drawing."""
    pace = Pace(PAUSE)

    def told(at: tuple[int, int], **words: str) -> None:
        done, total = at
        if pace.is_due() or done == total:
            tell(at, **words)

    return told


def _asset(name: str, **props: Any) -> gr.HTML:
    """A control of our own, assets/NAME.html with NAME.js."""
    html, script = ((ASSETS / f"{name}.{end}").read_text("utf-8") for end in ("html", "js"))
    return gr.HTML(value="", html_template=html, js_on_load=script, **props)


def _likeness(label: str, has_details: bool, info: str | None = None) -> gr.Slider:
    """A slider of lambda, where there is a local branch for it to weigh."""
    return gr.Slider(0, MAX_LAMBDA, LAMBDA, step=0.05, label=label, info=info, visible=has_details)


def _object_part(controls: dict[str, Any], handlers: AppHandlers) -> None:
    """Picture, square, mask, what the model sees, and the object as a file."""
    gr.Markdown("## 1. Your object")
    controls["picture"] = picture_input(
        label="Picture of one object (drop, click or paste)", height=240
    )
    controls["several"] = _asset("several", here=False, now="", thumbs={}, most=MAX_SHOWN)
    controls["several_message"] = gr.HTML()
    if handlers.examples is not None:
        controls["examples"] = gallery(
            "Or an example",
            value=example_pictures(handlers.examples),
            columns=6,
            height=150,
            allow_preview=False,
        )
    with gr.Group(visible=False) as controls["square"]:
        controls["squaring"] = gr.Radio(
            [("Cut the longer side off", "crop"), ("Add white to the shorter side", "pad")],
            value="crop",
            label="The model reads squares: how the picture becomes one",
        )
        controls["position"] = gr.Slider(
            0,
            1,
            0.5,
            step=0.05,
            label="Which part is kept, or where the picture lies: left or top 0, right or bottom 1",
        )
    finder, box = "found by GrabCut", "In a box (refined by GrabCut)"
    if handlers.takes_clicks:
        finder = "found by Segment Anything"
        box = f"In a box, or where I click ({finder})"
    controls["method"] = gr.Radio(
        [
            (f"In the middle ({finder})", "centre"),
            (box, "box"),
            ("Where I paint", "brush"),
            ("White in a mask file", "file"),
            ("The whole picture", "whole"),
        ],
        value="centre",
        label="Where the object is: only this part lends its details to your pictures",
    )
    with gr.Column(visible=False) as controls["mask_part"]:
        controls["mask"] = picture_input(
            label="Mask of the picture: white where the object is, black elsewhere", height=240
        )
    controls["marks"] = _asset("marker", picture="", method="centre", clicks=handlers.takes_clicks)
    controls["dropped"] = gr.HTML()
    controls["object_message"] = gr.HTML()
    controls["views"] = gallery(
        "What the model sees: the picture, the object, the patches it reads (not pink)",
        columns=3,
        allow_preview=False,
    )
    with gr.Accordion("Keep the object as a file, or use one", open=False):
        controls["save"] = gr.Button("Make a file of this object")
        controls["saved"] = UploadedFile(label="The object's file, for download", interactive=False)
        controls["concept_file"] = UploadedFile(
            label="Draw the object of this file instead of the picture", file_types=[".safetensors"]
        )


def _prompt_part(controls: dict[str, Any], handlers: AppHandlers) -> None:
    """Prompt and settings, buttons, pictures."""
    studio = handlers.studio
    word, pixels = studio.placeholder_token, ["pixels"] if studio.side < SMALL else []
    gr.Markdown("## 2. What to draw")
    controls["prompts"] = gr.Textbox(
        f"a photo of a {word}",
        label="Prompt",
        info=f"{word} stands for your object, once in each prompt; several prompts: one a line.",
        lines=2,
        max_lines=8,
    )
    controls["prompt_message"] = gr.HTML()
    controls["lambda_"] = _likeness(
        "Likeness to your object (lambda)",
        studio.has_details,
        "0: only a rough idea of it. 0.6: room for the prompt. 0.8: the object itself.",
    )
    controls["count"] = gr.Slider(1, 8, 2, step=1, label="Pictures of each prompt")
    with gr.Accordion("A second object in the same picture", open=False):
        _second_part(controls, handlers)
    with gr.Accordion("More settings", open=False):
        controls["guidance"] = gr.Slider(
            0,
            MAX_GUIDANCE,
            GUIDANCE_SCALE,
            step=0.5,
            label="How closely pictures follow the prompt (guidance)",
            info="1 or less: loosely. Very high: harsh colours.",
        )
        controls["negative"] = gr.Textbox(
            label="What the pictures should not show (negative prompt)",
            info="Works by guidance, so with a value above 1.",
            max_lines=4,
        )
        controls["steps"] = gr.Slider(
            1, MAX_STEPS, DEFAULT_STEPS, step=1, label="Steps: more take longer and draw cleaner"
        )
        controls["scheduler"] = gr.Dropdown(
            list(SAMPLERS),
            value=DEFAULT_SAMPLER,
            label="Sampler: how noise becomes a picture",
            info=f"{DEFAULT_SAMPLER} needs the fewest steps; lms with 100 is what the paper used.",
        )
        controls["speed"] = gr.Radio(
            list(RUNGS),
            value="exact",
            label="Speed: how much exactness is given up for time",
            info="Other than exact: less work in each step, and pictures that differ.",
        )
        controls["seed"] = gr.Number(
            -1,
            precision=0,
            label="Seed: the same number draws the same pictures",
            info="-1 picks one, which is shown with the pictures.",
        )
        controls["words"] = gr.Radio(
            [("The object's word alone (w0)", "0"), ("All words, background and pose too", "all")],
            value="0",
            label="What is read from the whole picture",
        )
    with gr.Row():
        controls["draw"] = gr.Button("Draw", variant="primary")
        controls["sweep"] = gr.Button("Compare likeness 0 to 1.5", visible=studio.has_details)
        controls["stop_button"] = gr.Button("Stop", variant="stop", interactive=False)
    controls["status"] = gr.HTML()
    controls["preview"] = gr.HTML()
    controls["gallery"] = gallery(
        "Pictures, after your object; select one to enlarge and download it",
        columns=3,
        buttons=["download", "download_all", "fullscreen"],
        elem_classes=pixels,
    )
    with gr.Column(visible=False) as controls["strip_part"]:
        gr.Markdown("Likeness from 0 to 1.5, left to right, same seed")
        controls["strip"] = DrawnImage(
            show_label=False,
            interactive=False,
            type="filepath",
            buttons=["download", "fullscreen"],
            alt_text="A row of pictures with lambda growing from left to right",
        )


def _second_part(controls: dict[str, Any], handlers: AppHandlers) -> None:
    """Its file, its likeness, and who may appear where."""
    studio = handlers.studio
    first, second = studio.placeholder_token, studio.second_token
    gr.Markdown(
        f"Make a file of the other object, load it here, and write `{second}` for it into each "
        f"prompt, beside `{first}`."
    )
    controls["second_file"] = UploadedFile(
        label="The other object's file", file_types=[".safetensors"], height=120
    )
    controls["second_message"] = gr.HTML()
    controls["second_lambda"] = _likeness(f"Likeness to {second} (lambda)", studio.has_details)
    controls["where"] = gr.Radio(
        [
            ("Anywhere", ""),
            (f"{first} left, {second} right", "left right"),
            (f"{first} right, {second} left", "right left"),
            (f"{first} above, {second} below", "above below"),
        ],
        value="",
        label="Where each may appear",
        info="In halves of their own their colours mix less.",
    )


def _wire(controls: dict[str, Any], handlers: AppHandlers) -> None:
    """Which handler answers to what."""
    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    looking = {
        "concurrency_id": "look",
        "concurrency_limit": 1,  # in order: the answer to the last change comes last
        "trigger_mode": "always_last",
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    working = {
        "concurrency_id": "pipeline",
        "concurrency_limit": 1,  # one at a time: a pipeline draws for one person
        "show_progress": "full",
        "show_progress_on": controls["status"],
        "api_visibility": "private",
    }

    def chosen(names: Sequence[str]) -> set[Any]:
        return {controls[name] for name in names}

    def listed(names: Sequence[str]) -> list[Any]:
        return [controls[name] for name in names]

    def values(data: dict[Any, Any]) -> Values:
        given = {name: data[part] for name, part in controls.items() if part in data}
        if "several" in given:
            given["several"] = uploaded_several(given["several"])
        return given

    def parts(answer: Values) -> dict[Any, Any]:
        return {controls[name]: value for name, value in answer.items()}

    def answer(handler: Callable[[Values], Values]) -> Callable:
        return lambda data: parts(handler(values(data)))

    def work(handler: Callable[..., Iterator[Values]]) -> Callable:
        def working(data: dict, tell: Any = gr.Progress()) -> Iterator[dict]:  # noqa: B008
            with tempfile.TemporaryDirectory() as folder:
                for answered in handler(values(data), Path(folder), seldom(tell)):
                    yield parts(answered)

        return working

    def pick(event: gr.SelectData) -> dict:
        return parts(handlers.pick_example(event.index))

    looked = {"inputs": chosen(OBJECT), "outputs": listed(LOOKED), **looking}
    moves = [("picture", "change", handlers.new_picture)]
    moves += [(*moved, handlers.new_square) for moved in NEW_SQUARE]
    for name, event, handler in moves:
        moved = getattr(controls[name], event)
        begun = {**quick, "trigger_mode": "always_last"}
        moved = moved(answer(handler), chosen(OBJECT), listed(DROPPED), **begun)
        moved.then(answer(handlers.look), **looked)
    for name, event in LOOK_AGAIN:
        getattr(controls[name], event)(answer(handlers.look), **looked)
    controls["marks"].input(lambda: "", None, controls["dropped"], **quick)
    wished = controls["several"].input
    wished = wished(answer(handlers.rearrange), chosen(OBJECT), listed(ARRANGED), **quick)
    wished.then(answer(handlers.glance), chosen(OBJECT), listed(HELD), **looking)
    for name in ("prompts", "words", "negative"):
        listener = controls[name].change
        listener(answer(handlers.check), chosen(DRAWING), listed(["prompt_message"]), **quick)
    listener = controls["second_file"].change
    listener(answer(handlers.new_second), chosen(DRAWING), listed(CHECKED), **looking)
    if "examples" in controls:
        controls["examples"].select(pick, None, listed(PICKED), **quick)
    saving = work(lambda values, folder, _: handlers.save_concept(values, folder))
    saved = controls["save"].click(saving, chosen(OBJECT), listed(SAVED), **working)
    current = chosen((*OBJECT, "saved_of"))
    saved.then(answer(handlers.check_saved), current, controls["saved"], **quick)

    drawing = []
    for name, drawer in (("draw", handlers.draw), ("sweep", partial(handlers.draw, sweep=True))):
        begun = controls[name].click(_begin, None, listed(("stop", *BUTTONS)), **quick, js=SHRINK)
        everything = chosen(("stop", *OBJECT, *DRAWING))
        worked = begun.then(work(drawer), everything, listed(DRAWN), **working)
        worked.then(_end, None, listed(BUTTONS), **quick)
        drawing.append(worked)
    controls["stop_button"].click(_stop, controls["stop"], listed(("given_up", "status")), **quick)
    controls["given_up"].change(None, cancels=drawing)


OFF, ON = gr.update(interactive=False), gr.update(interactive=True)

# Else the enlarged picture's place in the gallery is kept, where others come.
SHRINK = """() => {
    const escape = new KeyboardEvent("keydown", { code: "Escape", bubbles: true });
    document.querySelector("#gallery .preview")?.dispatchEvent(escape);
    return [];
}"""


def _begin() -> tuple[Any, ...]:
    return Stop(), OFF, OFF, ON


def _end() -> tuple[Any, ...]:
    return ON, ON, OFF


def _stop(stop: Stop) -> tuple[Any, Any]:
    """What has begun ends by itself, and says so; what still waits is given up."""
    stop.requested = True
    if stop.begun:
        return gr.skip(), gr.skip()
    return time.monotonic(), message("stopped before it began")
