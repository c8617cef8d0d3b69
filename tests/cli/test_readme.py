"""The README keeps its promises: the first commands stand, the Python snippets run; those of docs/
as well."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_scripts.cal_bbox_by_seg import main as index_masks
from elite.open_images import OpenImagesBoxes, OpenImagesMasks

REPOSITORY = Path(__file__).parents[2]
ENCODED = """
for name in ("06_yellow_solid_square", "11_turquoise_red_striped_round"):  # as encode.py would have
    concept.save(f"outputs/concepts/{name}.safetensors")
"""


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def snippets(pages: Iterable[str]) -> list[str]:
    return [block for page in pages for block in blocks("python", page)]


def test_the_readme_is_short() -> None:
    """What does not fit stands in docs/, each thing on one page."""
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


def test_the_first_two_blocks_install_and_draw_and_test() -> None:
    draw, test = blocks("bash")[:2]
    assert draw == "pip install -r requirements.txt && python inference_local.py\n"
    assert test == "pip install -r requirements-dev.txt && python -m pytest -q\n"


def test_the_snippets_draw(tmp_path: Path) -> None:
    """One after the other, as a reader would type them."""
    for name in ("checkpoints", "test_datasets"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    before = "README.md", "docs/concepts.md", "docs/diffusers.md"
    after = "docs/tutorial.md", "docs/training.md"
    code = "\n".join([*snippets(before), ENCODED, *snippets(after)])
    fast, drawn = re.subn(r"\bseed=(\d)", r"seed=\1, num_inference_steps=4", code)
    assert drawn == 3
    env = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run([sys.executable, "-c", fast], cwd=tmp_path, env=env, check=True, timeout=300)
    for name in (
        "critter_on_the_grass.png",
        "two_critters.png",
        "critter_in_place_of_the_other.png",
        "critter_in_blocks.png",
    ):
        assert (tmp_path / name).stat().st_size > 500
    assert (tmp_path / "critter.safetensors").exists()
    assert (tmp_path / "lambdas.png").stat().st_size > 500
    check_training_data(tmp_path / "runs/my_data")


def check_training_data(root: Path) -> None:
    """Stage 2 finds all sixteen objects in it, stage 1 those that fill no more than 80 % of their
    picture, the boxes tight."""
    boxes = OpenImagesBoxes(root, resolution=32, clip_size=64)
    assert index_masks([str(root), "--workers", "1"]) == 0
    masks = OpenImagesMasks(root, resolution=32, clip_size=64, latent_size=8)
    assert (len(boxes), len(masks)) == (14, 16)
    assert masks.sample(0, np.random.default_rng(0))["object_mask"].any()
    square = boxes.boxes[list(boxes.image_ids).index(b"08_orange_solid_square")] * 256
    np.testing.assert_allclose(square, (51, 206, 15, 242), atol=0.01)  # x0 x1 y0 y1 of its mask
