"""The placeholder in the prompt: where it stands among the tokens, and the words put in its place
(paper section 3.2)."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase


def find_placeholder(prompt: str, placeholder: str) -> int:
    """Character position of the placeholder as a whole word of the prompt, case-sensitive.

    Deviation: the release counts words between blanks and falls back to position 0; here "S," and
    "close-up of a S" are found, and a placeholder that is absent or there twice is a ValueError.
    """
    found = [
        match.start() for match in re.finditer(rf"(?<!\w){re.escape(placeholder)}(?!\w)", prompt)
    ]
    if len(found) != 1:
        count = "no" if not found else f"{len(found)} times the"
        raise ValueError(
            f"prompt {prompt!r} has {count} placeholder {placeholder!r}; write it exactly once, "
            "as a word of its own"
        )
    return found[0]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], placeholder: str, num_words: int = 1
) -> tuple[Tensor, Tensor]:
    """Token ids (B, 77) of the prompts and the placeholder's position in each, (B,).

    Args:
        tokenizer: a fast CLIP tokenizer.
        prompts: each with the placeholder in it once.
        placeholder: a word of a single token.
        num_words: how many words will replace it; they must fit.

    Raises:
        ValueError: placeholder absent, twice, of several tokens, or the words would run past the
        last token.
    """
    starts = [find_placeholder(prompt, placeholder) for prompt in prompts]
    length = tokenizer.model_max_length
    encoded = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    positions = []
    for prompt, start in zip(prompts, starts, strict=True):
        whole = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        spans = whole["offset_mapping"]
        covering = [
            i for i, (a, b) in enumerate(spans) if a < start + len(placeholder) and b > start
        ]
        if len(covering) != 1:
            raise ValueError(
                f"placeholder {placeholder!r} is {len(covering)} tokens for this tokenizer; "
                "choose a word of one token"
            )
        _check_room(prompt, covering[0], num_words, length)
        positions.append(covering[0])
    return encoded["input_ids"], torch.tensor(positions)


def _check_room(prompt: str, index: int, num_words: int, length: int) -> None:
    # A placeholder at the very last place has been cut off in favour of the end token.
    if index + num_words > length or index == length - 1:
        raise ValueError(
            f"prompt {prompt!r} is too long: its placeholder is token {index}, the text encoder "
            f"reads {length} "
            f"and {num_words} word(s) must fit; shorten what stands before it"
        )


def inject_words(embeddings: Tensor, words: Tensor, index: Tensor) -> Tensor:
    """Puts words in place of the placeholder; what follows moves right and falls off at the end.

    Args:
        embeddings: token embeddings without positions, (B, 77, D).
        words: (B, L, D).
        index: placeholder positions (B,), each with index + L <= 77.

    Returns:
        (B, 77, D).
    """
    length, num_words = embeddings.shape[1], words.shape[1]
    if int(index.max()) + num_words > length:
        raise ValueError(
            f"{num_words} words at position {int(index.max())} run past the {length} tokens of "
            "the text encoder"
        )
    position = torch.arange(length, device=embeddings.device)[None]  # (1, 77)
    offset = position - index[:, None]  # 0 at the placeholder
    source = torch.where(offset > 0, (position - num_words + 1).clamp(min=0), position)
    kept = embeddings.gather(1, source[..., None].expand_as(embeddings))
    word = words.to(embeddings).gather(
        1, offset.clamp(0, num_words - 1)[..., None].expand(-1, -1, words.shape[2])
    )
    inside = (offset >= 0) & (offset < num_words)
    return torch.where(inside[..., None], word, kept)


@contextmanager
def injected(text_encoder: CLIPTextModel, words: Tensor, index: Tensor) -> Iterator[None]:
    """Within it, this text encoder (no other instance) reads `words` where the placeholder
    stands."""
    embedding = text_encoder.get_input_embeddings()
    hook = embedding.register_forward_hook(
        lambda module, inputs, output: inject_words(output, words, index)
    )
    try:
        yield
    finally:
        hook.remove()


def encode_text(
    text_encoder: CLIPTextModel,
    input_ids: Tensor,
    words: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Text context (B, 77, D): the last hidden state, with `words` (B, L, D) at `index` (B,) if
    given."""
    if words is None or index is None:
        return text_encoder(input_ids).last_hidden_state
    with injected(text_encoder, words, index):
        return text_encoder(input_ids).last_hidden_state
