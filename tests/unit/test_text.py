"""The placeholder among the tokens, and the words put in its place."""

import pytest
import torch
from transformers import CLIPTextModel

from elite.text import (
    contains_word,
    encode_text,
    find_placeholder,
    inject_words,
    injected,
    read_prompt,
    spell_out,
    tokenize,
)
from elite.wording import Note
from tests import tiny

LENGTH = tiny.TEXT_LENGTH


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny.build_tokenizer()
    tokenizer.model_max_length = LENGTH
    return tokenizer


@pytest.fixture(scope="module")
def text_encoder() -> CLIPTextModel:
    return tiny.build_models()["text_encoder"]


# --- where the placeholder is ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "index"),  # token 0 is the start token
    [
        ("S", 1),
        ("a S", 2),
        ("a photo of a S", 5),
        ("a S, far away", 2),
        ("a photo of a S.", 5),
        ('a "S" with a photo', 3),
        ("close-up of a S", 6),  # close - up of a S
        ("a far-away S's photo", 5),
        ("a photo of s and S", 6),  # lower case is another word
        ("S-shaped", 1),
        ("a Sofa, SS and S", 9),  # s o f a , ss: 2 + ... counted below
    ],
)
def test_placeholder_is_found_by_tokens(tokenizer, prompt, index):
    if prompt.startswith("a Sofa"):
        index = 1 + len(tokenizer.tokenize("a Sofa, SS and"))
    input_ids, found = tokenize(tokenizer, [prompt], "S")
    assert found.tolist() == [index]
    assert input_ids.shape == (1, LENGTH)
    assert tokenizer.convert_ids_to_tokens(int(input_ids[0, index])) == "s</w>"


def test_words_of_several_tokens_before_the_placeholder(tokenizer):
    """The release counts words between blanks, which is wrong after any of these."""
    prompt = "an étagère, 12345 and a xylophone-like S"
    before = tokenizer.tokenize("an étagère, 12345 and a xylophone-like")
    assert len(before) > len(prompt.split())
    assert tokenize(tokenizer, [prompt], "S")[1].tolist() == [1 + len(before)]


def test_each_prompt_of_a_batch_has_its_own_position(tokenizer):
    prompts = ["S", "a photo of a S", "close-up of a S"]
    input_ids, index = tokenize(tokenizer, prompts, "S")
    assert index.tolist() == [1, 5, 6] and input_ids.shape == (3, LENGTH)
    for row, prompt in enumerate(prompts):
        assert torch.equal(tokenize(tokenizer, [prompt], "S")[0][0], input_ids[row])


def test_other_placeholders(tokenizer):
    assert tokenize(tokenizer, ["a photo of a * with a S"], "*")[1].tolist() == [5]
    assert tokenize(tokenizer, ["a photo of a photo, close"], "close")[1].tolist() == [7]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a photo of a dog", "no placeholder 'S'"),
        ("a photo of a s", "no placeholder 'S'"),
        ("a Sofa", "no placeholder 'S'"),
        ("", "no placeholder 'S'"),
        ("a S with a S", "2 times the placeholder 'S'"),
        ("S, S and S", "3 times the placeholder 'S'"),
    ],
)
def test_absent_or_repeated_placeholder(tokenizer, prompt, message):
    with pytest.raises(ValueError) as caught:
        tokenize(tokenizer, [prompt], "S")
    assert message in str(caught.value) and repr(prompt) in str(caught.value)
    assert "exactly once" in str(caught.value) and "\n" not in str(caught.value)


def test_halves_of_characters_are_refused(tokenizer):
    for prompt in ("a \ud83d S", "a S \udcff"):
        with pytest.raises(ValueError, match="none of Unicode"):
            tokenize(tokenizer, [prompt], "S")
        with pytest.raises(ValueError, match="none of Unicode"):
            read_prompt(["a", prompt], tokenizer)


def test_find_placeholder_gives_the_character():
    assert find_placeholder("close-up of a S", "S") == 14


def test_placeholder_of_several_tokens_takes_one(tokenizer):
    assert len(tokenizer.tokenize("sks")) > 1
    input_ids, index = tokenize(tokenizer, ["a photo of a sks, far away"], "sks")
    single, at = tokenize(tokenizer, ["a photo of a S, far away"], "S")
    assert index.tolist() == at.tolist() == [5]
    assert input_ids[0].tolist() == [
        int(token) if place != 5 else tokenizer.encode("sks")[1]
        for place, token in enumerate(single[0])
    ]


def test_placeholder_that_is_no_whole_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="does not keep the placeholder 'S ' apart"):
        tokenize(tokenizer, ["a S , far away"], "S ")
    with pytest.raises(ValueError, match="placeholder 'S1 cat' and another share a word"):
        tokenize(tokenizer, ["a S1 cat"], ["S1", "S1 cat"])


def prompt_with_placeholder_at(index: int) -> str:
    return " ".join(["a"] * (index - 1) + ["S"])


@pytest.mark.parametrize("num_words", [1, 2, 5])
def test_words_must_fit(tokenizer, num_words):
    """Position 76 is the end token's; words may fill the slots up to it."""
    last = min(LENGTH - num_words, LENGTH - 2)
    _, index = tokenize(tokenizer, [prompt_with_placeholder_at(last)], "S", num_words)
    assert index.tolist() == [last]
    for position in (last + 1, LENGTH - 1, LENGTH, 120):
        with pytest.raises(ValueError, match=f"too long: its placeholder is token {position},"):
            tokenize(tokenizer, [prompt_with_placeholder_at(position)], "S", num_words)


@pytest.mark.parametrize("num_words", [1, 2, 5])
def test_long_tail_is_cut_off_and_told(tokenizer, num_words):
    """The start, S and what moves S's neighbours take 1 + num_words of the tokens; one is the end's
    until words move that out."""
    read = LENGTH - 1 - max(num_words, 2)
    told: list[str] = []
    tokenize(tokenizer, ["S" + " a" * read], "S", num_words, told.append)
    assert not told
    prompt = "S" + " a" * read + " red photo"
    with pytest.warns(Note, match=r"too long: .* reads 77 tokens and leaves out 'red photo'"):
        input_ids, index = tokenize(tokenizer, [prompt], "S", num_words)
    assert index.tolist() == [1] and input_ids.shape == (1, LENGTH)


# --- learned words --------------------------------------------------------------------------------


@pytest.fixture
def learned():
    """Knows <Cat> of two vectors, and oto and <Cat>2 of one."""
    tokenizer = tiny.build_tokenizer()
    tokenizer.model_max_length = LENGTH
    tokenizer.add_tokens(["<Cat>", "<Cat>_1", "<Cat>2", "oto"])
    return tokenizer


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("a <Cat>, far away", "a <Cat> <Cat>_1, far away"),
        ("a <cat> and a <CAT>s", "a <Cat> <Cat>_1 and a <Cat> <Cat>_1s"),
        ("a <Cat> <cat>_1", "a <Cat> <Cat>_1"),
        ("a <cat>_1", "a <Cat>_1"),
        ("a <cat>2 on an oto", "a <Cat>2 on an oto"),
        ("a Photo of S", "a Photo of S"),
    ],
)
def test_learned_words_are_spelled_out_once(learned, text, spelled):
    assert spell_out(text, learned) == spell_out(spelled, learned) == spelled


def test_other_texts_stay_as_they_are(tokenizer):
    assert spell_out("a <Cat> of S", tokenizer) == "a <Cat> of S"


def test_a_word_that_is_read_in_another_is_told(learned):
    with pytest.warns(Note, match="the learned word 'oto' in 'photo'"):
        spell_out("a photo", learned)
    assert not contains_word("a photo, a fotoo", "oto")
    assert contains_word("a photo of Oto", "oto") and contains_word("two <cat>s", "<Cat>")


def test_what_is_too_long_is_told_and_learned_words_must_fit(learned, recwarn):
    fits = " ".join(["a"] * 73 + ["<cat>"])
    assert read_prompt([fits, "a"], learned) == [spell_out(fits, learned), "a"]
    assert not recwarn.list
    with pytest.warns(Note, match="leaves out 'on the beach'"):
        read_prompt(fits + " on the beach", learned)
    for prompt in ("a " + fits, "word " * 90 + "<Cat>"):
        with pytest.raises(ValueError, match=r"too long: the learned word '<Cat>', 2 token"):
            read_prompt(prompt, learned)
    with pytest.raises(ValueError, match=r"too long: the learned word 'oto', 1 token"):
        tokenize(learned, ["S " + "a " * 75 + "oto"], "S")


# --- words into the prompt ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "num_words"),
    [
        ([1, 4], 1),
        ([3, 0], 2),
        ([5, 2], 5),
        ([LENGTH - 5, 7], 5),  # words fill the last slots
        ([LENGTH - 1, LENGTH - 1], 1),
        ([0, LENGTH - 3], 3),
    ],
)
def test_injection_as_a_list(index, num_words):
    embeddings = torch.randn(2, LENGTH, 8)
    words = torch.randn(2, num_words, 8)
    out = inject_words(embeddings, words, torch.tensor(index))
    for row, at in enumerate(index):
        before, after = list(embeddings[row, :at]), list(embeddings[row, at + 1 :])
        expected = torch.stack([*before, *words[row], *after][:LENGTH])
        assert torch.equal(out[row], expected)


def test_words_past_the_end_are_refused():
    with pytest.raises(ValueError, match="5 words at position 73 run past the 77 tokens"):
        inject_words(torch.randn(2, LENGTH, 8), torch.randn(2, 5, 8), torch.tensor([1, 73]))


def test_injection_is_differentiable():
    words = torch.randn(2, 3, 8, requires_grad=True)
    inject_words(torch.randn(2, LENGTH, 8), words, torch.tensor([1, 5])).sum().backward()
    assert torch.equal(words.grad, torch.ones_like(words))


@torch.no_grad()
def test_own_embedding_as_word_changes_nothing(tokenizer, text_encoder):
    """So positions are added after the injection, and all else in the text encoder is untouched."""
    input_ids, index = tokenize(tokenizer, ["a photo of a S", "close-up of a S, far away"], "S")
    embedding = text_encoder.get_input_embeddings().weight
    words = embedding[input_ids[torch.arange(2), index]][:, None]
    plain = text_encoder(input_ids).last_hidden_state
    assert torch.equal(encode_text(text_encoder, input_ids, words, index), plain)
    assert torch.equal(encode_text(text_encoder, input_ids), plain)
    assert not torch.equal(encode_text(text_encoder, input_ids, words + 1, index), plain)


@torch.no_grad()
def test_several_words_equal_the_tokens_they_are(tokenizer, text_encoder):
    """The embeddings of "far away" in place of S give the context of the written prompt."""
    input_ids, index = tokenize(tokenizer, ["a S photo"], "S", 2)
    written = tokenizer(
        "a far away photo", padding="max_length", max_length=LENGTH, return_tensors="pt"
    )["input_ids"]
    words = text_encoder.get_input_embeddings()(written[:, 2:4])
    context = encode_text(text_encoder, input_ids, words, index)
    # The end of the text moved by one: what is read there is the padding token on both sides.
    torch.testing.assert_close(context, text_encoder(written).last_hidden_state)


@torch.no_grad()
def test_other_text_encoders_are_untouched_and_the_hook_goes(tokenizer, text_encoder):
    other = tiny.build_models(seed=3)["text_encoder"]
    input_ids, index = tokenize(tokenizer, ["a photo of a S"], "S")
    plain, other_plain = text_encoder(input_ids)[0], other(input_ids)[0]
    with injected(text_encoder, torch.ones(1, 1, 24), index):
        assert torch.equal(other(input_ids)[0], other_plain)
        assert not torch.equal(text_encoder(input_ids)[0], plain)
    assert torch.equal(text_encoder(input_ids)[0], plain)
    with pytest.raises(KeyError), injected(text_encoder, torch.ones(1, 1, 24), index):
        raise KeyError
    assert torch.equal(text_encoder(input_ids)[0], plain)
