"""`data_scripts/label.py`: a pile of photos to shards that train, and what is left out of them."""

import json
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_scripts.labelling import Limits, overlap
from elite.images import read_image, read_mask
from elite.masks import Box, Found
from elite.open_images import OpenImagesBoxes, OpenImagesMasks
from elite.shards import open_source
from small_world.render import Pose, draw
from tests.cli.test_docs import commands
from tests.conftest import REPOSITORY, run_script
from tests.critters import CRITTER
from tests.tiny import save_dino_folder, save_owl_folder, save_sam_folder

SCRIPT = "data_scripts/label.py"
SIDE = 256


class Stub:
    """Stands for a detector: finds the critters of the photos it was told of.

    Attributes:
        asked: how many photos it was shown.
    """

    def __init__(self):
        self.known, self.asked, self.model = {}, 0, None

    def __call__(self, name_or_path, words):  # in the place of the class
        self.word = words[0]
        look = partial(self.look)
        look.model = self.model
        return look

    def look(self, image, least):
        self.asked += 1
        return [Found(self.word, *one) for one in self.known[image.tobytes()]]


def box_of(mask):
    y, x = np.nonzero(mask)
    return Box(int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)


@pytest.fixture
def detector(monkeypatch):
    stub = Stub()
    monkeypatch.setattr("elite.detector.Detector", stub)
    return stub


def save_photo(path, scene="snow", half_width=0.32, seed=0):
    """A purple critter; returns its mask, bool (H, W)."""
    rng, pose = np.random.default_rng(seed), Pose(0.5, 0.5, half_width, 0, False)
    image, mask = draw(CRITTER, scene, rng, SIDE, pose)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=95)
    return mask > 0


@pytest.fixture
def photograph(tmp_path, detector):
    """Makes a photo of a critter, and tells the detector with which scores it finds it, or what
    else."""

    def make(name, *photo, scores=(0.9,), box=None):
        path = tmp_path / "photos" / name
        mask = save_photo(path, *photo)
        boxes = [(score, box or box_of(mask)) for score in scores]
        detector.known[read_image(path).tobytes()] = boxes
        return path

    return make


@pytest.fixture
def label(tmp_path):
    """Runs the script on the photos."""

    def run(*options, words=("critter",)):
        return run_script(
            SCRIPT, tmp_path / "photos", tmp_path / "shards", *("--words", *words),
            *("--detector_name_or_path", "stub", "--sheet", tmp_path / "sheet.png"),
            *("--workers", "1", *options),
        )  # fmt: skip

    return run


@pytest.fixture
def pile(tmp_path, photograph):
    """Two photos that are kept, in a folder of a folder, and one of each kind that is not."""
    photograph("a.png", "snow")
    photograph("trip/day 2/b.v1.jpg", "grass", scores=(0.9, 0.6))
    again = Image.open(tmp_path / "photos/a.png").resize((SIDE // 2, SIDE // 2))
    again.save(tmp_path / "photos/a again.jpg", quality=60)
    photograph("nothing.png", "night", scores=())
    photograph("unsure.png", "beach", scores=(0.2,))
    photograph("far.png", "road", 0.1)
    photograph("thin.png", "water", box=Box(10, 10, 240, 115))
    photograph("whole.png", "moon", box=Box(0, 0, SIDE, SIDE))
    (tmp_path / "photos/broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (90, 400)).save(tmp_path / "photos/strip.png")
    save_photo(tmp_path / "photos/.thumbnails/old/c.png", "table")
    return tmp_path / "photos"


def samples(folder):
    """The files of all tars by key and ending."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                found.setdefault(folder + slash + key, {})[ending] = tar.extractfile(member).read()
    return found


def test_a_pile_of_photos(label, pile, tmp_path, capsys):
    assert label() == 3
    told = capsys.readouterr()
    assert told.out.splitlines()[:8] == [
        "2 of 10 photos kept; dropped:",
        "  2 too few pixels",
        "  1 repeats another",
        "  1 nothing found",
        "  1 too long and thin",
        "  1 low score",
        "  1 too much of the picture",
        "  1 unreadable",
    ]
    assert "1 images could not be read:" in told.err and "broken.jpg: not a readable" in told.err
    found = samples(tmp_path / "shards")
    assert sorted(found) == ["a", "trip/day 2/b%2Ev1"]
    for name, files in (("a.png", found["a"]), ("trip/day 2/b.v1.jpg", found["trip/day 2/b%2Ev1"])):
        ending = name.rpartition(".")[2]
        assert sorted(files) == sorted((ending, "json", "mask.0.png"))
        assert files[ending] == (pile / name).read_bytes()
        labels = json.loads(files["json"])
        assert (labels["words"], labels["scores"]) == (["critter"], [0.9])
    source = open_source(tmp_path / "shards")
    boxes = OpenImagesBoxes(source, resolution=32)
    masks = OpenImagesMasks(source, resolution=32, clip_size=28, latent_size=8)
    assert (len(boxes), len(masks)) == (2, 2)
    true = save_photo(tmp_path / "true.png")
    box = box_of(true)
    expected = np.array([box.left, box.right, box.top, box.bottom]) / SIDE
    assert np.abs(boxes.boxes - expected).max() < 1e-6
    mask = read_mask("a", content=found["a"]["mask.0.png"])
    assert (mask & true).sum() / (mask | true).sum() > 0.95, "GrabCut in the box"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 1500


def test_what_was_found_is_not_looked_for_again(label, pile, detector, tmp_path, capsys):
    label()
    asked, shards = detector.asked, tmp_path / "shards"
    assert asked == 7  # neither the repeat, the broken one nor the strip
    written = [path for path in shards.rglob("*.*") if path.is_file() and path.suffix != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in written}
    (lost,) = [path for path in (shards / "labels").glob("*.json") if "0.2" in path.read_text()]
    lost.write_text("half")
    label()
    assert detector.asked == asked + 1 and "0.2" in lost.read_text()
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path for path in before if before[path] != after[path]} <= {
        lost, *(shards / name for name in ("index.json", "images.npy", "boxes.npy", "masks.npy"))
    }  # fmt: skip
    capsys.readouterr()
    assert label("--min_score", "0.15") == 2
    assert "holds shards of another source, or made with other options" in capsys.readouterr().err
    for name in ("000000.tar", "plan.json", "index.json"):
        (shards / name).unlink()
    assert label("--min_score", "0.15") == 3
    assert detector.asked == asked + 1 and len(samples(shards)) == 3
    assert label(words=("tree",)) == 2  # other words are looked for
    assert detector.asked == 2 * asked + 1
    detector.model = torch.nn.Linear(1, 1)  # other weights of the same name
    assert label("--min_score", "0.15") == 3
    assert detector.asked == 3 * asked + 1


def test_a_damaged_mask_is_made_again(label, pile, tmp_path):
    assert label() == 3
    paths = sorted((tmp_path / "shards" / "labels").glob("*.png"))
    before = [path.read_bytes() for path in paths]
    paths[0].write_bytes(before[0][: len(before[0]) // 2])
    Image.new("1", (8, 8), 1).save(paths[1])
    assert label() == 3
    assert [path.read_bytes() for path in paths] == before


def test_an_interrupted_run_goes_on(label, pile, detector, tmp_path, monkeypatch):
    look, shards = detector.look, tmp_path / "shards"

    def interrupted(image, least):
        if detector.asked == 3:
            raise KeyboardInterrupt
        return look(image, least)

    with monkeypatch.context() as patch:
        patch.setattr(detector, "look", interrupted)
        assert label() == 130
    assert len(list((shards / "labels").glob("*.json"))) == 3 and not list(shards.glob("*.tar"))
    assert label() == 3
    assert detector.asked == 7 and len(samples(shards)) == 2


def test_of_photos_that_show_the_same_the_largest_is_kept(label, photograph, tmp_path):
    small, large = tmp_path / "photos/a.png", photograph("b.png")
    Image.open(large).resize((SIDE // 2, SIDE // 2)).save(small)
    assert label() == 0
    assert sorted(samples(tmp_path / "shards")) == ["b"]
    shutil.rmtree(tmp_path / "shards")
    assert label("--max_distance", "-1", "--min_side", "1000") == 2, "both are too small"


def test_a_photo_of_the_same_name_in_another_format_is_another_one(label, photograph, tmp_path):
    photograph("a.jpg", "snow")
    photograph("a.png", "grass")
    assert label() == 0
    assert sorted(samples(tmp_path / "shards")) == ["a", "a%2Epng"]


def test_a_photo_that_is_gone_by_then_costs_itself(label, pile, detector, tmp_path, capsys):
    look = detector.look

    def last_look(image, least):
        (pile / "trip/day 2/b.v1.jpg").unlink(missing_ok=True)
        return look(image, least)

    detector.look = last_look
    assert label() == 3
    told = capsys.readouterr()
    assert "1 of 10 photos kept" in told.out and "  2 unreadable" in told.out
    assert "b.v1.jpg: no such file" in told.err
    assert sorted(samples(tmp_path / "shards")) == ["a"]


def test_a_full_disk_stops_the_work(label, pile, detector, monkeypatch, capsys):
    def full(path, text):
        raise ValueError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr("data_scripts.labelling.write_text", full)
    assert label() == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert detector.asked == 1


def test_things_without_a_mask_are_dropped(label, photograph, monkeypatch, tmp_path, capsys):
    def find(image, box):
        raise ValueError("found no object")

    photograph("a.png")
    monkeypatch.setattr("data_scripts.make_masks.find_object", find)
    assert label() == 2
    told = capsys.readouterr()
    assert "  1 no mask" in told.out and "no photo is kept" in told.err
    assert (tmp_path / "sheet.png").exists()


LIMITS = Limits()
MISFITS = [
    (Box(0, 0, 99, 150), "too few pixels"),
    (Box(0, 0, 100, 201), "too long and thin"),
    (Box(0, 0, 100, 200), ""),
    (Box(0, 0, 400, 401), "too much of the picture"),
    (Box(0, 0, 400, 400), ""),
]


@pytest.mark.parametrize(("box", "reason"), MISFITS)
def test_limits(box, reason):
    assert LIMITS.misfit(box, (400, 500)) == reason
    assert LIMITS.misfit(Box(0, 0, 100, 100), (707, 707)) == ""
    assert LIMITS.misfit(Box(0, 0, 100, 100), (708, 708)) == "too little of the picture"


def test_overlap():
    one = Box(0, 0, 10, 10)
    assert overlap(one, one) == 1 and overlap(one, Box(10, 0, 20, 10)) == 0
    assert overlap(one, Box(5, 0, 15, 10)) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min_score", "0"), "--min_score 0.0: expected 0.1 to 1"),
        (("--max_aspect", "nan"), "--max_aspect nan: expected 1 to 100"),
        (("--min_side", "0"), "--min_side 0: expected 1 or more"),
        (("--shard_mb", "0"), "--shard_mb 0.0: expected a number above 0"),
        (("--sheet", "photos/sheet.png"), "photos/sheet.png: lies among the photos"),
        (("--sheet", "sheet.jpg"), "--sheet sheet.jpg: expected a file name that ends in .png"),
        (("--sam_name_or_path", "none"), "none: cannot load"),
    ],
)
def test_mistakes_are_one_line_and_2(options, message, label, pile, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert label(*options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "shards").exists()


def test_folders_that_are_none(label, pile, tmp_path, capsys):
    for path in filter(Path.is_file, pile.rglob("*.*")):
        path.unlink()
    assert label() == 2
    assert f"{pile}: no picture in it; expected photos" in capsys.readouterr().err
    shutil.rmtree(pile)
    assert label() == 2
    assert f"{pile}: no such folder; expected photos in it" in capsys.readouterr().err


# --- with models, and the page --------------------------------------------------------------------


@pytest.mark.parametrize("save_detector", [save_owl_folder, save_dino_folder], ids=["owl", "dino"])
def test_the_commands_of_the_page_run(save_detector, tmp_path, capsys):
    """As they stand, but with models of random weights, which find anything anywhere."""
    page = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
    found = commands(page.split("## From a pile of photos\n")[1].split("\n## ")[0])
    for seed, scene in enumerate(("snow", "grass", "beach")):
        save_photo(tmp_path / f"photos/{scene}.jpg", scene, seed=seed)
    names = {
        "PHOTOS": tmp_path / "photos",
        "google/owlv2-base-patch16-ensemble": save_detector(tmp_path / "detector"),
        "facebook/sam-vit-base": save_sam_folder(tmp_path / "sam"),
        "outputs/label.png": tmp_path / "label.png",
    }
    anything = ("--min_score", "0.1", "--min_side", "20", "--max_aspect", "9", "--max_share", "1")
    more = {
        SCRIPT: (*anything, "--workers", "1", "--sheet", tmp_path / "label.png"),
        "train_global.py": ("--train_batch_size", "2"),
    }
    ran = []
    for words in found:
        if words[0] == "accelerate":  # launch --config_file FILE
            words = ["python", *words[4:]]
        words = [names.get(word, word.replace("runs/", f"{tmp_path}/")) for word in words]
        assert run_script(*words[1:], *more[words[1]]) == 0, capsys.readouterr().err
        ran.append(words[1])
    assert ran == [SCRIPT, "train_global.py"]
    assert (tmp_path / "label.png").exists() and samples(tmp_path / "labelled")
