"""Controls of the page: pictures and files as they were uploaded, and galleries."""

import os
from abc import ABCMeta
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import gradio as gr
from gradio.data_classes import FileData, ImageData
from gradio.utils import get_upload_folder

from app.several import Several, read_several

# Every so many seconds Gradio deletes files that nobody has used for so many seconds.
KEEP_FILES = (600, 3600)


def uploaded_path(payload: FileData | ImageData | None) -> str | None:
    """The uploaded file as it is, which lives on for now; one that was deleted is none, and the
    page says so. Refuses any other file of this machine, and addresses.

    Gradio itself checks only payloads that call themselves files.
    """
    if payload is None:
        return None
    path = Path(payload.path or "").resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise gr.Error("this is no uploaded file; upload it", print_exception=False)
    if not path.is_file():
        gr.Warning(f"{path.name} was deleted after an hour; upload it again")
        return None
    os.utime(path)
    return str(path)


def uploaded_several(text: str | None) -> Several:
    """The other pictures of an object, of uploaded files alone, without those that were deleted;
    refuses others and what is no such text, which the page does not send."""
    try:
        several = read_several(text)
    except ValueError as error:
        raise gr.Error(f"{error}", print_exception=False) from None
    there = {path for path in several.files if uploaded_path(FileData(path=path))}
    return several.without(lambda path: path not in there)


class Lasting:
    """A control that Gradio may build anew for a session, as it does where an answer leaves it as
    it is: what it makes is deleted in time, nevertheless."""

    is_template = True  # of the control that it is a kind of, to the browser
    files: ClassVar[set[str]] = set()  # of all of them

    @property
    def temp_files(self) -> set[str]:
        """Files that it has made, which the page knows of by the control that it was built with."""
        return self.files

    @temp_files.setter
    def temp_files(self, files: set[str]) -> None:
        pass


class NoStub(type(gr.Image)):  # type: ignore[misc]
    """Makes kinds of controls without the stub file that Gradio writes beside their source."""

    def __new__(cls, name: str, bases: tuple[type, ...], content: dict[str, Any]) -> type:
        return ABCMeta.__new__(cls, name, bases, content)


class UploadedImage(gr.Image, Lasting, metaclass=NoStub):
    """Hands on the file as it is, to be read by elite/: one way to read pictures, and a message
    where that fails."""

    def preprocess(self, payload: ImageData | None) -> str | None:
        return uploaded_path(payload)


class UploadedFile(gr.File, Lasting, metaclass=NoStub):
    """Hands on where the file is, as it was uploaded."""

    def preprocess(self, payload: Any) -> str | None:
        return uploaded_path(payload)


class DrawnImage(gr.Image, Lasting, metaclass=NoStub):
    """A picture that the app has made."""


class DrawnPictures(gr.Gallery, Lasting, metaclass=NoStub):
    """Several of them."""


def picture_input(**options: Any) -> gr.Image:
    """A control for a picture file; what the server puts there stays lossless, as masks must."""
    return UploadedImage(
        sources=["upload", "clipboard"], type="filepath", format="png", buttons=[], **options
    )


def gallery(label: str, buttons: Sequence[Any] = (), **options: Any) -> gr.Gallery:
    """Pictures below a line that says what they are; Gradio's own label would cover them."""
    gr.Markdown(label)
    return DrawnPictures(
        label=label,
        show_label=False,
        object_fit="contain",
        interactive=False,
        format="png",
        buttons=list(buttons),
        **options,
    )
