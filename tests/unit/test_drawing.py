"""Drawing a folder: reading ahead, encoding together, writing behind."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from elite import drawing as drawing_module
from elite.concept import Concept
from elite.data import PairFolder
from elite.drawing import Drawing, draw_folder
from elite.encoding import ahead
from tests import tiny

QUICK = Drawing(num_inference_steps=2)


def draw(pipe, pairs, output_dir, **options) -> list[str]:
    options = {"prompt": "a S", "seeds": [1, 2], **options}
    return draw_folder(pipe, PairFolder(pairs), output_dir, QUICK, **options)


def test_ahead_keeps_the_order_and_begins_no_more_than_asked():
    begun: list[int] = []
    gate = threading.Event()

    def slow(item: int) -> int:
        begun.append(item)
        gate.wait(10)
        return item * item

    with ThreadPoolExecutor(8) as pool:
        results = ahead(pool, slow, range(10), 3)
        first = next(results)
        assert len(begun) <= 4
        gate.set()
        assert [first.result(), *(future.result() for future in results)] == [
            item * item for item in range(10)
        ]


def test_ahead_raises_where_the_item_is_asked_for():
    def fails_at_2(item: int) -> int:
        if item == 2:
            raise ValueError("no 2")
        return item

    with ThreadPoolExecutor(1) as pool:
        futures = list(ahead(pool, fails_at_2, range(4), 2))
        assert [futures[i].result() for i in (0, 1, 3)] == [0, 1, 3]
        with pytest.raises(ValueError, match="no 2"):
            futures[2].result()


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batch_size_changes_no_picture(pipe, tmp_path, batch_size):
    pairs = tiny.save_pairs(tmp_path / "pairs", count=3)
    assert draw(pipe, pairs, tmp_path / "one") == []
    assert draw(pipe, pairs, tmp_path / "many", batch_size=batch_size) == []
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "many").iterdir())
    assert len(names) == 3 * 2 * 2 + 1
    for name in names:
        if name.endswith(".png") and name != "grid.png":
            a, b = (
                torch.frombuffer(bytearray(Image.open(folder / name).tobytes()), dtype=torch.uint8)
                for folder in (tmp_path / "one", tmp_path / "many")
            )
            assert (a.int() - b.int()).abs().max() <= 1, name


def test_pairs_are_encoded_once_and_together(pipe, tmp_path, monkeypatch):
    pairs = tiny.save_pairs(tmp_path / "pairs", count=3)
    encoded: list[int] = []
    encode = pipe.encode_views

    def counting(**views: torch.Tensor) -> Concept:
        encoded.append(len(views["clip_pixels"]))
        return encode(**views)

    monkeypatch.setattr(pipe, "encode_views", counting)
    draw(pipe, pairs, tmp_path / "out", batch_size=2)
    assert encoded == [2, 1]


def test_a_picture_that_cannot_be_written_stops_the_run(pipe, tmp_path, monkeypatch):
    def disk_full(*_: object) -> None:
        raise ValueError("disk full")

    monkeypatch.setattr(drawing_module, "write_picture", disk_full)
    pairs = tiny.save_pairs(tmp_path / "pairs")
    with pytest.raises(ValueError, match="disk full"):
        draw(pipe, pairs, tmp_path / "out")


def test_metadata_names_all_that_a_picture_depends_on(pipe, tmp_path):
    pairs = tiny.save_pairs(tmp_path / "pairs", count=1)
    draw(pipe, pairs, tmp_path / "out", seeds=[5], metadata={"scheduler": "lms"})
    with Image.open(tmp_path / "out" / "00000_00005.png") as picture:
        text = picture.text
    expected = {"prompt": "a S", "seed": "5", "lambda": "0.8", "words": "0", "scheduler": "lms"}
    expected |= {"num_inference_steps": "2", "guidance_scale": "5.0", "resolution": "32"}
    assert expected.items() <= text.items()
    assert text["fingerprint"] == pipe.fingerprint and text["torch"] == torch.__version__
