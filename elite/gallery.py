"""Concept files as a repository on the hub: a README.md with a picture of each, and the upload."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from huggingface_hub import CommitOperationAdd, HfApi
from PIL import Image

from elite.cards import CARD, GALLERY_TAG, gallery_card
from elite.concept import Concept
from elite.data import PairFolder
from elite.encoding import shown
from elite.files import write_atomically, write_text
from elite.wording import first_line

PICTURES = "pictures"  # folder inside the gallery


def save_gallery(pairs: PairFolder, folder: Path, fingerprint: str, base_model: str) -> list[Path]:
    """Writes README.md and a picture (object and cut-out) for each pair of which the folder has a
    concept of these mappers; a README.md that somebody else has written stays.

    Args:
        fingerprint: of the mappers that made the concepts.
        base_model: they are drawn with; named only if it is a name on the hub.

    Returns:
        All files of the gallery, inside the folder.

    Raises:
        ValueError: there is no concept, or the disk is full.
    """
    names = []
    for index, pair in enumerate(pairs.pairs):
        path = folder / f"{pair.name}.safetensors"
        if not path.exists() or Concept.load(path).fingerprint != fingerprint:
            continue
        try:
            pairs.read_all(index)
            tiles = shown(pairs, index)
        except ValueError:  # it has been reported as one that cannot be read
            continue
        strip = Image.fromarray(np.hstack([np.asarray(tile) for tile in tiles]))
        write_atomically(folder / PICTURES / f"{pair.name}.png", strip.save)
        names.append(pair.name)
    if not names:
        raise ValueError(f"{folder}: no concept in it; nothing to upload")
    card = folder / CARD
    if not card.exists() or GALLERY_TAG.encode() in card.read_bytes():
        write_text(card, gallery_card(names, PICTURES, fingerprint, base_model))
    files = [f"{name}.safetensors" for name in names] + [f"{PICTURES}/{n}.png" for n in names]
    return [card, *(folder / file for file in files)]


def push_gallery(folder: Path, files: list[Path], repository: str, token: str | None) -> str:
    """Uploads files of a folder in one commit, to a repository that is made if it is not there.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the hub cannot be reached, or refuses.
    """
    operations = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files
    ]
    api = HfApi(token=token)
    with uploading(repository, folder):
        name = api.create_repo(repository, exist_ok=True).repo_id
        return api.create_commit(name, operations, commit_message="Upload concepts").commit_url


@contextmanager
def uploading(repository: str, folder: Path) -> Iterator[None]:
    """Raises ValueError where an upload in it fails; what it was to upload is in the folder."""
    try:
        yield
    except Exception as error:  # whatever the hub and the network raise
        raise ValueError(
            f"{repository}: not uploaded ({first_line(error)}); log in by `hf auth login` or pass "
            f"--hub_token; all files are in {folder}"
        ) from None


def repository_of(hub_model_id: str | None, folder: Path | str) -> str:
    """Where a folder is uploaded to: the repository that was named, else one of its own name."""
    return hub_model_id or Path(folder).absolute().name
