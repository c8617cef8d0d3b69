"""What the scripts have in common at the command line: one clear line for a user's mistake, exit
codes, signals, quiet libraries."""

import argparse
import atexit
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn, Self, TextIO

from elite.wording import Note, one_line

OK, INTERRUPTED, BAD_INPUT, PARTLY_FAILED = 0, 130, 2, 3


def quiet_libraries() -> None:
    """Keeps hints for library developers (missing torchvision, deprecations) away from users;
    errors still show. Best called before anything imports transformers or diffusers, which may
    warn as they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from PIL.Image import DecompressionBombWarning  # such pictures are refused in our own words

    for category in (FutureWarning, DeprecationWarning, UserWarning, DecompressionBombWarning):
        warnings.filterwarnings("ignore", category=category)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    warnings.simplefilter("default", Note)
    warnings.showwarning = _show_warning
    for library in (logging, diffusers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A note as one line, above a progress bar if there is one; of what all processes of
    `accelerate launch` note, the first alone shows it."""
    from tqdm import tqdm

    if category is Note and os.environ.get("RANK", "0") != "0":
        return
    if issubclass(category, Note):
        text = f"note: {one_line(message)}"
    else:
        text = warnings.formatwarning(message, category, filename, lineno).rstrip()
    tqdm.write(text, file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and hands mistakes to the caller, where argparse alone prints the
    whole usage and exits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help explains the flags")


def script_parser(doc: str | None) -> Parser:
    """A command line whose --help begins with the script's docstring as it stands."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_set_name(parser: argparse.ArgumentParser) -> None:
    """--set_name of scripts that read Open Images."""
    parser.add_argument(
        "--set_name", default="test", help="test, validation or train (default test)"
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """--workers of scripts that use every core."""
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)"
    )


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raises ValueError where a flag of this name is given less than its least number."""
    for name, number in least.items():
        if (value := getattr(args, name)) is not None and value < number:
            raise ValueError(f"--{name} {value}: expected {number} or more")


def complain(message: object) -> None:
    """One line on stderr, whatever file names or prompts the message quotes."""
    print(f"error: {one_line(message)}", file=sys.stderr)


def list_failures(failures: Sequence[object], what: str) -> int:
    """Lists on stderr what could not be read, if anything. Returns the exit status."""
    if failures:
        lines = map(one_line, failures)
        print(f"{len(failures)} {what} could not be read:", *lines, sep="\n  ", file=sys.stderr)
    return PARTLY_FAILED if failures else OK


def run(main: Callable[[], int], keeps: bool = True) -> None:
    """Runs a script and exits: with its status, 2 and one line on stderr for a ValueError, a file
    that cannot be reached or a lost process of `accelerate launch`, 130 for Ctrl-C.

    Args:
        keeps: whether an interrupted one leaves what it has finished.
    """
    atexit.register(_leave_processes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # letters that the terminal does not have as \u51fa
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except ValueError as error:
        complain(error)
        sys.exit(BAD_INPUT)
    except OSError as error:  # a name that is too long, a folder that may not be read
        if error.filename is None:
            raise
        complain(f"{error.filename}: {error.strerror}; choose another file or folder")
        sys.exit(BAD_INPUT)
    except RuntimeError as error:
        if not _is_lost_process(error):
            raise
        complain(
            "another process of this run has ended, so this one ends, too; see that one's "
            "message; what is finished is kept"
        )
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        finished = "what is finished is kept" if keeps else "nothing is written before the end"
        print(f"interrupted; {finished}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _leave_processes() -> None:
    """Ends the process group of `accelerate launch`, if this process is in one: at its exit, since
    scripts that run in one process share it. A process that exits while still in the group may be
    aborted by the group's threads."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _is_lost_process(error: RuntimeError) -> bool:
    """Of torch.distributed (DistError and its like), or of gloo, which has no class of its own."""
    return type(error).__name__.startswith("Dist") or "gloo" in str(error)


class StopSignals:
    """Within it a first SIGTERM or SIGINT only sets `asked`; the next one ends the process at once.

    So work in whole steps can finish its step and save. Does nothing outside the main thread.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.asked: str | None = None  # name of the signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        os.write(2, f"{self.asked}: ends after this step; a second one ends at once\n".encode())
        for each in self.NUMBERS:
            signal.signal(each, signal.SIG_DFL)  # reaches even a process that waits inside C


class Stopped(SystemExit):
    """A signal ended the work after a whole step; all is saved, and the exit status is 0."""

    def __init__(self) -> None:
        super().__init__(OK)


def command_again(*more: str) -> str:
    """The command that started this process with arguments added, to be typed into a shell."""
    if "LOCAL_RANK" in os.environ:
        return f"accelerate launch [its options] {shlex.join([*sys.argv, *more])}"
    return shlex.join([*sys.orig_argv, *more])
