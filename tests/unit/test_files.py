"""Files appear whole or not at all, whatever writes them and however the disk fails."""

import errno
import hashlib
import json
import os
import resource
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from elite.data import pictures_in
from elite.files import check_writable, digest_weights, quick_digest, write_atomically, write_json
from elite.open_images import files_in
from elite.wording import Note

TENSORS = {"weight": torch.arange(20_000.0)}  # 80 kB


@contextmanager
def almost_full_disk(room: int = 8192):
    """No file grows beyond `room` bytes, as on a disk with so much space left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_file_is_there_whole_and_alone(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("whole"))
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_half_written_file_is_never_seen_under_its_name(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent, "a rename across disks would copy"
        assert temporary.suffix == path.suffix, "writers choose the format by it"

    write_atomically(path, write)
    assert path.read_text() == "half"


def test_where_nothing_can_be_written_is_seen_before(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder")
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "new" / "folder"):
        with pytest.raises(ValueError, match=rf"^{folder}: cannot be .*file: Not a directory\)"):
            check_writable(folder)
    with pytest.raises(ValueError, match="File name too long"):
        check_writable(tmp_path / ("x" * 1000))
    for url in ("s3://bucket/run", Path("s3://bucket/run"), "https://a.b/c"):
        with pytest.raises(ValueError, match=r"^(s3|https):/.* a URL; expected a folder of this"):
            check_writable(url)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=r"new: cannot be written .*Permission denied"):
        check_writable(tmp_path / "new")


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def rights(path) -> str:
    return f"{path.stat().st_mode & 0o777:o}"


def test_weights_may_be_read_by_those_who_read_the_rest(tmp_path, umask, mappers, pipe):
    """safetensors lets their owner alone."""
    write_atomically(tmp_path / "a.safetensors", lambda path: save_file(TENSORS, path))

    def checkpoint(folder):
        folder.mkdir()
        save_file(TENSORS, folder / "weights.safetensors")

    write_atomically(tmp_path / "checkpoint", checkpoint)
    mappers[0].save_pretrained(tmp_path / "mapper")
    pipe.save_pretrained(tmp_path / "pipe")
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in found if path.suffix == ".safetensors"]) == 9
    assert {rights(path) for path in found} == {"644"}
    os.umask(0o077)
    write_atomically(tmp_path / "mine.safetensors", lambda path: save_file(TENSORS, path))
    assert rights(tmp_path / "mine.safetensors") == "600"


WRITERS = {
    "text": lambda temporary: temporary.write_text("x" * 80_000),
    "picture": lambda temporary: Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    ).save(temporary, "PNG"),
    "array": lambda temporary: np.save(temporary, TENSORS["weight"].numpy()),
    "torch": lambda temporary: torch.save(TENSORS, temporary),
    "safetensors": lambda temporary: save_file(TENSORS, temporary),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, kind):
    path = tmp_path / "file.npy"
    path.write_text("old")
    with (
        almost_full_disk(),
        pytest.raises(ValueError, match=r"file\.npy: cannot be written") as caught,
    ):
        write_atomically(path, WRITERS[kind])
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "something was left behind"


def test_reason_of_the_system_is_told(tmp_path):
    def write(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="No space left on device"):
        write_atomically(tmp_path / "file.txt", write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"no picture", None], ids=["damaged", "missing"])
def test_a_file_that_cannot_be_read_is_no_full_disk(tmp_path, content):
    """Though PIL and the system say so by an OSError."""
    (tmp_path / "in").mkdir()
    if content:
        (tmp_path / "in" / "picture.png").write_bytes(content)

    def write(temporary):
        Image.open(tmp_path / "in" / "picture.png").save(temporary)

    with pytest.raises(OSError, match=r"in.picture\.png"):
        write_atomically(tmp_path / "out" / "picture.png", write)
    assert list((tmp_path / "out").iterdir()) == []


def test_other_mistakes_pass_through_and_leave_nothing(tmp_path):
    def write(temporary):
        temporary.write_text("half")
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        write_atomically(tmp_path / "file.txt", write)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "outputs").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written"):
        write_atomically(
            tmp_path / "outputs" / "file.txt", lambda temporary: temporary.write_text("x")
        )


def write_folder(content: str):
    def write(temporary):
        temporary.mkdir()
        (temporary / content).write_text(content)

    return write


def test_whole_folder_replaces_the_old_one(tmp_path):
    folder = tmp_path / "checkpoint-1"
    write_atomically(folder, write_folder("old"))
    write_atomically(folder, write_folder("new"))
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_failing_folder_leaves_the_old_one(tmp_path):
    folder = tmp_path / "checkpoint-1"
    write_atomically(folder, write_folder("old"))

    def write(temporary):
        write_folder("new")(temporary)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="No space left"):
        write_atomically(folder, write)
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]


def test_json_round_trip(tmp_path):
    value = {"step": 3, "loss": [0.5, None]}
    write_json(tmp_path / "value.json", value)
    assert json.loads((tmp_path / "value.json").read_text()) == value


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Else a power failure could leave the name with nothing in it."""
    flushed, fsync = [], os.fsync

    def note(descriptor):
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), folder.exists()))
        fsync(descriptor)

    folder = tmp_path / "checkpoint-1"
    monkeypatch.setattr(os, "fsync", note)
    write_atomically(folder, write_folder("weights"))
    inside, itself, parent = flushed
    assert inside[0].endswith("/weights") and not inside[1]
    assert itself[0].endswith(".tmp") and not itself[1]
    assert parent == (str(tmp_path), True)


# --- digests --------------------------------------------------------------------------------------


def test_a_quick_digest_tells_any_training_and_no_copy():
    torch.manual_seed(0)
    linear = torch.nn.Linear(300, 300)
    state = {name: value.detach().clone() for name, value in linear.state_dict().items()}
    before = quick_digest([state])
    changed = torch.zeros(4096, 24)
    changed[17, 1] = 1e-3  # between the values that are looked at
    moved = changed.roll(1, dims=0)
    digests = {quick_digest([{"weight": x}]) for x in (changed, moved, torch.zeros(4096, 24))}
    assert len(digests) == 3
    assert quick_digest([{name: value.clone() for name, value in state.items()}]) == before
    optimizer = torch.optim.AdamW(linear.parameters(), 1e-6)
    linear(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    assert quick_digest([linear.state_dict()]) != before
    renamed = {f"x.{name}": value for name, value in state.items()}
    assert quick_digest([renamed]) != before


def test_digest_is_of_names_and_float32_values():
    state = {"b": torch.tensor(1.0), "a": torch.eye(2).bfloat16().T}
    values = np.array([1, 0, 0, 1], np.float32).tobytes(), np.float32(1).tobytes()
    expected = hashlib.sha256(b"a" + values[0] + b"b" + values[1]).hexdigest()
    assert digest_weights(state) == digest_weights({"a": state["a"]}, {"b": state["b"]}) == expected
    state["b"] += 1
    assert digest_weights(state) != expected


@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_names_that_are_no_text_are_left_out_and_told(tmp_path, ending):
    """One such file among many ended a run after its work, with a line that named none."""
    (tmp_path / f"good{ending}").touch()
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9" + ending.encode())).touch()
    except OSError:
        pytest.skip("the file system takes no such name")
    read = pictures_in if ending == ".jpg" else partial(files_in, ending=".png")
    with pytest.warns(Note, match=r"left out \['caf.udce9.*no UTF-8, rename them"):
        assert read(tmp_path) == [tmp_path / f"good{ending}"]


def test_a_linked_folder_is_replaced_and_its_target_stays(tmp_path):
    """It ended in a traceback after the last step of a training, and blocked the folder."""
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "kept").touch()
    (tmp_path / "result").symlink_to(tmp_path / "big")
    write_atomically(tmp_path / "result", Path.mkdir)
    assert not (tmp_path / "result").is_symlink() and (tmp_path / "big" / "kept").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"big", "result"}
