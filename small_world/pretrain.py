"""Trains the small Stable Diffusion from nothing, part by part, each resumable:

    python -m small_world.pretrain samples | vae | vae_decoder | image_encoder | base | assemble
    [--work_dir runs/small_world] [--scale 1]

`samples` renders the pretraining set; `vae`, `vae_decoder` (trains the VAE's decoder further,
before or after `base`, since latents stay what they are), `image_encoder` and `base` (text encoder
and UNet together) train with the project's own loop and leave metrics, previews and checkpoints in
WORK_DIR/<part>; `assemble` writes the parts as fp16 safetensors in diffusers layout to
checkpoints/small_world. Interrupted parts go on from their last checkpoint.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from elite.console import OK, Stopped, command_again, run, script_parser
from elite.files import check_writable, digest_files, write_atomically
from elite.images import from_pixels, to_clip_pixels
from elite.loading import NOISE_SCHEDULE, make_scheduler, stock_pipeline
from elite.run_state import checkpoints
from elite.text import tokenize
from elite.training import fit, make_accelerator
from small_world.captions import describe, place, with_article
from small_world.flags import MODEL, add_scale, scaled
from small_world.models import (
    build_image_encoder,
    build_text_encoder,
    build_unet,
    build_vae,
    digest_weight_files,
)
from small_world.objectives import (
    MAX_WORDS,
    BaseModelObjective,
    ImageEncoderObjective,
    VAEObjective,
)
from small_world.samples import load_samples, render_samples, small_pixels
from small_world.tokenizer import build_tokenizer, token_ids
from small_world.world import ATTRIBUTES, SCENES, random_critter

NUM_SAMPLES = 100_000
SAVE_STEPS = 250
POSITIONS = 65  # of the image encoder: CLS and 8 x 8 patches; latents are 8 x 8
RECOLOURED = 0.3  # share of the image encoder's pictures
COLOUR_ATTRIBUTES = ("colour", "second", "trim", "scene")  # what recolouring hides
# Samples seen, batch, learning rate and the decay of the EMA of each part.
RECIPES: dict[str, dict[str, Any]] = {
    part: {
        "samples": samples,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "adam_betas": [0.9, 0.99],
        "ema_decay": ema_decay,
    }
    for part, samples, batch_size, learning_rate, ema_decay in (
        ("vae", 96_000, 32, 2e-3, 0.999),
        ("vae_decoder", 160_000, 32, 1e-3, 0.9995),
        ("image_encoder", 320_000, 64, 1e-3, 0.999),
        ("base", 768_000, 64, 1e-3, 0.9995),
    )
}
NUM_PREVIEWS = 8  # descriptions in a preview


class Samples:
    """A dataset of rendered critters, two views of each."""

    def __init__(self, folder: Path) -> None:
        self.views, self.records = load_samples(folder)

    def __len__(self) -> int:
        return len(self.views)

    def name(self, index: int) -> str:
        return f"sample {index}"


class VAEPictures(Samples):
    """The first views, as the VAE sees them."""

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        return {"pixels": small_pixels(self.views[index, 0])}

    def first(self, count: int) -> Tensor:
        """(count, 3, 32, 32), or as many as there are."""
        return torch.stack([small_pixels(view) for view in self.views[:count, 0]])


class Views(Samples):
    """Both views of a critter, as the image encoder sees them, with what they show."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.labels = torch.tensor([record["labels"] for record in self.records])
        self.profiles = torch.tensor([record["profile"] for record in self.records])
        self.coloured = torch.tensor([name in COLOUR_ATTRIBUTES for name in ATTRIBUTES])

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        views, labels = np.array(self.views[index]), self.labels[index]
        if rng.random() < RECOLOURED:
            views, labels = recoloured(views, rng), torch.where(self.coloured, -1, labels)
        pictures = views[..., :3]
        masks = views[..., 3:] / np.float32(255)
        objects = np.concatenate([pictures * masks / 255, masks], axis=-1)
        return {
            "clip_pixels": torch.stack([to_clip_pixels(picture) for picture in pictures]),
            "objects": F.avg_pool2d(torch.from_numpy(objects).permute(0, 3, 1, 2).float(), 2),
            "labels": labels,
            "profile": self.profiles[index],
        }


def recoloured(views: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Channels exchanged and perhaps inverted, the masks as they are: so that bodies are learned
    from outlines (in trials 83 % of held-out ones were named without this, 94 % with it)."""
    pictures = views[..., rng.permutation(3)]
    if rng.random() < 0.5:
        pictures = 255 - pictures
    return np.concatenate([pictures, views[..., 3:]], axis=-1)


class Latents(Samples):
    """Latents of the first views, image features of the second ones, and the captions.

    Args:
        cache: file for what is encoded, read where it is of these samples and models.
        key: a name for these samples and models.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: CLIPTokenizer,
        vae: AutoencoderKL,
        image_encoder: CLIPVisionModel,
        cache: Path,
        key: str,
    ) -> None:
        super().__init__(folder)
        self.input_ids = token_ids(tokenizer, [record["caption"] for record in self.records])
        concepts = [record["template"].format(record["concept"]) for record in self.records]
        self.concept_ids, self.index = tokenize(tokenizer, concepts, "S", num_words=MAX_WORDS)
        encoded = torch.load(cache, weights_only=True) if cache.exists() else {}
        if encoded.get("key") != key:
            encoded = {"key": key, **encode_all(vae, image_encoder, self.views)}
            write_atomically(cache, lambda temporary: torch.save(encoded, temporary))
        self.latents = encoded["latents"] * vae.config.scaling_factor
        self.objects = object_shares(self.views, side=self.latents.shape[-1])
        self.features = encoded["features"]

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        return {
            "latents": self.latents[index],
            "object_share": self.objects[index].float() / 255,
            "features": self.features[index],
            "input_ids": self.input_ids[index],
            "concept_ids": self.concept_ids[index],
            "index": self.index[index],
        }


def object_shares(views: np.ndarray, side: int, chunk: int = 2000) -> Tensor:
    """How much of each latent of the first views is object, 0 to 255, uint8 (N, 1, side, side)."""
    parts = []
    for start in range(0, len(views), chunk):
        masks = torch.from_numpy(views[start : start + chunk, 0, :, :, 3]).float()[:, None]
        parts.append(F.adaptive_avg_pool2d(masks, side).round().to(torch.uint8))
    return torch.cat(parts)


@torch.no_grad()
def encode_all(
    vae: AutoencoderKL, image_encoder: CLIPVisionModel, views: np.ndarray, chunk: int = 250
) -> dict[str, Tensor]:
    """Posterior means of the first views, unscaled (N, 16, 8, 8), and `image_features` of the
    second ones."""
    latents, features = [], []
    for start in tqdm(range(0, len(views), chunk), "encode"):
        first, second = np.array(views[start : start + chunk]).swapaxes(0, 1)
        pixels = torch.stack([small_pixels(view) for view in first])
        latents.append(vae.encode(pixels).latent_dist.mean)
        clip_pixels = torch.stack([to_clip_pixels(view[..., :3]) for view in second])
        features.append(image_features(image_encoder, clip_pixels))
    return {"latents": torch.cat(latents), "features": torch.cat(features)}


def image_features(image_encoder: CLIPVisionModel, clip_pixels: Tensor) -> Tensor:
    """CLS beside the mean of the patches, (B, 2 x width)."""
    states = image_encoder(clip_pixels).last_hidden_state
    return torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=1)


def grid(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures enlarged with nearest neighbour, row by row; all rows are full."""
    large = [picture.resize((128, 128), Image.Resampling.NEAREST) for picture in pictures]
    return make_image_grid(large, len(large) // columns, columns)


def train(
    part: str,
    recipe: Mapping[str, Any],
    objective: nn.Module,
    dataset: object,
    work_dir: Path,
    scale: float,
    preview: Callable | None = None,
) -> None:
    """Fits a part by a share of its recipe, from the last checkpoint in WORK_DIR/PART where there
    is one; processes of `accelerate launch` share the batch."""
    folder = work_dir / part
    accelerator = make_accelerator("auto", cpu=not torch.cuda.is_available())
    fit(
        objective,
        dataset,
        accelerator,
        output_dir=folder,
        max_steps=scaled(recipe["samples"] // recipe["batch_size"], scale),
        batch_size=recipe["batch_size"] // accelerator.num_processes,
        learning_rate=recipe["learning_rate"],
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        adam_betas=tuple(recipe["adam_betas"]),
        ema_decay=recipe["ema_decay"],
        attention_positions=POSITIONS,
        save_steps=SAVE_STEPS,
        checkpoints_total_limit=1,
        resume="latest" if checkpoints(folder) else None,
        preview=preview,
        validation_steps=500,
        config={"part": part, **{key: recipe[key] for key in recipe if key != "samples"}},
    )


def train_vae(work_dir: Path, scale: float) -> None:
    dataset = VAEPictures(work_dir / "samples")
    objective = VAEObjective(build_vae())
    fit_vae("vae", objective, dataset, work_dir, scale)
    if PartialState().is_main_process:
        set_scaling_factor(objective.vae, dataset.first(512))
        write_atomically(work_dir / "vae" / "vae", objective.vae.save_pretrained)


def train_vae_decoder(work_dir: Path, scale: float) -> None:
    dataset = VAEPictures(work_dir / "samples")
    vae = AutoencoderKL.from_pretrained(work_dir / "vae" / "vae")
    objective = VAEObjective(vae, decoder_only=True)
    fit_vae("vae_decoder", objective, dataset, work_dir, scale)


def fit_vae(
    part: str, objective: VAEObjective, dataset: VAEPictures, work_dir: Path, scale: float
) -> None:
    def preview() -> Image.Image:
        pixels = dataset.first(16).to(objective.vae.device)
        decoded = objective.vae.decode(objective.vae.encode(pixels).latent_dist.mean).sample
        return grid([to_image(x) for x in torch.cat([pixels, decoded])], columns=len(pixels))

    train(part, RECIPES[part], objective, dataset, work_dir, scale, preview)


@torch.no_grad()
def set_scaling_factor(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Gives the VAE the scaling factor by which its latents have unit deviation."""
    deviation = vae.encode(pixels.to(vae.device)).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=round(1 / float(deviation), 5))


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] as a picture."""
    return Image.fromarray(from_pixels(pixels))


def train_image_encoder(work_dir: Path, scale: float) -> None:
    objective = ImageEncoderObjective(build_image_encoder())
    dataset = Views(work_dir / "samples")
    train("image_encoder", RECIPES["image_encoder"], objective, dataset, work_dir, scale)


def train_base(work_dir: Path, scale: float) -> None:
    tokenizer = build_tokenizer()
    vae = AutoencoderKL.from_pretrained(work_dir / "vae" / "vae").eval()
    folder = work_dir / "image_encoder" / "image_encoder"
    image_encoder = CLIPVisionModel.from_pretrained(folder).eval()
    samples, cache = work_dir / "samples", work_dir / "base" / "encoded.pt"
    key = digest_files(samples / "records.json") + digest_weight_files(
        work_dir / "vae" / "vae", folder
    )
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():  # encodes for all
        dataset = Latents(samples, tokenizer, vae, image_encoder, cache, key)
    objective = BaseModelObjective(build_text_encoder(tokenizer), build_unet(), tokenizer)

    def preview() -> Image.Image:
        pipe = base_pipeline(vae=vae, tokenizer=tokenizer, **objective.parts)
        pipe.to(objective.unet.device).set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(i) for i in range(16)]
        prompts = [prompt for prompt in preview_prompts() for _ in range(2)]
        return grid(
            pipe(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generators).images,
            8,
        )

    train("base", RECIPES["base"], objective, dataset, work_dir, scale, preview)


def preview_prompts() -> list[str]:
    """Full descriptions of held-out combinations, in scenes in turn."""
    rng, scenes = np.random.default_rng(0), list(SCENES)
    return [
        with_article(describe(random_critter(rng, "combinations"))) + place(scenes[i])
        for i in range(NUM_PREVIEWS)
    ]


def base_pipeline(**parts: Any) -> StableDiffusionPipeline:
    """The stock pipeline over these parts: vae, text_encoder, tokenizer, unet."""
    return stock_pipeline({**parts, "scheduler": make_scheduler("dpm++", NOISE_SCHEDULE)})


def assemble(work_dir: Path, target: Path) -> None:
    """The trained parts in diffusers layout, fp16 safetensors, ready for
    `ElitePipeline.from_stable_diffusion`. The decoder is that of `vae_decoder`, if there is
    one."""
    trained_on = work_dir / "vae_decoder"
    last = trained_on if (trained_on / "vae").is_dir() else work_dir / "vae"
    pipe = base_pipeline(
        vae=AutoencoderKL.from_pretrained(last / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work_dir / "base" / "text_encoder"),
        tokenizer=build_tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(work_dir / "base" / "unet"),
    )
    image_encoder = CLIPVisionModel.from_pretrained(work_dir / "image_encoder" / "image_encoder")
    save_model(pipe, image_encoder, target)


def save_model(pipe: StableDiffusionPipeline, image_encoder: CLIPVisionModel, target: Path) -> None:
    """Writes fp16 safetensors in diffusers layout, the image encoder among them."""
    pipe.to(dtype=torch.float16).save_pretrained(target)
    write_atomically(target / "image_encoder", image_encoder.half().save_pretrained)


def main() -> int:
    parser = script_parser(__doc__)
    trainers = {
        "vae": train_vae,
        "vae_decoder": train_vae_decoder,
        "image_encoder": train_image_encoder,
        "base": train_base,
    }
    parser.add_argument("part", choices=["samples", *trainers, "assemble"])
    parser.add_argument("--work_dir", type=Path, default=Path("runs/small_world"))
    parser.add_argument("--target", type=Path, default=MODEL)
    add_scale(parser)
    args = parser.parse_args()
    check_writable(args.target if args.part == "assemble" else args.work_dir)
    torch.manual_seed(0)
    if args.part == "samples":
        render_samples(args.work_dir / "samples", scaled(NUM_SAMPLES, args.scale), "trained")
    elif args.part == "assemble":
        assemble(args.work_dir, args.target)
    else:
        try:
            trainers[args.part](args.work_dir, args.scale)
        except Stopped:
            print("resume with:", command_again())
            raise
    return OK


if __name__ == "__main__":
    run(main)
