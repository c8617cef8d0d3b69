"""What each part of the small Stable Diffusion learns: three objectives for the project's one
training loop."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel

from elite.files import write_atomically
from elite.objectives import seeded_noise, seeded_timesteps
from small_world.world import COLOURS, PATTERNS, SCENES, SHAPES

# Attributes in the order of `samples.labels`.
ATTRIBUTES = {
    "shape": len(SHAPES),
    "pattern": len(PATTERNS),
    "colour": len(COLOURS),
    "second": len(COLOURS),
    "scene": len(SCENES),
}


class VAEObjective(nn.Module):
    """Reconstruction (L1 and squared error) with a light KL pull towards unit latents.

    With `decoder_only` the encoder stays as it is, and so do the latents that others have learned.
    """

    def __init__(
        self, vae: AutoencoderKL, kl_weight: float = 1e-4, decoder_only: bool = False
    ) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(not decoder_only)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        pixels = batch["pixels"]  # (B, 3, 32, 32) in [-1, 1]
        posterior = self.vae.encode(pixels).latent_dist
        noise = seeded_noise(batch["seed"], tuple(posterior.mean.shape[1:]))
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        squared = F.mse_loss(decoded, pixels)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = squared + 0.5 * F.l1_loss(decoded, pixels) + self.kl_weight * kl
        psnr = -10 * torch.log10(squared.detach() / 4)
        return {"loss": loss, "psnr": psnr, "kl": kl.detach()}

    def save_pretrained(self, folder: Path) -> None:
        write_atomically(folder / "vae", self.vae.save_pretrained)


class ImageEncoderObjective(nn.Module):
    """CLIP's contrastive loss, plus attribute heads on CLS and a patch head that names each patch's
    colours."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        width = clip.config.vision_config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in ATTRIBUTES.items()})
        self.patch_head = nn.Linear(width, 2 * 2 * 3)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        clip_pixels = batch["clip_pixels"]  # (B, 3, 64, 64), CLIP-normalised
        vision = self.clip.vision_model(clip_pixels)
        cls = vision.pooler_output  # (B, width)
        attributes = {
            name: F.cross_entropy(head(cls), batch["labels"][:, i], ignore_index=-1)
            for i, (name, head) in enumerate(self.heads.items())
        }
        named = batch["labels"][:, 2] >= 0  # recoloured pictures no longer fit their caption
        contrastive = self._contrastive(cls[named], batch["input_ids"][named])
        patches = self.patch_head(vision.last_hidden_state[:, 1:])  # (B, 64, 12)
        side = round(patches.shape[1] ** 0.5)
        colours = F.pixel_unshuffle(F.adaptive_avg_pool2d(clip_pixels, 2 * side), 2)
        patch_colours = F.mse_loss(patches, colours.flatten(2).transpose(1, 2))
        loss = sum(attributes.values()) + 0.2 * contrastive + patch_colours
        accuracy = {
            f"acc_{name}": _accuracy(head(cls), batch["labels"][:, i])
            for i, (name, head) in enumerate(self.heads.items())
        }
        return {
            "loss": loss,
            "contrastive": contrastive.detach(),
            "patch": patch_colours.detach(),
            **accuracy,
        }

    def _contrastive(self, cls: Tensor, input_ids: Tensor) -> Tensor:
        text = self.clip.text_model(input_ids).pooler_output
        image = F.normalize(self.clip.visual_projection(cls), dim=-1)
        text = F.normalize(self.clip.text_projection(text), dim=-1)
        logits = self.clip.logit_scale.exp().clamp(max=100) * image @ text.T  # (B, B)
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def save_pretrained(self, folder: Path) -> None:
        write_atomically(folder / "clip", self.clip.save_pretrained)
        write_atomically(folder / "image_encoder", self.clip.vision_model.save_pretrained)


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    known = target >= 0
    return (logits.detach().argmax(-1) == target)[known].float().mean()


class BaseModelObjective(nn.Module):
    """Text encoder and UNet together: epsilon prediction with min-SNR weights (Hang et al. 2023,
    gamma 5)."""

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        empty_ids: Tensor,
        empty_probability: float = 0.1,
        snr_gamma: float = 5.0,
    ) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        self.scheduler, self.empty_probability, self.snr_gamma = (
            scheduler,
            empty_probability,
            snr_gamma,
        )
        self.register_buffer("empty_ids", empty_ids, persistent=False)  # (24,)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        latents, seeds = batch["latents"], batch["seed"]
        empty = (seeds % 1000 < 1000 * self.empty_probability)[:, None]  # (B, 1)
        input_ids = torch.where(empty, self.empty_ids, batch["input_ids"])
        context = self.text_encoder(input_ids).last_hidden_state
        noise = seeded_noise(seeds, tuple(latents.shape[1:])).to(latents)
        t = seeded_timesteps(seeds, len(self.scheduler.alphas_cumprod)).to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, t)
        noise_hat = self.unet(noisy, t, context).sample
        alphas = self.scheduler.alphas_cumprod.to(latents.device)[t]
        snr = alphas / (1 - alphas)
        weight = snr.clamp(max=self.snr_gamma) / snr
        squared = (noise_hat.float() - noise).square().mean(dim=(1, 2, 3))  # (B,)
        return {"loss": (weight * squared).mean(), "mse": squared.mean().detach()}

    def save_pretrained(self, folder: Path) -> None:
        write_atomically(folder / "unet", self.unet.save_pretrained)
        write_atomically(folder / "text_encoder", self.text_encoder.save_pretrained)
