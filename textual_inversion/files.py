"""Files of learned words in the formats in use: read, merged, written, loaded into a stock
pipeline.

| form | file | the word |
| --- | --- | --- |
| diffusers | learned_embeds.safetensors or .bin: placeholders with vectors | the placeholder |
| A1111 | .pt with string_to_param | its name, or the file's |
| A1111 | .safetensors with emb_params | the file's name |
| SDXL | .safetensors with clip_l and clip_g | the file's name |

A placeholder of several vectors is spelled as diffusers does: `<cat> <cat>_1 <cat>_2`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from elite.checkpoint import TORCH_FILES, load_torch
from elite.concept import load_one
from elite.families import STABLE_DIFFUSION, TOKENIZERS
from elite.files import is_file, write_atomically
from elite.loading import FLOATS
from elite.wording import brief, note

# File of each text encoder's embeddings, as diffusers' loaders look for them.
EMBEDDING_FILES = {
    "text_encoder": "learned_embeds.safetensors",
    "text_encoder_2": "learned_embeds_2.safetensors",
}
# Tensors of files that hold one word, named after the file, and the text encoder they belong to.
UNNAMED = {"emb_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}

Embeddings = dict[str, Tensor]  # placeholder to its vectors (L, D)


def spell(placeholder: str, num_vectors: int) -> list[str]:
    """The tokens of a placeholder: ['<cat>', '<cat>_1', ...]."""
    return [placeholder, *(f"{placeholder}_{i}" for i in range(1, num_vectors))]


def save_embeddings(path: Path | str, embeddings: Mapping[str, Any]) -> None:
    """Writes placeholders with their vectors; of a single one diffusers reads the file as it is.

    One of several vectors is written in small letters, since diffusers finds no other.
    """
    if Path(path).suffix in TORCH_FILES:
        write_atomically(path, lambda temporary: torch.save(embeddings, temporary))
        return
    tensors = {}
    for name, rows in embeddings.items():
        written = name if len(rows) == 1 else name.lower()
        if written != name:
            note(f"{path}: {name!r} is written as {written!r}; type that in other programs")
        tensors[written] = rows.detach().cpu().clone().contiguous()
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


def files_of(embeddings: Mapping[str, Embeddings], form: str) -> dict[str, dict[str, Any]]:
    """What `save_embeddings` writes, by file name, so that `load_embeddings` reads it again.

    Args:
        embeddings: by text encoder.
        form: diffusers (a file for each text encoder), a1111 or sdxl (a file for each word).

    Raises:
        ValueError: the form holds one text encoder and there are two, or the other way round; or a
            word that no file can be named by.
    """
    if form == "diffusers":
        return {EMBEDDING_FILES[encoder]: dict(words) for encoder, words in embeddings.items()}
    files: dict[str, dict[str, Any]] = {}
    for word, rows in embeddings["text_encoder"].items():
        second = embeddings.get("text_encoder_2", {}).get(word)
        if (second is None) == (form == "sdxl"):
            found, fitting = ("one text encoder", "a1111") if second is None else ("two", "sdxl")
            raise ValueError(f"{word!r} was learned with {found}; choose --format {fitting}")
        if set(word) & set("/\\"):
            raise ValueError(f"{word!r} cannot name a file; pass --rename '{word}=NEW'")
        if form == "sdxl":
            files[f"{word}.safetensors"] = {"clip_l": rows, "clip_g": second}
        else:
            # 265 is the token of "*", which the word took the place of where the form comes from.
            files[f"{word}.pt"] = {
                "string_to_token": {"*": 265},
                "string_to_param": {"*": rows.detach().cpu().clone()},
                "name": word,
                "step": 0,
                "sd_checkpoint": None,
                "sd_checkpoint_name": None,
            }
    return files


def either(path: Path) -> tuple[Path, Path]:
    """A file of embeddings as safetensors, and as older versions of diffusers wrote it."""
    return path, path.with_suffix(".bin")


def load_embeddings(source: Path | str) -> dict[str, Embeddings]:
    """Embeddings by text encoder: what is in a file, or in a folder of diffusers' files.

    A concept of ELITE counts as the embedding of its w0, named after its file.

    Raises:
        ValueError: nothing there, or not a file of embeddings.
    """
    source = Path(source)
    if not source.is_dir():
        return _load_file(source)
    found = {}
    for encoder, name in EMBEDDING_FILES.items():
        for path in either(source / name):
            if encoder not in found and path.exists():
                found[encoder] = _load_file(path)["text_encoder"]
    if "text_encoder" not in found:
        raise ValueError(f"{source}: no {EMBEDDING_FILES['text_encoder']} in this folder")
    _check_same(source, found)
    return found


def _load_file(path: Path) -> dict[str, Embeddings]:
    if not is_file(path):
        raise ValueError(f"{path}: no such file; expected learned embeddings")
    is_torch = path.suffix.lower() in TORCH_FILES
    content: Any = load_torch(path) if is_torch else _load_safetensors(path)
    word: Any = path.stem
    if not isinstance(content, dict):
        content = {}
    if "string_to_param" in content:
        word, params = content.get("name") or word, content["string_to_param"]
        _check_word(path, word)
        is_one = isinstance(params, dict) and len(params) == 1
        content = {"emb_params": next(iter(params.values()))} if is_one else {}
    words = content.get("words")
    if isinstance(words, Tensor) and words.ndim == 3:
        concept = load_one(path)
        if concept.family != STABLE_DIFFUSION.name:
            raise ValueError(
                f"{path}: concept for another family than {STABLE_DIFFUSION.title}, whose words "
                "are no embeddings of one text encoder; draw it with inference_local.py"
            )
        return {"text_encoder": {f"<{path.stem}>": concept.words[0, :1]}}
    found: dict[str, dict[str, Any]] = {"text_encoder": content}
    if content and content.keys() <= UNNAMED.keys():
        found = {of: {word: content[key]} for key, of in UNNAMED.items() if key in content}
    vectors = [rows for by_word in found.values() for rows in by_word.values()]
    if "text_encoder" not in found or not vectors or not all(map(_is_vectors, vectors)):
        raise ValueError(
            f"{path}: not learned embeddings; expected vectors named by placeholders, or a file of "
            "A1111 or SDXL"
        )
    for name in found["text_encoder"]:
        _check_word(path, name)
    embeddings = {
        encoder: {name: rows.detach().reshape(-1, rows.shape[-1]) for name, rows in by_word.items()}
        for encoder, by_word in found.items()
    }
    _check_same(path, embeddings)
    return embeddings


def _check_word(path: Path, name: Any) -> None:
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise ValueError(
            f"{path}: {brief(name)} is no placeholder; expected a word that can be typed"
        )


def _check_same(source: Path, by_encoder: Mapping[str, Embeddings]) -> None:
    """Raises ValueError where two text encoders have not the same words of as many vectors."""
    first, *others = (
        {(word, len(rows)) for word, rows in words.items()} for words in by_encoder.values()
    )
    if odd := min((pair for other in others for pair in first ^ other), default=None):
        raise ValueError(
            f"{source}: {odd[0]!r} has {odd[1]} vectors for one of the text encoders alone; pass "
            "files of both that were made together"
        )


def is_known(token: str, vocabulary: Mapping[str, int]) -> bool:
    """Whether a tokenizer reads it as a token of its own: CLIP's has whole words as 'cat</w>'."""
    return token in vocabulary or f"{token.lower()}</w>" in vocabulary


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a safetensors file ({error}); get it again, or if torch.save wrote it, "
            "name it .pt"
        ) from None


def _is_vectors(rows: Any) -> bool:
    """(D) or (L, D) of floating-point numbers."""
    if not isinstance(rows, Tensor) or rows.layout != torch.strided or rows.dtype not in FLOATS:
        return False
    return rows.ndim in (1, 2) and rows.numel() > 0 and bool(rows.isfinite().all())


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
                        f"another name with python merge_embeddings.py --rename '{old}=NEW'"
                    )
                owner[token] = source
            for encoder, embeddings in by_encoder.items():
                if old in embeddings:
                    merged.setdefault(encoder, {})[name] = embeddings[old]
    for name, rows in merged["text_encoder"].items():
        if (following := f"{name}_{len(rows)}".lower()) in owner:
            raise ValueError(
                f"{owner[following]}: placeholder {following!r} would be read as a vector of "
                f"{name!r}; give one of the two another name by --rename, or merge fewer"
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
        ValueError: of another width than the text encoder, a token that exists, a word that one
            text encoder lacks, or for other text encoders than the pipeline's.
    """
    for encoder, by_word in embeddings.items():
        if missing := [w for words in embeddings.values() for w in words if w not in by_word]:
            raise ValueError(
                f"embedding {missing[0]!r} has no vectors for {encoder}, others have; pass its "
                "files of both text encoders"
            )
    for encoder, tokenizer in TOKENIZERS.items():
        module = getattr(pipe, encoder, None)
        if module is None:
            if encoder in embeddings:
                raise ValueError(
                    f"embedding {next(iter(embeddings[encoder]))!r} is for SDXL's two text "
                    "encoders, this model has one; use the model it was learned with"
                )
            continue
        if encoder not in embeddings:
            raise ValueError(
                f"this model reads two text encoders; pass the folder with "
                f"{EMBEDDING_FILES[encoder]}, too, or a file with clip_l and clip_g"
            )
        width = module.get_input_embeddings().weight.shape[1]
        for name, rows in embeddings[encoder].items():
            if rows.shape[1] != width:
                raise ValueError(
                    f"embedding {name!r} is {rows.shape[1]} wide, {encoder} of this model {width}; "
                    "use the model it was learned with"
                )
            vocabulary = getattr(pipe, tokenizer).get_vocab()
            if name in vocabulary:
                raise ValueError(
                    f"embedding {name!r} is a word of the tokenizer already; give it another name "
                    f"by python merge_embeddings.py --rename '{name}=NEW'"
                )
            if is_known(name, vocabulary):
                note(f"embedding {name!r}: prompts read it in place of the model's own word")
            pipe.load_textual_inversion(
                {name: rows}, text_encoder=module, tokenizer=getattr(pipe, tokenizer)
            )
