"""What textual inversion learns: new rows of the token embedding, from a few pictures of one
concept, by the same loss as Stable Diffusion itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer

from elite.concept import load_one
from elite.families import TOKENIZERS, encode_texts
from elite.objectives import Batch, DenoisingObjective
from elite.text import read_prompt
from textual_inversion.files import EMBEDDING_FILES, is_known, save_embeddings, spell

# --- tokens and rows ------------------------------------------------------------------------------


def add_tokens(tokenizer: CLIPTokenizer, placeholder: str, num_vectors: int) -> list[int]:
    """Teaches the tokenizer a placeholder. Returns the ids of its tokens.

    Raises:
        ValueError: the tokenizer knows one of them already.
    """
    tokens = spell(placeholder, num_vectors)
    known = tokenizer.get_vocab()
    read = [*tokens, f"{placeholder}_{num_vectors}"]  # the last would be one more vector
    if taken := [token for token in read if is_known(token, known)]:
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


def concept_rows(
    path: Path | str, widths: Mapping[str, int], num_vectors: int
) -> dict[str, Tensor]:
    """ELITE's words of a concept as rows (L, D) of each text encoder: w0 for one vector, all words
    for as many. A concept of Stable Diffusion gives rows of SDXL's first text encoder alone.

    Args:
        widths: D of each text encoder.

    Raises:
        ValueError: no concept, of another width, or of another number of words.
    """
    words = load_one(path).words[0].float()  # (levels, D), or D of all
    if words.shape[1] != sum(widths.values()):
        widths = {"text_encoder": widths["text_encoder"]}
    if words.shape[1] != sum(widths.values()):
        raise ValueError(
            f"{path}: its words are {words.shape[1]} wide, the text encoder's "
            f"{widths['text_encoder']}; use the model it was made with"
        )
    if num_vectors not in (1, len(words)):
        raise ValueError(
            f"{path}: has {len(words)} words for {num_vectors} vectors; choose --num_vectors 1 "
            f"or {len(words)}"
        )
    parts = words[:num_vectors].split(list(widths.values()), dim=1)
    return dict(zip(widths, parts, strict=True))


def starting_rows(
    parts: Mapping[str, Any],
    num_vectors: int,
    words: str | None = None,
    concept: str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Where the new rows (L, D) of each text encoder start.

    Args:
        parts: as `loading.load_stable_diffusion` gives them.
        words, seed: as `initializer` and `seed` of `initial_rows`.
        concept: a concept file of ELITE; see `concept_rows`.

    Raises:
        ValueError: as these two, or words that nothing starts from beside the concept.
    """
    longest = min(parts[name].model_max_length for name in parts.keys() & TOKENIZERS.values()) - 2
    if num_vectors > longest:
        raise ValueError(f"--num_vectors {num_vectors}: a prompt has room for {longest} tokens")
    embeddings = {
        encoder: parts[encoder].get_input_embeddings() for encoder in TOKENIZERS if encoder in parts
    }
    widths = {encoder: known.weight.shape[1] for encoder, known in embeddings.items()}
    of_concept = {} if concept is None else concept_rows(concept, widths, num_vectors)
    if words is not None and of_concept.keys() == embeddings.keys():
        raise ValueError(
            f"--initializer_token {words!r}: {concept} gives all vectors; leave one of them out"
        )
    return {
        encoder: of_concept[encoder]
        if encoder in of_concept
        else initial_rows(known, parts[TOKENIZERS[encoder]], num_vectors, words, seed)
        for encoder, known in embeddings.items()
    }


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
        self.freeze()

    @property
    def trained(self) -> nn.ParameterList:
        return nn.ParameterList(rows.learned for rows in self.rows.values())

    def save_pretrained(self, folder: Path) -> None:
        """`learned_embeds.safetensors`, and for SDXL `learned_embeds_2.safetensors`."""
        for encoder, rows in self.rows.items():
            save_embeddings(folder / EMBEDDING_FILES[encoder], {self.placeholder: rows.learned})

    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        """Token ids (B, 77) by text encoder. Raises ValueError where the new word is cut off."""
        tokens = {}
        for encoder in self.rows:
            tokenizer = self.parts[TOKENIZERS[encoder]]
            tokens[encoder] = tokenizer(
                read_prompt(captions, tokenizer),
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).input_ids
        return tokens

    def check(self, templates: Sequence[str], source: object) -> None:
        """Raises ValueError where a caption cuts the new word off: before a run, not in its
        middle."""
        for template in templates:
            try:
                self.tokens([template.replace("{}", self.placeholder)])
            except ValueError as error:
                raise ValueError(f"{source}: {error}, or lower --num_vectors") from None

    def loss(self, batch: Batch, latents: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        noisy = self.scheduler.add_noise(latents, noise, t)
        input_ids = [batch[encoder] for encoder in self.rows]
        context, added = encode_texts(list(self.text_encoders), input_ids, batch["size_and_crop"])
        eps_hat = self.unet(noisy, t, context, added_cond_kwargs=added).sample
        return {"loss": F.mse_loss(eps_hat.float(), self.target(latents, noise, t).float())}
