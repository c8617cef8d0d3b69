"""What a speed costs, at a reduced size on the shipped small world."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from benchmarks import quality
from benchmarks.ladder import counted_flops
from benchmarks.models import TEXT_LENGTH, UNET
from benchmarks.quality import Compared, work_at_full_size, work_of_ladder
from elite.deep_features import deep_features_reused
from elite.speed import RUNGS, Speed, single_knobs
from small_world import methods
from small_world.methods import Pictures
from small_world.world import ATTRIBUTES

SMALL = ["--samples", "3", "--num_inference_steps", "6", "--batch_size", "2"]
MORE = ["--guidance_stop", "0.9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    assert quality.main([*SMALL, *MORE, "--output_dir", str(folder)]) == 0
    return folder


def test_every_speed_has_its_row(folder):
    results = json.loads((folder / "results.json").read_text())
    speeds = results["speeds"]
    assert list(speeds) == [*RUNGS, *single_knobs(), "guidance_stop 0.9"]
    exact = speeds["exact"]
    assert exact["work"] == 1 and exact["far"] == 0
    assert all(mean == 0 and low == -high for mean, low, high in exact["lost"].values())
    assert speeds["fast"]["work"] < speeds["balanced"]["work"] < 1
    assert set(exact["scores"]) == set(quality.SCORES)
    lines = (folder / "results.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in speeds]
    for name in ("cost.png", "grid.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 100


def test_pictures_are_of_the_same_noise(folder):
    """Each speed draws others than exact, near them."""
    drawn = {path.stem: np.load(path)["pictures"] for path in (folder / "drawn").glob("*.npz")}
    assert len(drawn) == len(RUNGS) + len(single_knobs()) + 1
    exact = drawn.pop("exact").astype(int)
    for name, pictures in drawn.items():
        distance = np.abs(pictures - exact).mean(axis=(1, 2, 3))
        others = np.abs(pictures - np.roll(exact, 1, axis=0)).mean(axis=(1, 2, 3))
        assert 0 < distance.mean() < others.mean(), name


def test_a_second_run_draws_what_is_new_alone(folder, monkeypatch):
    drawn = []

    def draw(method, batch_size, progress):
        drawn.append(method.name)
        return torch.zeros(3, 3, 32, 32)

    monkeypatch.setattr(methods, "draw_row", draw)
    monkeypatch.setattr(Pictures, "_save", lambda *_: None)
    with pytest.raises(AssertionError):  # as nothing was saved
        quality.main([*SMALL, "--deep_every", "4", "--output_dir", str(folder)])
    assert drawn == ["deep_every 4"]


def verdicts(right: int, scene: int) -> dict[str, np.ndarray]:
    """Of 300 pictures; so many per cent have all of the critter right, and so many the scene."""
    counts = {name: scene if name == "scene" else right for name in (*ATTRIBUTES, "identity")}
    return {name: (np.arange(300) < 3 * count).astype(int) for name, count in counts.items()}


@pytest.mark.parametrize(
    ("name", "right", "distance", "holds"),
    [
        ("balanced", 100, 0.0, True),
        ("balanced", 100, 11.0, False),  # far
        ("balanced", 95, 0.0, False),
        ("fast", 99, 11.0, True),
        ("fast", 90, 0.0, False),
    ],
)
def test_what_a_speed_may_lose(name, right, distance, holds):
    exact = verdicts(100, 100)
    compared = Compared(name, verdicts(right, 100), exact, np.full(300, distance), 0.5, 0.4)
    assert compared.holds == holds
    likeness, scene, identity = (x.difference[0] for x in compared.lost)
    assert likeness == identity == pytest.approx(right / 100 - 1) and scene == 0


def test_work_without_weights_is_that_of_the_steps():
    """Counted once more by running a tiny UNet, the rows of the prompts alone once guidance has
    ended."""
    unet = UNet2DConditionModel(**UNET["tiny"]).eval()
    latents, context = torch.zeros(2, 4, 16, 16), torch.zeros(2, TEXT_LENGTH, 24)

    def steps(speed: Speed) -> None:
        with torch.no_grad(), deep_features_reused(unet, speed.runs_whole):
            for step in range(6):
                rows = 2 if step < speed.guided_steps(6) else 1
                unet(latents[:rows], 0, context[:rows])

    tried = {
        "exact": Speed(),
        "one": Speed(guidance_stop=0.5),
        "both": Speed(0.5, 4),
        "first": Speed(0.5, 3, 2),
    }
    flops = {name: counted_flops(partial(steps, speed)) for name, speed in tried.items()}
    wanted = {name: count / flops["exact"] for name, count in flops.items()}
    found = work_at_full_size(tried, 6, size="tiny")
    assert found == pytest.approx(wanted, rel=1e-3) and found["both"] < found["one"] < 1


def test_work_of_a_file_of_the_ladder(tmp_path):
    path = tmp_path / "ladder.json"
    row = {"medians": {"stock": 3.0, "exact": 4.0, "fast": 1.0}}
    path.write_text(json.dumps({"tables": [{"title": "Work of a whole picture", "rows": [row]}]}))
    assert work_of_ladder(path, ["exact", "fast"]) == {"exact": 1, "fast": 0.25}
    no_rows = {"tables": [{"title": "Work of a whole picture", "rows": []}]}
    for names, text in (
        (["exact", "balanced"], path.read_text()),
        (["exact"], "{}"),
        (["exact"], json.dumps(no_rows)),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"ladder\.json: no work of every speed in it"):
            work_of_ladder(path, names)
