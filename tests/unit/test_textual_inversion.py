"""Textual inversion: which rows learn, where they start, their files, and merging."""

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from elite.families import TOKENIZERS, encode_texts
from elite.loading import load_stable_diffusion, stock_pipeline
from elite.settings import EMBEDDING_FORMATS, TextualInversionConfig
from elite.wording import Note
from textual_inversion import preview
from textual_inversion.files import (
    EMBEDDING_FILES,
    files_of,
    load_embeddings,
    load_into,
    merge_embeddings,
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


def save_word(folder, name=WORD, num_vectors=1, width=24, encoders=("text_encoder",)):
    """Files of one word, every value its number of vectors."""
    for encoder in encoders:
        rows = torch.full((num_vectors, width), float(num_vectors))
        save_embeddings(folder / EMBEDDING_FILES[encoder], {name: rows})
    return folder


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


# --- files ----------------------------------------------------------------------------------------


def test_embeddings_of_another_width_are_refused(model_folder, tmp_path):
    stock = stock_pipeline(load_stable_diffusion(model_folder))
    embeddings = load_embeddings(save_word(tmp_path, width=48))
    with pytest.raises(ValueError, match=r"'<cat>' is 48 wide, text_encoder of this model 24"):
        load_into(stock, embeddings)


def test_xl_needs_both_files(xl_folder, tmp_path):
    stock = stock_pipeline(load_stable_diffusion(xl_folder))
    with pytest.raises(ValueError, match=r"learned_embeds_2\.safetensors"):
        load_into(stock, load_embeddings(save_word(tmp_path)))


@pytest.mark.parametrize("lacking", list(EMBEDDING_FILES))
def test_a_word_that_one_text_encoder_lacks_is_named_before_any_is_loaded(xl_folder, lacking):
    stock = stock_pipeline(parts := load_stable_diffusion(xl_folder))
    rows = random_rows(parts)
    embeddings = {encoder: {WORD: some, "<mug>": some} for encoder, some in rows.items()}
    del embeddings[lacking]["<mug>"]
    before = len(stock.tokenizer)
    with pytest.raises(ValueError, match=f"'<mug>' has no vectors for {lacking}"):
        load_into(stock, embeddings)
    assert len(stock.tokenizer) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"pickle", "not a safetensors file"),
        ({}, "not learned embeddings"),
        ({"w": torch.zeros(1, 2, 3)}, "not learned embeddings"),
        ({"": torch.zeros(1, 3)}, "'' is no placeholder"),
        ({"a\nb": torch.zeros(1, 3)}, "'a.*b' is no placeholder"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "word.safetensors"
    if isinstance(content, dict):
        save_file(content, path)
    elif content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_embeddings(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


TWO = torch.arange(48.0).reshape(2, 24)
WIDE = torch.ones(2, 32)
A1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": TWO}, "step": 7}
FORMS = {  # file, what is in it, the word, whether it is SDXL's
    "diffusers' .bin": ("learned_embeds.bin", {"<cat-toy>": TWO[0]}, "<cat-toy>", False),
    "trained parameter": ("x.bin", {"<cat>": torch.nn.Parameter(TWO)}, "<cat>", False),
    "A1111's .pt": ("file.pt", {**A1111, "name": "moody"}, "moody", False),
    "A1111's .PT without a name": ("moody.PT", {**A1111, "name": None}, "moody", False),
    "emb_params": ("EasyNeg.safetensors", {"emb_params": TWO}, "EasyNeg", False),
    "emb_params of torch": ("EasyNeg.pt", {"emb_params": TWO}, "EasyNeg", False),
    "SDXL": ("xl.safetensors", {"clip_l": TWO, "clip_g": WIDE}, "xl", True),
    "SDXL of torch": ("xl.pt", {"clip_l": TWO, "clip_g": WIDE}, "xl", True),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_about_are_read(tmp_path, form):
    name, content, word, is_xl = FORMS[form]
    save = save_file if name.endswith(".safetensors") else torch.save
    save(content, tmp_path / name)
    found = load_embeddings(tmp_path / name)
    assert list(found) == ["text_encoder", "text_encoder_2"][: 1 + is_xl]
    assert list(found["text_encoder"]) == [word]
    rows = found["text_encoder"][word]
    assert torch.equal(rows, TWO[: len(rows)]) and not rows.requires_grad
    if is_xl:
        assert torch.equal(found["text_encoder_2"][word], WIDE)


def test_folder_of_bin_files_is_read(tmp_path):
    torch.save({WORD: TWO}, tmp_path / "learned_embeds.bin")
    torch.save({WORD: WIDE}, tmp_path / "learned_embeds_2.bin")
    found = load_embeddings(tmp_path)
    assert torch.equal(found["text_encoder"][WORD], TWO)
    assert torch.equal(found["text_encoder_2"][WORD], WIDE)


class Bomb:
    """Raises when unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pt", {"string_to_param": {"*": TWO}, "name": Bomb()}, "refused, since loading any"),
        ("x.bin", Bomb(), "it is refused"),
        ("x.bin", [TWO], "not learned embeddings"),
        ("x.bin", {"step": 7}, "not learned embeddings"),
        ("x.pt", {"string_to_param": {}, "name": "x"}, "not learned embeddings"),
        ("x.pt", {**A1111, "name": 7}, "7 is no placeholder"),
        ("x.bin", {"<x>": TWO.to_sparse()}, "not learned embeddings"),
        ("x.pt", {"clip_g": WIDE}, "not learned embeddings"),
    ],
)
def test_torch_files_of_other_things_are_refused(tmp_path, name, content, message):
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_embeddings(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def words_of(*names: str, xl: bool = False) -> dict:
    found = {"text_encoder": dict.fromkeys(names, TWO)}
    return found | ({"text_encoder_2": dict.fromkeys(names, WIDE)} if xl else {})


@pytest.mark.parametrize(
    ("form", "xl", "written"),
    [
        ("diffusers", False, ["learned_embeds.safetensors"]),
        ("diffusers", True, ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]),
        ("a1111", False, ["cat.pt", "dog.pt"]),
        ("sdxl", True, ["cat.safetensors", "dog.safetensors"]),
    ],
)
def test_every_form_is_written_as_it_is_read(tmp_path, form, xl, written):
    embeddings = words_of("cat", "dog", xl=xl)
    for name, content in files_of(embeddings, form).items():
        save_embeddings(tmp_path / name, content)
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    sources = [tmp_path] if form == "diffusers" else sorted(tmp_path.iterdir())
    again = merge_embeddings(sources)
    assert again.keys() == embeddings.keys()
    for encoder, by_word in embeddings.items():
        for word, rows in by_word.items():
            assert torch.equal(again[encoder][word], rows)


def test_forms_are_the_choices_of_the_flag():
    for form in EMBEDDING_FORMATS:
        assert files_of(words_of("cat", xl=form == "sdxl"), form)


@pytest.mark.parametrize(
    ("embeddings", "form", "message"),
    [
        (words_of("cat"), "sdxl", "'cat' was learned with one text encoder; choose --format a1111"),
        (words_of("cat", xl=True), "a1111", "'cat' was learned with two; choose --format sdxl"),
        (words_of("a/b"), "a1111", "'a/b' cannot name a file; pass --rename 'a/b=NEW'"),
    ],
)
def test_form_that_cannot_hold_a_word_is_refused(embeddings, form, message):
    with pytest.raises(ValueError, match=message):
        files_of(embeddings, form)


def test_diffusers_reads_what_is_written_for_a1111(model_folder, tmp_path):
    for name, content in files_of(words_of("moody"), "a1111").items():
        save_embeddings(tmp_path / name, content)
    stock = stock_pipeline(load_stable_diffusion(model_folder))
    stock.load_textual_inversion(tmp_path / "moody.pt")
    known = stock.text_encoder.get_input_embeddings().weight
    assert torch.equal(known[stock.tokenizer.convert_tokens_to_ids("moody_1")], TWO[1])


def test_words_of_sdxl_are_refused_by_a_smaller_model(model_folder):
    stock = stock_pipeline(load_stable_diffusion(model_folder))
    with pytest.raises(ValueError, match=r"embedding 'cat' is for SDXL's two text encoders"):
        load_into(stock, words_of("cat", xl=True))


def test_folder_without_the_first_file_is_refused(tmp_path):
    save_word(tmp_path, encoders=("text_encoder_2",))
    with pytest.raises(ValueError, match=r"no learned_embeds\.safetensors"):
        merge_embeddings([tmp_path])


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no learned_embeds\.safetensors"):
        load_embeddings(tmp_path)


def test_merging_keeps_every_word(tmp_path):
    encoders = ("text_encoder", "text_encoder_2")
    a = save_word(tmp_path / "a", "<cat>", 1, encoders=encoders)
    b = save_word(tmp_path / "b", "<mug>", 3, encoders=encoders)
    merged = merge_embeddings([a, b])
    for encoder in encoders:
        sizes = {name: len(rows) for name, rows in merged[encoder].items()}
        assert sizes == {"<cat>": 1, "<mug>": 3}
    save_embeddings(tmp_path / "both" / EMBEDDING_FILES["text_encoder"], merged["text_encoder"])
    again = load_embeddings(tmp_path / "both")["text_encoder"]
    assert torch.equal(again["<mug>"], merged["text_encoder"]["<mug>"])


def test_clashing_words_need_a_new_name(tmp_path):
    folders = [save_word(tmp_path / str(n), "<cat>", n) for n in (1, 2, 3)]
    with pytest.raises(ValueError, match=r"2: placeholder '<cat>' is also in .*1; .*--rename"):
        merge_embeddings(folders)
    merged = merge_embeddings(folders, [("<cat>", "<cat-b>"), ("<cat>", "<cat-c>")])
    sizes = {name: len(rows) for name, rows in merged["text_encoder"].items()}
    assert sizes == {"<cat>": 1, "<cat-b>": 2, "<cat-c>": 3}
    with pytest.raises(ValueError, match="<cat>"):
        merge_embeddings(folders, [("<cat>", "<cat-b>"), ("<cat>", "<cat-b>")])


def test_words_that_differ_in_capital_letters_clash(tmp_path):
    folders = [save_word(tmp_path / name, f"<{name}>") for name in ("cat", "Cat")]
    with pytest.raises(ValueError, match=r"Cat: placeholder '<cat>' is also in .*cat; .*--rename"):
        merge_embeddings(folders)
    merged = merge_embeddings(folders, [("<Cat>", "<dog>")])
    assert list(merged["text_encoder"]) == ["<cat>", "<dog>"]


def test_words_inside_other_words_clash_too(tmp_path):
    a = save_word(tmp_path / "a", "<cat>", 2)
    b = save_word(tmp_path / "b", "<cat>_1", 1)
    with pytest.raises(ValueError, match=r"placeholder '<cat>_1' is also in"):
        merge_embeddings([a, b])


def test_a_word_that_continues_another_clashes(tmp_path):
    """It would be read as one more vector of the other."""
    folders = [save_word(tmp_path / "a", "<Cat>", 1), save_word(tmp_path / "b", "<cat>_1", 1)]
    for some in (folders, folders[::-1]):
        with pytest.raises(ValueError, match=r"b: placeholder '<cat>_1' would be read as a vector"):
            merge_embeddings(some)
    merged = merge_embeddings(folders, [("<cat>_1", "<dog>")])
    assert list(merged["text_encoder"]) == ["<Cat>", "<dog>"]


def test_a_word_that_the_model_would_continue_is_no_placeholder(tokenizer):
    tokenizer.add_tokens(["<new>_2"])
    with pytest.raises(ValueError, match="'<new>_2' is a token of this model already"):
        add_tokens(tokenizer, "<new>", 2)


def test_a_single_word_can_be_renamed(tmp_path):
    folder = save_word(tmp_path / "a")
    merged = merge_embeddings([folder], [(WORD, "<dog>")])
    assert list(merged["text_encoder"]) == ["<dog>"]
    with pytest.raises(ValueError, match=r"--rename <cow>=<dog>: no input has that placeholder"):
        merge_embeddings([folder], [("<cow>", "<dog>")])


def test_concept_becomes_a_word(tmp_path, concept):
    path = tmp_path / "corgi.safetensors"
    concept.save(path)
    merged = merge_embeddings([path])
    assert torch.equal(merged["text_encoder"]["<corgi>"], concept.words[0, :1])


def test_file_of_one_word_is_that_of_diffusers(tmp_path):
    save_word(tmp_path, num_vectors=2)
    tensors = load_file(tmp_path / "learned_embeds.safetensors")
    assert list(tensors) == [WORD] and tensors[WORD].shape == (2, 24)
