"""What scripts say at the end, whatever the terminal can show."""

import io
import sys

import pytest

from elite.console import run


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
