"""python -m tests.hostile [--json FILE] [--kinds KIND ...]: every bad input, and counts by kind.

Exit status 1 where one of them ends in anything but one clear line or a correct result.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from elite.console import quiet_libraries
from tests.hostile.corpus import all_cases
from tests.hostile.harness import World, judge, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kinds", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        wanted = [c for c in all_cases(world) if not args.kinds or c.kind in args.kinds]
        verdicts = []
        for case in wanted:
            verdict = judge(case, world)
            verdicts.append(verdict)
            if verdict.fault:
                print(f"FAULT {verdict.kind} {verdict.name}: {verdict.fault}", flush=True)
    print(table(verdicts))
    if args.json:
        args.json.write_text(
            json.dumps([asdict(verdict) for verdict in verdicts]), encoding="utf-8"
        )
    return int(any(verdict.fault for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
