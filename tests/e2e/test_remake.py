"""`remake.sh`: which commands it runs, that a share of it runs from end to end, and where."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from small_world import pretrain
from small_world.flags import scaled
from small_world.judge import parse_args as parse_judge

REPOSITORY = Path(__file__).resolve().parents[2]
# Writes down its arguments, and a script that it is given; runs nothing but arithmetic.
FAKE_PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then exec {python} "$@"; fi
if [ "$1" = - ]; then cat > {log}.py; set -- {log}.py "${{@:2}}"; fi
printf '%q ' "$@" >> {log}
echo >> {log}
"""


@pytest.fixture
def remake(tmp_path):
    """Runs remake.sh with an interpreter that only notes its arguments; gives exit status, what it
    complains of, and the commands."""
    log, fake = tmp_path / "log", tmp_path / "python"
    fake.write_text(FAKE_PYTHON.format(python=shlex.quote(sys.executable), log=log))
    fake.chmod(0o755)

    def run(*arguments: str, scale: str | None = None) -> tuple[int, str, list[list[str]]]:
        variables = {**os.environ, "PYTHON": str(fake)}
        variables.pop("SCALE", None)
        command = ["bash", str(REPOSITORY / "small_world" / "remake.sh"), *arguments]
        done = subprocess.run(
            command,
            env=variables | ({} if scale is None else {"SCALE": scale}),
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        lines = log.read_text().splitlines() if log.exists() else []
        return done.returncode, done.stderr, [shlex.split(line) for line in lines]

    return run


def flag(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


def plain(command: list[str]) -> list[str]:
    """What a launch runs; another command as it is."""
    return command[4:] if command[1] == "accelerate.commands.launch" else command


def test_every_command_of_a_scaled_remake_is_small_and_writes_into_its_folder(remake, tmp_path):
    status, complaint, commands = remake("made", scale="0.002")
    assert (status, complaint) == (0, "")
    parts = {plain(c)[2]: c for c in commands if plain(c)[1] == "small_world.pretrain"}
    assert [*parts] == ["samples", "vae", "vae_decoder", "image_encoder", "base", "assemble"]
    long = [command for name, command in parts.items() if name != "assemble"]
    launched = {name for name, command in parts.items() if "configs/cpu_2.json" in command}
    assert launched == {"vae", "vae_decoder", "image_encoder", "base"}
    judge, score = (c for c in commands if c[:2] == ["-m", "small_world.judge"])
    assert {flag(command, "scale") for command in [*long, judge]} == {"0.002"}
    assert flag(score, "samples") == "1"
    objects, pictures = (c for c in commands if c[0] == "data_scripts/make_small_world.py")
    assert flag(objects, "test_datasets") == str(tmp_path / "made/test_datasets")
    assert flag(pictures, "count") == "80"
    stages = [c for c in commands if "--max_train_steps" in c]
    assert [flag(stage, "max_train_steps") for stage in stages] == ["12", "5"]
    written = ("work_dir", "target", "output_dir", "report", "model", "judge", "train_data_dir")
    for command in commands:
        for name in written:
            if f"--{name}" in command:
                assert flag(command, name).startswith(str(tmp_path / "made") + "/"), command


def test_a_whole_remake_is_what_the_recipes_say(remake):
    status, _, commands = remake()
    assert status == 0
    text = "\n".join(shlex.join(command) for command in commands)
    assert f"--test_datasets {REPOSITORY}/test_datasets" in text
    assert "--scale 0" not in text and "--max_train_steps 6000" in text
    assert f"assemble --work_dir {REPOSITORY}/runs/small_world" in text
    assert f"--target {REPOSITORY}/checkpoints/small_world" in text


def test_a_share_never_lands_where_the_whole_is(remake):
    status, complaint, commands = remake(scale="0.5")
    assert status == 2 and commands == []
    assert complaint.startswith("error: SCALE=0.5: expected a FOLDER")


def execute(command: list[str]) -> None:
    """A command in this process, so that torch is imported once; one process of a launch will do,
    but where processes wait for each other."""
    if plain(command)[2] == "base":
        subprocess.run([sys.executable, *command], check=True)
        return
    command = plain(command)
    sys.argv = [part for part in command if part != "-m"]
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__")
        else:
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, command


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_share_runs_from_end_to_end(remake, tmp_path, monkeypatch):
    def threads(workers: int, **_) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr("elite.workers.ProcessPoolExecutor", threads)
    monkeypatch.setattr(sys, "argv", [])  # put back afterwards
    monkeypatch.chdir(REPOSITORY)
    for command in remake("made", scale="0.0001")[2]:
        execute(command)
    made = tmp_path / "made"
    weights = {path.parent.name for path in made.glob("checkpoints/*/*/*.safetensors")}
    parts = {"vae", "text_encoder", "unet", "image_encoder"}
    assert weights == {*parts, "global_mapper", "local_mapper"}
    assert len([*made.glob("test_datasets/*_bg.png")]) == 16
    rows = json.loads((made / "runs/small_world/score.json").read_text())["rows"]
    assert rows["ELITE, lambda 0.8"]["scene"]["total"] == 1


def test_a_share_is_at_least_one():
    assert [scaled(number, 0.002) for number in (80_000, 2500, 100)] == [160, 5, 1]
    assert scaled(12_000, 1.0) == 12_000


@pytest.mark.parametrize("share", ["0", "1.5", "-1", "much"])
def test_other_shares_are_refused(share, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "vae", "--scale", share])
    monkeypatch.setattr(pretrain, "train_vae", lambda *_: pytest.fail("trains"))
    monkeypatch.chdir(tmp_path)
    for parse in (pretrain.main, lambda: parse_judge(["train", "--scale", share])):
        with pytest.raises(ValueError, match=f"argument --scale: {share}: expected more than 0"):
            parse()
