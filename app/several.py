"""Several pictures of one object: what the page holds of those that its controls do not show, and
what becomes of it as pictures are added, turned to and removed."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.marking import MAX_LENGTH, share

# What the controls hold of a picture, by name, and "thumb", an address of its thumbnail or "".
Picture = dict[str, Any]

MAX_SHOWN = 8  # pictures of one object
MAX_SEVERAL = 2 * MAX_LENGTH  # characters of the text that they come in, with their marks
CONTROLS = ("picture", "squaring", "position", "method", "marks", "mask")
NEW: Picture = {
    "picture": None,
    "squaring": "crop",
    "position": 0.5,
    "method": "centre",
    "marks": "",
    "mask": None,
    "thumb": "",
}


@dataclass(frozen=True)
class Several:
    """Pictures of one object beside the one that the controls show, which has its place among them.

    Args:
        others: in order.
        at: how many of them come before the controls' picture.
        given: file that was put into the controls from here, marks and all; None for none.
        thumb: of the controls' picture.
        wanted: what the person asks for: {"add": files}, {"turn": file} or {"remove": file}, where
            "" is the controls' picture.
    """

    others: tuple[Picture, ...] = ()
    at: int = 0
    given: str | None = None
    thumb: str = ""
    wanted: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What `read_several` reads, less what is wanted; "" where there are no pictures."""
        kept = {"others": self.others, "at": self.at, "given": self.given, "thumb": self.thumb}
        return json.dumps(kept) if self.others or self.given else ""

    @property
    def files(self) -> list[str]:
        """All files that it names."""
        named = [path for one in self.others for path in (one["picture"], one["mask"])]
        return [path for path in (*named, *self.wanted.get("add", ())) if path]

    def without(self, is_gone: Callable[[str], bool]) -> "Several":
        """Without files that are gone: pictures, and masks of pictures."""
        kept = [not is_gone(one["picture"]) for one in self.others]
        others = [
            {**one, "mask": None} if one["mask"] and is_gone(one["mask"]) else one
            for one, is_kept in zip(self.others, kept, strict=True)
            if is_kept
        ]
        wanted = dict(self.wanted)
        if "add" in wanted:
            wanted["add"] = [path for path in wanted["add"] if not is_gone(path)]
        return replace(self, others=tuple(others), at=sum(kept[: self.at]), wanted=wanted)

    def pictures(self, controls: Mapping[str, Any]) -> list[Picture]:
        """All pictures in order, with that of the controls where they hold one.

        Raises:
            ValueError: too many.
        """
        own = {**{name: controls[name] for name in CONTROLS}, "thumb": self.thumb}
        shown, held = [own] if own["picture"] else [], self.merged(controls)
        return checked([*held.others[: held.at], *shown, *held.others[held.at :]])

    def merged(self, controls: Mapping[str, Any]) -> "Several":
        """This with each picture once, and none that the controls show."""
        seen, others, at = {controls["picture"]}, list[Picture](), self.at
        for place, one in enumerate(self.others):
            if one["picture"] not in seen:
                others.append(one)
            elif place < self.at:
                at -= 1
            seen.add(one["picture"])
        return replace(self, others=tuple(others), at=at)

    def rearranged(self, controls: Mapping[str, Any]) -> tuple["Several", Picture]:
        """After what is wanted: this, and the picture that the controls are to show.

        Raises:
            ValueError: a picture is there already or not at all, or there are too many.
        """
        wanted: Any
        wish, wanted = next(iter(self.wanted.items()), ("turn", ""))
        pictures = self.pictures(controls)
        files = [one["picture"] for one in pictures]
        if wish == "add":
            added = [path for path in dict.fromkeys(wanted) if path not in files]
            if not added:
                raise ValueError(f"{names(wanted)}: among the pictures of the object already")
            pictures = checked([*pictures, *({**NEW, "picture": path} for path in added)])
            return turned(pictures, len(files))
        file = wanted or controls["picture"]
        if file not in files and wish == "remove":  # deleted, and so gone already
            return turned(pictures, min(self.at, max(0, len(pictures) - 1)))
        if file not in files:
            raise ValueError("no such picture of the object; it may have been deleted by now")
        place = files.index(file)
        if wish == "turn":
            return turned(pictures, place)
        del pictures[place]
        at = self.at - (place < self.at)
        return turned(pictures, max(0, min(at, len(pictures) - 1)))


def checked(pictures: list[Picture]) -> list[Picture]:
    """The pictures. Raises ValueError where they are too many."""
    if len(pictures) > MAX_SHOWN:
        raise ValueError(f"{len(pictures)} pictures; show at most {MAX_SHOWN} of one object")
    return pictures


def turned(pictures: list[Picture], place: int) -> tuple[Several, Picture]:
    """Of these pictures: the one at this place, for the controls, after what is held of the others;
    an empty one where there are none."""
    own = pictures[place] if pictures else NEW
    others = (*pictures[:place], *pictures[place + 1 :])
    return Several(others, place, own["picture"], own["thumb"]), own


@contextmanager
def numbered(number: int, count: int) -> Iterator[None]:
    """Within it, mistakes say which of several pictures they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"picture {number}: {error}" if count > 1 else str(error)) from None


def names(paths: list[str]) -> str:
    return ", ".join(Path(path).name for path in paths)


def read_several(text: str | None) -> Several:
    """What the page holds, from its text: JSON of the fields of `Several`.

    Raises:
        ValueError: the text is something else, or too long.
    """
    if not text:
        return Several()
    if len(text) > MAX_SEVERAL:
        raise ValueError("too much is painted on all pictures together; clear some of the marks")
    try:
        content = json.loads(text)
        several = Several(
            others=tuple(map(_read_picture, content["others"])),
            at=content["at"],
            given=content["given"],
            thumb=_text(content["thumb"]),
            wanted=_read_wanted(content.get("wanted") or {}),
        )
        if several.at not in range(len(several.others) + 1):
            raise ValueError
        return several
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("the pictures of the object cannot be read; reload the page") from None


def _read_picture(content: Mapping[str, Any]) -> Picture:
    texts = {name: _text(content[name]) for name in ("picture", "squaring", "method", "marks")}
    mask = None if content["mask"] is None else _text(content["mask"])
    position, thumb = share(content["position"]), _text(content["thumb"])
    return {**texts, "position": position, "mask": mask, "thumb": thumb}


def _read_wanted(content: Mapping[str, Any]) -> dict[str, Any]:
    if not content:
        return {}
    ((wish, wanted),) = content.items()
    if wish == "add":
        return {wish: [_text(path) for path in wanted]}
    if wish not in ("turn", "remove"):
        raise ValueError
    return {wish: _text(wanted)}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value
