"""Controls of the page: pictures and files as they were uploaded, and galleries."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.data_classes import FileData, ImageData
from gradio.utils import get_upload_folder

from app.several import Several, read_several

T = TypeVar("T", gr.Image, gr.File)
# Every so many seconds Gradio deletes files that nobody has used for so many seconds.
KEEP_FILES = (600, 3600)


def uploaded_path(payload: FileData | ImageData | None) -> str | None:
    """The uploaded file as it is, which lives on for now; refuses any other file of this machine,
    and addresses.

    Gradio itself checks only payloads that call themselves files.
    """
    if payload is None:
        return None
    folder = Path(get_upload_folder()).resolve()
    path = Path(payload.path or "").resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise gr.Error(
            "this is no uploaded file, or was deleted after an hour; upload it again",
            print_exception=False,
        )
    os.utime(path)
    return str(path)


def uploaded_several(text: str | None) -> Several:
    """The other pictures of an object, of uploaded files alone; refuses others and what is no such
    text, which the page does not send."""
    try:
        several = read_several(text)
    except ValueError as error:
        raise gr.Error(f"{error}", print_exception=False) from None
    for path in several.files:
        uploaded_path(FileData(path=path))
    return several


def as_uploaded(control: T) -> T:
    """Makes a control hand on the file as it is, to be read by elite/: one way to read pictures,
    and a message where that fails.

    Gradio's own reading comes back where the control itself is updated; update a group around it.
    """
    control.preprocess = uploaded_path  # type: ignore[method-assign,assignment]
    return control


def picture_input(**options: Any) -> gr.Image:
    """A control for a picture file; what the server puts there stays lossless, as masks must."""
    return as_uploaded(
        gr.Image(
            sources=["upload", "clipboard"], type="filepath", format="png", buttons=[], **options
        )
    )


def gallery(label: str, buttons: Sequence[Any] = (), **options: Any) -> gr.Gallery:
    """Pictures below a line that says what they are; Gradio's own label would cover them."""
    gr.Markdown(label)
    return gr.Gallery(
        label=label,
        show_label=False,
        object_fit="contain",
        interactive=False,
        format="png",
        buttons=list(buttons),
        **options,
    )
