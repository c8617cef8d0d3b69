"""Subjects of an evaluation: pairs, DreamBench's layout, and the files of prompts."""

import pytest
from PIL import Image

from elite.config import REPOSITORY
from elite.wording import Note
from evaluation.cases import Case, make_cases
from evaluation.subjects import read_prompts, read_subjects
from small_world.attributes import AttributeScores, scene_of
from small_world.captions import CLASS_WORD
from small_world.classifier import Judge
from small_world.objects import NUM_OBJECTS, critter_of
from small_world.world import ATTRIBUTES, SCENES, labels
from tests import tiny

DREAMBENCH = """Classes

subject_name,class
backpack,backpack
dog2,dog
grey_sloth,stuffed animal

Prompts

Object Prompts

prompt_list = [
	'a {0} {1} in the jungle'.format(unique_token, class_token),
	"a {0} {1} on someone's table".format(unique_token, class_token)
]

Live Subject Prompts
prompt_list = [
	'a {0} {1} wearing a hat'.format(unique_token, class_token),
]
"""


def test_prompts_of_dreambenchs_own_file(tmp_path):
    path = tmp_path / "prompts_and_classes.txt"
    path.write_text(DREAMBENCH)
    prompts = read_prompts(path)
    assert prompts.classes == {
        "backpack": "backpack",
        "dog2": "dog",
        "grey_sloth": "stuffed animal",
    }
    assert prompts.of("backpack") == ("a {} in the jungle", "a {} on someone's table")
    assert prompts.of("dog") == ("a {} wearing a hat",)


@pytest.mark.parametrize("name", ["dreambench", "small_world"])
def test_bundled_prompts(name):
    prompts = read_prompts(REPOSITORY / "configs" / "prompts" / f"{name}.yaml")
    if name == "dreambench":
        assert len(set(prompts.of("clock"))) == len(set(prompts.of("dog"))) == 25
        assert prompts.of("clock") != prompts.of("cat")
    else:
        subjects = read_subjects(REPOSITORY / "test_datasets", prompts.classes, "object")
        assert len(subjects) == NUM_OBJECTS == len(prompts.classes)
        assert {critter_of(s.name) is not None and s.class_word for s in subjects} == {CLASS_WORD}
        assert [scene_of(text) for text in prompts.of(CLASS_WORD)] == list(SCENES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: {object: [a mug]}", r"prompt 'a mug': expected \{\} in it once"),
        ("prompts: {object: []}", "no prompts for object"),
        ("prompts: {object: ['a {}', 'a {}']}", r"prompt 'a \{\}' is there twice; leave one out"),
        ("prompts: ['a {}']", "expected lists under object and living"),
        ("prompts: {object: ['a {}']}\nliving: [dog]", "no prompts for living"),
        ("prompts: {object: ['a {}']}\nclasses: [dog]", "expected classes as NAME: WORD"),
        ("prompt: {}", "unknown prompt"),
    ],
)
def test_wrong_prompt_files_are_refused(tmp_path, text, message):
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(str(path))


def test_missing_prompt_files_are_refused(tmp_path):
    for name in ("prompts.txt", "prompts.yaml"):
        with pytest.raises(ValueError, match=name):
            read_prompts(tmp_path / name)


def test_pairs_are_their_own_references(tmp_path):
    subjects = read_subjects(tiny.save_pairs(tmp_path, 2), {"pair1": "mug"}, "thing")
    assert [(s.name, s.class_word) for s in subjects] == [("pair0", "thing"), ("pair1", "mug")]
    assert subjects[0].reference_paths == (subjects[0].pair.image_path,)
    image, mask = subjects[0].pair.read()
    assert image.shape == (40, 40, 3) and mask.sum() == 400
    assert [picture.size for picture in subjects[0].references(cropped=True)] == [(20, 20)]


def test_two_subjects_of_one_name_would_overwrite_their_pictures(tmp_path):
    tiny.save_pairs(tmp_path, 1)
    (tmp_path / "pair0.jpg").write_bytes((tmp_path / "pair0.png").read_bytes())
    with pytest.raises(ValueError, match=r"pair0\.png: has the name of .*pair0\.jpg"):
        read_subjects(tmp_path, {}, "thing")


def test_folders_of_pictures_are_subjects(tmp_path):
    """The input is the first picture with a mask; all are references."""
    folder = tiny.save_pairs(tmp_path / "vase", 2)
    (folder / "pair0_bg.png").unlink()
    Image.new("RGB", (10, 10)).save(folder / "00.jpg")
    (subject,) = read_subjects(tmp_path, {"vase": "vase"}, "thing")
    assert subject.class_word == "vase" and subject.pair.image_path.name == "pair1.png"
    assert [path.name for path in subject.reference_paths] == ["00.jpg", "pair0.png", "pair1.png"]
    sizes = [picture.size for picture in subject.references(cropped=True)]
    assert sizes == [(10, 10), (40, 40), (20, 20)]


@pytest.fixture
def plus(tmp_path):
    """DreamBench++'s layout: two pictures, of which one has a mask."""
    tiny.save_pairs(tmp_path / "images/live_subject/animal", 2)
    (tmp_path / "images/live_subject/animal/pair0_bg.png").unlink()
    captions = tmp_path / "captions/live_subject/animal"
    captions.mkdir(parents=True)
    text = "Kitten\na kitten on the moon, kitten\nKittens\n\nA Kitten's hat\na {} kitten\n"
    (captions / "pair1.txt").write_text(text)
    return tmp_path


def test_subjects_of_dreambench_plus_plus_have_prompts_of_their_own(plus):
    with pytest.warns(Note) as notes:
        (subject,) = read_subjects(plus, {}, "thing")
    assert (subject.name, subject.class_word) == ("live_subject_animal_pair1", "Kitten")
    assert subject.templates == ("a {} on the moon, kitten", "A {}'s hat")
    assert subject.reference_paths == (subject.pair.image_path,)
    told = [str(one.message) for one in notes]
    assert told[0].endswith("1 pictures without a mask are left out")
    assert told[1].endswith("pair1.txt: 2 prompts without 'Kitten', or with a brace, are left out")
    prompts = read_prompts(REPOSITORY / "configs/prompts/dreambench.yaml")
    cases = make_cases([subject], prompts, [1, 2])
    assert [case.class_prompt for case in cases[::2]] == [
        "a Kitten on the moon, kitten",
        "A Kitten's hat",
    ]
    assert cases[3].path == "live_subject_animal_pair1/01_00002.png"


def test_captions_that_are_none_are_named(plus):
    path = plus / "captions/live_subject/animal/pair1.txt"
    for text in ("", "cat\na dog\n"):
        path.write_text(text)
        with pytest.warns(Note), pytest.raises(ValueError, match=r"pair1\.txt: no prompt with"):
            read_subjects(plus, {}, "thing")
    path.unlink()
    with (
        pytest.warns(Note),
        pytest.raises(ValueError, match=r"pair1\.txt: .*expected the subject's"),
    ):
        read_subjects(plus, {}, "thing")
    (plus / "images/live_subject/animal/pair1_bg.png").unlink()
    with pytest.raises(ValueError, match="no picture of images/ has a mask"):
        read_subjects(plus, {}, "thing")


def test_subject_without_any_mask_is_named(tmp_path):
    folder = tiny.save_pairs(tmp_path / "vase", 1)
    (folder / "pair0_bg.png").unlink()
    with pytest.raises(ValueError, match=r"vase: no picture has a mask; .*pair0_bg\.png"):
        read_subjects(tmp_path, {}, "thing")


def case(subject: str, template: str) -> Case:
    found = read_subjects(REPOSITORY / "test_datasets", {}, CLASS_WORD)
    return Case(next(s for s in found if s.name == subject), 0, template, 42)


def test_pictures_are_judged_by_what_their_subject_and_prompt_are():
    """With a judge that finds everything, a solid critter has no second colour to be right in."""
    cases = [
        case("06_yellow_solid_square", "a {} on the moon"),
        case("11_turquoise_red_striped_round", "a {} at night"),
    ]
    scores = AttributeScores(Judge(widths=(8, 8)), cases)
    for one, scene in zip(cases, ("moon", "night"), strict=True):
        assert scores.wanted[one] == labels(critter_of(one.subject.name), scene)
    found = scores([Image.new("RGB", (32, 32))] * 2, cases)
    assert found.keys() == ATTRIBUTES.keys()
    assert found["second"][0] is None and found["second"][1] in (0.0, 1.0)
    with pytest.raises(ValueError, match="names no scene of the small world"):
        AttributeScores(Judge(widths=(8, 8)), [case("06_yellow_solid_square", "a {} in a teapot")])


def test_other_prompts_are_no_scenes():
    with pytest.raises(ValueError, match="names no scene of the small world"):
        scene_of("a {} in a teapot")


def test_pairs_beside_folders_of_pictures_stay_the_subjects(tmp_path):
    tiny.save_pairs(tmp_path, 2)
    tiny.save_pairs(tmp_path / "originals", 1)
    with pytest.warns(Note, match="originals is left out, and 0 more"):
        subjects = read_subjects(tmp_path, {}, "object")
    assert [subject.name for subject in subjects] == ["pair0", "pair1"]


def test_a_stray_picture_beside_folders_is_left_out(tmp_path):
    tiny.save_pairs(tmp_path / "dog", 1)
    (tmp_path / ".thumbs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / ".thumbs" / "dog.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "poster.jpg")
    with pytest.warns(Note, match=r"poster\.jpg is left out, and 0 more"):
        subjects = read_subjects(tmp_path, {}, "object")
    assert [subject.name for subject in subjects] == ["dog"]
