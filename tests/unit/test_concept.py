"""A concept and its file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from elite import Concept
from elite.concept import FORMAT_VERSION, ConceptFolder, is_saved
from elite.named_concepts import row_per_prompt


def make_concept(fingerprint: str = "f00d", tokens: bool = True, seed: int = 0) -> Concept:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(1, 3, 24, generator=generator)
    return Concept(
        words, torch.randn(1, 16, 24, generator=generator) if tokens else None, fingerprint
    )


@pytest.mark.parametrize("tokens", [True, False])
def test_file_round_trip_is_bit_identical(tmp_path, tokens):
    concept = make_concept(tokens=tokens)
    concept.save(tmp_path / "corgi.safetensors")
    loaded = Concept.load(str(tmp_path / "corgi.safetensors"))
    assert torch.equal(loaded.words, concept.words) and loaded.fingerprint == "f00d"
    if tokens:
        assert torch.equal(loaded.feature_tokens, concept.feature_tokens)
    else:
        assert loaded.feature_tokens is None
    assert len(loaded) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["corgi.safetensors"]


def test_slices_and_half_precision_survive(tmp_path):
    """Rows of a batch are views; a file must hold what they show."""
    both = Concept.stack([make_concept(seed=1), make_concept(seed=2)])
    view = both.feature_tokens.transpose(1, 2).contiguous().transpose(1, 2)[1:]
    concept = Concept(both.words.half()[1:], view, "f00d")
    concept.save(tmp_path / "x.safetensors")
    loaded = Concept.load(tmp_path / "x.safetensors")
    assert torch.equal(loaded.words, concept.words) and loaded.words.dtype == torch.float16
    assert torch.equal(loaded.feature_tokens, concept.feature_tokens)


def test_full_size_concept_is_a_few_hundred_kilobytes(tmp_path):
    path = tmp_path / "x.safetensors"
    Concept(torch.zeros(1, 5, 768), torch.zeros(1, 256, 768), "f00d").save(path)
    assert path.stat().st_size < 900_000


def complaint(path) -> str:
    with pytest.raises(ValueError) as caught:
        Concept.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_file(tmp_path):
    assert "no such file" in complaint(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("content", [b"", b"hello, this is no tensor file", b"\xff" * 64])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert "not a safetensors file" in complaint(tmp_path / "x.safetensors")


def test_folder_is_refused(tmp_path):
    complaint(tmp_path)


def test_truncated_concept_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    make_concept().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a safetensors file" in complaint(path)


@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "pt"}, {"format": "elite-concept", "version": "999", "fingerprint": "f00d"}],
    ids=["none", "other", "newer"],
)
def test_safetensors_of_something_else_or_a_newer_version(tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    save_file({"words": torch.zeros(1, 3, 24)}, path, metadata)
    newer = bool(metadata) and "version" in metadata
    assert ("concept format 999, this version reads" if newer else "not a concept") in complaint(
        path
    )


def test_concept_without_fingerprint_or_words_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    metadata = {"format": "elite-concept", "version": FORMAT_VERSION}
    save_file({"words": torch.zeros(1, 3, 24)}, path, metadata)
    complaint(path)
    save_file({"other": torch.zeros(1)}, path, metadata | {"fingerprint": "f00d"})
    assert "not a concept" in complaint(path)


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    make_concept(seed=1).save(path)

    def full(file, content):
        with open(file, "wb") as opened:
            opened.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(ValueError, match="No space left on device"):
        make_concept(seed=2).save(path)
    assert torch.equal(load_file(path)["words"], make_concept(seed=1).words)
    assert list(tmp_path.iterdir()) == [path]


def test_everyone_may_read_the_file(tmp_path):
    make_concept().save(tmp_path / "x.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_digest_is_of_the_values_alone(tmp_path):
    concept = make_concept()
    for name, origin in (("a", {}), ("b", {"source": "another picture"})):
        concept.save(tmp_path / f"{name}.safetensors", origin)
    folder = ConceptFolder(tmp_path)
    assert folder.digest(0) == folder.digest(1) == concept.digest
    half = Concept(concept.words.half(), concept.feature_tokens.half(), "f00d")
    others = [make_concept(seed=1), make_concept(tokens=False), half]
    assert len({concept.digest, *(other.digest for other in others)}) == 4


def test_saved_means_whole_and_of_the_same_origin(tmp_path):
    path, origin = tmp_path / "x.safetensors", {"source": "cafe", "fingerprint": "f00d"}
    assert not is_saved(path, origin)
    make_concept().save(path, {"source": "cafe"})
    assert is_saved(path, origin) and len(Concept.load(path)) == 1
    assert not is_saved(path, origin | {"source": "beef"})
    assert not is_saved(path, origin | {"fingerprint": "other mappers"})
    assert not is_saved(path, origin | {"dtype": "said nowhere"})
    save_file({"words": torch.zeros(1, 3, 24)}, tmp_path / "other.safetensors", origin)
    assert not is_saved(tmp_path / "other.safetensors", origin)
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_saved(path, origin)


def test_folder_reads_files_by_name(tmp_path):
    for seed, name in enumerate(("b", "a")):
        make_concept(seed=seed).save(tmp_path / f"{name}.safetensors")
    (tmp_path / ".a.1.tmp.safetensors").write_bytes(b"left by a killed run")
    (tmp_path / "grid.png").touch()
    folder = ConceptFolder(tmp_path)
    assert [path.stem for path in folder.paths] == ["a", "b"] and len(folder) == 2
    assert torch.equal(folder.read(1).words, make_concept(seed=0).words)
    assert ConceptFolder(tmp_path / "a.safetensors").read(0).digest == make_concept(seed=1).digest


def test_folder_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="nothing: no such file or folder"):
        ConceptFolder(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no concept file"):
        ConceptFolder(tmp_path)
    path = tmp_path / "two.safetensors"
    Concept.stack([make_concept(), make_concept()]).save(path)
    with pytest.raises(ValueError, match=r"two.safetensors: holds 2 objects, expected one"):
        ConceptFolder(tmp_path).read(0)
    path.write_bytes(b"")
    assert ConceptFolder(tmp_path).digest(0) == ""


def test_other_mappers_are_refused_in_one_line():
    make_concept("f00d").check_mappers("f00d")
    with pytest.raises(ValueError, match=r"fingerprint f00d, these are cafe\) .*; encode it again"):
        make_concept("f00d").check_mappers("cafe")


def test_concepts_of_several_devices_fit_in_one_batch():
    """The meta device stands for a GPU."""
    here, there = make_concept(seed=1), make_concept(seed=2).to("meta")
    rows = row_per_prompt([here, there], 2, torch.device("meta"))
    assert len(rows) == 2
    assert {part.device.type for part in (rows.words, rows.feature_tokens)} == {"meta"}


def test_stack():
    concepts = [make_concept(seed=1), make_concept(seed=2)]
    both = Concept.stack(concepts)
    assert len(both) == 2
    assert torch.equal(both.words[1:], concepts[1].words)
    assert torch.equal(both.feature_tokens[:1], concepts[0].feature_tokens)
    with pytest.raises(ValueError, match="different mappers"):
        Concept.stack([make_concept("f00d"), make_concept("cafe")])


def test_objects_are_counted_as_those_of_a_list():
    concepts = [make_concept(seed=seed) for seed in range(3)]
    stacked = Concept.stack(concepts)
    assert [torch.equal(a.words, b.words) for a, b in zip(stacked, concepts, strict=True)]
    assert torch.equal(stacked[-1].words, concepts[2].words)
    with pytest.raises(IndexError):
        stacked[3]


def test_objects_of_one_and_of_two_pictures_do_not_stack():
    one = make_concept(seed=1)
    two = Concept.stack([one, make_concept(seed=2)]).as_one()
    assert len(two) == 1 and two.num_tokens == 2 * one.num_tokens
    with pytest.raises(ValueError, match="different numbers of feature tokens"):
        Concept.stack([one, two])
