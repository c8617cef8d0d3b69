"""What the base model is built on: how well the VAE draws critters, what the image encoder tells.

    python -m small_world.probe [--output_dir runs/probe] [--model checkpoints/small_world]

Of fresh critters of held-out combinations in whole scenes: the mean PSNR of their pictures through
the VAE, and the share of each attribute that a linear probe (logistic regression, fitted to fresh
trained critters) reads from the image encoder's features, CLS beside the mean of the patches; of
new kinds what another one reads, fitted to other critters of these kinds as well. Where the model
has mappers, the same from their w0. OUTPUT_DIR receives probe.md and probe.json. Exit code 2: bad
input.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionModel

from elite.console import OK, check_least, run, script_parser
from elite.encoding import batches
from elite.files import check_writable, write_json, write_text
from elite.images import to_clip_pixels
from elite.loading import load_parts
from elite.markdown import table
from elite.pipeline import ElitePipeline, stack_views
from small_world.attributes import right_ones
from small_world.flags import MODEL
from small_world.pretrain import image_features
from small_world.samples import small_pixels, whole_view
from small_world.score import CONCEPT_SIDE, Case, cell, make_cases, share
from small_world.world import ATTRIBUTES, labels, unseen_kinds

SEED = 1  # of the cases, which score and reproduce draw with 0
BATCH_SIZE = 100
WEIGHT_DECAY = 1e-4  # of the probe
RECONSTRUCTED = 200  # pictures whose PSNR is averaged
NEW_KIND = "new kind"

Picture = tuple[np.ndarray, np.ndarray]  # image and mask
Reader = Callable[[Sequence[Picture]], Tensor]  # to what is read of them, (B, width)


def features_of(image_encoder: CLIPVisionModel) -> Reader:
    """Reads `image_features`, (B, 2 x width)."""

    def read(pictures: Sequence[Picture]) -> Tensor:
        views = [whole_view(*picture)[..., :3] for picture in pictures]
        return image_features(image_encoder, torch.stack([to_clip_pixels(view) for view in views]))

    return read


def primary_words_of(elite: ElitePipeline) -> Reader:
    """Reads w0, (B, D)."""

    def read(pictures: Sequence[Picture]) -> Tensor:
        views = stack_views([elite.concept_views(*picture) for picture in pictures])
        return elite.encode_views(**views).words[:, 0]

    return read


def drawn(case: Case) -> Picture:
    """The source of a case; not its own `source`, which each of thousands would keep."""
    return case.picture(case.source_scene, case.rng, CONCEPT_SIDE)


@torch.no_grad()
def read_all(readers: Mapping[str, Reader], cases: Sequence[Case], name: str) -> dict[str, Tensor]:
    """What each reader reads of all cases, (N, width)."""
    found: dict[str, list[Tensor]] = {reader: [] for reader in readers}
    for some in batches(iter(tqdm(cases, f"read {name}")), BATCH_SIZE):
        pictures = [drawn(case) for case in some]
        for reader, read in readers.items():
            found[reader].append(read(pictures))
    return {reader: torch.cat(parts) for reader, parts in found.items()}


def labels_of(cases: Sequence[Case]) -> Tensor:
    """What their sources show, (N, attributes)."""
    return torch.tensor([labels(case.critter, case.source_scene) for case in cases])


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


def read_by_probe(
    fitted: Tensor, fitted_labels: Tensor, seen: Tensor, cases: Sequence[Case]
) -> dict[str, dict]:
    """What a probe of features (N, width) and labels (N, attributes) reads from other features
    (M, width) of these cases: shares by attribute, and by NEW_KIND where they have one."""
    mean, deviation = fitted.mean(0), fitted.std(0).clamp(min=1e-6)
    probe = fit_probe((fitted - mean) / deviation, fitted_labels)
    with torch.no_grad():
        logits = {name: head((seen - mean) / deviation) for name, head in probe.items()}
    found = right_ones(logits, labels_of(cases))
    new = [found[n][i] for i, case in enumerate(cases) for n in unseen_kinds(case.critter)]
    found[NEW_KIND] = torch.stack(new) if new else torch.empty(0)
    return {name: share(values[values >= 0]) for name, values in found.items()}


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
    parser.add_argument(
        "--fitted",
        type=int,
        default=8000,
        help="trained renders the probe is fitted to, with half as many of new kinds for these",
    )
    parser.add_argument("--samples", type=int, default=1000, help="renders that are read")
    args = parser.parse_args(arguments)
    check_least(args, fitted=2, samples=1)
    check_writable(args.output_dir)
    torch.manual_seed(0)
    parts = load_parts(args.model)
    readers = {"image encoder": features_of(parts["image_encoder"])}
    if (args.model / "global_mapper").is_dir():
        elite = ElitePipeline.from_stable_diffusion(args.model, local_mapper=False)
        readers["w0"] = primary_words_of(elite)
    known = make_cases(args.fitted, "trained", SEED)
    cases = {"held out": make_cases(args.samples, "held out", SEED)}
    new = make_cases(args.fitted // 2 + args.samples, "new kinds", SEED)
    more, cases["new kinds"] = new[: -args.samples], new[-args.samples :]

    fitted, of_new = read_all(readers, known, "trained"), read_all(readers, more, "more new kinds")
    known_labels, new_labels = labels_of(known), labels_of(more)
    rows = {}
    for kind, some in cases.items():
        seen = read_all(readers, some, kind)
        for reader in readers:
            x, y = fitted[reader], known_labels
            if kind == "new kinds":
                x, y = torch.cat([x, of_new[reader]]), torch.cat([y, new_labels])
            rows[f"{reader}, {kind}"] = read_by_probe(x, y, seen[reader], some)
    shown = (case.picture(case.scene, case.rng) for case in cases["held out"][:RECONSTRUCTED])
    pixels = torch.stack([small_pixels(whole_view(*picture)) for picture in shown])
    decibels = psnr(parts["vae"], pixels)

    lines = [[name, *(cell(score) for score in scores.values())] for name, scores in rows.items()]
    text = table(["% read by a probe", *ATTRIBUTES, NEW_KIND], lines)
    text += f"\n\nVAE: {decibels:.1f} dB.\n"
    about = {"model": str(args.model), "fitted": args.fitted, "samples": args.samples}
    write_json(args.output_dir / "probe.json", {**about, "psnr": decibels, "rows": rows})
    write_text(args.output_dir / "probe.md", text)
    print(text)
    return OK


if __name__ == "__main__":
    run(main, keeps=False)
