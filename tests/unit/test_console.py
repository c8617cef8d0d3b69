"""What scripts say at the end, whatever the terminal can show."""

import io
import sys
import warnings

import pytest

from elite.console import _show_warning, run
from elite.wording import ShareNote, note


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
