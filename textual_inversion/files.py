"""Files of learned words, as diffusers writes them: read, merged, loaded into a stock pipeline.

A placeholder of several vectors is spelled as diffusers does: `<cat> <cat>_1 <cat>_2`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from elite.concept import DTYPES, Concept
from elite.files import is_file, write_atomically
from elite.wording import brief, note

# File of each text encoder's embeddings, as diffusers' loaders look for them.
EMBEDDING_FILES = {
    "text_encoder": "learned_embeds.safetensors",
    "text_encoder_2": "learned_embeds_2.safetensors",
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

Embeddings = dict[str, Tensor]  # placeholder to its vectors (L, D)


def spell(placeholder: str, num_vectors: int) -> list[str]:
    """The tokens of a placeholder: ['<cat>', '<cat>_1', ...]."""
    return [placeholder, *(f"{placeholder}_{i}" for i in range(1, num_vectors))]


def save_embeddings(path: Path | str, embeddings: Embeddings) -> None:
    """Writes placeholders with their vectors; of a single one diffusers reads the file as it is.

    One of several vectors is written in small letters, since diffusers finds no other.
    """
    tensors = {}
    for name, rows in embeddings.items():
        written = name if len(rows) == 1 else name.lower()
        if written != name:
            note(f"{path}: {name!r} is written as {written!r}; type that in other programs")
        tensors[written] = rows.detach().cpu().contiguous()
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


def load_embeddings(source: Path | str) -> dict[str, Embeddings]:
    """Embeddings by text encoder: of a file the first encoder's, of a folder whatever is there.

    A concept of ELITE counts as the embedding of its w0, named after its file.

    Raises:
        ValueError: nothing there, or not a file of embeddings.
    """
    source = Path(source)
    if not source.is_dir():
        return {"text_encoder": _load_file(source)}
    found = {
        encoder: _load_file(source / name)
        for encoder, name in EMBEDDING_FILES.items()
        if (source / name).exists()
    }
    if "text_encoder" not in found:
        raise ValueError(f"{source}: no {EMBEDDING_FILES['text_encoder']} in this folder")
    return found


def _load_file(path: Path) -> Embeddings:
    if not is_file(path):
        raise ValueError(f"{path}: no such file; expected learned embeddings")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a safetensors file ({error}); other formats are not read, since they "
            "could run code"
        ) from None
    if "words" in tensors and tensors["words"].ndim == 3:
        return {f"<{path.stem}>": Concept.load(path).words[0, :1]}
    if not tensors or not all(map(_is_vectors, tensors.values())):
        raise ValueError(f"{path}: not learned embeddings; expected vectors named by placeholders")
    if bad := [name for name in tensors if not name.strip() or not name.isprintable()]:
        raise ValueError(
            f"{path}: {brief(bad[0])} is no placeholder; expected a word that can be typed"
        )
    return {name: rows.reshape(-1, rows.shape[-1]) for name, rows in tensors.items()}


def _is_vectors(rows: Tensor) -> bool:
    """(D) or (L, D) of floating-point numbers."""
    is_shaped = rows.ndim in (1, 2) and rows.numel() > 0
    return is_shaped and rows.dtype in DTYPES and bool(rows.isfinite().all())


def merge_embeddings(
    sources: Sequence[Path | str], renames: Sequence[tuple[str, str]] = ()
) -> dict[str, Embeddings]:
    """Several files or folders as one.

    Args:
        renames: (old, new) pairs; of placeholders that clash the first keeps its name and each
            rename gives the next one another.

    Raises:
        ValueError: two sources use one placeholder, one continues another, or a rename matches
            none.
    """
    merged: dict[str, Embeddings] = {}
    owner: dict[str, str] = {}  # token to the source that has it
    pending = list(renames)
    loaded = [(str(source), load_embeddings(source)) for source in sources]
    times = [name for _, by_encoder in loaded for name in by_encoder["text_encoder"]]
    for source, by_encoder in loaded:
        for old in by_encoder["text_encoder"]:
            name = old
            if old.lower() in owner or times.count(old) == 1:
                name = next((new for known, new in pending if known == old), old)
                pending = [(k, new) for k, new in pending if (k, new) != (old, name)]
            for token in spell(name.lower(), len(by_encoder["text_encoder"][old])):
                if token in owner:
                    raise ValueError(
                        f"{source}: placeholder {token!r} is also in {owner[token]}; give it "
                        f"another name with --rename '{old}=NEW'"
                    )
                owner[token] = source
            for encoder, embeddings in by_encoder.items():
                if old in embeddings:
                    merged.setdefault(encoder, {})[name] = embeddings[old]
    for name, rows in merged["text_encoder"].items():
        if (following := f"{name}_{len(rows)}".lower()) in owner:
            raise ValueError(
                f"{owner[following]}: placeholder {following!r} would be read as a vector of "
                f"{name!r}; give it another name with --rename '{following}=NEW'"
            )
    if pending:
        raise ValueError(
            f"--rename {pending[0][0]}={pending[0][1]}: no input has that placeholder left to "
            f"rename; they have {', '.join(owner)}"
        )
    return merged


def load_into(pipe: Any, embeddings: Mapping[str, Embeddings]) -> None:
    """Loads embeddings into a stock pipeline of diffusers.

    Raises:
        ValueError: of another width than the text encoder, a token that exists, or a missing
            encoder's part.
    """
    for encoder, tokenizer in TOKENIZERS.items():
        module = getattr(pipe, encoder, None)
        if module is None:
            continue
        if encoder not in embeddings:
            raise ValueError(
                f"this model reads two text encoders; pass the folder with "
                f"{EMBEDDING_FILES[encoder]}, too"
            )
        width = module.get_input_embeddings().weight.shape[1]
        for name, rows in embeddings[encoder].items():
            if rows.shape[1] != width:
                raise ValueError(
                    f"embedding {name!r} is {rows.shape[1]} wide, {encoder} of this model {width}; "
                    "use the model it was learned with"
                )
            pipe.load_textual_inversion(
                {name: rows}, text_encoder=module, tokenizer=getattr(pipe, tokenizer)
            )
