"""Kills training runs at random points, many times, and writes the figures:

    python -m tests.faults.long --kills 20 --output runs/faults/report.json

`make faults` is this; `tests/faults/test_kills.py` does the same with a few kills.
"""

import argparse
import os
import platform
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from elite.files import write_json
from tests.faults.runs import KINDS, SCRIPTS, World, compare_killed, compare_pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--pair_kills", type=int, default=4, help="of one of two processes")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, help="of the moments; none draws one")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--output", type=Path, default=Path("runs/faults/report.json"))
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    print(f"seed {seed}")
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()}",
        "torch": torch.__version__,
        "seed": seed,
        "one_process": {},
        "two_processes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "world", args.steps, {"dataloader_num_workers": 2})
        for number, kind in enumerate(args.kinds):
            place = Path(folder) / f"one_{number}"
            found = compare_killed(
                world, kind, place, kills=args.kills, seed=seed + number, timed=True
            )
            report["one_process"][kind] = found
            print(kind, found, flush=True)
            write_json(args.output, report)
        for number, kind in enumerate(k for k in args.kinds if k in SCRIPTS and args.pair_kills):
            place = Path(folder) / f"two_{number}"
            found = compare_pair(world, kind, place, args.pair_kills, seed + 100 + number)
            report["two_processes"][kind] = found
            print(kind, found, flush=True)
            write_json(args.output, report)
    print(f"figures in {args.output}")


if __name__ == "__main__":
    main()
