"""What the library notes while it works for a person, told to that person, not to the terminal."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from elite.wording import Note

_told: ContextVar[list[str] | None] = ContextVar("told", default=None)
_elsewhere: Any = warnings.showwarning


@contextmanager
def noted() -> Iterator[list[str]]:
    """Within it, in this thread alone, notes go into the list, every time that they come up."""
    global _elsewhere
    if (shown := warnings.showwarning) is not _show:
        _elsewhere, warnings.showwarning = shown, _show
        warnings.simplefilter("always", Note)
    told: list[str] = []
    before = _told.set(told)
    try:
        yield told
    finally:
        _told.reset(before)


def _show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    told = _told.get()
    if told is None or not issubclass(category, Note):
        _elsewhere(message, category, *where, **more)
    elif str(message) not in told:
        told.append(str(message))
