"""Workers that share the work of a script."""

import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

import cv2


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """A pool of processes of one core each; a single worker is a thread of this process, since a
    new one takes seconds to begin. Ctrl-C, which reaches them all, is left to this process: then
    what no worker has begun is dropped.

    Raises:
        ValueError: one of them has ended, as where memory runs out.
    """
    with ThreadPoolExecutor(1) if workers == 1 else _processes(workers) as pool:
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


def _processes(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
