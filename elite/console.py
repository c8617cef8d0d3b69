"""What the scripts have in common at the command line: one clear line for a user's mistake, exit
codes, quiet libraries."""

import os
import sys
import warnings
from collections.abc import Callable

from elite.wording import one_line

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

    for library in (logging, diffusers_logging):
        library.set_verbosity_error()
    logging.disable_progress_bar()


def complain(message: object) -> None:
    """One line on stderr, whatever file names or prompts the message quotes."""
    print(f"error: {one_line(message)}", file=sys.stderr)


def run(main: Callable[[], int]) -> None:
    """Runs a script and exits: with its status, 2 and one line on stderr for a ValueError or a file
    that cannot be reached, 130 for Ctrl-C."""
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
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept", file=sys.stderr)
        sys.exit(INTERRUPTED)
