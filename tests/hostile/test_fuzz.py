"""Damaged files: hypothesis changes good ones; every reader answers with a ValueError that names
the file, or reads it. `make hostile` tries more of them (HOSTILE_EXAMPLES)."""

import os
import shlex

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elite.text import find_placeholder
from elite.wording import LONGEST, one_line
from tests.conftest import REPOSITORY
from tests.hostile.readers import READERS, feed
from tests.hostile.seeds import SEEDS

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "40"))
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="HOSTILE_EXAMPLES" not in os.environ,  # CI tries the same ones each time
    suppress_health_check=list(HealthCheck),
)
Edit = tuple[int, int, bytes]  # where, how many bytes go, what takes their place
edits = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 8), st.binary(max_size=8)), max_size=6
)


def edited(seed: bytes, changes: list[Edit]) -> bytes:
    content = seed
    for place, gone, new in changes:
        start = place % (len(content) + 1)
        content = content[:start] + new + content[start + gone :]
    return content


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_refused_or_read(reader):
    @bounded
    @given(st.sampled_from(SEEDS[reader]), edits)
    def attempt(seed: bytes, changes: list[Edit]) -> None:
        feed(reader, edited(seed, changes))

    attempt()


@pytest.mark.parametrize("reader", READERS)
def test_noise_is_refused_or_read(reader):
    @bounded
    @given(st.binary(max_size=200))
    def attempt(content: bytes) -> None:
        feed(reader, content)

    attempt()


@bounded
@given(st.text(), st.text(min_size=1))
def test_any_prompt_is_refused_or_has_its_placeholder(prompt, placeholder):
    try:
        start = find_placeholder(prompt, placeholder)
    except ValueError:
        return
    assert prompt[start:].startswith(placeholder)


@bounded
@given(st.text())
def test_messages_are_one_printable_line(text):
    line = one_line(text * 50)
    assert line.isprintable() and len(line) < 12 * LONGEST


def test_every_reader_is_fuzzed_under_guidance_too():
    listed = (REPOSITORY / "Makefile").read_text().partition("for reader in ")[2].partition(";")[0]
    assert shlex.split(listed) == list(READERS)
