"""What the placeholders of a prompt stand for: which concepts, which of their words, with what
weight, and where.

A prompt with regions is read several times: once for where no region is, with all words as they
are, and once for each region, in which the words of all concepts that have regions are its own. A
text encoder carries a word into all that follows it, so that "a S1 next to a S2", read once, would
tell every place of S1.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elite.concept import Concept
from elite.images import ImageLike, as_mask
from elite.kinds import is_whole
from elite.wording import brief

Words = int | Literal["all"]
ConceptLike = Concept | Path | str  # or the file of one
# By placeholder: one, or one per prompt.
Concepts = Mapping[str, ConceptLike | Sequence[ConceptLike]]
Weights = float | Sequence[float]  # one, or one per prompt


def concepts_by_name(
    concept: ConceptLike | Sequence[ConceptLike] | None, concepts: Concepts | None, placeholder: str
) -> Concepts:
    """Concepts by placeholder, whichever way they were given."""
    if not isinstance(placeholder, str):
        raise ValueError(f"placeholder_token is {brief(placeholder)}; expected a word")
    if concept is None:
        named = {} if concepts is None else concepts
        if not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named):
            raise ValueError(f'concepts are {brief(concepts)}; expected {{"S1": a, "S2": b}}')
        return named
    if concepts is not None:
        raise ValueError("concept and concepts are both given; put all into concepts")
    return {placeholder: concept}


def weights_by_name(
    lambda_: Weights | Mapping[str, Weights], names: Sequence[str]
) -> dict[str, Weights]:
    """The weight of every concept."""
    if not isinstance(lambda_, Mapping):
        return dict.fromkeys(names, lambda_)
    if set(lambda_) != set(names):
        raise ValueError(
            f"lambda_ is given for {', '.join(lambda_) or 'nothing'}; expected one for each of "
            f"{', '.join(names)}"
        )
    return dict(lambda_)


def as_weight(weight: Weights) -> Tensor:
    """One number, or one per prompt. Raises ValueError where it is something else."""
    try:
        given = torch.as_tensor(weight)
    except (TypeError, ValueError, RuntimeError):
        given = torch.tensor(torch.nan)
    is_real = given.dtype != torch.bool and not given.is_complex()
    if not is_real or given.ndim > 1 or not given.float().isfinite().all():
        raise ValueError(f"lambda_ is {brief(weight)}; expected a number, or one per prompt")
    return given.float()


def latent_regions(
    regions: Mapping[str, ImageLike], names: Sequence[str], height: int, width: int
) -> dict[int, Tensor]:
    """The share of each latent that lies in a region, (height, width), by the place of its concept
    among the names."""
    unknown = set(regions) - set(names)
    if unknown:
        of = ", ".join(sorted(map(str, unknown)))
        raise ValueError(f"region of {of}: no such concept; there are {', '.join(names)}")
    shares = {}
    for name, region in regions.items():
        mask = as_mask(region, f"region of {name}")
        if not mask.any():
            raise ValueError(f"region of {name} is empty; paint white where it may appear")
        pixels = torch.from_numpy(mask.astype(np.float32))[None, None]
        shares[names.index(name)] = F.adaptive_avg_pool2d(pixels, (height, width))[0, 0]
    return shares


def words_of_readings(words: Tensor, regions: Collection[int]) -> list[Tensor]:
    """The words (B, N, L, D) that each reading of the prompt has in place of the N concepts."""
    readings = [words]
    for n in regions:
        own = words.clone()
        own[:, list(regions)] = words[:, [n]]
        readings.append(own)
    return readings


def places_in_readings(index: Tensor, n: int, regions: Collection[int], text_length: int) -> Tensor:
    """Where all readings, one after the other, have words of concept n: (B, places), of its
    positions (B, N) in one."""
    places = [index[:, [n]]]
    for reading, owner in enumerate(regions, start=1):
        stands_for = list(regions) if owner == n else [] if n in regions else [n]
        places.append(index[:, stands_for] + reading * text_length)
    return torch.cat(places, dim=1)


def row_per_prompt(
    concept: ConceptLike | Sequence[ConceptLike], count: int, device: torch.device
) -> Concept:
    """`count` rows on a device: all of one concept, or each of its own.

    Raises:
        ValueError: another number of concepts, no concepts, or of different mappers.
    """
    is_one = isinstance(concept, str) or not isinstance(concept, Sequence)
    several: Sequence[Any] = [concept] if is_one else concept  # type: ignore[assignment]
    if not several:
        raise ValueError("an empty list of concepts; pass one, or one per prompt")
    stacked = Concept.stack([as_concept(one).to(device) for one in several])
    if len(stacked) not in (1, count):
        raise ValueError(
            f"{len(stacked)} concepts for {count} prompts; pass one, or one per prompt"
        )
    return stacked if len(stacked) == count else stacked.expand(count)


def as_concept(concept: ConceptLike) -> Concept:
    """That of a file, or itself. Raises ValueError where it is neither."""
    if isinstance(concept, str | Path):
        return Concept.load(concept)
    if not isinstance(concept, Concept):
        raise ValueError(f"concept is {brief(concept)}; expected that of encode_concept or a file")
    return concept


def pick_words(words: Tensor, which: Words) -> Tensor:
    """w (B, levels, D) to the words that are injected: (B, 1, D) for an index, all for "all"."""
    if which == "all":
        return words
    if not is_whole(which) or not 0 <= which < words.shape[1]:
        last = words.shape[1] - 1
        raise ValueError(f"word {which} does not exist; choose 0 to {last}, or all words")
    return words[:, which : which + 1]
