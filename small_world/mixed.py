"""Critters and other people's things in one batch, put together on the device.

Critters come rendered (`samples`), two views each. Things, PNGs with transparency as
`data_scripts/fetch_art.py` leaves them, are laid on drawn scenes in a new pose every time. What
both say of themselves has one form, so that no objective can tell them apart.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPVisionModel

from elite.images import CLIP_MEAN, CLIP_STD
from elite.text import tokenize
from small_world.bodies import DIRECTIONS
from small_world.captions import fill
from small_world.objectives import MAX_WORDS
from small_world.pretrain import COLOUR_ATTRIBUTES, RECOLOURED, image_features
from small_world.samples import FRAMINGS, SECOND_FRAMINGS, framed_template, load_samples
from small_world.scenes import draw_scene
from small_world.things import name_of, premultiplied, read_thing
from small_world.tokenizer import build_tokenizer, token_ids
from small_world.world import ATTRIBUTES, SCENES

# A thing's longer side, as a share of the picture's.
EXTENTS = {
    "scene": (0.62, 0.95),
    "tight": (0.92, 1.0),
    "cutout": (0.62, 1.0),
    "far": (0.33, 0.6),
    "zoom": (1.2, 1.4),
}
ON_BLACK = ("cutout", "far")
TURN = 12.0  # degrees, to either side


def sprite(file: Path, side: int) -> np.ndarray:
    """A thing in the middle of a square as long as itself: uint8 (side, side, 4), colours times
    alpha."""
    thing = premultiplied(read_thing(file))
    longest = max(thing.shape[:2])
    height, width = (max(1, round(length * side / longest)) for length in thing.shape[:2])
    shrinks = longest > side
    way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    square = np.zeros((side, side, 4), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = cv2.resize(
        thing, (width, height), interpolation=way
    ).round()
    return square


def draw_backgrounds(count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Scenes as those of critters: uint8 (scenes, count, side, side, 3)."""
    drawn = [draw_scene(scene, rng, 2 * side) for scene in SCENES for _ in range(count)]
    small = [cv2.resize(one, (side, side), interpolation=cv2.INTER_AREA) for one in drawn]
    return np.stack(small).reshape(len(SCENES), count, side, side, 3)


def draw_records(names: Sequence[str], rounds: int, rng: np.random.Generator) -> list[dict]:
    """As those of critters, for every thing in turn, `rounds` times over: template, noun, framings,
    scenes and labels of two views."""
    records = []
    for noun in [*names] * rounds:
        scenes = [str(name) for name in rng.choice(list(SCENES), 2, replace=False)]
        framings = [
            str(rng.choice(list(shares), p=list(shares.values())))
            for shares in (FRAMINGS, SECOND_FRAMINGS)
        ]
        template = framed_template(framings[0], scenes[0], rng)
        labels = np.full((2, len(ATTRIBUTES)), -1)  # a thing has none but its scene
        for row, framing, scene in zip(labels, framings, scenes, strict=True):
            if framing == "scene":
                row[-1] = list(SCENES).index(scene)
        records.append(
            {
                "template": template,
                "noun": noun,
                "concept": "S",
                "framings": framings,
                "scenes": scenes,
                "labels": labels.tolist(),
                "profile": [0.0] * len(DIRECTIONS),
            }
        )
    return records


def words_of(names: list[str]) -> list[str]:
    """The words that the tokenizer learns whole."""
    words = {word for name in names for word in name.lower().split()}
    return sorted(word for word in words if word.isascii() and word.isalpha())


class MixedWorld:
    """Batches, half of them critters and half things; no thing twice. `names` of the things are
    words of the `tokenizer`.

    Args:
        samples: folder of `render_samples`.
        things: PNGs with transparency.
        side: of the views, as of the samples.
        rounds: captions for every thing.
        backgrounds: pictures of every scene.
        device: where all of it lies, and batches are made.
    """

    def __init__(
        self,
        samples: Path,
        things: Sequence[Path],
        side: int,
        rounds: int,
        backgrounds: int,
        device: torch.device,
    ) -> None:
        self.rounds, self.device = rounds, device
        self.extents = torch.tensor(list(EXTENTS.values()), device=device)  # (framings, 2)
        self.on_black = torch.tensor([name in ON_BLACK for name in EXTENTS], device=device)
        rng = np.random.default_rng(0)
        self.names = [name_of(file) for file in things]
        self.tokenizer = build_tokenizer(words_of(self.names))
        views, critters = load_samples(samples)
        self.views = torch.from_numpy(np.array(views)).to(device)  # (N, 2, side, side, 4)
        self.critters = self._told(critters)
        sprites = np.stack([sprite(file, side) for file in things])
        self.sprites = self._pictures(sprites)  # (S, 4, side, side)
        self.backgrounds = self._pictures(draw_backgrounds(backgrounds, side, rng))
        records = draw_records(self.names, rounds, rng)
        self.things = self._told(records)
        self.framings = torch.tensor(
            [[list(EXTENTS).index(name) for name in record["framings"]] for record in records],
            device=device,
        )  # (rounds x S, 2)
        self.scenes = torch.tensor(
            [[list(SCENES).index(name) for name in record["scenes"]] for record in records],
            device=device,
        )

    def _pictures(self, levels: np.ndarray) -> Tensor:
        """uint8 (..., H, W, C) to (..., C, H, W) on the device."""
        return torch.from_numpy(levels).to(self.device).movedim(-1, -3)

    def _told(self, records: list[dict]) -> dict[str, Tensor]:
        """What the records say, as the objectives read it."""
        captions = [fill(record["template"], record["noun"]) for record in records]
        concepts = [record["template"].format(record["concept"]) for record in records]
        concept_ids, index = tokenize(self.tokenizer, concepts, "S", num_words=MAX_WORDS)
        told = {
            "input_ids": token_ids(self.tokenizer, captions),  # (N, 48)
            "concept_ids": concept_ids,
            "index": index,
            "labels": torch.tensor([record["labels"] for record in records]),  # (N, 2, attributes)
            "profile": torch.tensor([record["profile"] for record in records]),
        }
        return {name: values.to(self.device) for name, values in told.items()}

    def batch(self, count: int) -> dict[str, Tensor]:
        """Views (B, 2, 4, side, side) in [0, 1], RGB and mask, and what they say of themselves; B
        is less than `count` where there are fewer things than half of it."""
        device = self.device
        critters = torch.randint(len(self.views), (count - count // 2,), device=device)
        things = torch.randperm(len(self.sprites), device=device)[: count // 2]
        turns = torch.randint(self.rounds, things.shape, device=device)
        records = turns * len(self.sprites) + things
        rendered = self.views[critters].movedim(-1, 2).float() / 255
        views = torch.cat([rendered, self.compose(records)])
        order = torch.randperm(len(views), device=device)  # the first read captions
        told = {
            name: torch.cat([self.critters[name][critters], self.things[name][records]])[order]
            for name in self.things
        }
        return {"views": views[order], **told}

    def compose(self, records: Tensor) -> Tensor:
        """Things of these records (N,) in new poses, both views: (N, 2, 4, side, side)."""
        framings, scenes = self.framings[records].flatten(), self.scenes[records].flatten()
        sprites = self.sprites[records % len(self.sprites)].repeat_interleave(2, dim=0)
        grid = F.affine_grid(self._poses(framings), list(sprites.shape), align_corners=False)
        placed = F.grid_sample(sprites.float() / 255, grid, align_corners=False)
        seen = placed[:, 3:]
        chosen = torch.randint(self.backgrounds.shape[1], scenes.shape, device=self.device)
        black = self.on_black[framings][:, None, None, None]
        behind = self.backgrounds[scenes, chosen].float() / 255 * ~black
        pictures = behind * (1 - seen) + placed[:, :3]
        return torch.cat([pictures, (seen > 0.5).float()], dim=1).unflatten(0, (-1, 2))

    def _poses(self, framings: Tensor) -> Tensor:
        """Random poses as `render.Pose` has them, as matrices (N, 2, 3) from places of the picture
        to those of the sprite, both in [-1, 1]."""

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(len(framings), *shape, device=self.device) - 1

        least, most = self.extents[framings].T
        extent = least + (most - least) * uniform().abs().sqrt()  # rather large than small
        centre = (1 - extent).abs().clamp(min=0.04)[:, None] * uniform(2)
        angle, flip = torch.deg2rad(TURN * uniform()), uniform().sign()
        cos, sin = angle.cos(), angle.sin()
        rows = torch.stack([flip * cos, flip * sin, -sin, cos], dim=1).unflatten(1, (2, 2))
        rows = rows / extent[:, None, None]
        return torch.cat([rows, -rows @ centre[..., None]], dim=2)


# --- what the objectives read ---------------------------------------------------------------------


def random_seeds(count: int) -> Tensor:
    """On the CPU, so that the base model's objective need not wait for a GPU to look at one."""
    return torch.randint(2**31, (count,))


def seen_by_vae(views: Tensor) -> Tensor:
    """Views (B, 4, side, side) in [0, 1] at half their side, RGB in [-1, 1]."""
    return 2 * F.avg_pool2d(views[:, :3], 2) - 1


def seen_by_clip(pictures: Tensor) -> Tensor:
    """RGB (..., 3, side, side) in [0, 1] with CLIP's mean and deviation."""
    channels = zip(pictures.unbind(-3), CLIP_MEAN, CLIP_STD, strict=True)
    return torch.stack([(values - mean) / std for values, mean, std in channels], dim=-3)


def vae_batch(world: MixedWorld, count: int) -> dict[str, Tensor]:
    """For `VAEObjective`: first views."""
    pixels = seen_by_vae(world.batch(count)["views"][:, 0])
    return {"pixels": pixels, "seed": random_seeds(len(pixels))}


def image_encoder_batch(world: MixedWorld, count: int) -> dict[str, Tensor]:
    """For `ImageEncoderObjective`: both views, a share of them recoloured, all in one way."""
    batch = world.batch(count)
    pictures, masks = batch["views"].split([3, 1], dim=2)
    recoloured = round(RECOLOURED * len(pictures))
    changed = pictures[:recoloured][:, :, torch.randperm(3)]
    pictures = torch.cat([1 - changed if torch.rand(()) < 0.5 else changed, pictures[recoloured:]])
    hidden = torch.tensor([name in COLOUR_ATTRIBUTES for name in ATTRIBUTES], device=world.device)
    labels = batch["labels"].clone()
    labels[:recoloured, :, hidden] = -1
    objects = torch.cat([pictures * masks, masks], dim=2)
    return {
        "clip_pixels": seen_by_clip(pictures),
        "objects": F.avg_pool2d(objects.flatten(0, 1), 2).unflatten(0, (-1, 2)),
        "labels": labels,
        "profile": batch["profile"],
    }


@torch.no_grad()
def base_batch(
    vae: AutoencoderKL, image_encoder: CLIPVisionModel, world: MixedWorld, count: int
) -> dict[str, Tensor]:
    """For `BaseModelObjective`: latents of first views and features of second ones, both computed
    anew."""
    batch = world.batch(count)
    first, second = batch.pop("views").unbind(1)
    latents = vae.encode(seen_by_vae(first)).latent_dist.mean.float()
    return {
        **batch,
        "latents": latents * vae.config.scaling_factor,
        "object_share": F.adaptive_avg_pool2d(first[:, 3:], latents.shape[-1]),
        "features": image_features(image_encoder, seen_by_clip(second[:, :3])).float(),
        "seed": random_seeds(len(latents)),
    }
