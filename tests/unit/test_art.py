"""Things of other people: fetched as packages, cut out, put into scenes, judged by their own
pictures."""

import io
import json
import os
import stat
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data_scripts import fetch_art
from small_world.art import art_rows, composite, make_art_tasks, score_art, seen_labels, sheet
from small_world.attributes import judged
from small_world.classifier import Judge
from small_world.score import draw_renders
from small_world.things import read_thing
from small_world.world import ATTRIBUTES, SCENES


def cut_out(size=(100, 80), colour=(200, 30, 30), edge=20) -> Image.Image:
    """A filled rectangle in the middle of nothing."""
    levels = np.zeros((size[1], size[0], 4), np.uint8)
    levels[edge:-edge, edge:-edge] = (*colour, 255)
    return Image.fromarray(levels)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.fixture
def art(tmp_path):
    colours = ((220, 30, 30), (40, 80, 200), (60, 160, 70))
    for i, colour in enumerate(colours):
        cut_out(colour=colour).save(tmp_path / f"thing{i}.png")
    return tmp_path


@pytest.mark.parametrize("size", [64, 256])
def test_a_thing_stands_in_the_scene_where_its_mask_says(size):
    thing = np.asarray(cut_out().crop((20, 20, 80, 60)))
    rng = np.random.default_rng(3)
    image, mask = composite(thing, "night", rng, size)
    assert image.shape == (size, size, 3) and mask.shape == (size, size)
    assert set(np.unique(mask)) == {0, 255}
    inside = image[mask == 255].astype(float)
    assert np.abs(np.median(inside, axis=0) - (200, 30, 30)).max() < 3
    outside = image[mask == 0].astype(float)
    assert (outside[:, 0] > 150).mean() < 0.06, "its red leaks beyond the mask"
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    longer = max(np.ptp(rows), np.ptp(columns)) / size
    assert 0.55 < longer < 1.0


def test_cases_are_drawn_by_seed_and_read_in_another_scene(art):
    cases = make_art_tasks(art, 10, seed=0)
    assert sorted(case.file.name for case in cases) == ["thing0.png", "thing1.png", "thing2.png"]
    assert all(case.scene != case.source_scene for case in cases)
    assert [c.seed for c in cases] == [c.seed for c in make_art_tasks(art, 10, seed=0)]
    assert [c.seed for c in cases] != [c.seed for c in make_art_tasks(art, 10, seed=1)]
    assert cases[0].source[0].shape == (256, 256, 3)
    assert not np.array_equal(cases[0].source[0], cases[1].source[0])


def test_a_folder_without_things_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder of PNGs .*fetch_art.py"):
        make_art_tasks(tmp_path, 3, seed=0)


def test_a_thing_that_cannot_be_read_is_named(art):
    (art / "thing1.png").write_bytes((art / "thing1.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"thing1\.png: cannot be read; expected a PNG"):
        read_thing(art / "thing1.png")


def test_tasks_of_held_out_things_alone(tmp_path):
    for i in range(30):
        cut_out().save(tmp_path / f"thing{i}.png")
    tasks = make_art_tasks(tmp_path, 30, seed=0, held_out=True)
    assert sorted(task.file.stem for task in tasks) == ["thing12", "thing25", "thing26"]


def test_renders_of_any_size(art):
    """The VAE row of a model of 64 px shows what its own VAE can do."""
    task = make_art_tasks(art, 1, seed=0)[0]
    small, large = draw_renders([task]), draw_renders([task], side=128)
    assert (small.shape, large.shape) == ((1, 3, 32, 32), (1, 3, 64, 64))
    alike = torch.nn.functional.avg_pool2d(large, 2) - small
    assert alike.abs().mean() < 0.2


def test_right_is_what_the_judge_sees_in_the_thing_itself(art):
    torch.manual_seed(0)
    judge, cases = Judge().eval(), make_art_tasks(art, 3, seed=0)
    wanted = seen_labels(judged(judge, cases[0].views)[0], cases[0].scene)
    assert len(wanted) == len(ATTRIBUTES) and wanted[-1] == list(SCENES).index(cases[0].scene)
    rows = [row for row in art_rows(None, None, cases) if "thing" in row.name]
    scores, pictures = score_art(judge, rows, cases, batch_size=2)
    assert list(scores) == ["the thing itself", "another thing"]
    assert torch.equal(pictures["the thing itself"], draw_renders(cases))
    others = dict(zip(cases, cases[1:] + cases[:1], strict=True))
    assert torch.equal(pictures["another thing"], draw_renders(cases, others.__getitem__))
    assert scores["the thing itself"]["identity"]["total"] == 3
    assert sheet(cases, pictures).size == (3 * 160, 3 * 160 + 36)


# --- fetching -------------------------------------------------------------------------------------


def fake_npm(folder, archive) -> None:
    """An npm that leaves this archive in the working directory."""
    script = folder / "npm"
    script.write_text(f"#!/bin/sh\ncp {archive} .\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A package manager whose every package has emoji, names, and things that are no cut-outs."""
    files = {
        "package/data-by-emoji.json": json.dumps(
            {
                "\U0001f408": {"slug": "cat", "group": "Animals & Nature"},
                "\U0001f600": {"slug": "grin", "group": "Smileys & Emotion"},
            }
        ).encode(),
        "package/img/twitter/64/1f408.png": encoded(cut_out()),
        "package/img/twitter/64/1f600.png": encoded(cut_out()),
        "package/img/twitter/64/1f409.png": b"no picture",
        "package/img/apple/64/1f408.png": encoded(cut_out(colour=(0, 0, 255))),
    }
    archive = tmp_path / "archive.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    fake_npm(tmp_path, archive)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_emoji_of_things_are_fetched_by_name(npm, capsys):
    out = npm / "out"
    assert fetch_art.main([str(out), "--sources", "twitter"]) == 0
    assert [path.name for path in (out / "twitter").iterdir()] == ["cat.png"]
    with Image.open(out / "twitter" / "cat.png") as picture:
        assert picture.size == (60, 40) and picture.getpixel((5, 5)) == (200, 30, 30, 255)
    assert "twitter: 1 pictures, CC-BY 4.0" in capsys.readouterr().out


def test_a_source_that_is_there_is_left(npm):
    out = npm / "out"
    (out / "twitter").mkdir(parents=True)
    assert fetch_art.main([str(out), "--sources", "twitter"]) == 0
    assert list((out / "twitter").iterdir()) == []


def test_without_its_package_manager_a_source_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"unicode-emoji-json@0.9.0: needs npm; install it or"):
        fetch_art.main([str(tmp_path / "out"), "--sources", "google"])


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    script = tmp_path / "npm"
    script.write_text("#!/bin/sh\necho 404 not found >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"npm could not fetch it \(404 not found\)"):
        fetch_art.main([str(tmp_path / "out"), "--sources", "google"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["damaged.tgz", "cut.tgz", "damaged.deb"])
def test_a_damaged_package_is_named(npm, name):
    content = (npm / "archive.tgz").read_bytes()
    path = npm / name
    path.write_bytes(content[: len(content) // 2] if name == "cut.tgz" else b"no package")
    with pytest.raises(ValueError, match=rf"^{name}: damaged; expected an npm or Debian package"):
        list(fetch_art.members(path, ("package/",)))


@pytest.mark.parametrize(
    "image",
    [cut_out((20, 20), edge=2), Image.new("RGBA", (90, 90), "red"), Image.new("RGBA", (90, 90))],
    ids=["tiny", "without transparency", "empty"],
)
def test_what_is_no_cut_out_is_left_out(image):
    assert fetch_art.read_picture(encoded(image), 128) is None


def test_large_ones_are_made_smaller():
    assert fetch_art.read_picture(encoded(cut_out((600, 400))), 128).size == (128, 82)


def test_landscapes_stay_whole():
    picture = fetch_art.read_picture(encoded(Image.new("RGB", (600, 400))), 300, is_whole=True)
    assert (picture.mode, picture.size) == ("RGB", (300, 200))
