"""Runs bad inputs one after the other and judges how each ends: refused by one clear line, or taken
with a result that its case has checked. Anything else is a fault."""

import contextlib
import io
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from elite import Concept, ElitePipeline
from elite.wording import one_line
from tests import tiny
from tests.conftest import make_pipe, run_script

SECONDS = 30  # a case that takes longer hangs
MEMORY = 2 * 2**30  # bytes of this process at its largest
LONGEST_LINE = 2000  # characters that a person may be asked to read
CANARY = "canary"  # a file that hostile code would write


class World:
    """What cases may use: a folder of their own, a tiny model with its mappers."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root
        self.canary = root / CANARY

    def fresh(self) -> None:
        """A new folder for the next case."""
        self.folder = Path(tempfile.mkdtemp(dir=self.root, prefix="case"))

    @cached_property
    def model(self) -> Path:
        return tiny.save_model_folder(self.root / "model")

    @cached_property
    def mappers(self) -> Path:
        tiny.save_mappers(self.root / "mappers", self.model)
        tiny.save_release_mappers(self.root / "mappers", self.model)
        return self.root / "mappers"

    @cached_property
    def pipe(self) -> ElitePipeline:
        return make_pipe(self.model, self.mappers)

    @cached_property
    def concept(self) -> Concept:
        return self.pipe.encode_concept(*tiny.picture(0))

    @cached_property
    def pairs(self) -> Path:
        return tiny.save_pairs(self.root / "pairs")

    @property
    def model_flags(self) -> tuple[str, ...]:
        return (
            *("--pretrained_model_name_or_path", str(self.model)),
            *("--global_mapper_path", str(self.mappers / "global_mapper")),
            *("--local_mapper_path", str(self.mappers / "local_mapper")),
        )

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def script(self, name: str, *arguments: str | Path) -> int:
        """A script's exit status, 0 or 3; status 2 becomes the ValueError that it has printed."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = run_script(name, *arguments)
        lines = [line for line in said.getvalue().splitlines() if "error" in line]
        if status == 2:
            raise ValueError("\n".join(lines) or "no line at all\n")
        assert status in (0, 3), f"exit status {status}: {said.getvalue()[-500:]}"
        return status


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        action: makes it, feeds it and checks the result; a ValueError of one line refuses it.
        refused: whether it has to be; None leaves both.
    """

    kind: str
    name: str
    action: Callable[[World], object]
    refused: bool | None = True


@dataclass(frozen=True)
class Verdict:
    """How a case ended: `fault` is empty where it ended well."""

    kind: str
    name: str
    refused: bool
    said: str
    fault: str
    seconds: float
    peak: int  # bytes of the process


def judge(case: Case, world: World) -> Verdict:
    """Runs a case under a watchdog."""
    world.fresh()
    _reset_peak()
    start, refused, said, fault = time.monotonic(), False, "", ""
    try:
        with _watchdog():
            case.action(world)
    except ValueError as error:
        refused, said = True, one_line(error)  # as scripts print it
        fault = _fault_of_line(said)
    except BaseException as error:
        trace = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__}: {error} ({Path(trace.filename).name}:{trace.lineno})"
    seconds, peak = time.monotonic() - start, _peak()
    if not fault and case.refused is not None and refused != case.refused:
        fault = f"was {'refused: ' + said if refused else 'taken'}"
    if world.canary.exists():
        world.canary.unlink()
        fault = "its code was executed"
    if peak > MEMORY:
        fault = fault or f"took {peak / 2**20:.0f} MiB"
    return Verdict(case.kind, case.name, refused, said[:300], fault[:600], seconds, peak)


def _fault_of_line(line: str) -> str:
    """What is wrong with an error message; empty for one clear line."""
    if not line.strip() or "\n" in line:
        return f"not one line: {line!r}"
    if len(line) > LONGEST_LINE:
        return f"a line of {len(line)} characters: {line[:200]!r}"
    if re.search(r"[\x00-\x1f\x7f-\x9f]", line):
        return f"control characters in {line[:200]!r}"
    return ""


class _Hangs(BaseException):
    """Passes every `except Exception`."""


@contextlib.contextmanager
def _watchdog() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _Hangs(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _reset_peak() -> None:
    """Linux counts the largest size anew from here."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The largest resident size in bytes; since `_reset_peak` where Linux says so."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(verdicts: Sequence[Verdict]) -> str:
    """Counts by kind."""
    lines = [
        f"{'kind':14}{'inputs':>8}{'refused':>9}{'taken':>7}{'faults':>8}{'seconds':>9}{'MiB':>7}"
    ]
    kinds = list(dict.fromkeys(verdict.kind for verdict in verdicts))
    for kind in [*kinds, "all"]:
        mine = [verdict for verdict in verdicts if kind in (verdict.kind, "all")]
        faults = sum(bool(verdict.fault) for verdict in mine)
        refused = sum(verdict.refused for verdict in mine if not verdict.fault)
        seconds, peak = sum(v.seconds for v in mine), max(v.peak for v in mine) / 2**20
        taken = len(mine) - faults - refused
        lines.append(
            f"{kind:14}{len(mine):8}{refused:9}{taken:7}{faults:8}{seconds:9.1f}{peak:7.0f}"
        )
    return "\n".join(lines)
