"""python -m tests.hostile.guided READER SECONDS: coverage-guided fuzzing of a reader with atheris.

Exit status 0: no fault within the time. Atheris changes whole files so that new lines of elite/ and
the libraries it instruments are reached.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["elite"], enable_loader_override=False):
    from tests.hostile.readers import feed
from tests.hostile.seeds import SEEDS


def main() -> None:
    reader, seconds = sys.argv[1], sys.argv[2]
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(SEEDS[reader]):
            (Path(folder) / str(number)).write_bytes(seed)
        flags = [f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=2048", "-verbosity=0"]
        artifacts = f"-artifact_prefix={folder}/"
        options = [sys.argv[0], *flags, artifacts, "-print_final_stats=1", folder]
        atheris.Setup(options, lambda content: feed(reader, content))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
