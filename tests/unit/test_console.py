"""What scripts say at the end, whatever the terminal can show."""

import io
import sys
import warnings

import pytest

from elite.console import _show_warning, run
from elite.wording import ShareNote, note
from tests.conftest import run_script


def test_letters_that_the_terminal_lacks_end_no_run(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), "cp1252") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    def main() -> int:
        print("pictures in \u51fa\u529b")
        raise ValueError("\u51fa\u529b: no such folder")

    with pytest.raises(SystemExit) as exit:
        run(main)
    assert exit.value.code == 2
    out, err = (stream.buffer for stream in streams if stream.flush() is None)
    assert out.getvalue().split() == [b"pictures", b"in", rb"\u51fa\u529b"]
    assert err.getvalue().split(b": ")[:2] == [b"error", rb"\u51fa\u529b"]


@pytest.mark.parametrize(
    ("rank", "shown"),
    [
        (None, ["note: prompt", "note: mask"]),
        ("0", ["note: prompt", "note: mask"]),
        ("1", ["note: mask"]),
    ],
)
def test_what_all_processes_note_is_shown_once(monkeypatch, capsys, rank, shown):
    """Each reads the prompt, but its own share of the masks."""
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = _show_warning
        note("prompt")
        note("mask", ShareNote)
    assert capsys.readouterr().err.splitlines() == shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "b", "--side", "abc"], "argument --side: invalid int value: 'abc'; --help explains"),
        (["a", "b", "--shard", "9"], "unrecognized arguments: --shard 9; --help explains"),
        ([], "required: source, target; --help explains"),
    ],
)
def test_a_mistyped_flag_is_one_line(capsys, arguments, said):
    """It was the whole usage, and a part of a flag's name was taken for it."""
    assert run_script("data_scripts/make_shards.py", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
