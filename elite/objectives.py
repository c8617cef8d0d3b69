"""What ELITE learns: the noising step that every objective shares, and the two objectives (paper
eq. 4 and 7)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from elite.attention import install, local_inputs, local_values
from elite.defaults import PLACEHOLDER
from elite.families import encode_texts, family_of, text_encoders, tokenize_for_each, tokenizers
from elite.files import write_atomically
from elite.images import patch_mask
from elite.loading import pixels_per_latent
from elite.mappers import GlobalMapper, LocalMapper, clip_levels, words_and_tokens
from elite.noise import POSTERIOR_STREAM, seeded_noise, seeded_timesteps

WORD_PENALTY = 0.01  # stage 1, weight of mean |w|
VALUE_PENALTY = 1e-4  # stage 2, weight of mean |V_l f|
TRAINED_PREDICTIONS = ("epsilon", "v_prediction")
NOISING = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
INPUT_IDS = ("input_ids", "input_ids_2")  # of a batch, for each text encoder

Batch = Mapping[str, Any]  # tensors, and the list of captions


class DenoisingObjective(nn.Module, ABC):
    """What every objective shares: a frozen Stable Diffusion and its noising step.

    Args:
        parts: vae, text_encoder, unet, scheduler, as `loading.load_stable_diffusion` gives them; of
            SDXL text_encoder_2 too.

    Raises:
        ValueError: the UNet predicts neither noise nor velocity.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        super().__init__()
        prediction = parts["scheduler"].config.get("prediction_type", "epsilon")
        if prediction not in TRAINED_PREDICTIONS:
            raise ValueError(
                f"the model's scheduler has prediction_type {prediction!r}; training knows "
                f"{' and '.join(TRAINED_PREDICTIONS)}"
            )
        self.vae, self.unet = parts["vae"], parts["unet"]
        self.family, self.text_encoders = family_of(self.unet), nn.ModuleList(text_encoders(parts))
        # The release trains on DDPM noise whatever the sampler.
        known = parts["scheduler"].config
        self.scheduler = DDPMScheduler(**{key: known[key] for key in NOISING if key in known})

    @property
    @abstractmethod
    def trained(self) -> nn.Module:
        """The one module that learns."""

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Exports what was trained into `folder`, for users."""

    def freeze(self) -> None:
        """Leaves nothing to learn but `trained`."""
        self.requires_grad_(False)
        self.trained.requires_grad_(True)
        self.train()

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Keeps what does not learn in the dtype it computes in under autocast: half the memory, no
        cast at each step."""
        vae_stays = self.family.vae_overflows and dtype == torch.float16
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad and not (vae_stays and name.startswith("vae.")):
                parameter.data = parameter.data.to(dtype)

    def train(self, mode: bool = True) -> Self:
        """Frozen parts stay in evaluation mode."""
        super().train(False)
        self.trained.train(mode)
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """batch: what the dataset gives, collated; plus `seed` (B,). Returns {"loss": ..., other
        scalars}."""
        seeds = batch["seed"]
        if "latent_mean" in batch:  # of the latent cache
            latents = self.draw_latents(batch["latent_mean"], batch["latent_std"], seeds)
        else:
            latents = self.encode_pixels(batch["pixels"], seeds)
        noise = seeded_noise(seeds, tuple(latents.shape[1:])).to(latents)
        t = seeded_timesteps(seeds, self.scheduler.config.num_train_timesteps).to(latents.device)
        tokens = {key: ids.to(latents.device) for key, ids in self.tokens(batch["caption"]).items()}
        return self.loss({**batch, **tokens}, latents, noise, t)

    @abstractmethod
    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        """What `loss` reads of the captions."""

    @abstractmethod
    def loss(self, batch: Batch, latents: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """`loss` and other scalars, for given z, eps and timesteps."""

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, seeds: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] to z in float32, one draw of the posterior per sample seed."""
        as_it_is = torch.autocast(pixels.device.type, enabled=False)
        with as_it_is if self.family.vae_overflows else nullcontext():
            posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return self.draw_latents(posterior.mean.float(), posterior.std.float(), seeds)

    def draw_latents(self, mean: Tensor, std: Tensor, seeds: Tensor) -> Tensor:
        """z (B, C, h, w), at the scale the UNet knows, from the posterior of the VAE: mean and
        deviation (B, C, h, w), one draw per sample seed."""
        noise = seeded_noise(seeds, tuple(mean.shape[1:]), POSTERIOR_STREAM).to(mean)
        return (mean + std * noise) * self.vae.config.scaling_factor

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet predicts: the noise, or the velocity (v = alpha eps - sigma z) of models
        trained for that, as Stable Diffusion 2.x at 768 px."""
        if self.scheduler.config.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, t)
        return noise


class EliteObjective(DenoisingObjective):
    """What both stages share: words in the prompt, mappers in the UNet.

    Args:
        parts: also tokenizers and image_encoder, as `loading.load_parts` gives them.
        global_mapper, local_mapper: installed in the UNet; stage 1 has no local mapper.
        placeholder_token: the word of the captions that the concept's words replace.

    Raises:
        ValueError: a mapper does not fit the UNet.
    """

    learns: Literal["global_mapper", "local_mapper"]  # the part that a stage trains

    def __init__(
        self,
        parts: Mapping[str, Any],
        global_mapper: GlobalMapper,
        local_mapper: LocalMapper | None = None,
        placeholder_token: str = PLACEHOLDER,
    ) -> None:
        super().__init__(parts)
        self.image_encoder = parts["image_encoder"]
        self.tokenizers, self.placeholder_token = tokenizers(parts), placeholder_token
        self.global_mapper, self.local_mapper = global_mapper, local_mapper
        self.freeze()
        install(self.unet, global_mapper, local_mapper)

    @property
    def trained(self) -> GlobalMapper | LocalMapper:
        return getattr(self, self.learns)

    def save_pretrained(self, folder: Path) -> None:
        """Writes the trained mapper to a folder of its name, which the pipeline loads."""
        write_atomically(folder / self.learns, self.trained.save_pretrained)

    @property
    @abstractmethod
    def words_injected(self) -> int:
        """How many words the placeholder becomes."""

    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        ids_of_each, index = tokenize_for_each(
            self.tokenizers, captions, self.placeholder_token, self.words_injected
        )
        return {"index": index, **dict(zip(INPUT_IDS, ids_of_each, strict=False))}

    def predict(
        self,
        batch: Batch,
        noisy_latents: Tensor,
        t: Tensor,
        words: Tensor,
        local: list[Tensor] | None = None,
    ) -> Tensor:
        """eps_hat (B, C, h, w) with `words` (B, L, D) in the prompt; SDXL is told that the picture
        is whole and of its own size."""
        context, added = encode_texts(
            list(self.text_encoders),
            [batch[name] for name in INPUT_IDS if name in batch],
            self._whole(noisy_latents),
            words,
            batch["index"],
        )
        added["image_embeds"] = local or []
        return self.unet(noisy_latents, t, context, added_cond_kwargs=added).sample

    def _whole(self, latents: Tensor) -> Tensor:
        """`size_and_crop` of pictures of these latents that nothing was cut from, (B, 6)."""
        height, width = (n * pixels_per_latent(self.vae) for n in latents.shape[2:])
        whole = torch.tensor([height, width, 0, 0, height, width]).to(latents)
        return whole.expand(len(latents), -1)


class GlobalObjective(EliteObjective):
    """Stage 1 (paper eq. 4): learns the global mapper with all its words in the prompt."""

    learns = "global_mapper"

    @property
    def words_injected(self) -> int:
        return self.global_mapper.num_levels

    def loss(self, batch: Batch, latents: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """`mean((eps_hat - eps)^2) + 0.01 mean|w|` for given noise and timesteps."""
        layers = self.global_mapper.config.hidden_layers
        with torch.no_grad():
            levels = clip_levels(self.image_encoder, batch["clip_pixels"], layers)
        w = self.global_mapper(levels)  # (B, levels, D)
        noisy = self.scheduler.add_noise(latents, noise, t)
        eps_hat = self.predict(batch, noisy, t, w)
        mse = F.mse_loss(eps_hat.float(), self.target(latents, noise, t).float())
        penalty = WORD_PENALTY * w.float().abs().mean()
        return {"loss": mse + penalty, "mse": mse.detach(), "penalty": penalty.detach()}


class LocalObjective(EliteObjective):
    """Stage 2 (paper eq. 7): learns the local mapper beside the frozen global one, w0 in the
    prompt.

    Deviation: the release also computes gradients of the global mapper, which nothing uses; here it
    has none.
    """

    learns = "local_mapper"
    words_injected = 1  # w0
    local_mapper: LocalMapper

    def loss(self, batch: Batch, latents: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """`sum(M (eps_hat - eps)^2) / sum(M)` per sample, averaged, plus `1e-4 mean|V_l f|`.

        M (B, 1, h, w) is broadcast over the latent channels, so the first term is that many times a
        mean.
        """
        config, mappers = self.image_encoder.config, (self.global_mapper, self.local_mapper)
        views = batch["clip_pixels"], batch["object_pixels"]
        m = patch_mask(batch["object_mask"], config.image_size // config.patch_size)
        w, f = words_and_tokens(self.image_encoder, *mappers, *views, m)
        assert f is not None
        local = local_inputs(f, batch["index"], 1.0, batch["input_ids"].shape[1])
        noisy = self.scheduler.add_noise(latents, noise, t)
        eps_hat = self.predict(batch, noisy, t, w[:, :1], local)
        squared = (eps_hat.float() - self.target(latents, noise, t).float()).square()
        M = batch["loss_mask"].to(squared)  # (B, 1, h, w)
        mse = ((M * squared).sum(dim=(1, 2, 3)) / M.sum(dim=(1, 2, 3))).mean()
        values = local_values(self.local_mapper, f)
        penalty = VALUE_PENALTY * torch.stack([v.float().abs().mean() for v in values]).mean()
        return {"loss": mse + penalty, "mse": mse.detach(), "penalty": penalty.detach()}
