"""Which sampler is as good as the reference, on made-up scores."""

import argparse
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evaluation.cases import Case, report
from evaluation.subjects import read_subjects
from small_world import samplers
from small_world.samplers import Sampler, evaluated, fewest, markdown
from tests import tiny


def sampler(
    name: str, steps: int, body: float, scene: float, differences: tuple[float, ...] = (1.0, 3.0)
) -> Sampler:
    means = {**dict.fromkeys((*samplers.SHOWN, "eyes"), body), "scene": scene}
    scores = {
        metric: {"mean": mean, "interval": [mean - 0.05, mean + 0.05]}
        for metric, mean in means.items()
    }
    return Sampler(name, steps, scores, np.array(differences))


REFERENCE = sampler("lms", 100, 0.70, 0.90)


@pytest.mark.parametrize(
    ("body", "scene", "good"),
    [(0.70, 0.90, True), (0.66, 0.86, True), (0.64, 0.95, False), (0.90, 0.84, False)],
)
def test_as_good_in_every_metric(body, scene, good):
    assert sampler("dpm++", 10, body, scene).as_good_as(REFERENCE) is good


def test_a_single_far_picture_is_not_as_good():
    assert sampler("dpm++", 10, 0.7, 0.9, (9.0, 10.0)).as_good_as(REFERENCE)
    assert not sampler("dpm++", 10, 0.7, 0.9, (0.0, 10.1)).as_good_as(REFERENCE)


def test_differences_of_pictures(tmp_path):
    """Of those that were scored: an earlier run with more seeds has left others."""
    data = tiny.save_pairs(tmp_path / "data", 1)
    (subject,) = read_subjects(data, {}, "thing")
    case = Case(subject, 0, "a {}", 42)
    for folder, value in (("lms_100", 100), ("dpm++_8", 92)):
        picture = np.full((4, 4, 3), 100, dtype=np.uint8)
        picture[:2] = value
        (tmp_path / folder / subject.name).mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / folder / case.path)
    Image.new("RGB", (4, 4)).save(tmp_path / "lms_100" / replace(case, seed=43).path)
    settings = {"test_data_dir": str(data), "crop_references": False, "class_word": "thing"}
    references = {subject.name: subject.measured_with(cropped=False)}
    row = case.key | {"body": 1.0}
    report([case], [row], tmp_path / "lms_100", settings, {"references": references})
    found = samplers.picture_differences(tmp_path / "dpm++_8", tmp_path / "lms_100")
    assert found.tolist() == [4.0]


def test_fewest_steps_of_those_as_good():
    few, some, many = (
        sampler("unipc", 8, 0.5, 0.9),
        sampler("dpm++", 15, 0.7, 0.9),
        sampler("dpm++", 25, 0.8, 0.95),
    )
    assert fewest(REFERENCE, [many, few, some]) is some
    assert fewest(REFERENCE, [few]) is REFERENCE


def test_table_names_each_and_the_choice_is_the_good_one():
    candidates = [sampler("dpm++", 15, 0.7, 0.9), sampler("unipc", 8, 0.5, 0.9)]
    text, chosen = markdown(REFERENCE, candidates), fewest(REFERENCE, candidates)
    assert (chosen.name, chosen.steps) == ("dpm++", 15)
    assert "| 70.0% (65.0% to 75.0%) | 90.0% (85.0% to 95.0%) | 2.0 | 0.0% | - |" in text
    assert text.count("| yes |") == 1 and text.count("| no |") == 1
    assert "eyes" not in text and text.startswith("| sampler | steps | body |")


def test_scores_of_an_earlier_run_are_not_taken_for_those_of_this_one(tmp_path, monkeypatch):
    """They may be of other weights or another lambda; evaluate.py knows which pictures to keep."""
    folder = tmp_path / "dpm++_20"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"scores": {}}))

    def evaluate(words):
        assert words[words.index("--llambda") + 1] == "0.6"
        (folder / "results.json").write_text(json.dumps({"scores": REFERENCE.scores}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(samplers.subprocess, "run", evaluate)
    monkeypatch.setattr(samplers, "picture_differences", lambda *_: np.zeros(1))
    args = argparse.Namespace(work_dir=tmp_path, num_images=1, batch_size=1, llambda=0.6)
    found = evaluated("dpm++", 20, args)
    assert found.scores == REFERENCE.scores and found.steps == 20


def test_a_run_that_fails_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(samplers.subprocess, "run", lambda *_: SimpleNamespace(returncode=2))
    args = argparse.Namespace(work_dir=tmp_path, num_images=1, batch_size=1, llambda=0.8)
    with pytest.raises(ValueError, match=r"unipc, 8 steps: evaluate\.py ended with status 2"):
        evaluated("unipc", 8, args)
