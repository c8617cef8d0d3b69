"""The placeholder in the prompt: where it stands among the tokens, and the words put in its place
(paper section 3). And the words of textual inversion beside it."""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from elite.wording import brief, note


def check_texts(*texts: str | Sequence[str] | None) -> None:
    """Raises ValueError where a text holds half of a character, which no tokenizer reads: a
    surrogate of JSON, or a byte of a command line that is not UTF-8."""
    for given in texts:
        for text in [given] if isinstance(given, str) else given or ():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"prompt {brief(text)}: its character {error.start + 1} is none of Unicode; "
                    "write it in UTF-8"
                ) from None


def find_placeholder(prompt: str, placeholder: str) -> int:
    """Character position of the placeholder as a whole word of the prompt, case-sensitive.

    Deviation: the release counts words between blanks and falls back to position 0; here "S," and
    "close-up of a S" are found, and a placeholder that is absent or there twice is a ValueError.
    """
    found = [match.start() for match in whole_word(placeholder).finditer(prompt)]
    if len(found) != 1:
        count = "no" if not found else f"{len(found)} times the"
        raise ValueError(
            f"prompt {brief(prompt)} has {count} placeholder {brief(placeholder)}; "
            "write it exactly once, as a word of its own"
        )
    return found[0]


def whole_word(placeholder: str) -> re.Pattern:
    """What finds a placeholder in prompts."""
    return re.compile(rf"(?<!\w){re.escape(placeholder)}(?!\w)")


# --- learned words --------------------------------------------------------------------------------


def learned_words(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """The words that textual inversion has added to a tokenizer, with their tokens: one for each
    vector, named as diffusers does: {"<cat>": ["<cat>", "<cat>_1"]}."""
    added = tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens)
    words = {name: [name] for name in added}
    for name, tokens in words.items():
        while (token := f"{name}_{len(tokens)}") in added:
            tokens.append(token)
    behind = {token for tokens in words.values() for token in tokens[1:]}
    return {name: tokens for name, tokens in words.items() if name not in behind}


def spell_out(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with all tokens of each learned word in it; those that are there already stay.

    Capital and small letters are the same, as to the tokenizer. (Diffusers looks for the word as
    it was added among tokens of small letters, and so reads "<Cat>" as its first vector alone.)
    """
    forms: dict[str, str] = {}
    for tokens in learned_words(tokenizer).values():
        spelled = " ".join(tokens)
        forms |= {token.lower(): token for token in tokens}
        forms |= {tokens[0].lower(): spelled, spelled.lower(): spelled}
    if not forms:
        return text
    longest_first = sorted(map(re.escape, forms), key=len, reverse=True)

    def spelled_form(match: re.Match) -> str:
        if _is_inside_word(match):
            before, after = text[: match.start()].split(" ")[-1], text[match.end() :].split(" ")[0]
            note(
                f"the tokenizer reads the learned word {match[0]!r} in "
                f"{before + match[0] + after!r}; a name such as '<{match[0]}>' is in no other word"
            )
        return forms.get(match[0].lower(), match[0])

    return re.sub("|".join(longest_first), spelled_form, text, flags=re.IGNORECASE)


def contains_word(text: str, word: str) -> bool:
    """Whether a learned word is in a text, in capital or small letters, and not just a part of
    another: "oto" is not in "a photo"."""
    found = re.finditer(re.escape(word), text, re.IGNORECASE)
    return not all(map(_is_inside_word, found))


def _is_inside_word(match: re.Match) -> bool:
    """Whether letters beside the match make it a part of a longer word."""
    before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    edges = before + match[0][0], match[0][-1] + after
    return any(re.fullmatch(r"\w\w", edge) for edge in edges)


def read_prompt(
    prompt: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int | None = None,
    tell: Callable[[str], object] = note,
) -> str | list[str]:
    """Prompts as a pipeline of diffusers should tokenize them, in place of its own
    `maybe_convert_prompt`: with learned words spelled out, and a note where it is too long.

    Args:
        length: tokens that the text encoder reads; None means the tokenizer's own.
        tell: told of text that is cut off.

    Raises:
        ValueError: a learned word is cut off, or a text is none of Unicode.
    """
    if not isinstance(prompt, str):
        return [str(read_prompt(one, tokenizer, length, tell)) for one in prompt]
    check_texts(prompt)
    text, length = spell_out(prompt, tokenizer), length or tokenizer.model_max_length
    whole = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, spans = whole["input_ids"], whole["offset_mapping"]
    if len(ids) > length:
        _tell_cut(tokenizer, text, ids, spans, length - 1, length, tell)
    return text


def _tell_cut(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    kept: int,
    length: int,
    tell: Callable[[str], object],
) -> None:
    """Reports what a text encoder of this length does not read, the tokens from `kept` on. Raises
    ValueError where learned words are among them."""
    for word, tokens in learned_words(tokenizer).items():
        if not set(ids[kept:]).isdisjoint(tokenizer.convert_tokens_to_ids(tokens)):
            raise ValueError(
                f"prompt {brief(text)} is too long: the learned word {word!r}, {len(tokens)} "
                f"token(s), runs past the {length} that the text encoder reads; shorten the prompt"
            )
    tell(
        f"prompt {brief(text)} is too long: the text encoder reads {length} tokens and leaves out "
        f"{brief(text[spans[kept][0] :])}; shorten it"
    )


# --- the placeholder ------------------------------------------------------------------------------


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    placeholders: str | Sequence[str],
    num_words: int = 1,
    tell: Callable[[str], object] = note,
) -> tuple[Tensor, Tensor]:
    """Token ids of the prompts, (B, 77), and where the placeholders stand among them.

    A placeholder takes one token, also where the tokenizer has it in several.

    Args:
        tokenizer: a fast CLIP tokenizer.
        prompts: each with every placeholder in it once.
        placeholders: one word, or N of them.
        num_words: how many words will replace each; they must fit.
        tell: called with a message about text that is cut off.

    Returns:
        Ids, and positions (B,) of one placeholder or (B, N) of N.

    Raises:
        ValueError: a placeholder is absent, twice or tied to its neighbours, or the words, or
        learned ones, would run past the last token.
    """
    several = [placeholders] if isinstance(placeholders, str) else list(placeholders)
    length = tokenizer.model_max_length
    ids, positions = [], []
    for prompt in prompts:
        tokens, spans, where = _tokens(tokenizer, prompt, several)
        for rank, place in enumerate(sorted(where)):
            _check_room(prompt, place, rank * (num_words - 1), num_words, length)
        # The end token keeps its place in a text that is too long, until words move it out.
        moved = len(several) * (num_words - 1)
        kept = length - max(moved, 1) if len(tokens) > length else length - moved
        if kept < len(tokens) - 1:
            _tell_cut(tokenizer, prompt, tokens[:-1], spans, kept, length, tell)
        ids.append(tokens if len(tokens) <= length else [*tokens[: length - 1], tokens[-1]])
        positions.append(where)
    padded = tokenizer.pad({"input_ids": ids}, padding="max_length", max_length=length)
    index = torch.tensor(positions)
    return torch.tensor(padded["input_ids"]), (
        index[:, 0] if isinstance(placeholders, str) else index
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, placeholders: Sequence[str]
) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """All ids of a prompt, one for each placeholder, where they stand in the text, and the
    placeholders' positions among them."""
    check_texts(prompt)
    whole = tokenizer(prompt, return_offsets_mapping=True, verbose=False)
    spans = whole["offset_mapping"]
    taken: set[int] = set()
    dropped: set[int] = set()
    firsts = []
    for placeholder in placeholders:
        start = find_placeholder(prompt, placeholder)
        end = start + len(placeholder)
        covering = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
        if not covering or (spans[covering[0]][0], spans[covering[-1]][1]) != (start, end):
            raise ValueError(
                f"prompt {brief(prompt)}: the tokenizer does not keep the placeholder "
                f"{brief(placeholder)} apart from its neighbours; write blanks around it or choose "
                "another word"
            )
        if not taken.isdisjoint(covering):
            raise ValueError(
                f"prompt {brief(prompt)}: placeholder {brief(placeholder)} and another share a "
                "word; choose words that are no part of each other"
            )
        taken |= set(covering)
        firsts.append(covering[0])
        dropped |= set(covering[1:])
    kept = [i for i in range(len(spans)) if i not in dropped]
    ids, spans = [whole["input_ids"][i] for i in kept], [spans[i] for i in kept]
    return ids, spans, [first - sum(i < first for i in dropped) for first in firsts]


def _check_room(prompt: str, index: int, moved: int, num_words: int, length: int) -> None:
    # A placeholder at the very last place has been cut off in favour of the end token.
    if index + moved + num_words > length or index >= length - 1:
        raise ValueError(
            f"prompt {brief(prompt)} is too long: its placeholder is token {index + moved}, the "
            f"text encoder reads {length} and {num_words} word(s) must fit; shorten what stands "
            "before it"
        )


def word_positions(index: Tensor, num_words: int) -> Tensor:
    """Where the first word of each placeholder stands after the injection; index (B, N)."""
    return index + (num_words - 1) * (index[:, None] < index[:, :, None]).sum(2)


def inject_words(embeddings: Tensor, words: Tensor, index: Tensor) -> Tensor:
    """Puts words in place of the placeholders; what follows moves right and falls off at the end.

    Args:
        embeddings: token embeddings without positions, (B, 77, D).
        words: (B, L, D) of one placeholder, or (B, N, L, D) of N.
        index: placeholder positions (B,) or (B, N), such that the words fit.

    Returns:
        (B, 77, D).
    """
    if index.ndim == 1:
        return _inject(embeddings, words, index)
    rows = torch.arange(len(index), device=index.device)
    for n in index.argsort(dim=1, descending=True).T:  # the last first, so that none moves
        embeddings = _inject(embeddings, words[rows, n], index[rows, n])
    return embeddings


def _inject(embeddings: Tensor, words: Tensor, index: Tensor) -> Tensor:
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
def injected(
    text_encoder: CLIPTextModel, words: Tensor, index: Tensor, input_ids: Tensor | None = None
) -> Iterator[None]:
    """Within it, this text encoder (no other instance, and in this thread alone) reads `words`
    where the placeholders stand, and `input_ids`, if given, in place of the ids it is called with.
    Pooled text is taken where the words have moved the end to."""
    embedding = text_encoder.get_input_embeddings()
    moved = (words.shape[-2] - 1) * index[0].numel()  # places by which words move the end
    embedded = input_ids

    def ids_given(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal embedded
        embedded = args[0] if input_ids is None else input_ids
        return (_end_moved(embedded, moved, text_encoder.config.eos_token_id), *args[1:])

    hooks = [
        text_encoder.register_forward_pre_hook(_in_this_thread(ids_given)),
        embedding.register_forward_pre_hook(_in_this_thread(lambda module, args: (embedded,))),
        embedding.register_forward_hook(
            _in_this_thread(lambda module, inputs, output: inject_words(output, words, index))
        ),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook of a module, which in other threads changes nothing."""
    owner = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == owner else None


def _end_moved(input_ids: Tensor, moved: int, end: int) -> Tensor:
    """Ids (B, 77) by which a text encoder finds the end of a text whose words have moved it; at the
    last place where they have moved it out."""
    if not moved:
        return input_ids
    start = input_ids[:, :1].expand(-1, moved)  # is no end
    ids = torch.cat([start, input_ids[:, :-moved]], dim=1)
    # CLIP's old configs call the end 2, and then the largest id is taken for it; the first counts.
    ids[:, -1] = input_ids.amax(dim=1) if end == 2 else end
    return ids


def encode_text(
    text_encoder: CLIPTextModel,
    input_ids: Tensor,
    words: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Context (B, 77, D): the last hidden state, with words in it if given, as for
    `inject_words`."""
    return text_output(text_encoder, input_ids, words, index).last_hidden_state


def text_output(
    text_encoder: CLIPTextModel,
    input_ids: Tensor,
    words: Tensor | None = None,
    index: Tensor | None = None,
    **options: Any,
) -> Any:
    """All that the text encoder gives; arguments as for `encode_text`, and its own options."""
    if words is None or index is None:
        return text_encoder(input_ids, **options)
    with injected(text_encoder, words, index):
        return text_encoder(input_ids, **options)
