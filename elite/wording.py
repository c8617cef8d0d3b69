"""How messages quote a stranger's input: short, on one line, without control characters."""

import difflib
import reprlib
import warnings
from collections.abc import Iterable

SHOWN = 200  # characters of one value
LONGEST = 1500  # characters of a message


class _Short(reprlib.Repr):
    def repr_instance(self, x: object, level: int) -> str:
        """Of arrays and tensors, which are many lines, the shape."""
        if isinstance(shape := getattr(x, "shape", None), tuple):
            return f"{type(x).__name__} of shape {tuple(shape)}"
        return super().repr_instance(x, level)


_short = _Short()
_short.maxstring = _short.maxother = _short.maxlong = SHOWN
_short.maxlevel = 2  # a nested YAML of ten aliases would fill the memory
_short.maxlist = _short.maxdict = _short.maxtuple = 4


class Note(UserWarning):
    """Something that is done as asked, but may not be meant; scripts show it as one line."""


class ShareNote(Note):
    """A note about a file that perhaps one process of `accelerate launch` alone has read."""


def note(message: str, kind: type[Note] = Note) -> None:
    """Tells the user, once for each message."""
    warnings.warn(message, kind, stacklevel=2)


def brief(value: object) -> str:
    """`repr`, but never long."""
    return _short.repr(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one most like it, if any is."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]}?" if match else ""


def first_line(error: Exception) -> str:
    """The beginning of what an exception says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:SHOWN]


def one_line(text: object) -> str:
    """The text without line breaks and control characters; a long one loses its middle."""
    parts = str(text).strip()
    if len(parts) > LONGEST:
        parts = f"{parts[: LONGEST // 2]} ... {parts[-LONGEST // 3 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in parts)
