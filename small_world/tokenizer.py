"""A byte-level BPE of the small world's own words, in the format every CLIP tokenizer has."""

from collections.abc import Iterable
from itertools import pairwise
from string import ascii_letters, punctuation

from torch import Tensor
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from elite.open_images import PHOTO_TEMPLATES
from small_world.captions import CLASS_WORD
from small_world.world import ATTRIBUTES, HELD_OUT_KINDS, SCENES

MAX_LENGTH = 48
FRAMING_WORDS = "far away very zoomed in close up an and with on"


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(B, MAX_LENGTH)."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids


def world_words() -> list[str]:
    """Every lower-case word of captions and prompts, in a fixed order; those of held-out kinds
    are none."""
    kinds = [
        kind
        for name, values in ATTRIBUTES.items()
        for kind in values
        if kind not in HELD_OUT_KINDS.get(name, ())
    ]
    sources = (*PHOTO_TEMPLATES, CLASS_WORD, *kinds, *SCENES.values(), FRAMING_WORDS)
    text = " ".join(sources).replace("{}", " ").replace("-", " ")
    return sorted(set(text.lower().split()))


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word under the merges so far."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        pieces[at : at + 2] = ["".join(best)]
    return pieces


def build_tokenizer(more: Iterable[str] = ()) -> CLIPTokenizer:
    """The tokenizer in which each word of the world, and each of `more` (lower-case letters), is
    one token; any other text is spelled out in bytes."""
    merges: list[tuple[str, str]] = []
    for word in [*world_words(), *more]:
        pieces = _pieces(word, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = ["".join(pieces[:2]), *pieces[2:]]
    alphabet = sorted(set(bytes_to_unicode().values()) | set(ascii_letters + punctuation))
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
