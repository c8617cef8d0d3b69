"""Files of learned words: the forms that are read and written, and merging."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from elite import Concept
from elite.loading import load_stable_diffusion, stock_pipeline
from elite.settings import EMBEDDING_FORMATS
from elite.wording import Note
from textual_inversion.files import (
    EMBEDDING_FILES,
    files_of,
    load_embeddings,
    load_into,
    merge_embeddings,
    save_embeddings,
)

WORD = "<cat>"


def save_word(folder, name=WORD, num_vectors=1, width=24, encoders=("text_encoder",)):
    """Files of one word, every value its number of vectors."""
    for encoder in encoders:
        rows = torch.full((num_vectors, width), float(num_vectors))
        save_embeddings(folder / EMBEDDING_FILES[encoder], {name: rows})
    return folder


def test_embeddings_of_another_width_are_refused(model_folder, tmp_path):
    stock = stock_pipeline(load_stable_diffusion(model_folder))
    embeddings = load_embeddings(save_word(tmp_path, width=48))
    with pytest.raises(ValueError, match=r"'<cat>' is 48 wide, text_encoder of this model 24"):
        load_into(stock, embeddings)


def test_a_word_that_the_tokenizer_has_is_to_be_renamed(model_folder, tmp_path):
    stock = stock_pipeline(load_stable_diffusion(model_folder))
    word = next(token for token in stock.tokenizer.get_vocab() if token.isalpha())
    with pytest.raises(ValueError, match=f"{word!r} is a word of the tokenizer .* --rename"):
        load_into(stock, load_embeddings(save_word(tmp_path, word)))


def test_a_concept_file_of_several_objects_is_no_word(tmp_path, concept):
    Concept.stack([concept, concept]).save(tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"two\.safetensors: holds 2 objects, expected one"):
        load_embeddings(tmp_path / "two.safetensors")


def test_xl_needs_both_files(xl_folder, tmp_path):
    stock = stock_pipeline(load_stable_diffusion(xl_folder))
    with pytest.raises(ValueError, match=r"learned_embeds_2\.safetensors"):
        load_into(stock, load_embeddings(save_word(tmp_path)))


@pytest.mark.parametrize("lacking", list(EMBEDDING_FILES))
def test_a_word_that_one_text_encoder_lacks_is_named_before_any_is_loaded(xl_folder, lacking):
    stock = stock_pipeline(load_stable_diffusion(xl_folder))
    embeddings = words_of(WORD, "<mug>", xl=True)
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
        ("x.pt", {**A1111, "name": ["x"]}, r"\['x'\] is no placeholder"),
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


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"<a>": TWO}, {"<a>": WIDE, "<b>": WIDE}, "'<b>' has 2 vectors for one of the text enc"),
        ({"<a>": TWO[:1]}, {"<a>": WIDE.repeat(3, 1)}, "'<a>' has [13] vectors for one of"),
    ],
)
def test_words_of_one_text_encoder_alone_are_refused(tmp_path, first, second, said):
    """Merging dropped them."""
    for name, words in zip(EMBEDDING_FILES.values(), (first, second), strict=True):
        save_embeddings(tmp_path / name, words)
    with pytest.raises(ValueError, match=said):
        load_embeddings(tmp_path)


def test_a_word_of_the_model_is_told(model_folder, tmp_path):
    """CLIP has most whole words as 'cat</w>' alone; get_vocab's order differs in each process."""
    stock = stock_pipeline(load_stable_diffusion(model_folder))
    vocabulary = stock.tokenizer.get_vocab()
    words = (token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>"))
    word = max(w for w in words if len(w) > 2 and w not in vocabulary)
    with pytest.warns(Note, match=f"{word!r}: prompts read it in place of the model's own word"):
        load_into(stock, load_embeddings(save_word(tmp_path, word)))
