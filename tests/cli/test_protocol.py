"""DreamBench's protocol in evaluate.py, the rows beside its scores, and the comparison of runs."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from elite.data import pair_of
from elite.files import digest_weights
from elite.images import read_image
from elite.sheets import HEADER, TILE, tile_rows
from evaluation import cases as cases_module
from evaluation import protocol
from evaluation.cases import Case, contact_sheets, make_cases
from evaluation.metrics import Clip, Dino
from evaluation.protocol import CLIP, DINO, GROUND, Setup, departures, digest_prompts
from evaluation.rate import Program, cases_of, numbers_of, read_ratings, results_of
from evaluation.subjects import Subject, read_prompts, read_subjects
from tests import tiny
from tests.conftest import run_script
from tests.unit.test_subjects import DREAMBENCH

COMPARE, RATE = "evaluation/compare.py", "evaluation/rate.py"


# --- the protocol ---------------------------------------------------------------------------------


@pytest.fixture
def dreambench(tmp_path):
    """backpack of three pictures, the second one with a mask, and dog2 of one."""
    folder = tmp_path / "dataset"
    for name, seeds, masked in (("backpack", (0, 1, 2), 1), ("dog2", (3,), 3)):
        (folder / name).mkdir(parents=True)
        for seed in seeds:
            image, mask = tiny.picture(seed)
            Image.fromarray(image).save(folder / name / f"0{seed}.png")
            if seed == masked:
                Image.fromarray(mask).save(folder / name / f"0{seed}_bg.png")
    (tmp_path / "prompts_and_classes.txt").write_text(DREAMBENCH)
    return folder


@pytest.fixture
def evaluate(whole_model, dreambench, tmp_path):
    """Runs evaluate.py with tiny models; returns results.json."""
    clip, dino = tiny.save_clip_folder(tmp_path / "clip"), tiny.save_vit_folder(tmp_path / "dino")

    def run(name, *options, status=0):
        assert run_script(
            "evaluate.py", "--pretrained_model_name_or_path", whole_model,
            *("--test_data_dir", dreambench, "--prompts", tmp_path / "prompts_and_classes.txt"),
            *("--clip_name_or_path", clip, "--dino_name_or_path", dino, "--device", "cpu"),
            *("--num_inference_steps", "2", "--output_dir", tmp_path / name, *options),
        ) == status  # fmt: skip
        return json.loads((tmp_path / name / "results.json").read_text())

    return run


def cosines(model, picture, paths):
    others = model.images([Image.fromarray(read_image(path)) for path in paths])
    return float((others @ model.images([picture])[0]).mean())


def test_a_run_says_with_what_it_was_measured_and_what_is_possible(
    evaluate, dreambench, tmp_path, capsys
):
    results = evaluate("out", "--protocol", "dreambench", "--num_images", "2")
    told = capsys.readouterr().out
    clip, dino = Clip(tmp_path / "clip"), Dino(tmp_path / "dino")
    protocol, rows = results["protocol"], results["rows"]
    weights = digest_weights(clip.model.state_dict())[:16]
    assert protocol["clip"] == f"{tmp_path / 'clip'}, weights {weights}"
    assert protocol["pictures"] == "2 a prompt, seeds 42 to 43" and protocol["subjects"] == "2"
    assert protocol["prompts"].startswith("prompts_and_classes.txt, SHA-256 ")
    assert protocol["resize"].startswith("bicubic, shorter side to 32 px and for DINO 32 px; ")
    assert len(results["departures"]) == 6
    assert "subjects of a single picture" in results["departures"], "dog2"
    for text in (*protocol.values(), *results["departures"]):
        assert text in told and text in (tmp_path / "out/results.md").read_text()

    backpack, dog = (sorted((dreambench / name).glob("0?.png")) for name in ("backpack", "dog2"))
    ceiling, paste = (rows[name] for name in sorted(rows) if name != "this run")
    for model, column in ((clip, "clip_i"), (dino, "dino_i")):
        reals = [
            cosines(model, Image.open(path), [other for other in backpack if other != path])
            for path in backpack
        ]
        assert ceiling[column]["mean"] == pytest.approx(np.mean(reals), abs=1e-6)
        assert ceiling[column]["pictures"] == 3, "dog2 has no other picture"
        pasted = []
        for path, paths, prompts in ((backpack[1], backpack, 2), (dog[0], dog, 1)):
            image, mask = pair_of(path).read()
            image = np.where(mask[..., None], image, GROUND).astype(np.uint8)
            pasted += [cosines(model, Image.fromarray(image), paths)] * prompts
        assert paste[column]["mean"] == pytest.approx(np.mean(pasted), abs=1e-6)
    assert "clip_t" not in ceiling and paste["clip_t"]["pictures"] == 3
    assert rows["this run"] == results["scores"]

    plain = evaluate("plain", "--metrics", "clip", "dino", "--num_images", "2")
    assert plain["scores"] == results["scores"] and "protocol" not in plain


def test_a_subject_with_a_broken_reference_leaves_the_rest(evaluate, dreambench, tmp_path, capsys):
    (dreambench / "backpack/02.png").write_bytes(b"no picture")
    results = evaluate("out", "--protocol", "dreambench", "--num_images", "2", status=3)
    assert "02.png: not a readable image" in capsys.readouterr().err
    assert results["subjects"] == 1 and set(results["references"]) == {"dog2"}
    with open(tmp_path / "out/results.csv", newline="", encoding="utf-8") as file:
        assert {row["subject"] for row in csv.DictReader(file)} == {"dog2"}


@pytest.fixture
def cases(monkeypatch):
    """As many as DreamBench has, of prompts that stand for its own."""
    subjects = [Subject(str(n), "mug", pair_of(Path(f"{n}.jpg")), ()) for n in range(30)]
    kinds = [(number, seed) for number in range(25) for seed in range(4)]
    cases = [
        Case(subject, number, f"a {{}} in place {number}", seed)
        for subject in subjects
        for number, seed in kinds
    ]
    monkeypatch.setitem(protocol.PROMPTS, "object", digest_prompts(cases, subjects[0]))
    return cases


def with_other_words(case):
    return replace(case, template=case.template.replace("place 3", "no place"))


SETUP = Setup("prompts_and_classes.txt", CLIP, DINO, cropped=False)


def test_what_is_dreambenchs_departs_in_nothing(cases):
    assert departures(cases, SETUP) == []


@pytest.mark.parametrize(
    ("fewer", "change", "message"),
    [
        (lambda case: case.subject.name != "7", {}, "29 subjects, not 30"),
        (lambda case: case.number or case.subject.name != "7", {}, "not the 25 prompts of"),
        (lambda case: case.seed, {}, "3 pictures a prompt, not 4"),
        (bool, {"clip": "clip"}, f"CLIP clip, not {CLIP}"),
        (bool, {"dino": "facebook/dinov2-small"}, f"DINO facebook/dinov2-small, not {DINO}"),
        (bool, {"cropped": True}, "cropped references"),
    ],
)
def test_each_departure_is_named(cases, fewer, change, message):
    (found,) = departures([case for case in cases if fewer(case)], replace(SETUP, **change))
    assert found.startswith(message)


def test_prompts_of_ones_own_in_the_form_of_dreambenchs_are_a_departure(cases):
    (found,) = departures([with_other_words(case) for case in cases], SETUP)
    assert found.startswith("not the 25 prompts of prompts_and_classes.txt")


# --- comparing runs -------------------------------------------------------------------------------


def save_run(folder, scores, references=None, **measured_by):
    """A run of scores by subject: a list by prompt, None where there is none."""
    folder.mkdir()
    settings = {"clip_name_or_path": "c", "dino_name_or_path": "d", "judge_path": "j"}
    settings |= {"crop_references": False, **measured_by}
    results = {"settings": settings} | ({"references": references} if references else {})
    (folder / "results.json").write_text(json.dumps(results))
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["subject", "prompt", "seed", "clip_i"])
        writer.writeheader()
        for subject, values in scores.items():
            for number, value in enumerate(values):
                row = {"subject": subject, "prompt": f"a {{}}, {number}", "seed": 42}
                writer.writerow({**row, "clip_i": value})
    return folder


def test_runs_are_compared_picture_by_picture(tmp_path, capsys):
    """Subjects differ much more than the runs do, which unpaired intervals would not see."""
    values = {str(n): [n / 10, n / 10 + 0.01] for n in range(8)}
    better = {n: [value + 0.02 for value in row] for n, row in values.items()}
    one = save_run(tmp_path / "one", values)
    other = save_run(tmp_path / "other", {**better, "9": [0.5]})
    assert run_script(COMPARE, one, other) == 0
    head, _, row, rest = capsys.readouterr().out.splitlines()
    assert head.startswith("| metric | first | second | difference |")
    assert row == (
        "| clip_i | 0.3550 | 0.3750 | +0.0200 | +0.0200 to +0.0200 | 16 | 8 | second higher |"
    )
    assert rest == "left out: 0 pictures of the first alone, 1 of the second"
    assert run_script(COMPARE, other, one) == 0
    assert "| -0.0200 to -0.0200 | 16 | 8 | first higher |" in capsys.readouterr().out


def test_what_could_be_chance_is_not_told_apart(tmp_path, capsys):
    one = save_run(tmp_path / "one", {str(n): [0.5, None] for n in range(8)})
    signs = (1, -1, 1, -1, 1, 1, -1, 1)
    mixed = {str(n): [0.5 + sign / 10, 0.5] for n, sign in enumerate(signs)}
    other = save_run(tmp_path / "other", mixed)
    assert run_script(COMPARE, one, other) == 0
    assert "| 8 | 8 | not told apart |" in capsys.readouterr().out, "what one lacks is no pair"
    few = save_run(tmp_path / "few", {str(n): [0.9] for n in range(7)})
    assert run_script(COMPARE, one, few) == 0
    assert "| 7 | 7 | too few subjects |" in capsys.readouterr().out, "chance tells few apart"


def test_runs_that_do_not_compare_are_refused(tmp_path, capsys):
    one = save_run(tmp_path / "one", {"a": [0.5]})
    for name, scores, changes, message in (
        ("b", {"a": [0.5]}, {"clip_name_or_path": "other"}, "clip_name_or_path is other, but c in"),
        ("c", {"b": [0.5]}, {}, f"shares no picture with {one}"),
        ("e", {"a": [None, 0.5]}, {}, f"has no metric of {one}; rate both by the same"),
        ("d", {"a": ["x"]}, {}, "damaged results"),
    ):
        other = save_run(tmp_path / name, scores, **changes)
        assert run_script(COMPARE, one, other) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {other}: ") and message in line
    results = {"settings": {}, "protocol": {"clip": "c, weights 1"}}
    (tmp_path / "d/results.json").write_text(json.dumps(results))
    (tmp_path / "d/results.csv").write_text((one / "results.csv").read_text())
    assert run_script(COMPARE, one, tmp_path / "d") == 2
    assert "is nothing, but c in" in capsys.readouterr().err
    assert run_script(COMPARE, one, tmp_path / "none") == 2
    assert "expected the --output_dir of a finished run" in capsys.readouterr().err


def test_runs_with_other_references_are_refused(tmp_path, capsys):
    """Those of a subject that both have; earlier runs, which do not say, are compared."""
    one, other, fewer, silent = (
        save_run(tmp_path / name, {"a": [0.5]}, references)
        for name, references in (
            ("one", {"a": "mug, 01", "b": "cat, 01"}),
            ("other", {"a": "cup, 01"}),
            ("fewer", {"a": "mug, 01", "c": "cat, 02"}),
            ("silent", None),
        )
    )
    assert run_script(COMPARE, one, other) == 2
    assert f"{other}: references of a is cup, 01, but mug, 01 in" in capsys.readouterr().err
    assert run_script(COMPARE, one, fewer) == run_script(COMPARE, one, silent) == 0


def test_class_word_and_references_are_what_a_run_says(dreambench):
    prompts = read_prompts(dreambench.parent / "prompts_and_classes.txt")
    backpack, dog = read_subjects(dreambench, prompts.classes, "thing")
    before = backpack.measured_with(cropped=False), backpack.measured_with(cropped=True)
    assert before[0].startswith("backpack, ") and dog.measured_with(False).startswith("dog, ")
    assert replace(backpack, class_word="bag").measured_with(False) == f"bag, {before[0][10:]}"
    (dreambench / "backpack/01_bg.png").write_bytes(b"another mask")
    assert backpack.measured_with(False) == before[0] and backpack.measured_with(True) != before[1]
    (dreambench / "backpack/02.png").write_bytes(b"another reference")
    assert backpack.measured_with(False) != before[0]


# --- contact sheets -------------------------------------------------------------------------------


def test_each_subject_stands_under_its_own_prompts(dreambench, tmp_path, monkeypatch):
    """backpack has prompts of an object, dog2 those of a living thing."""
    prompts = read_prompts(tmp_path / "prompts_and_classes.txt")
    made = make_cases(read_subjects(dreambench, prompts.classes, "thing"), prompts, [1, 2])
    for case in made:
        (tmp_path / case.path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / case.path)
    named = []

    def naming(rows, columns):
        named.append((len(rows), columns))
        return tile_rows(rows, columns)

    monkeypatch.setattr(cases_module, "tile_rows", naming)
    (sheet,) = contact_sheets(made, tmp_path)
    assert named == [
        (1, ["input", "object", "a S in the jungle", "a S on someone's table"]),
        (1, ["input", "object", "a S wearing a hat"]),
    ]
    assert sheet.size == (4 * TILE, 2 * (HEADER + TILE))


# --- ratings --------------------------------------------------------------------------------------

RATER = """
import json, sys
for number, line in enumerate(sys.stdin):
    asked = json.loads(line)
    with open(sys.argv[1], "a") as file:
        file.write(line)
    if number == int(sys.argv[2]):
        print("dunno", flush=True)
    else:
        print(json.dumps({"concept": number, "prompt_following": 4}), flush=True)
"""


@pytest.fixture
def rater(tmp_path):
    """A command that rates, writes down what it was asked, and fails at a picture."""
    (tmp_path / "rater.py").write_text(RATER)

    def command(fails_at=-1):
        return sys.executable, tmp_path / "rater.py", tmp_path / "asked", str(fails_at)

    return command


def asked(tmp_path):
    return [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]


def test_a_program_rates_a_run_and_goes_on(evaluate, rater, dreambench, tmp_path, capsys):
    evaluate("out", "--metrics", "clip", "--num_images", "2")
    assert run_script(RATE, tmp_path / "out", *rater(fails_at=3)) == 2
    assert "the program answered 'dunno\\n'; expected a line of JSON" in capsys.readouterr().err
    ratings = tmp_path / "out/ratings.jsonl"
    assert len(ratings.read_text().splitlines()) == 1 + 3
    assert run_script(RATE, tmp_path / "out", *rater()) == 2, "another command"
    assert "is by [" in capsys.readouterr().err
    _, *rows = ratings.read_text().splitlines(keepends=True)
    command = [str(word) for word in rater()]
    cut = '{"subject": "dog2", "pro'  # as a killed process leaves it
    ratings.write_text("".join([json.dumps({"command": command}) + "\n", *rows, cut]))
    assert run_script(RATE, tmp_path / "out", *rater()) == 0
    assert len(asked(tmp_path)) == 4 + 3, "what was rated is not rated again"
    assert asked(tmp_path)[0] == {
        "picture": str(tmp_path / "out/backpack/00_00042.png"),
        "reference": str(dreambench / "backpack/01.png"),
        "prompt": "a backpack in the jungle",
    }
    told = capsys.readouterr().out
    assert "| concept | 1.0000 |" in told and "| prompt_following | 4.0000 |" in told
    assert len(ratings.read_text().splitlines()) == 1 + 6

    evaluate("again", "--metrics", "clip", "--num_images", "2")
    assert run_script(COMPARE, tmp_path / "out", tmp_path / "again") == 0
    assert "concept" not in capsys.readouterr().out, "one of them is not rated"
    assert run_script(RATE, tmp_path / "again", *rater()) == 0
    capsys.readouterr()
    assert run_script(COMPARE, tmp_path / "out", tmp_path / "again") == 0
    assert "| concept | 1.0000 | 2.5000 | +1.5000 |" in capsys.readouterr().out
    text = ratings.read_text().replace("rater.py", "other.py")
    ratings.write_text(text)
    assert run_script(COMPARE, tmp_path / "out", tmp_path / "again") == 2
    assert "rate both alike" in capsys.readouterr().err


def test_only_what_was_scored_is_rated(evaluate, dreambench, tmp_path):
    """Of a subject that broke since, older pictures may lie there; prompts and their order may be
    others."""
    evaluate("run", "--metrics", "clip")
    run = tmp_path / "run"
    before = {case.path: case.class_prompt for case in cases_of(run, results_of(run))}
    assert before["backpack/00_00042.png"] == "a backpack in the jungle"
    Image.new("RGB", (8, 8)).save(run / "backpack" / "07_00042.png")
    prompts = tmp_path / "prompts_and_classes.txt"
    prompts.write_text(DREAMBENCH.replace("in the jungle", "at sea").replace(",dog", ",cat"))
    assert {case.path: case.class_prompt for case in cases_of(run, results_of(run))} == before
    (run / "dog2" / "00_00042.png").unlink()
    left = before.keys() - {"dog2/00_00042.png"}
    assert {case.path for case in cases_of(run, results_of(run))} == left
    image = run / "backpack" / "00_00042.png"
    Image.new("RGB", (8, 8)).save(image)
    with pytest.raises(ValueError, match=f"{image}: was drawn anew since it was scored; run eval"):
        cases_of(run, results_of(run))
    shutil.copy(dreambench / "backpack/00.png", dreambench / "backpack/02.png")
    with pytest.raises(ValueError, match="backpack is not what"):
        cases_of(run, results_of(run))


def test_another_clip_of_the_same_path_is_told(evaluate, tmp_path, capsys):
    evaluate("one", "--metrics", "clip")
    evaluate("two", "--metrics", "clip", "--llambda", "0.1")
    assert run_script(COMPARE, tmp_path / "one", tmp_path / "two") == 0
    file = tmp_path / "clip" / "model.safetensors"
    weights = load_file(file)
    save_file({name: x * 1.01 for name, x in weights.items()}, file, metadata={"format": "pt"})
    evaluate("three", "--metrics", "clip", "--llambda", "0.1")
    capsys.readouterr()
    assert run_script(COMPARE, tmp_path / "one", tmp_path / "three") == 2
    assert "weights of clip is " in capsys.readouterr().err


def test_pictures_that_are_drawn_anew_are_rated_anew(evaluate, rater, tmp_path, capsys):
    evaluate("out", "--metrics", "clip")
    evaluate("same", "--metrics", "clip")
    for name in ("out", "same"):
        assert run_script(RATE, tmp_path / name, *rater()) == 0
    count = len(asked(tmp_path))
    evaluate("out", "--metrics", "clip", "--llambda", "0.2")
    capsys.readouterr()
    assert run_script(COMPARE, tmp_path / "same", tmp_path / "out") == 0
    assert "concept" not in capsys.readouterr().out, "the ratings are of other pictures"
    assert run_script(RATE, tmp_path / "out", *rater()) == 0
    assert len(asked(tmp_path)) == count + count // 2
    assert run_script(RATE, tmp_path / "out", *rater()) == 0
    assert len(asked(tmp_path)) == count + count // 2
    assert run_script(COMPARE, tmp_path / "same", tmp_path / "out") == 0
    assert "| concept |" in capsys.readouterr().out


NO_RATINGS = ["", "4", "[4]", "{}", '{"a": "x"}', '{"a": true}', '{"a": NaN}', "[" * 100_000]


@pytest.mark.parametrize("line", [*NO_RATINGS, f'{{"a": 1{"0" * 400}}}'])
def test_what_is_no_rating(line):
    assert numbers_of(line) == {}


def test_ratings_that_are_named_as_a_column_are_refused(tmp_path):
    """They would take the place of the picture's name."""
    answer = "import sys\nfor _ in sys.stdin: print('{\"subject\": 3}', flush=True)"
    pair = SimpleNamespace(image_path=tmp_path / "a.png")
    case = SimpleNamespace(subject=SimpleNamespace(pair=pair), class_prompt="a mug")
    for name, taken in (("subject", ()), ("clip_t", ["clip_t"])):
        program = Program([sys.executable, "-c", answer.replace("subject", name)], taken)
        with pytest.raises(ValueError, match=r"a.png: the program .* none named subject, prompt"):
            program(case, tmp_path / "a.png")
        program.close()


def test_a_rating_is_not_named_as_a_metric(evaluate, tmp_path, capsys):
    """It took the metric's place in comparisons."""
    evaluate("out", "--metrics", "clip")
    answer = "import sys\nfor _ in sys.stdin: print('{\"clip_t\": 3}', flush=True)"
    capsys.readouterr()
    assert run_script(RATE, tmp_path / "out", sys.executable, "-c", answer) == 2
    assert "none named subject, prompt, seed, picture, digest, asked, clip_i, clip_t" in (
        capsys.readouterr().err
    )


def test_a_folded_prompt_is_compared_with_its_ratings(evaluate, tmp_path, capsys):
    """It ended in a line break, which the table of results lost, and its ratings with it."""
    prompts = "prompts: {object: [a {} in the snow]}\n".replace("a {} in the snow", '"a {}\\n"')
    (tmp_path / "prompts.yaml").write_text(prompts)
    evaluate("out", "--metrics", "clip", "--prompts", tmp_path / "prompts.yaml")
    answer = "import sys\nfor _ in sys.stdin: print('{\"good\": 3}', flush=True)"
    assert run_script(RATE, tmp_path / "out", sys.executable, "-c", answer) == 0
    capsys.readouterr()
    assert run_script(COMPARE, tmp_path / "out", tmp_path / "out") == 0
    assert "| good | 3.0000 | 3.0000 | +0.0000 |" in capsys.readouterr().out


def test_mistakes_in_rating_are_one_line_and_2(tmp_path, capsys):
    run = save_run(tmp_path / "run", {"a": [0.5]})
    for arguments, message in (
        ((run,), "no program; expected one after the run"),
        ((tmp_path / "none", "true"), "expected the --output_dir of a finished run"),
        ((run, "true"), f"{run}: damaged results.json (KeyError('references'))"),
    ):
        assert run_script(RATE, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    with pytest.raises(ValueError, match=r"no_such_program: cannot be started \(No such file"):
        Program(["no_such_program"])
    for text in ("[]\n", '{"command": ["a"]}\n{"subject": "a"}\n'):
        (run / "ratings.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"ratings.jsonl: no ratings of a run; remove it"):
            read_ratings(run)
