"""Encode the target of every Open Images box with the VAE, once, before stage 1 training.

    python data_scripts/cache_latents.py OPEN_IMAGES OUT_DIR --pretrained_model_name_or_path MODEL
        [--resolution 512] [--dtype float16] [--batch_size 8] [--workers 8] [--device cuda]

Then train_global.py with `--cache_latents OUT_DIR`, or the URL of a copy of it, and the same model,
folder and resolution needs no VAE in its steps. OUT_DIR/index.json lists the files with size and
SHA-256. Interrupted, it goes on with those that are missing; after a change it encodes again those
that no longer fit or are damaged. Exit code 2: nothing could be done; 3: some images could not be
read (they are listed, the rest is encoded).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from elite.console import check_least, list_failures, quiet_libraries, run, script_parser
from elite.files import check_writable
from elite.settings import MOST_GB

DTYPES = ("float32", "float16", "bfloat16")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("train_data_dir", help="Open Images root, or shards: folder or URL")
    parser.add_argument("out_dir", type=Path, help="folder for the latents")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="Stable Diffusion whose VAE encodes: a diffusers folder, hub name or single file",
    )
    parser.add_argument("--revision", help="of a hub model (default: its main branch)")
    parser.add_argument("--variant", help="of the weights' files, as fp16 (default: none)")
    parser.add_argument(
        "--single_file_config", help="folder with the configs of a single file (default: the hub's)"
    )
    parser.add_argument(
        "--resolution", type=int, help="side of the targets in pixels (default: what is drawn)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of what is stored (default float32)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=8, help="targets encoded at once (default 8)"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that read images (default: this one)"
    )
    parser.add_argument("--shard_cache", help="folder that shards are fetched to (default: none)")
    parser.add_argument(
        "--shard_cache_gb", type=float, default=20.0, help="most that it may hold (default 20)"
    )
    parser.add_argument("--device", help="such as cpu, cuda:0 or mps (default: the fastest)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    check_least(args, resolution=8, batch_size=1, workers=0)
    if not 0 < args.shard_cache_gb <= MOST_GB:
        raise ValueError(
            f"--shard_cache_gb {args.shard_cache_gb:g}: expected more than 0, at most {MOST_GB:g}"
        )
    check_writable(args.out_dir)
    quiet_libraries()
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from elite.files import is_file
    from elite.hardware import pick_device
    from elite.latents import cache_latents
    from elite.loading import load_model, load_part, load_stable_diffusion, side_for_training
    from elite.open_images import OpenImagesBoxes
    from elite.shards import open_source

    model, revision = args.pretrained_model_name_or_path, args.revision or None
    if is_file(model):
        parts = load_stable_diffusion(model, single_file_config=args.single_file_config)
        vae, unet_config = parts["vae"], parts["unet"].config
    else:
        vae = load_model(
            AutoencoderKL, model, "vae", variant=args.variant or None, revision=revision
        )
        unet_config = load_part(
            UNet2DConditionModel, model, "unet", loader="load_config", revision=revision
        )
    resolution = side_for_training(args.resolution, unet_config, vae)
    cache = {"cache": args.shard_cache, "cache_gb": args.shard_cache_gb}
    source = open_source(args.train_data_dir, **cache, window=1)  # shard by shard, in order
    boxes = OpenImagesBoxes(source, resolution=resolution)
    failures = cache_latents(
        boxes,
        vae.to(pick_device(args.device)),
        args.out_dir,
        dtype=getattr(torch, args.dtype),
        batch_size=args.batch_size,
        workers=args.workers,
    )
    print(f"{args.out_dir}: latents of {len(boxes)} targets at {resolution} px")
    return list_failures(failures, "images")


if __name__ == "__main__":
    run(main)
