"""Puts the README's results into the model card of the small world, so that they cannot disagree:
python docs/make_card.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from elite.files import write_text

REPOSITORY = Path(__file__).resolve().parents[1]
CARD = REPOSITORY / "checkpoints/small_world/README.md"


def page() -> str:
    """The card with the results as the README has them."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    results = readme.split("\n## Results\n")[1].split("\n[All results]")[0].strip()
    before, rest = CARD.read_text(encoding="utf-8").split("\n## Results\n")
    after = rest[rest.index("\n## ") :]
    return f"{before}\n## Results\n\n{results}\n{after}"


if __name__ == "__main__":
    write_text(CARD, page())
    print(f"{CARD}: {len(page().splitlines())} lines")
