"""What `elite/hardware.py` costs and saves: peak memory and time of a whole picture.

    python -m benchmarks.hardware                      tiny models, a minute
    python -m benchmarks.hardware --size full --rounds 3 --batch_sizes 1 4

Each case is drawn in a process of its own, once to warm up (and to compile), then once to measure.
On a CPU nothing is offloaded, as there is nowhere else to go, and memory is that of the process; on
a GPU it is what torch has allocated there.
"""

import argparse
from functools import partial

import torch

from benchmarks.generation import ELITE, draw_elite
from benchmarks.harness import Goal, Table, finish, make_parser, parse, timed
from benchmarks.memory import memory_rows, peak_memory
from benchmarks.models import DTYPES, build_elite, build_parts, random_concept
from elite.console import run
from elite.defaults import DEFAULT_SAMPLER
from elite.inference import pick_device, prepare_to_draw
from elite.loading import side_in_pixels
from elite.settings import DrawingModelConfig

CASES: dict[str, dict[str, bool]] = {
    "plain": {},
    "low_memory": {"low_memory": True},
    "fp8_weights": {"fp8_weights": True},
    "low_memory, fp8_weights": {"low_memory": True, "fp8_weights": True},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
}
GPU_GOAL = Goal("low_memory", 3 * 1024, of="median")  # MiB of a picture of 512 px


def picture_cost(
    case: str,
    size: str,
    device: torch.device,
    dtype: str,
    resolution: int | None,
    batch_size: int,
    steps: int,
) -> dict[str, float]:
    """MiB at the peak and above the resting level, and seconds, of the second picture of a process.

    Args:
        resolution: None means the model's own.
    """
    pipe = build_elite(build_parts(size, torch.device("cpu"), DTYPES[dtype], DEFAULT_SAMPLER))
    precision = "no" if dtype == "fp32" else dtype
    settings = {"device": str(device), "mixed_precision": precision, **CASES[case]}
    prepare_to_draw(pipe, DrawingModelConfig(**settings))
    side = resolution or side_in_pixels(pipe.unet, pipe.vae)
    concept, options = random_concept(pipe), {"num_inference_steps": steps, "output_type": "np"}
    draw = partial(draw_elite, pipe, ELITE, concept, side, batch_size, **options)
    draw()
    seconds: list[float] = []
    measure = timed(draw, device)
    peak = peak_memory(lambda: seconds.append(measure()), device)
    return {**peak, "seconds": seconds[0]}


def tables(args: argparse.Namespace, device: torch.device) -> list[Table]:
    """Peaks and seconds over number types and batch sizes."""
    goal = GPU_GOAL if device.type == "cuda" and "low_memory" in args.cases else None
    total = Table("Peak memory of a whole picture, loaded models included", "MiB", goal)
    above = Table("Peak memory of a whole picture above the resting level", "MiB")
    seconds = Table("Time of a whole picture in little memory and with other kernels", "s")
    for dtype in args.dtypes:
        for batch_size in args.batch_sizes:
            setting = (args.size, device, dtype, args.resolution, batch_size, args.steps)
            cases = {case: (case, *setting) for case in args.cases}
            name = f"{dtype}, batch {batch_size}"
            rows = memory_rows(cases, picture_cost, args.rounds, name)
            for table, kind in ((total, "total"), (above, "above"), (seconds, "seconds")):
                table.rows.append(rows[kind])
    return [total, above, seconds]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "hardware")
    parser.add_argument("--steps", type=int, default=2, help="a picture (default 2)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--resolution", type=int, help="default the model's own")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="default all"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--device", help="default CUDA where it is, else the CPU")
    return parse(parser, "hardware", argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return finish(args, tables(args, pick_device(args.device)), "hardware")


if __name__ == "__main__":
    run(main, keeps=False)
