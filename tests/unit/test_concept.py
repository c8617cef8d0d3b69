"""A concept and its file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from elite import Concept
from elite.concept import FORMAT_VERSION


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
    concept = Concept(both.words.half()[1:], both.feature_tokens.transpose(1, 2), "f00d")
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

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elite.concept.save_file", full)
    with pytest.raises(ValueError, match="No space left on device"):
        make_concept(seed=2).save(path)
    assert torch.equal(load_file(path)["words"], make_concept(seed=1).words)
    assert list(tmp_path.iterdir()) == [path]


def test_stack():
    concepts = [make_concept(seed=1), make_concept(seed=2)]
    both = Concept.stack(concepts)
    assert len(both) == 2
    assert torch.equal(both.words[1:], concepts[1].words)
    assert torch.equal(both.feature_tokens[:1], concepts[0].feature_tokens)
    with pytest.raises(ValueError, match="different mappers"):
        Concept.stack([make_concept("f00d"), make_concept("cafe")])
