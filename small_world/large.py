"""The small world at 64 px, critters and other people's things together, in minutes of one GPU:

    python data_scripts/fetch_art.py ART --sources fluent google twitter
    python -m small_world.large --art ART/fluent ART/google ART/twitter --output_dir OUT
    [--minutes 8] [--size full]

Renders critters on all cores, then trains VAE, image encoder and base model in what is left of the
time, by the objectives of `pretrain` on batches that the device puts together. OUT receives
renders, model/ (fp16 in diffusers layout, image encoder included, for train_global.py,
train_local.py and `small_world.judge`) and grid.png: what was trained on, the same through the VAE,
descriptions of held-out critters and names of things as the base model draws them. One thing in six
is kept from training. `--size tiny` runs on a CPU, to see that it runs. An interrupted run begins
anew. Exit code 2: bad input.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from elite.console import OK, add_workers, check_least, quiet_libraries, run, script_parser
from elite.files import check_writable, write_atomically


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    side: int  # of the stored views; VAE and UNet see half of it
    width: int  # of text and image features
    channels: tuple[int, ...]  # of the UNet's levels
    critters: int
    rounds: int  # captions for every thing
    backgrounds: int  # pictures of every scene
    batch_size: int


SIZES = {
    "full": Size(128, 192, (128, 160, 160), 30_000, 16, 100, 384),  # 40 MB in fp16
    "tiny": Size(128, 32, (32, 48), 16, 2, 2, 6),
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--art", type=Path, nargs="+", required=True, help="folders of PNGs")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default 8)")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    add_workers(parser)
    args = parser.parse_args(arguments)
    check_least(args, workers=1)
    if not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes}: expected more than 0")
    check_writable(args.output_dir)
    return args


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    args = parse_args(arguments)
    quiet_libraries()
    import torch

    from elite.hardware import pick_device
    from small_world.large_training import preview, train_all
    from small_world.mixed import MixedWorld
    from small_world.pretrain import save_model
    from small_world.samples import render_samples
    from small_world.things import find_things

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # of what autocast leaves in float32
    size, samples = SIZES[args.size], args.output_dir / f"samples_{args.size}"
    files = [file for folder in args.art for file in find_things(folder, held_out=False)]
    render_samples(samples, size.critters, "trained", workers=args.workers, side=size.side)
    world = MixedWorld(
        samples,
        files,
        side=size.side,
        rounds=size.rounds,
        backgrounds=size.backgrounds,
        device=pick_device(None),
    )
    passed = time.monotonic() - started
    print(f"{size.critters} critters and {len(files)} things after {passed:.0f} s", flush=True)
    pipe, image_encoder = train_all(size, world, max(1.0, 60 * args.minutes - passed))
    write_atomically(args.output_dir / "grid.png", preview(pipe, world).save)
    save_model(pipe, image_encoder, args.output_dir / "model")
    print(f"{args.output_dir / 'model'}: done after {time.monotonic() - started:.0f} s")
    return OK


if __name__ == "__main__":
    run(main)
