"""What is evaluated: concepts with their reference pictures, and the prompts.

Three layouts: a folder of NAME.jpg + NAME_bg.png pairs, each its own subject; DreamBench's, a
folder of pictures per subject, of which the first one with a mask beside it is the input and all
are references; and DreamBench++'s, images/ and captions/, where each picture has prompts of its
own.
"""

import ast
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from elite.config import read_yaml
from elite.data import Pair, PairFolder, is_picture, pair_of, pictures_in
from elite.files import digest_files, read_text, with_text_names
from elite.images import object_box, read_image
from elite.wording import brief, note

KINDS = ("object", "living")


@dataclass(frozen=True)
class Prompts:
    """What is drawn of each subject: templates with {} by kind, and the subjects' class words."""

    templates: Mapping[str, tuple[str, ...]]
    classes: Mapping[str, str] = field(default_factory=dict)
    living: frozenset[str] = frozenset()  # class words of the second kind

    def of(self, class_word: str) -> tuple[str, ...]:
        kind = "living" if class_word in self.living else "object"
        return self.templates[kind]


@dataclass(frozen=True)
class Subject:
    """One concept: the picture and mask it is read from, the pictures it is compared with, and the
    templates of prompts that are its own."""

    name: str
    class_word: str
    pair: Pair
    reference_paths: tuple[Path, ...]
    templates: tuple[str, ...] = ()

    def references(self, cropped: bool) -> list[Image.Image]:
        """The pictures to compare with; cropped to the object's box where there is a mask."""
        pictures = []
        for path in self.reference_paths:
            pair = pair_of(path)
            if cropped and pair.mask_path.exists():
                image, mask = pair.read()
                image = image[object_box(mask)]
            else:
                image = read_image(path)
            pictures.append(Image.fromarray(image))
        return pictures

    def measured_with(self, cropped: bool) -> str:
        """What scores of its pictures depend on besides these: the class word, and a digest of the
        files of its references."""
        masks = [pair_of(path).mask_path for path in self.reference_paths] if cropped else []
        return f"{self.class_word}, {digest_files(*self.reference_paths, *masks)}"


def read_subjects(root: Path | str, classes: Mapping[str, str], default: str) -> list[Subject]:
    """The subjects of a folder of pairs, or of the layout of DreamBench or DreamBench++, by name.

    Args:
        classes: class word by subject name.
        default: class word of the others.

    Raises:
        ValueError: no such folder, nothing in it, a subject without a mask, or two of one name.
    """
    subjects = sorted(_read_layout(Path(root), classes, default), key=lambda one: one.name)
    for one, other in itertools.pairwise(subjects):
        if one.name == other.name:  # and so would overwrite its pictures
            raise ValueError(
                f"{other.pair.image_path}: has the name of {one.pair.image_path}, {one.name}; "
                "rename one of them"
            )
    return subjects


def _read_layout(root: Path, classes: Mapping[str, str], default: str) -> list[Subject]:
    if (root / "images").is_dir() and (root / "captions").is_dir():
        return _read_plus(root)
    inside = with_text_names(root, root.glob("[!.]*/"))
    folders = sorted(path for path in inside if any(map(is_picture, path.iterdir())))
    beside = pictures_in(root) if folders else []
    holds_pairs = any(pair_of(path).mask_path.exists() for path in beside)
    if left_out := folders if holds_pairs else beside:
        note(
            f"{root}: holds pictures and folders of pictures; {left_out[0].name} is left out, and "
            f"{len(left_out) - 1} more"
        )
    if folders and not holds_pairs:
        return [_read_folder(folder, classes.get(folder.name, default)) for folder in folders]
    return [
        Subject(pair.name, classes.get(pair.name, default), pair, (pair.image_path,))
        for pair in PairFolder(root, folders=False).pairs
    ]


def _read_folder(folder: Path, class_word: str) -> Subject:
    pictures = pictures_in(folder)
    pairs = [pair_of(path) for path in pictures]
    with_mask = [pair for pair in pairs if pair.mask_path.exists()]
    if not with_mask:
        raise ValueError(
            f"{folder}: no picture has a mask; draw the object of one in white on black and save "
            f"it as {pairs[0].mask_path.name}"
        )
    return Subject(folder.name, class_word, with_mask[0], tuple(pictures))


def _read_plus(root: Path) -> list[Subject]:
    """images/KIND/00.jpg with a mask 00_bg.png beside it, and captions/KIND/00.txt: the subject's
    word, then a prompt a line. Raises ValueError where none has a mask."""
    paths = sorted(path for path in (root / "images").rglob("*") if is_picture(path))
    pairs = [pair_of(path) for path in paths]
    with_mask = [pair for pair in pairs if pair.mask_path.exists()]
    if not with_mask:
        raise ValueError(
            f"{root}: no picture of images/ has a mask NAME_bg.png; data_scripts/make_masks.py "
            "makes those of a folder"
        )
    if len(with_mask) < len(pairs):
        note(f"{root}: {len(pairs) - len(with_mask)} pictures without a mask are left out")
    return [_read_captions(root, pair) for pair in with_mask]


def _read_captions(root: Path, pair: Pair) -> Subject:
    place = pair.image_path.relative_to(root / "images").with_suffix("")
    path = root / "captions" / place.with_suffix(".txt")
    text = read_text(path, "expected the subject's word, and a prompt a line")
    word, *captions = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    captions = list(dict.fromkeys(captions))
    usable = [caption for caption in captions if "{" not in caption]  # which would be a template
    a_word = re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)
    found = [a_word.subn("{}", caption, count=1) for caption in usable]
    templates = tuple(template for template, count in found if count)
    if not templates:
        raise ValueError(f"{path}: no prompt with the subject's word {brief(word)} in it")
    if len(templates) < len(captions):
        missing = len(captions) - len(templates)
        note(f"{path}: {missing} prompts without {brief(word)}, or with a brace, are left out")
    return Subject("_".join(place.parts), word, pair, (pair.image_path,), templates)


# --- prompts --------------------------------------------------------------------------------------


def read_prompts(path: Path | str) -> Prompts:
    """Prompts from our YAML, or from DreamBench's own `prompts_and_classes.txt`.

    Raises:
        ValueError: neither, or a prompt without {}.
    """
    if Path(path).suffix == ".txt":
        return _read_dreambench(Path(path))
    content = read_yaml(path)
    if unknown := content.keys() - {"prompts", "classes", "living"}:
        raise ValueError(f"{path}: unknown {sorted(unknown)[0]}; expected prompts, classes, living")
    templates = content.get("prompts")
    if not isinstance(templates, dict) or not templates.keys() <= set(KINDS):
        raise ValueError(f"{path}: prompts: expected lists under {' and '.join(KINDS)}")
    classes, living = content.get("classes") or {}, content.get("living") or []
    words = [*classes, *classes.values(), *living] if isinstance(classes, dict) else [classes]
    if not isinstance(living, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path}: expected classes as NAME: WORD, and living as a list of words")
    return _checked(path, templates, classes, living)


def _read_dreambench(path: Path) -> Prompts:
    """The text file of DreamBench: a table of subjects, and two Python lists of prompts.

    Its prompts name a token and a class word, '{0} {1}'; ELITE's word stands for both.
    """
    text = read_text(path, "expected DreamBench's file, which github.com/google/dreambooth has")
    table, _, lists = text.partition("Prompts")
    rows = ([part.strip() for part in line.split(",")] for line in table.splitlines())
    classes = {row[0]: row[1] for row in rows if _is_class_row(row)}
    halves = re.split(r"Live Subject", lists, maxsplit=1)
    try:
        templates = {kind: _quoted(half) for kind, half in zip(KINDS, halves, strict=False)}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: a prompt is no Python string ({error}); correct it") from None
    return _checked(path, templates, classes, ["dog", "cat"])


def _is_class_row(row: list[str]) -> bool:
    """Whether these parts of a line are a subject's name and class word."""
    if len(row) != 2 or row[0] == "subject_name":
        return False
    return bool(re.fullmatch(r"[\w-]+", row[0]) and re.fullmatch(r"[\w ]+", row[1]))


def _quoted(text: str) -> list[str]:
    """The string literals of a Python list that is never executed, with one {} in each."""
    literals = re.findall(r"""('(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")\.format""", text)
    return [ast.literal_eval(literal).replace("{0} {1}", "{}") for literal in literals]


def _checked(path: Path | str, templates: Mapping, classes: dict, living: list) -> Prompts:
    """Raises ValueError where a list of prompts is missing or a prompt lacks its {}."""
    for kind in KINDS if living else KINDS[:1]:
        texts = templates.get(kind)
        if not isinstance(texts, list) or not texts:
            raise ValueError(f"{path}: no prompts for {kind}; expected a list of texts with {{}}")
        for text in texts:
            if not isinstance(text, str) or text.count("{}") != 1:
                raise ValueError(f"{path}: prompt {brief(text)}: expected {{}} in it once")
            if [str(other).strip() for other in texts].count(text.strip()) > 1:
                raise ValueError(f"{path}: prompt {brief(text)} is there twice; leave one out")
    # YAML's folded texts end in a line break, which a table of results would lose.
    kinds = {kind: tuple(text.strip() for text in texts) for kind, texts in templates.items()}
    return Prompts(kinds, classes, frozenset(living))
