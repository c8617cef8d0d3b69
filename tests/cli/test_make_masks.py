"""`data_scripts/make_masks.py`: masks that the other scripts read, a sheet, and what it says."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_scripts import make_masks
from elite.data import PairFolder
from elite.images import read_mask
from elite.masks import Box
from elite.sam import Sam
from elite.sheets import TILE
from small_world.render import Pose, draw
from tests.conftest import pixels, run_script
from tests.critters import CRITTER
from tests.tiny import save_sam_folder

SCRIPT = "data_scripts/make_masks.py"
HEADER = "name,left,top,right,bottom\n"
SIZE = 64


def save_render(path: Path, x: float = 0.5, half_width: float = 0.32) -> np.ndarray:
    """A purple critter on snow; returns its mask, bool (H, W)."""
    pose = Pose(x, 0.5, half_width, 0, False)
    image, mask = draw(CRITTER, "snow", np.random.default_rng(0), SIZE, pose)
    Image.fromarray(image).save(path)
    return mask > 0


@pytest.fixture
def photos(tmp_path) -> Path:
    """Critters: large.png in the middle, corner.png small at the left."""
    folder = tmp_path / "photos"
    folder.mkdir()
    save_render(folder / "large.png")
    save_render(folder / "corner.png", x=0.25, half_width=0.18)
    return folder


@pytest.fixture
def script(photos, tmp_path):
    """Runs the script on the pictures, with the sheet in another folder."""

    def run(*arguments: str | Path) -> int:
        return run_script(SCRIPT, photos, "--sheet", tmp_path / "sheet.png", *arguments)

    return run


@pytest.fixture
def boxes(tmp_path) -> Path:
    """A box for corner.png."""
    path = tmp_path / "boxes.csv"
    path.write_text(HEADER + "corner,2,18,31,47\n")
    return path


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


def errors(capsys) -> list[str]:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_masks_are_what_the_other_scripts_read(script, photos, tmp_path, capsys):
    (photos / "corner.png").unlink()
    Image.open(photos / "large.png").save(photos / "also.jpg", quality=95)
    assert script() == 0
    pairs = PairFolder(photos)
    assert [pair.name for pair in pairs.pairs] == ["also", "large"]
    for index in range(2):
        _, mask = pairs.read(index)
        assert overlap(mask, save_render(tmp_path / "true.png")) > 0.95
    assert f"masks made: 2; look at {tmp_path / 'sheet.png'} first" in capsys.readouterr().out


def test_sheet_shows_picture_outline_and_object(script, photos, tmp_path):
    script()
    sheet = pixels(tmp_path / "sheet.png")
    row = sheet[-TILE:].reshape(TILE, 4, TILE, 3).swapaxes(0, 1)  # of large.png, the last name
    assert (row[0] < 128).any(), "a name"
    true = np.asarray(Image.fromarray(read_mask(photos / "large_bg.png")).resize((TILE, TILE), 0))
    np.testing.assert_array_equal(row[3][~true], 0)
    np.testing.assert_array_equal(row[3][true], row[1][true])
    outline = (row[2] == make_masks.OUTLINE).all(-1)
    assert outline.any() and np.array_equal(row[2][~outline], row[1][~outline])


def test_box_mends_one_mask_and_keeps_the_others(script, photos, boxes, tmp_path, capsys):
    true = save_render(tmp_path / "true.png", x=0.25, half_width=0.18)
    Image.new("L", (SIZE, SIZE), 255).save(photos / "corner_bg.png")
    Image.new("L", (SIZE, SIZE), 255).save(photos / "large_bg.png")
    assert script("--boxes", boxes) == 0
    assert read_mask(photos / "corner_bg.png").all(), "kept without --overwrite"
    assert "masks made: 0" in capsys.readouterr().out
    assert script("--boxes", boxes, "--overwrite") == 0
    assert overlap(read_mask(photos / "corner_bg.png"), true) > 0.88  # of 20 px, edges count
    assert read_mask(photos / "large_bg.png").all(), "no box, so kept"
    assert "masks made: 1" in capsys.readouterr().out


def test_overwrite_makes_all_anew(script, photos):
    Image.new("L", (SIZE, SIZE), 255).save(photos / "large_bg.png")
    (photos / "corner.png").unlink()
    assert script("--overwrite") == 0
    assert not read_mask(photos / "large_bg.png").all()


def test_picture_without_mask_and_box_is_named(script, photos, boxes, capsys):
    assert script("--boxes", boxes) == 3
    (line,) = errors(capsys)
    assert "large.png: has neither a mask nor a box; add a row for large" in line
    assert (photos / "corner_bg.png").exists()


def test_bad_pictures_cost_a_line_each(script, photos, capsys):
    (photos / "broken.png").write_bytes(b"\x89PNG broken")
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    shutil.copy(photos / "large.png", photos / "old.png")
    (photos / "old_bg.png").write_bytes(b"no mask")
    (photos / "corner.png").unlink()
    assert script() == 3
    broken, dot, old = errors(capsys)
    assert "broken.png: not a readable image" in broken
    assert "dot.png: GrabCut found no object" in dot
    assert "old_bg.png: not a readable image" in old
    assert (photos / "large_bg.png").exists() and not (photos / "dot_bg.png").exists()


def test_nothing_could_be_done(script, photos, tmp_path, capsys):
    for path in photos.iterdir():
        path.write_bytes(b"")
    assert script() == 2
    assert len(errors(capsys)) == 2 and not (tmp_path / "sheet.png").exists()


def test_many_pictures_get_several_sheets(script, photos, tmp_path, monkeypatch, capsys):
    shutil.copy(photos / "large.png", photos / "third.png")
    monkeypatch.setattr("elite.sheets.SHEET_ROWS", 2)
    assert script() in (0, 3)
    names = sorted(path.name for path in tmp_path.glob("sheet*.png"))
    assert names == ["sheet.png", "sheet_2.png"]
    assert f"{tmp_path / 'sheet.png'}, {tmp_path / 'sheet_2.png'} first" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [2, 48])
def test_an_interrupted_run_leaves_the_sheets_so_far(script, photos, tmp_path, monkeypatch, rows):
    shutil.copy(photos / "large.png", photos / "third.png")
    found: list[list[str]] = []

    def find(image, box):
        found.append([path.name for path in tmp_path.glob("sheet*.png")])
        if len(found) == 3:
            raise KeyboardInterrupt
        return np.eye(SIZE) > 0

    monkeypatch.setattr("elite.masks.find_object", find)
    monkeypatch.setattr("elite.sheets.SHEET_ROWS", rows)
    assert script() == 130
    assert found == [[], [], ["sheet.png"] if rows == 2 else []], "written as soon as it is full"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height // TILE == 2


BAD_BOXES = [
    ("", "no column name, left, top, right, bottom; expected name,left,top,right,bottom"),
    ("name,left,top,right\n", "no column bottom"),
    (HEADER + "corner,2,18,31\n", "line 2: corner has the box '2,18,31,'; expected four whole"),
    (HEADER + "corner,2,18,31,4.5\n", "expected four whole numbers"),
    (HEADER + "dog,2,18,31,47\n", "line 2: 'dog' is no picture of the folder"),
    (HEADER + "corner,2,18,31,47\n" * 2, "line 3: 'corner' is no picture of the folder, or has"),
    (HEADER + "corner,\xff\n", "codec can't decode"),
]


@pytest.mark.parametrize(("text", "message"), BAD_BOXES, ids=[m[:20] for _, m in BAD_BOXES])
def test_mistakes_in_the_boxes_are_one_line_and_2(script, photos, boxes, capsys, text, message):
    boxes.write_text(text, encoding="latin-1")
    assert script("--boxes", boxes) == 2
    (line,) = errors(capsys)
    assert line.startswith(f"error: {boxes}: ") and message in line
    assert not list(photos.glob("*_bg.png"))


def test_box_that_does_not_fit_costs_a_line(script, boxes, capsys):
    boxes.write_text(HEADER + "corner,2,18,65,47\nlarge,4,4,60,60\n")
    assert script("--boxes", boxes) == 3
    (line,) = errors(capsys)
    assert "corner.png: box 2,18,65,47 is empty or outside the picture of 64 x 64" in line


def test_mistakes_on_the_command_line(script, photos, tmp_path, capsys):
    shutil.copy(photos / "large.png", photos / "large.webp")
    for arguments, message in (
        ((), "large.webp: has the name of large.png; rename one of them"),
        (("--boxes", tmp_path / "none.csv"), "none.csv: No such file or directory"),
        (("--sheet", tmp_path / "sheet.jpg"), "expected a file name that ends in .png"),
        (("--sheet", photos / "sheet.png"), "lies among the pictures; choose another folder"),
    ):
        assert script(*arguments) == 2
        (line,) = errors(capsys)
        assert message in line
        (photos / "large.webp").unlink(missing_ok=True)
    assert not list(photos.glob("*_bg.png"))


# --- Segment Anything -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory) -> Path:
    return save_sam_folder(tmp_path_factory.mktemp("sam"))


def test_sam_makes_the_masks_of_middle_box_and_click(script, photos, boxes, sam_folder):
    sam, model = Sam(sam_folder), ("--method", "sam", "--sam_name_or_path", sam_folder)
    images = {name: pixels(photos / f"{name}.png") for name in ("corner", "large")}

    def made(name: str) -> np.ndarray:
        return read_mask(photos / f"{name}_bg.png")

    assert script(*model) == 0
    for name, image in images.items():
        assert np.array_equal(made(name), sam(image))
    boxes.write_text(HEADER + "corner,2,18,31,47\nlarge,40,30,40,30\n")
    assert script(*model, "--boxes", boxes, "--overwrite") == 0
    assert np.array_equal(made("corner"), sam(images["corner"], Box(2, 18, 31, 47)))
    assert np.array_equal(made("large"), sam(images["large"], Box(40, 30, 40, 30)))


def test_a_click_is_no_box_for_grabcut(script, boxes, capsys):
    boxes.write_text(HEADER + "corner,9,9,9,9\nlarge,4,4,60,60\n")
    assert script("--boxes", boxes) == 3
    (line,) = errors(capsys)
    assert "box 9,9,9,9 is empty or outside" in line


def test_mistakes_about_the_sam_model(script, photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no hub in reach
    remedy = "expected a Segment Anything folder or hub name, as facebook/sam-vit-base"
    for arguments, message in (
        (("--method", "sam"), "--method sam and --sam_name_or_path need each other"),
        (("--sam_name_or_path", tmp_path), "--method sam and --sam_name_or_path need each other"),
        (("--method", "sam", "--sam_name_or_path", tmp_path / "none"), remedy),
        (("--method", "sam", "--sam_name_or_path", tmp_path / "clip"), "is a model of clip"),
        (
            ("--method", "sam", "--sam_name_or_path", "nobody/sam"),
            f"nobody/sam: cannot load {remedy}",
        ),
    ):
        assert script(*arguments) == 2
        (line,) = errors(capsys)
        assert all(part in line for part in message.split(" cannot load ")), line
    assert not list(photos.glob("*_bg.png"))
