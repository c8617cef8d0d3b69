"""Textual inversion: which rows learn, where they start, and what is read."""

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from elite.families import TOKENIZERS, encode_texts
from elite.loading import load_stable_diffusion, stock_pipeline
from elite.settings import TextualInversionConfig
from elite.wording import Note
from textual_inversion import preview
from textual_inversion.files import (
    EMBEDDING_FILES,
    load_embeddings,
    load_into,
    save_embeddings,
    spell,
)
from textual_inversion.objective import (
    ExtendedEmbedding,
    TextualInversionObjective,
    add_tokens,
    concept_rows,
    initial_rows,
)

WORD = "<cat>"


@pytest.fixture(params=["sd", "xl"])
def family(request, model_folder, xl_folder):
    """A folder of Stable Diffusion 1.x, and one of SDXL."""
    return {"sd": model_folder, "xl": xl_folder}[request.param]


@pytest.fixture
def tokenizer(model_folder) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(model_folder / "tokenizer")


@pytest.fixture
def embedding() -> torch.nn.Embedding:
    torch.manual_seed(0)
    return torch.nn.Embedding(2000, 24)


def random_rows(parts, num_vectors=2, seed=0):
    return {
        encoder: initial_rows(
            parts[encoder].get_input_embeddings(), parts[tokenizer], num_vectors, seed=seed
        )
        for encoder, tokenizer in TOKENIZERS.items()
        if encoder in parts
    }


# --- tokens and rows ------------------------------------------------------------------------------


def test_placeholder_of_several_vectors_is_spelled_as_diffusers_does(tokenizer):
    ids = add_tokens(tokenizer, WORD, 3)
    assert spell(WORD, 3) == ["<cat>", "<cat>_1", "<cat>_2"]
    assert ids == list(range(len(tokenizer) - 3, len(tokenizer)))
    words = tokenizer("a <cat> <cat>_1 <cat>_2 in the snow").input_ids
    assert [i for i in words if i >= ids[0]] == ids


@pytest.mark.parametrize("placeholder", ["critter", "S"])
def test_word_of_the_model_is_no_placeholder(tokenizer, placeholder):
    with pytest.raises(ValueError, match=f"{placeholder}.* is a token of this model already"):
        add_tokens(tokenizer, placeholder, 1)


def test_extended_embedding_reads_old_and_new_rows(embedding):
    rows = torch.randn(2, 24)
    extended = ExtendedEmbedding(embedding, 2000, rows)
    ids = torch.tensor([[5, 2000, 2001, 1999]])
    expected = torch.stack([embedding.weight[5], rows[0], rows[1], embedding.weight[1999]])
    assert torch.equal(extended(ids)[0], expected)


def test_rows_start_from_words_in_turn(embedding, tokenizer):
    red, critter = tokenizer("red critter", add_special_tokens=False).input_ids
    rows = initial_rows(embedding, tokenizer, 3, "red critter")
    assert torch.equal(rows, embedding.weight[[red, critter, red]])
    with pytest.raises(ValueError, match="'red critter' is 2 tokens for 1 vector"):
        initial_rows(embedding, tokenizer, 1, "red critter")
    with pytest.raises(ValueError, match="is 0 tokens"):
        initial_rows(embedding, tokenizer, 1, "")


def test_random_rows_look_like_known_ones(embedding, tokenizer):
    rows = initial_rows(embedding, tokenizer, 500, seed=1)
    assert torch.equal(rows, initial_rows(embedding, tokenizer, 500, seed=1))
    assert not torch.equal(rows, initial_rows(embedding, tokenizer, 500, seed=2))
    assert rows.std() == pytest.approx(float(embedding.weight.std()), rel=0.05)
    assert rows.mean() == pytest.approx(float(embedding.weight.mean()), abs=0.05)


def test_rows_start_from_a_concept(tmp_path, pipe, concept):
    path = tmp_path / "thing.safetensors"
    concept.save(path)
    one, two = {"text_encoder": 24}, {"text_encoder": 24, "text_encoder_2": 32}
    assert torch.equal(concept_rows(path, one, 1)["text_encoder"], concept.words[0, :1])
    assert torch.equal(concept_rows(path, one, 3)["text_encoder"], concept.words[0])
    assert concept_rows(path, two, 1).keys() == one.keys()
    with pytest.raises(ValueError, match="3 words for 2 vectors; choose --num_vectors 1 or 3"):
        concept_rows(path, one, 2)
    with pytest.raises(ValueError, match="words are 24 wide, the text encoder's 768"):
        concept_rows(path, {"text_encoder": 768}, 1)
    wide = replace(concept, words=torch.randn(1, 3, 56), feature_tokens=None, family="sdxl")
    wide.save(path)
    assert [rows.shape for rows in concept_rows(path, two, 3).values()] == [(3, 24), (3, 32)]
    with pytest.raises(ValueError, match=r"concept for another family than Stable Diffusion 1.x"):
        load_embeddings(path)


def test_a_word_that_the_model_would_continue_is_no_placeholder(tokenizer):
    tokenizer.add_tokens(["<new>_2"])
    with pytest.raises(ValueError, match="'<new>_2' is a token of this model already"):
        add_tokens(tokenizer, "<new>", 2)


# --- what the objective reads ---------------------------------------------------------------------


def test_text_is_what_the_stock_pipeline_reads(family, tmp_path):
    """Trained rows, saved and loaded by diffusers, condition its pipeline as they did training."""
    objective = TextualInversionObjective(
        parts := load_stable_diffusion(family), WORD, random_rows(parts)
    )
    objective.save_pretrained(tmp_path)
    caption = f"a photo of a {WORD} in the snow"
    tokens = objective.tokens([caption])
    with torch.no_grad():
        context, added = encode_texts(
            objective.text_encoders, list(tokens.values()), torch.zeros(1, 6)
        )
    stock = stock_pipeline(load_stable_diffusion(family))
    for encoder in objective.rows:
        stock.load_textual_inversion(
            tmp_path / EMBEDDING_FILES[encoder],
            text_encoder=getattr(stock, encoder),
            tokenizer=getattr(stock, TOKENIZERS[encoder]),
        )
    with torch.no_grad():
        expected = stock.encode_prompt(
            caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    assert torch.equal(context, expected[0])
    if added:
        assert torch.equal(added["text_embeds"], expected[2])
    plain = stock_pipeline(load_stable_diffusion(family)).encode_prompt(
        caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert not torch.allclose(context, plain[0])


def test_gradients_exist_for_the_new_rows_alone(family):
    objective = TextualInversionObjective(
        parts := load_stable_diffusion(family), WORD, random_rows(parts)
    )
    batch = {
        "pixels": torch.rand(2, 3, 32, 32),
        "caption": [f"a {WORD}", f"a photo of a {WORD}"],
        "size_and_crop": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2),
        "seed": torch.tensor([1, 2]),
    }
    objective(batch)["loss"].backward()
    with_gradient = [n for n, p in objective.named_parameters() if p.grad is not None]
    assert len(with_gradient) == len(objective.rows)
    assert all(name.endswith("token_embedding.learned") for name in with_gradient)
    assert all(rows.learned.grad.any() for rows in objective.rows.values())


def test_caption_without_room_for_the_word_is_refused(model_folder):
    objective = TextualInversionObjective(
        parts := load_stable_diffusion(model_folder), WORD, random_rows(parts, num_vectors=4)
    )
    with pytest.raises(ValueError, match=r"too long: the learned word '<cat>', 4 token"):
        objective.tokens(["red " * 72 + WORD])
    assert objective.tokens(["red " * 71 + WORD])["text_encoder"].shape == (1, 77)


def context(pipe, prompt):
    """What the UNet reads of a prompt."""
    with torch.no_grad():
        return pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]


def test_capital_letters_of_a_word_keep_its_vectors(family):
    """They are the same to the tokenizer; diffusers' own reading loses all but the first."""
    contexts = []
    for name in ("<mycat>", "<MyCat>"):
        stock = stock_pipeline(parts := load_stable_diffusion(family))
        rows = random_rows(parts, num_vectors=3)
        load_into(stock, {encoder: {name: some} for encoder, some in rows.items()})
        contexts += [context(stock, f"a {word} on a mug") for word in ("<mycat>", "<MyCat>")]
    assert all(torch.equal(contexts[0], other) for other in contexts[1:])
    stock = stock_pipeline(parts := load_stable_diffusion(family))
    first = {encoder: {"<mycat>": rows[encoder][:1]} for encoder in rows}
    load_into(stock, first)
    assert not torch.equal(context(stock, "a <mycat> on a mug"), contexts[0])


def test_diffusers_alone_reads_every_vector_of_a_file(model_folder, tmp_path):
    rows = random_rows(parts := load_stable_diffusion(model_folder), num_vectors=3)
    path = tmp_path / "learned_embeds.safetensors"
    with pytest.warns(Note, match=r"'<MyCat>' is written as '<mycat>'; type that"):
        save_embeddings(path, {"<MyCat>": rows["text_encoder"]})
    ours = stock_pipeline(load_stable_diffusion(model_folder))
    load_into(ours, load_embeddings(path))
    plain = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    plain.load_textual_inversion(path)
    assert torch.equal(context(plain, "a <mycat>"), context(ours, "a <MyCat>"))


@pytest.mark.parametrize("word", [WORD, "<Cat>"])
def test_previews_read_the_tokens_that_training_reads(model_folder, word, monkeypatch):
    parts = load_stable_diffusion(model_folder)
    objective = TextualInversionObjective(parts, word, random_rows(parts))
    config = TextualInversionConfig(
        pretrained_model_name_or_path="",
        train_data_dir="",
        placeholder_token=word,
        num_infer_images=1,
        resolution=32,
    )
    monkeypatch.setattr(preview, "PREVIEW_STEPS", 1)
    read = []
    hook = parts["text_encoder"].register_forward_pre_hook(
        lambda module, args: read.append(args[0])
    )
    preview.PromptPreview(config, parts)()
    hook.remove()
    expected = objective.tokens([f"a photo of a {word}"])["text_encoder"]
    assert (expected >= objective.rows["text_encoder"].first_id).sum() == 2
    assert any(torch.equal(ids, expected) for ids in read)
