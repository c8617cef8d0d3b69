"""Processes that share the work of a script."""

import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

import cv2


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes of one core each. Ctrl-C, which reaches them all, is left to this
    process: then what no worker has begun is dropped.

    Raises:
        ValueError: one of them has ended, as where memory runs out.
    """
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker
    ) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise ValueError(
                "a worker process has ended before its work; if memory ran out, let fewer work at "
                "once"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
