"""The README keeps its promises: the Python snippet runs, its commands name what exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_first_two_blocks_install_and_draw_and_test() -> None:
    draw, test = blocks("bash")[:2]
    assert draw == "pip install -r requirements.txt && python inference_local.py\n"
    assert test == "pip install -r requirements-dev.txt && python -m pytest -q\n"


def test_the_snippets_draw(tmp_path: Path) -> None:
    """One after the other, as a reader would type them."""
    for name in ("checkpoints", "test_datasets"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    fast = re.sub(r"\bseed=(\d)", r"seed=\1, num_inference_steps=4", "\n".join(blocks("python")))
    assert fast.count("num_inference_steps=4") == 2
    env = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run([sys.executable, "-c", fast], cwd=tmp_path, env=env, check=True, timeout=300)
    for name in ("mug_on_the_grass.png", "mug_and_heart.png", "mug_in_place_of_the_star.png"):
        assert (tmp_path / name).stat().st_size > 500
    assert (tmp_path / "mug.safetensors").exists()


def test_every_file_it_names_exists() -> None:
    named = re.findall(
        r"(?:python|bash|--config_file|--config) ([\w/]+\.(?:py|sh|json|yaml))", README
    )
    assert len(named) > 8
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
