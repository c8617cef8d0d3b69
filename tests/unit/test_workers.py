"""Processes that share a script's work, and how they end."""

import os
import signal
import time
from pathlib import Path

import pytest

from elite.workers import worker_pool


def work(path: Path) -> None:
    time.sleep(0.5)
    path.touch()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_not_begun_is_dropped(tmp_path, workers):
    """Ctrl-C in a script waited for everything that was still to do."""
    with pytest.raises(KeyboardInterrupt), worker_pool(workers) as pool:
        paths = [tmp_path / str(number) for number in range(20)]
        futures = [pool.submit(work, path) for path in paths]
        futures[0].result()
        raise KeyboardInterrupt
    assert 1 <= len(list(tmp_path.iterdir())) < 10


def test_one_worker_is_this_process():
    with worker_pool(1) as pool:
        assert pool.submit(os.getpid).result() == os.getpid()


def test_workers_leave_the_signal_to_the_script():
    with worker_pool(2) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


def test_a_killed_worker_is_one_line():
    """It was a traceback of the pool."""
    said = r"a worker process has ended before .*fewer work at once"
    with pytest.raises(ValueError, match=said), worker_pool(2) as pool:
        pool.submit(os._exit, 9).result()
