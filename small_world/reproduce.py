"""The paper's claims on the small world, as one table:

    python -m small_world.reproduce [--output_dir runs/reproduce] [--samples 500] [--inversions 24]

Held-out critters, each read from one picture and drawn in another scene with a part added ("a S
with wings on the beach"), by every method: class word, full description, all words, w0, w0 with the
local branch over lambda, textual inversion after some numbers of steps. The judge says what is
seen. OUTPUT_DIR receives results.md, results.json, curve.png, grid.png and grid_new_kinds.png, and
in drawn/ and inversion/ what an interrupted run goes on from. Exit code 2: bad input.
"""

import argparse
from pathlib import Path

from elite.console import OK, quiet_libraries, run, script_parser
from elite.files import check_writable
from small_world.flags import add_drawing, check_drawing


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_drawing(parser, 500, "a method")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument(
        "--inversions", type=int, default=24, help="concepts for textual inversion; 0 leaves it out"
    )
    parser.add_argument("--inversion_steps", type=int, nargs="+", default=[100, 500, 2000])
    args = parser.parse_args(arguments)
    check_drawing(args)
    if not 0 <= args.inversions <= args.samples:
        raise ValueError(f"--inversions {args.inversions}: expected 0 to --samples {args.samples}")
    if args.inversion_steps != sorted(set(args.inversion_steps)) or args.inversion_steps[0] < 1:
        raise ValueError("--inversion_steps: expected numbers from 1 on, each above the last")
    check_writable(args.output_dir)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    quiet_libraries()
    from small_world.classifier import load_judge
    from small_world.table import Table

    judge = load_judge(args.judge)
    table = Table(
        args.model,
        args.output_dir,
        samples=args.samples,
        inversions=args.inversions,
        inversion_steps=args.inversion_steps,
        seed=args.seed,
        batch_size=args.batch_size,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
    )
    table.draw()
    print(table.report(judge))
    print(f"\nmore in {args.output_dir}; look at {args.output_dir / 'grid.png'} first")
    return OK


if __name__ == "__main__":
    run(main)
