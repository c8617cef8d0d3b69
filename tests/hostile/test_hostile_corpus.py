"""Every bad input of the corpus ends in one clear line or a correct result, within 2 GB."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

KINDS = (
    *("image", "mask", "csv", "index", "texts", "yaml", "checkpoint", "concept", "latents"),
    *("embedding", "model", "prompt", "flags"),
)
MEMORY_GUARD = 12 * 2**30  # of addresses; what is really used is measured


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> list[dict]:
    """Judged in a process of their own, which a bomb may end."""
    path = tmp_path_factory.mktemp("hostile") / "verdicts.json"
    guarded = f"import resource as r; r.setrlimit(r.RLIMIT_AS, ({MEMORY_GUARD},) * 2)"
    code = f"{guarded}; import runpy; runpy.run_module('tests.hostile', run_name='__main__')"
    command = [sys.executable, "-c", code, "--json", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1800)
    print(done.stdout)
    assert path.exists(), done.stderr[-2000:]
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_ends_badly(verdicts, kind):
    mine = [verdict for verdict in verdicts if verdict["kind"] == kind]
    assert mine, f"no input of the kind {kind}"
    faults = [f"{verdict['name']}: {verdict['fault']}" for verdict in mine if verdict["fault"]]
    assert not faults, "\n".join(faults)


def test_there_are_many(verdicts):
    assert len(verdicts) >= 600
    assert {verdict["kind"] for verdict in verdicts} == set(KINDS)
