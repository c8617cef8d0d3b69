"""Where the shipped weights lie."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / "checkpoints" / "small_world"
JUDGE = REPOSITORY / "checkpoints" / "small_world_judge"
