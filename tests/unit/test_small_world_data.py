"""What the small world leaves on disk: training data, test objects, pretraining samples."""

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_scripts import make_small_world as writer
from elite.annotations import load_mask_boxes
from elite.data import PairFolder
from elite.images import read_image, read_mask
from elite.open_images import OpenImagesBoxes, OpenImagesMasks
from small_world import samples
from small_world.captions import fill, phrase_of
from small_world.objects import NUM_COMBINATIONS, NUM_OBJECTS, critter_of, name_of, test_object
from small_world.render import draw
from small_world.samples import (
    FRAMINGS,
    SECOND_FRAMINGS,
    SIDE,
    framed,
    load_samples,
    render_samples,
    small_pixels,
    without_a_part,
)
from small_world.things import find_things, is_held_out_thing
from small_world.world import (
    ATTACHED,
    ATTRIBUTES,
    HELD_OUT_KINDS,
    SCENES,
    has_trim,
    is_held_out,
    random_critter,
    unseen_kinds,
)

test_object.__test__ = False  # no test, by its name
ROOT = Path(__file__).resolve().parents[2]
COUNT = 6


# --- training data --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world") / "open_images"
    writer.make_open_images(root, COUNT, seed=1, size=256, workers=1)
    return root


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_folder_depends_on_the_seed_and_not_on_the_workers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK", 1)
    writer.make_open_images(tmp_path / "two", COUNT, seed=1, size=256, workers=2)
    writer.make_open_images(tmp_path / "other", COUNT, seed=2, size=256, workers=2)
    assert files_of(tmp_path / "two") == files_of(folder)
    assert files_of(tmp_path / "other") != files_of(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "two"]  # nothing temporary


def test_datasets_read_the_folder(folder):
    boxes = OpenImagesBoxes(folder, resolution=32, clip_size=64)
    masks = OpenImagesMasks(folder, resolution=32, clip_size=64, latent_size=8)
    assert 0 < len(boxes) <= COUNT and 0 < len(masks) <= COUNT
    for dataset in (boxes, masks):
        sample = dataset.sample(0, np.random.default_rng(0))
        assert sample["pixels"].shape == (3, 32, 32)


def test_boxes_are_those_of_the_masks(folder):
    with open(folder / "annotations" / "test-annotations-object-segmentation.csv") as file:
        rows = {row["MaskPath"]: row for row in csv.DictReader(file)}
    index = load_mask_boxes(folder / "segs" / "test_bbox_dict.npy")
    assert len(index) == len(rows) == COUNT
    for name, top, bottom, left, right in index:
        mask = read_mask(folder / "segs" / "test" / name)
        assert mask[top:bottom, left:right].sum() == mask.sum() > 0
        row = rows[name]
        box = [float(row[f"Box{side}"]) * 256 for side in ("XMin", "XMax", "YMin", "YMax")]
        assert np.allclose(box, (left, right, top, bottom), atol=1e-3)
        assert read_image(folder / "images" / "test" / f"{row['ImageID']}.jpg").shape[:2] == (
            256,
            256,
        )


def test_the_class_is_named(folder):
    text = (folder / "annotations" / "oidv6-class-descriptions.csv").read_text()
    assert text.split() == ["LabelName,DisplayName", "/m/sw_critter,Critter"]


def test_only_critters_that_may_be_trained_on_are_drawn(tmp_path, monkeypatch):
    drawn = []

    def noting(critter, *args):
        drawn.append(critter)
        return draw(critter, *args)

    monkeypatch.setattr(writer, "draw", noting)
    for folder in ("images/test", "segs/test"):
        (tmp_path / folder).mkdir(parents=True)
    for number in range(60):
        writer.write_picture(tmp_path, 1, 32, number)
    assert len(set(drawn)) == 60
    assert not any(is_held_out(critter) or unseen_kinds(critter) for critter in drawn)


def test_every_second_picture_shows_a_thing(tmp_path, monkeypatch):
    """With --art, and never one that is held out."""
    art = tmp_path / "art"
    art.mkdir()
    for i in (1, 2, 12, 25, 26, 31):
        file = art / f"thing{i}.png"
        colour = (0, 0, 0) if is_held_out_thing(file) else (250, 0, 250)
        Image.fromarray(np.full((40, 40, 4), (*colour, 255), np.uint8)).save(file)
    assert len(find_things(art, held_out=True)) == 4
    monkeypatch.setattr(POOL, lambda workers, **_: ThreadPoolExecutor(workers))
    root = tmp_path / "made"
    writer.main([str(root), "--count", "20", "--size", "64", "--art", str(art)])
    for number in range(20):
        image = read_image(root / "images" / "test" / f"{number:016x}.jpg")
        (mask_file,) = (root / "segs" / "test").glob(f"{number:016x}_*.png")
        inside = np.median(image[read_mask(mask_file)].astype(float), axis=0)
        assert (np.abs(inside - (250, 0, 250)).max() < 12) == (number % 2 == 1)


def test_finished_folder_is_not_overwritten(folder):
    before = files_of(folder)
    with pytest.raises(ValueError, match="is there already; remove it"):
        writer.main([str(folder), "--count", "2"])
    assert files_of(folder) == before


def test_nothing_is_written_where_something_is_wrong(folder, tmp_path):
    objects = tmp_path / "objects"
    for arguments, message in (
        ([folder], "is there already; remove it"),
        ([tmp_path / "new", "--art", tmp_path / "none"], "none"),
        ([objects], "is given for --test_datasets, too; choose another folder"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.main([*map(str, arguments), "--test_datasets", str(objects)])
        assert not objects.exists() or not any(objects.iterdir())


def test_the_working_directory_may_be_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer.main([".", "--count", "1", "--size", "32", "--workers", "1"])
    assert len(list((tmp_path / "images" / "test").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "nothing to make"), (["x", "--count", "0"], "--count 0: expected 1 or more")],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        writer.main(arguments)


# --- the test objects -----------------------------------------------------------------------------


def test_test_objects_are_combinations_and_new_kinds():
    made = [test_object(number) for number in range(NUM_OBJECTS)]
    critters = [critter for critter, _ in made]
    assert (NUM_COMBINATIONS, len(set(critters))) == (12, 16)
    assert all(is_held_out(critter) for critter in critters[:12])
    unseen = [unseen_kinds(critter) for critter in critters]
    assert unseen == [[]] * 12 + [[name] for name in HELD_OUT_KINDS]
    assert [scene for _, scene in made[:12]] == list(SCENES)


def test_names_of_test_objects_lead_back_to_them():
    names = [name_of(number) for number in range(NUM_OBJECTS)]
    assert names == sorted(set(names))
    assert [critter_of(name) for name in names] == [test_object(n)[0] for n in range(NUM_OBJECTS)]
    assert names[2] == "02_yellow_pink_patched_star"
    assert names[11] == "11_turquoise_red_striped_round"


@pytest.mark.parametrize(
    "name", ["corgi", "02", "02_pink_solid_star", "16_green_solid_square", "2_green_solid_square"]
)
def test_other_names_are_no_objects(name):
    with pytest.raises(ValueError, match=f"{name}: no object of the small world; .* 00_"):
        critter_of(name)


def test_shipped_test_objects_are_what_the_script_draws(tmp_path):
    writer.make_test_datasets(tmp_path, 256)
    made, shipped = PairFolder(tmp_path), PairFolder(ROOT / "test_datasets")
    names = [pair.name for pair in made.pairs]
    assert names == [name_of(number) for number in range(NUM_OBJECTS)]
    assert [pair.name for pair in shipped.pairs] == names
    for number in range(NUM_OBJECTS):
        (image, mask), (own_image, own_mask) = made.read(number), shipped.read(number)
        assert (mask == own_mask).all()
        assert cv2.absdiff(image, own_image).max() < 24  # other JPEG libraries round otherwise
        assert 0.1 < mask.mean() < 0.65
        edges = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
        assert not any(edge.any() for edge in edges), f"{names[number]} is cut off"


# --- pretraining samples --------------------------------------------------------------------------


POOL = "elite.workers.ProcessPoolExecutor"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """Thirty samples in chunks of twenty, by threads."""
    folder = tmp_path_factory.mktemp("samples") / "trained"
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(samples, "CHUNK", 20)
        patches.setattr(POOL, lambda workers, **_: ThreadPoolExecutor(workers))
        render_samples(folder, 30, "trained")
        render_samples(folder.parent / "other", 30, "any", seed=1)
    return folder


def test_samples_are_two_views_with_what_they_show(rendered):
    views, records = load_samples(rendered)
    assert views.shape == (30, 2, SIDE, SIDE, 4) and views.dtype == np.uint8
    assert len(records) == 30 and len({record["noun"] for record in records}) > 20
    scene = list(ATTRIBUTES).index("scene")
    for pair, record in zip(views, records, strict=True):
        assert record["caption"] == fill(record["template"], record["noun"])
        first, second = record["labels"]
        differing = [name for name, a, b in zip(ATTRIBUTES, first, second, strict=True) if a != b]
        lacks = set(differing) - {"scene", "trim"}
        assert len(lacks) == (record["concept"] != "S"), "one critter, but for what is asked for"
        for view, framing, numbers in zip(pair, record["framings"], record["labels"], strict=True):
            assert (numbers[scene] >= 0) == (framing == "scene")
            assert view[..., 3].mean() > 0.01 * 255, "a mask"
        assert first[scene] == -1 or first[scene] != second[scene], "two scenes"


def test_the_second_view_lacks_what_the_words_ask_for():
    rng, asked = np.random.default_rng(0), set()
    for _ in range(300):
        critter = random_critter(rng, "trained")
        fewer, concept = without_a_part(critter, rng)
        worn = [name for name in ATTACHED if getattr(critter, name) != "none"]
        lost = [name for name in worn if getattr(fewer, name) == "none"]
        assert not is_held_out(fewer), "taking off what it wears on top makes another combination"
        if not lost:
            assert fewer == critter and concept == "S" and set(worn) <= {"top"}
            continue
        (name,) = lost
        assert concept == f"S with {phrase_of(getattr(critter, name))}"
        assert (fewer.ears is None) == (fewer.top != "ears")
        assert (fewer.tail_numbers is None) == (fewer.tail != "tail")
        assert (fewer.trim is None) == (not has_trim(fewer))
        changed = {name, "trim", "ears", "tail_numbers"}
        assert {k: v for k, v in vars(fewer).items() if k not in changed} == {
            k: v for k, v in vars(critter).items() if k not in changed
        }
        asked.add(name)
    assert asked == set(ATTACHED)


def test_samples_hold_no_held_out_kind(rendered):
    _, records = load_samples(rendered)
    for name, kinds in HELD_OUT_KINDS.items():
        column = list(ATTRIBUTES).index(name)
        held_out = {ATTRIBUTES[name].index(kind) for kind in kinds}
        assert not held_out & {record["labels"][0][column] for record in records}


def test_samples_follow_their_seed(rendered):
    """The judge's are others than the models'."""
    (own, _), (other, _) = load_samples(rendered), load_samples(rendered.parent / "other")
    pictures = {view.tobytes() for views in (own, other) for pair in views for view in pair}
    assert len(pictures) == 2 * 30 * 2


def test_samples_that_are_there_stay(rendered, monkeypatch):
    monkeypatch.setattr(POOL, lambda *_, **__: pytest.fail("again"))
    render_samples(rendered, 30, "trained")
    with pytest.raises(ValueError, match="30 samples of 64 px; expected 40 of 64 px"):
        render_samples(rendered, 40, "trained")


@pytest.mark.parametrize("framing", sorted({*FRAMINGS, *SECOND_FRAMINGS}))
def test_framings(framing):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        view = np.dstack(draw(random_critter(rng), "forest", rng, 2 * SIDE))
        before = view.copy()
        picture, template, scene = framed(view, "forest", framing, rng)
        assert picture.shape == (SIDE, SIDE, 4) and picture.dtype == np.uint8
        assert (view == before).all(), "not changed in place"
        assert template.count("{}") == 1
        assert scene == ("forest" if framing == "scene" else None)
        assert framing == "scene" or "in the forest" not in template
        mask = picture[..., 3] > 0
        assert mask.any()
        if framing in ("far", "cutout"):
            assert (picture[~mask] == 0).mean() > (0.99 if framing == "cutout" else 0.4)
        if framing == "far":
            assert mask.mean() < 0.36
    assert sum(FRAMINGS.values()) == pytest.approx(1) == sum(SECOND_FRAMINGS.values())


def test_small_pixels_are_means_of_four():
    view = np.zeros((SIDE, SIDE, 4), np.uint8)
    view[::2, ::2, 0], view[..., 3] = 255, 255
    pixels = small_pixels(view)
    assert pixels.shape == (3, SIDE // 2, SIDE // 2)
    assert pixels[0].unique().item() == pytest.approx(-0.5) and (pixels[1:] == -1).all()
