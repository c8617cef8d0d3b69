"""A concept: what ELITE needs to know of one object, encoded once from its picture and mask; and
its file."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from elite.families import FAMILIES, STABLE_DIFFUSION, Family
from elite.files import is_file, with_text_names, write_atomically
from elite.loading import FLOATS
from elite.wording import brief

FORMAT_VERSION = "1"
LARGEST = 65_504  # of float16
HEADER = {"format": "elite-concept", "version": FORMAT_VERSION}


@dataclass(frozen=True)
class Concept:
    """One or several objects, ready to be drawn.

    Args:
        words: w, (B, levels, D); w0 is the primary word.
        feature_tokens: f after the mask, (B, patches, D), of an object read from several pictures
            those of all, one picture after the other; None without a local mapper.
        fingerprint: of the mappers that made it.
        family: name of their model's.
    """

    words: Tensor
    feature_tokens: Tensor | None
    fingerprint: str
    family: str = STABLE_DIFFUSION.name

    def __len__(self) -> int:
        return len(self.words)

    @property
    def num_tokens(self) -> int:
        """Feature tokens of an object, 0 without a local mapper."""
        return 0 if self.feature_tokens is None else self.feature_tokens.shape[1]

    def __getitem__(self, row: int) -> "Concept":
        """One of several objects. Raises IndexError where there is no such one."""
        row = range(len(self))[row]
        return self._changed(lambda part: part[row : row + 1])

    def to(self, device: torch.device | str) -> "Concept":
        """The same on a device."""
        return self._changed(lambda part: part.to(device))

    def expand(self, count: int) -> "Concept":
        """One object, `count` times."""
        return self._changed(lambda part: part.expand(count, -1, -1))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Concept":
        """The same change made to words and feature tokens."""
        tokens = self.feature_tokens
        return replace(
            self,
            words=change(self.words),
            feature_tokens=None if tokens is None else change(tokens),
        )

    def as_one(self) -> "Concept":
        """These objects as pictures of the same one: its words are their mean, and its local branch
        reads the feature tokens of all, (1, pictures x patches, D).

        Deviation: the release reads one picture of an object.
        """
        tokens = self.feature_tokens
        return replace(
            self,
            words=self.words.mean(dim=0, keepdim=True),
            feature_tokens=None if tokens is None else tokens.flatten(0, 1)[None],
        )

    def check_mappers(self, fingerprint: str, family: Family = STABLE_DIFFUSION) -> None:
        """Raises ValueError where the mappers of this fingerprint did not make the concept."""
        if self.family != family.name:
            own = FAMILIES.get(self.family)
            raise ValueError(
                f"concept was made for {own.title if own else brief(self.family)}, this model is "
                f"{family.title}; encode it again with this pipeline"
            )
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"concept was made by other mappers (fingerprint {self.fingerprint}, these are "
                f"{fingerprint}) or an earlier version; encode it again with this pipeline"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What its file holds, on the CPU."""
        parts = {"words": self.words, "feature_tokens": self.feature_tokens}
        return {k: x.detach().cpu().contiguous() for k, x in parts.items() if x is not None}

    @property
    def digest(self) -> str:
        """A short name for these values, the same for a file written again."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path | str, origin: Mapping[str, str] | None = None) -> None:
        """Writes a safetensors file (a few hundred kB at Stable Diffusion size), whole or not at
        all.

        Args:
            origin: what it was encoded from, for `is_saved`.
        """
        metadata = {**(origin or {}), **HEADER, "fingerprint": self.fingerprint}
        if self.family != STABLE_DIFFUSION.name:  # which files without a family are of
            metadata["family"] = self.family
        content = save(self.tensors, metadata)  # save_file lets nobody else read its file
        write_atomically(path, lambda temporary: temporary.write_bytes(content))

    @classmethod
    def load(cls, path: Path | str) -> "Concept":
        """Reads what `save` wrote. Raises ValueError where the file is something else."""
        if not is_file(path):
            raise ValueError(f"{path}: no such file; expected a concept")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: not a safetensors file ({error}); encode the concept again"
            ) from None
        is_concept = metadata.get("format") == HEADER["format"] and "fingerprint" in metadata
        if not is_concept or "words" not in tensors:
            raise ValueError(f"{path}: not a concept; expected a file written by Concept.save")
        if metadata.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{path}: concept format {metadata.get('version')}, this version reads "
                f"{FORMAT_VERSION}; encode it again"
            )
        concept = cls(
            tensors["words"],
            tensors.get("feature_tokens"),
            metadata["fingerprint"],
            metadata.get("family", STABLE_DIFFUSION.name),
        )
        if not concept.is_sound:
            raise ValueError(
                f"{path}: words or feature tokens of a wrong shape or type, or not numbers; "
                "encode the concept again"
            )
        return concept

    @property
    def is_sound(self) -> bool:
        """Whether shapes and types are those of a concept, and every value is a number that half
        precision holds too."""
        parts = [self.words, *([] if self.feature_tokens is None else [self.feature_tokens])]
        if any(part.ndim != 3 or not part.numel() or part.dtype not in FLOATS for part in parts):
            return False
        fit = {(len(part), part.shape[2]) for part in parts}
        return len(fit) == 1 and all(bool((part.abs() <= LARGEST).all()) for part in parts)

    @staticmethod
    def stack(concepts: "list[Concept]") -> "Concept":
        """One batch of concepts from several, all of the same mappers and of equally many
        pictures."""
        if len({concept.fingerprint for concept in concepts}) > 1:
            raise ValueError(
                "concepts come from different mappers; encode them with the same pipeline"
            )
        if len({concept.num_tokens for concept in concepts}) > 1:
            raise ValueError(
                "concepts with different numbers of feature tokens (of more pictures, or encoded "
                "without a local mapper) do not fit in one batch; draw them one at a time"
            )
        tokens = [c.feature_tokens for c in concepts if c.feature_tokens is not None]
        return replace(
            concepts[0],
            words=torch.cat([concept.words for concept in concepts]),
            feature_tokens=torch.cat(tokens) if tokens else None,
        )


def is_saved(path: Path, origin: Mapping[str, str]) -> bool:
    """Whether the concept file is there, whole, and says that it is of this origin."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except (SafetensorError, OSError):
        return False
    return {**origin, **HEADER}.items() <= found.items()


def load_one(path: Path | str) -> Concept:
    """The one object of a concept file.

    Raises:
        ValueError: the file is no concept, or holds several objects; the message names it.
    """
    concept = Concept.load(path)
    if len(concept) != 1:
        raise ValueError(
            f"{path}: holds {len(concept)} objects, expected one; save each row on its own"
        )
    return concept


class ConceptFolder:
    """The concept files NAME.safetensors of a folder, by name, or one such file.

    Raises:
        ValueError: no such file or folder, or no concept file in it.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        if not is_file(path) and not path.is_dir():
            raise ValueError(
                f"{path}: no such file or folder; expected concept files as encode.py writes them"
            )
        self.paths = [path]
        if path.is_dir():
            self.paths = sorted(with_text_names(path, path.glob("[!.]*.safetensors")))
        if not self.paths:
            raise ValueError(
                f"{path}: no concept file (*.safetensors) in it; encode.py writes them"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Concept:
        """The one object of a file, as `load_one`."""
        return load_one(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index].stem

    def digest(self, index: int) -> str:
        """A short name for the object of a file; empty where there is none."""
        try:
            return self.read(index).digest
        except ValueError:  # whoever draws it says why
            return ""
