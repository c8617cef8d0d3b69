"""What each part of the small Stable Diffusion learns: three objectives for the project's one
training loop."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from elite.files import write_atomically
from elite.loading import NOISE_SCHEDULE
from elite.noise import seeded_noise, seeded_timesteps
from elite.text import encode_text
from small_world.bodies import DIRECTIONS
from small_world.tokenizer import token_ids
from small_world.world import ATTRIBUTES

OBJECT_WEIGHT = 4.0  # of the base model's loss, beside 1 everywhere: parts are a few latents
MAX_WORDS = 5  # of a concept in a caption
TOLD = 1 / 3  # share of a batch that reads captions; the rest reads words made of features
EMPTY = 0.1  # share that reads the empty caption, for guidance
KL_WEIGHT = 1e-4  # of the VAE
TEMPERATURE = 0.1  # of the contrast of views
WORD_SCALE = 0.1  # of these words: that of a mapper under stage 1's penalty, near the vocabulary's


class VAEObjective(nn.Module):
    """Reconstruction (L1 and squared error) with a light KL pull towards unit latents.

    With `decoder_only` the encoder stays as it is, and so do the latents that others have learned.
    """

    def __init__(self, vae: AutoencoderKL, decoder_only: bool = False) -> None:
        super().__init__()
        self.vae = vae
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(not decoder_only)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = batch["pixels"]  # (B, 3, 32, 32) in [-1, 1]
        posterior = self.vae.encode(pixels).latent_dist
        seeds = batch["seed"].to(pixels.device)
        noise = seeded_noise(seeds, tuple(posterior.mean.shape[1:]))
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        squared = F.mse_loss(decoded, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = squared + 0.5 * F.l1_loss(decoded, pixels) + KL_WEIGHT * kl
        psnr = -10 * torch.log10(squared.detach() / 4)
        return {"loss": loss, "psnr": psnr, "kl": kl.detach()}

    def save_pretrained(self, folder: Path) -> None:
        write_atomically(folder / "vae", self.vae.save_pretrained)


class ViewsObjective(nn.Module):
    """What two views of one critter teach: its attributes by cross entropy, and by contrast
    (NT-Xent, Chen et al. 2020) that both are the same one.

    Args:
        width: of the features that `compare` is given.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, len(kinds)) for name, kinds in ATTRIBUTES.items()}
        )

    def compare(self, features: Tensor, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The two losses and the accuracies.

        Args:
            features: (2B, width), first views before second ones.
            embeddings: (2B, any), compared by their directions.
            labels: (2B, attributes), -1 where there is nothing to see.
        """
        loss = torch.zeros((), device=features.device)
        accuracies = {}
        for (name, head), target in zip(self.heads.items(), labels.T, strict=True):
            logits, known = head(features).float(), target >= 0
            error = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
            count = known.sum().clamp(min=1)
            loss = loss + error / count
            right = (logits.detach().argmax(1) == target) & known
            accuracies[f"acc_{name}"] = right.sum() / count
        unit = F.normalize(embeddings.float(), dim=-1)
        alike = unit @ unit.T / TEMPERATURE  # (2B, 2B)
        own = torch.eye(len(alike), dtype=torch.bool, device=alike.device)
        alike = alike.masked_fill(own, -torch.inf)
        partner = torch.arange(len(alike), device=alike.device).roll(len(alike) // 2)
        same = (alike.detach().argmax(1) == partner).float().mean()
        contrast = F.cross_entropy(alike, partner)
        return {"attributes": loss, "contrast": contrast, "same": same, **accuracies}


class ImageEncoderObjective(ViewsObjective):
    """The vision tower: attributes of CLS and the mean of the patches, and by a head of its own the
    body's profile, which bodies without a name have, too; contrast of CLS; and a patch head that
    paints the object alone and its mask, so that features keep the outline."""

    def __init__(self, image_encoder: CLIPVisionModel) -> None:
        width = image_encoder.config.hidden_size
        super().__init__(2 * width)
        self.image_encoder = image_encoder
        self.projection = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 64))
        self.profile = nn.Linear(2 * width, len(DIRECTIONS))
        self.painter = nn.Linear(width, 4 * 4 * 4)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        clip_pixels = batch["clip_pixels"].transpose(0, 1).flatten(0, 1)  # (2B, 3, 64, 64)
        objects = batch["objects"].transpose(0, 1).flatten(0, 1)  # (2B, 4, 32, 32)
        output = self.image_encoder(clip_pixels)
        cls, patches = output.pooler_output, output.last_hidden_state[:, 1:]
        features = torch.cat([cls, patches.mean(1)], dim=1)  # (2B, 2 x width)
        labels = batch["labels"].transpose(0, 1).flatten(0, 1)
        out = self.compare(features, self.projection(cls), labels)
        painted = self.painter(patches).float()  # (2B, 64, 64)
        wanted = F.unfold(objects, kernel_size=4, stride=4).transpose(1, 2)
        outline = F.mse_loss(painted, wanted)
        reach = batch["profile"].repeat(2, 1)  # (2B, directions); 0 where there is no body
        error = (self.profile(features).float() - reach).square()[reach > 0]
        profile = error.sum() / max(1, error.numel())
        out["loss"] = out["attributes"] + out["contrast"] + 20 * outline + 20 * profile
        return {**out, "outline": outline, "profile": profile}

    def save_pretrained(self, folder: Path) -> None:
        write_atomically(folder / "image_encoder", self.image_encoder.save_pretrained)


def num_told(batch_size: int) -> int:
    """How many of a batch read captions, at least one."""
    return max(1, round(TOLD * batch_size))


class BaseModelObjective(nn.Module):
    """Text encoder and UNet together: epsilon prediction, weighted by 1 / (1 + SNR) (Choi et al.
    2022, "Perception prioritized training"), so that noisy steps, which decide outlines, count.

    A third of every batch reads captions; in the rest, one, two or five words, made of the image
    encoder's features of another view by a head that is thrown away afterwards, stand for the
    critter. So the model learns to read any point of the space of words, not only its vocabulary.
    They are as large as words that a mapper can afford: without a bound the head made them sixty
    times as large, and stage 1, whose penalty keeps words small, found none of what they told.
    """

    def __init__(
        self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer
    ) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        self.scheduler = DDPMScheduler(**NOISE_SCHEDULE)
        empty_ids = token_ids(tokenizer, [""])[0]  # (48,)
        self.register_buffer("empty_ids", empty_ids, persistent=False)
        width = text_encoder.config.hidden_size  # and that of the image encoder
        self.word_head = nn.Sequential(
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, MAX_WORDS * width),
        )

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What is trained, by its name in a pipeline."""
        return {"text_encoder": self.text_encoder, "unet": self.unet}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        latents, context = batch["latents"], self.context(batch)
        seeds = batch["seed"].to(latents.device)
        noise = seeded_noise(seeds, tuple(latents.shape[1:])).to(latents)
        t = seeded_timesteps(seeds, len(self.scheduler.alphas_cumprod))
        noisy = self.scheduler.add_noise(latents, noise, t)
        noise_hat = self.unet(noisy, t, context).sample
        alphas = self.scheduler.alphas_cumprod.to(latents.device)[t]
        weight = 1 - alphas  # 1 / (1 + signal to noise)
        M = 1 + OBJECT_WEIGHT * batch["object_share"]  # (B, 1, 8, 8)
        error = (M * (noise_hat.float() - noise).square()).mean(dim=(1, 2, 3))
        squared = error / M.mean(dim=(1, 2, 3))  # (B,)
        told, shown = squared.detach().tensor_split([num_told(len(squared))])
        return {"loss": (weight * squared).mean(), "told": told.mean(), "shown": shown.mean()}

    def context(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, 48, D): of captions for the first `num_told` of the batch, of words made of features
        for the others."""
        seeds = batch["seed"]
        empty = (seeds % 1000 < 1000 * EMPTY)[:, None]  # (B, 1)
        empty = empty.to(batch["input_ids"].device)
        told = num_told(len(seeds))
        input_ids = torch.where(empty, self.empty_ids, batch["input_ids"])[:told]
        words = self.word_head(batch["features"][told:]).unflatten(1, (MAX_WORDS, -1))
        words = WORD_SCALE * F.layer_norm(words, words.shape[-1:])
        num_words = MAX_WORDS // (int(seeds[0]) % MAX_WORDS + 1)  # 1 in three of five, 2, 5
        shown = encode_text(
            self.text_encoder,
            batch["concept_ids"][told:],
            words[:, :num_words],
            batch["index"][told:],
        )
        nothing = encode_text(self.text_encoder, self.empty_ids[None])
        shown = torch.where(empty[told:, :, None], nothing, shown)
        return torch.cat([encode_text(self.text_encoder, input_ids), shown])

    def save_pretrained(self, folder: Path) -> None:
        write_atomically(folder / "unet", self.unet.save_pretrained)
        write_atomically(folder / "text_encoder", self.text_encoder.save_pretrained)
