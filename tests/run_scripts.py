"""Runs top-level scripts one after another: `run_scripts.py A.py --flag 1 -- B.py --flag 2`.

Tests launch this under accelerate, so that importing torch is paid for once per process.
"""

import runpy
import sys
from itertools import groupby
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def run(argv: list[str]) -> int:
    """One script with its arguments; its exit status."""
    sys.argv = argv
    try:
        runpy.run_path(str(REPOSITORY / argv[0]), run_name="__main__")
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


if __name__ == "__main__":
    calls = [list(words) for is_break, words in groupby(sys.argv[1:], "--".__eq__) if not is_break]
    sys.path.insert(0, str(REPOSITORY))
    sys.exit(max(run(call) for call in calls))
