"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable

HANGS = 180  # seconds after which a thread or process that should have ended has hung


def wait_until(happened: Callable[[], object], what: str) -> None:
    """Waits for what others do; where it does not come, that is an AssertionError."""
    deadline = time.monotonic() + HANGS
    while not happened():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.01)
