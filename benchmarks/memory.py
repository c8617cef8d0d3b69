"""Peak memory of one case, measured in a process of its own, so that no other case has left its
traces in the allocator."""

import gc
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row, alternate

MIB = 2**20
# glibc gives freed blocks above this many bytes back to the system at once. By itself it keeps
# some of up to 32 MB, so that the peak would depend on what was freed before.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}


def peak_memory(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """MiB at the peak of `work` with everything that was there before, and above that."""
    gc.collect()
    resting = _in_use(device)
    _forget_peak(device)
    work()
    peak = _peak(device)
    return {"total": peak / MIB, "above": (peak - resting) / MIB}


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """The answer of a function at module level, called in a process that has only done its imports
    and has as many threads of torch as this one."""
    os.environ.update(RETURNED)  # read by the server when it starts, and so by all its processes
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.models"])
    threads = {"initializer": torch.set_num_threads, "initargs": (torch.get_num_threads(),)}
    with ProcessPoolExecutor(1, mp_context=context, **threads) as pool:
        return pool.submit(function, *args).result()


def memory_rows(
    cases: dict[str, tuple[Any, ...]],
    measure: Callable[..., dict[str, float]],
    rounds: int,
    name: str,
) -> dict[str, Row]:
    """A row of totals, a row of what lies above the resting level, and one of whatever else is
    measured.

    Args:
        cases: per case the arguments of `measure`, which answers as `peak_memory` does, perhaps
            with more; called in turns, each time in a fresh process.
    """
    fresh = {case: partial(in_fresh_process, measure, *given) for case, given in cases.items()}
    seen = alternate(fresh, rounds, f"memory, {name}")
    return {
        kind: Row(name, {case: [peak[kind] for peak in peaks] for case, peaks in seen.items()})
        for kind in next(iter(seen.values()))[0]
    }


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(key: str) -> int:
    """Bytes, from Linux's account of this process.

    `ru_maxrss` would not do: a child starts with the peak of its parent.

    Raises:
        ValueError: another system.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise ValueError(
            "peak memory on a CPU is read from Linux's /proc; leave it out with --memory_rounds 0"
        ) from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
