"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): new rows of the token embedding learn one
concept from a few pictures. Stable Diffusion 1.x and SDXL; the files are those of diffusers.

A placeholder of several vectors is spelled as diffusers does: `<cat> <cat>_1 <cat>_2`.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from elite.concept import DTYPES, Concept
from elite.files import is_file, write_atomically
from elite.loading import is_xl
from elite.objectives import Batch, DenoisingObjective
from elite.wording import brief

# File of each text encoder's embeddings, as diffusers' loaders look for them.
EMBEDDING_FILES = {
    "text_encoder": "learned_embeds.safetensors",
    "text_encoder_2": "learned_embeds_2.safetensors",
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

Embeddings = dict[str, Tensor]  # placeholder to its vectors (L, D)


# --- tokens and rows ------------------------------------------------------------------------------


def spell(placeholder: str, num_vectors: int) -> list[str]:
    """The tokens of a placeholder: ['<cat>', '<cat>_1', ...]."""
    return [placeholder, *(f"{placeholder}_{i}" for i in range(1, num_vectors))]


def add_tokens(tokenizer: CLIPTokenizer, placeholder: str, num_vectors: int) -> list[int]:
    """Teaches the tokenizer a placeholder. Returns the ids of its tokens.

    Raises:
        ValueError: the tokenizer knows one of them already.
    """
    tokens = spell(placeholder, num_vectors)
    known = tokenizer.get_vocab()
    if taken := [token for token in tokens if token in known or f"{token}</w>" in known]:
        raise ValueError(
            f"placeholder {taken[0]!r} is a token of this model already; choose a new word such as "
            f"'<{placeholder.strip('<>')}-1>'"
        )
    tokenizer.add_tokens(tokens)
    return tokenizer.convert_tokens_to_ids(tokens)


class ExtendedEmbedding(nn.Module):
    """A token embedding with new rows behind the known ones; only the new rows learn.

    Deviation: the usual way trains the whole matrix and copies the old rows back after each step;
    here they have no gradient, no optimiser state and no weight decay.
    """

    def __init__(self, known: nn.Embedding, first_id: int, rows: Tensor) -> None:
        super().__init__()
        self.known, self.first_id = known, first_id
        self.learned = nn.Parameter(rows.clone())  # (L, D)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, N) to embeddings (B, N, D)."""
        new = input_ids >= self.first_id
        known = self.known(input_ids.masked_fill(new, 0))
        learned = F.embedding((input_ids - self.first_id).clamp(min=0), self.learned.to(known))
        return torch.where(new[..., None], learned, known)


def initial_rows(
    embedding: nn.Embedding,
    tokenizer: CLIPTokenizer,
    num_vectors: int,
    initializer: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Where the new rows (L, D) start.

    Args:
        initializer: words whose tokens fill the rows in turn; None draws rows with the mean and
            deviation of the known ones.

    Raises:
        ValueError: the words are more tokens than there are rows, or none.
    """
    known = embedding.weight.detach().float()
    if initializer is None:
        noise = torch.randn(
            num_vectors, known.shape[1], generator=torch.Generator().manual_seed(seed)
        )
        return known.mean(0) + known.std(0) * noise.to(known)
    ids = tokenizer(initializer, add_special_tokens=False).input_ids
    if not 0 < len(ids) <= num_vectors:
        raise ValueError(
            f"initializer {initializer!r} is {len(ids)} tokens for {num_vectors} vector(s); "
            f"choose a word of one token or raise --num_vectors"
        )
    return known[[ids[i % len(ids)] for i in range(num_vectors)]]


def concept_rows(path: Path | str, width: int, num_vectors: int) -> Tensor:
    """ELITE's words of a concept as rows (L, D): w0 for one vector, all words for as many.

    Raises:
        ValueError: no concept, of another width, or of another number of words.
    """
    words = Concept.load(path).words[0].float()  # (levels, D)
    if words.shape[1] != width:
        raise ValueError(
            f"{path}: its words are {words.shape[1]} wide, the text encoder's {width}; "
            "use the model it was made with"
        )
    if num_vectors not in (1, len(words)):
        raise ValueError(
            f"{path}: has {len(words)} words for {num_vectors} vectors; choose --num_vectors 1 "
            f"or {len(words)}"
        )
    return words[:num_vectors]


# --- files ----------------------------------------------------------------------------------------


def save_embeddings(path: Path | str, embeddings: Embeddings) -> None:
    """Writes placeholders with their vectors; of a single one diffusers reads the file as it is."""
    tensors = {name: rows.detach().cpu().contiguous() for name, rows in embeddings.items()}
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
        ValueError: two sources use one placeholder, or a rename matches none.
    """
    merged: dict[str, Embeddings] = {}
    owner: dict[str, str] = {}  # token to the source that has it
    pending = list(renames)
    loaded = [(str(source), load_embeddings(source)) for source in sources]
    times = [name for _, by_encoder in loaded for name in by_encoder["text_encoder"]]
    for source, by_encoder in loaded:
        for old in by_encoder["text_encoder"]:
            name = old
            if old in owner or times.count(old) == 1:
                name = next((new for known, new in pending if known == old), old)
                pending = [(k, new) for k, new in pending if (k, new) != (old, name)]
            for token in spell(name, len(by_encoder["text_encoder"][old])):
                if token in owner:
                    raise ValueError(
                        f"{source}: placeholder {token!r} is also in {owner[token]}; give it "
                        f"another name with --rename '{old}=NEW'"
                    )
                owner[token] = source
            for encoder, embeddings in by_encoder.items():
                if old in embeddings:
                    merged.setdefault(encoder, {})[name] = embeddings[old]
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


# --- learning -------------------------------------------------------------------------------------


class TextualInversionObjective(DenoisingObjective):
    """Learns the vectors of one placeholder: `mean((eps_hat - eps)^2)`, all else frozen.

    Args:
        parts: as `loading.load_stable_diffusion` gives them; the tokenizers learn the placeholder,
            and the text encoders are given the new rows.
        placeholder: the new word of the captions.
        rows: where they start, (L, D) by text encoder.

    Raises:
        ValueError: the placeholder is a token already.
    """

    def __init__(
        self, parts: Mapping[str, Any], placeholder: str, rows: Mapping[str, Tensor]
    ) -> None:
        super().__init__(parts)
        self.parts, self.placeholder = parts, placeholder
        self.rows: dict[str, ExtendedEmbedding] = {}
        for encoder, start in rows.items():
            ids = add_tokens(parts[TOKENIZERS[encoder]], placeholder, len(start))
            known = parts[encoder].get_input_embeddings()
            self.rows[encoder] = ExtendedEmbedding(known, ids[0], start)
            parts[encoder].set_input_embeddings(self.rows[encoder])
        self.text_encoder_2 = parts.get("text_encoder_2")
        self.words = " ".join(spell(placeholder, len(rows["text_encoder"])))
        self.freeze()

    @property
    def trained(self) -> nn.ParameterList:
        return nn.ParameterList(rows.learned for rows in self.rows.values())

    def save_pretrained(self, folder: Path) -> None:
        """`learned_embeds.safetensors`, and for SDXL `learned_embeds_2.safetensors`."""
        for encoder, rows in self.rows.items():
            save_embeddings(folder / EMBEDDING_FILES[encoder], {self.placeholder: rows.learned})

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, seeds: Tensor) -> Tensor:
        # SDXL's VAE overflows in fp16.
        xl = is_xl(self.unet)
        with torch.autocast(pixels.device.type, enabled=False) if xl else nullcontext():
            return super().encode_pixels(pixels, seeds)

    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        """Token ids (B, 77) by text encoder."""
        captions = [caption.replace(self.placeholder, self.words) for caption in captions]
        tokens = {}
        for encoder, rows in self.rows.items():
            ids = self.parts[TOKENIZERS[encoder]](
                captions, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            if (missing := (ids >= rows.first_id).sum(1) < len(rows.learned)).any():
                raise ValueError(
                    f"caption {captions[int(missing.nonzero()[0])]!r} is too long: the new word "
                    f"runs past token {ids.shape[1]}; shorten the template"
                )
            tokens[encoder] = ids
        return tokens

    def loss(self, batch: Batch, latents: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        noisy = self.scheduler.add_noise(latents, noise, t)
        context, added = self.encode_text(batch)
        eps_hat = self.unet(noisy, t, context, added_cond_kwargs=added).sample
        mse = F.mse_loss(eps_hat.float(), self.target(latents, noise, t).float())
        return {"loss": mse}

    def encode_text(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Text context (B, 77, D), and what SDXL's UNet reads besides."""
        if self.text_encoder_2 is None:
            return self.text_encoder(batch["text_encoder"]).last_hidden_state, {}
        first = self.text_encoder(batch["text_encoder"], output_hidden_states=True)
        second = self.text_encoder_2(batch["text_encoder_2"], output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return context, {"text_embeds": second.text_embeds, "time_ids": batch["size_and_crop"]}
