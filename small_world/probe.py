"""What the base model is built on: how well the VAE draws critters, what the image encoder tells.

    python -m small_world.probe [--output_dir runs/probe] [--model checkpoints/small_world]

Of fresh critters of held-out combinations in whole scenes: the mean PSNR of their pictures through
the VAE, and the share of each attribute that a linear probe reads from the image encoder's features
(CLS beside the mean of the patches; logistic regression, fitted to fresh trained critters).
OUTPUT_DIR receives probe.md and probe.json. Exit code 2: bad input.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionModel

from elite.console import OK, check_least, run, script_parser
from elite.files import check_writable, write_json, write_text
from elite.images import to_clip_pixels
from elite.loading import load_parts
from elite.markdown import table
from small_world.attributes import right_ones
from small_world.flags import MODEL
from small_world.pretrain import image_features
from small_world.samples import small_pixels, whole_view
from small_world.score import cell, make_cases, share
from small_world.world import ATTRIBUTES

SEED = 1  # of the cases, which score and reproduce draw with 0
WEIGHT_DECAY = 1e-4  # of the probe
RECONSTRUCTED = 200  # pictures whose PSNR is averaged


def views_and_labels(count: int, kind: str) -> tuple[Tensor, Tensor]:
    """Views of fresh critters of one of `score.KINDS`, uint8 (N, 64, 64, 4), and what they show,
    (N, attributes)."""
    cases = make_cases(count, kind, SEED)
    drawn = (case.picture(case.scene, case.rng) for case in tqdm(cases, f"draw {kind}"))
    views = np.stack([whole_view(*picture) for picture in drawn])
    return torch.from_numpy(views), torch.tensor([case.wanted for case in cases])


@torch.no_grad()
def features_of(image_encoder: CLIPVisionModel, views: Tensor) -> Tensor:
    """`image_features` of views (N, 64, 64, 4), (N, 2 x width)."""
    features = []
    for some in views[..., :3].split(250):
        clip_pixels = torch.stack([to_clip_pixels(view.numpy()) for view in some])
        features.append(image_features(image_encoder, clip_pixels))
    return torch.cat(features)


def fit_probe(features: Tensor, labels: Tensor) -> nn.ModuleDict:
    """Logistic regressions of all attributes, by L-BFGS; labels of -1 are left out."""
    width = features.shape[1]
    probe = nn.ModuleDict({name: nn.Linear(width, len(k)) for name, k in ATTRIBUTES.items()})
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        errors = [
            F.cross_entropy(head(features[target >= 0]), target[target >= 0])
            for head, target in zip(probe.values(), labels.T, strict=True)
            if (target >= 0).any()
        ]
        decay = sum(head.weight.square().sum() for head in probe.values())
        total = torch.stack(errors).sum() + WEIGHT_DECAY * decay
        total.backward()
        return total

    optimizer.step(loss)
    return probe


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over pictures (N, 3, H, W) in [-1, 1] of their PSNR through the VAE, dB."""
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    errors = (decoded - pixels).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(errors / 4)).mean())


def main(arguments: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/probe"))
    parser.add_argument("--fitted", type=int, default=8000, help="renders the probe is fitted to")
    parser.add_argument("--samples", type=int, default=1000, help="held-out renders")
    args = parser.parse_args(arguments)
    check_least(args, fitted=1, samples=1)
    check_writable(args.output_dir)
    torch.manual_seed(0)
    parts = load_parts(args.model)
    known, known_labels = views_and_labels(args.fitted, "trained")
    views, wanted = views_and_labels(args.samples, "held out")

    fitted = features_of(parts["image_encoder"], known)
    mean, deviation = fitted.mean(0), fitted.std(0).clamp(min=1e-6)
    probe = fit_probe((fitted - mean) / deviation, known_labels)
    seen = (features_of(parts["image_encoder"], views) - mean) / deviation
    with torch.no_grad():
        logits = {name: head(seen) for name, head in probe.items()}
    found = right_ones(logits, wanted)
    scores = {name: share(values[values >= 0]) for name, values in found.items()}
    pixels = torch.stack([small_pixels(view.numpy()) for view in views[:RECONSTRUCTED]])
    decibels = psnr(parts["vae"], pixels)

    cells = [cell(score) for score in scores.values()]
    text = table(["VAE, dB", *scores], [[f"{decibels:.1f}", *cells]]) + "\n"
    about = {"model": str(args.model), "fitted": args.fitted, "samples": args.samples}
    write_json(args.output_dir / "probe.json", {**about, "psnr": decibels, "attributes": scores})
    write_text(args.output_dir / "probe.md", text)
    print(text)
    return OK


if __name__ == "__main__":
    run(main)
