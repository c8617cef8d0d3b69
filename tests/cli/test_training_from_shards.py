"""Training from shards at a URL as from the folder, and the commands of its page."""

import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from accelerate.utils.other import get_free_port

from elite.run_state import checkpoints
from tests import tiny
from tests.cli.test_docs import commands
from tests.conftest import REPOSITORY, run_script
from tests.faults.runs import metrics
from tests.open_images import make_open_images
from tests.shards import INDEX, PACK, make_shards, served


@pytest.fixture(scope="module")
def open_images(tmp_path_factory):
    return make_open_images(tmp_path_factory.mktemp("data"), n=8)


@pytest.fixture
def shards(open_images, tmp_path):
    return make_shards(open_images, tmp_path / "shards")


def train(stage, data, output_dir, model_folder, mapper_folder, *options):
    local = ("--local_mapper_path", mapper_folder / "local_mapper") if stage == "local" else ()
    return run_script(
        f"train_{stage}.py",
        *("--pretrained_model_name_or_path", model_folder, "--train_data_dir", data),
        *("--global_mapper_path", mapper_folder / "global_mapper", "--output_dir", output_dir),
        *("--max_train_steps", "3", "--train_batch_size", "2", "--save_steps", "1"),
        *("--gradient_accumulation_steps", "1", "--validation_steps", "0", *local, *options),
    )


def outcome(output_dir):
    weights = checkpoints(output_dir)[-1] / "weights.safetensors"
    return metrics(output_dir), weights.read_bytes()


@pytest.mark.parametrize("stage", ["global", "local"])
def test_training_from_a_url_is_training_from_the_folder(
    stage, open_images, shards, model_folder, mapper_folder, tmp_path
):
    own = (model_folder, mapper_folder)
    assert train(stage, open_images, tmp_path / "plain", *own) == 0
    with served(shards) as server:
        options = ("--shard_cache", tmp_path / "cache", "--shard_window", "1000")
        assert train(stage, server.url, tmp_path / "sharded", *own, *options) == 0
    assert outcome(tmp_path / "sharded") == outcome(tmp_path / "plain")


def test_latents_are_cached_from_a_url_and_at_one_train_as_the_local_ones(
    shards, model_folder, mapper_folder, tmp_path, capsys
):
    with served(shards) as server:
        fetched = ("--shard_cache", tmp_path / "cache")
        assert run_script(
            "data_scripts/cache_latents.py", server.url, tmp_path / "latents", *fetched,
            *("--pretrained_model_name_or_path", model_folder, "--device", "cpu"),
        ) == 0  # fmt: skip
    shutil.copytree(tmp_path / "latents", shards / "latents")
    own = (model_folder, mapper_folder)
    with served(shards) as server:
        for name, latents in (("local", tmp_path / "latents"), ("remote", f"{server.url}/latents")):
            options = (*fetched, "--cache_latents", latents)
            assert train("global", server.url, tmp_path / name, *own, *options) == 0
        assert any(name.endswith(".safetensors") for name in server.asked)
        assert outcome(tmp_path / "remote") == outcome(tmp_path / "local")
        shutil.rmtree(checkpoints(tmp_path / "remote")[-1])
        options += ("--resume_from_checkpoint", "latest", "--dataloader_num_workers", "1")
        assert train("global", server.url, tmp_path / "remote", *own, *options) == 0
    assert outcome(tmp_path / "remote")[1] == outcome(tmp_path / "local")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "lies elsewhere; give --shard_cache a folder"),
        (("--shard_cache", "cache"), "cannot be fetched (no such file); expected the URL of a"),
        (("--shard_cache", "cache", "--cache_latents", "nowhere"), "cannot be fetched (no such"),
        (("--shard_window", "0"), "shard_window: got 0, expected at least 1"),
        (("--shard_cache_gb", "0"), "shard_cache_gb: got 0.0, expected more than 0"),
    ],
)
def test_training_mistakes_give_one_line_and_2(
    options, message, model_folder, mapper_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with served(tmp_path / "empty") as server:
        own = (model_folder, mapper_folder)
        assert train("global", server.url, tmp_path / "run", *own, *options) == 2
    captured = capsys.readouterr().err
    assert message in captured.splitlines()[-1] and "Traceback" not in captured


def test_pairs_train(model_folder, mapper_folder, tmp_path):
    pairs = tiny.save_pairs(tmp_path / "pairs", count=4)
    shards = make_shards(pairs, tmp_path / "shards")
    assert train("global", shards, tmp_path / "run", model_folder, mapper_folder) == 0


# --- the page -------------------------------------------------------------------------------------


def test_the_commands_of_the_page_run(tmp_path, capsys):
    """As they stand, on four pictures and one process; the server is Python's own."""
    page = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
    found = commands(page.split("## From shards\n")[1].split("\n## ")[0])
    make_open_images(tmp_path / "small_world/open_images", n=4)
    port = str(get_free_port())
    servers, ran = [], []
    try:
        for words in found:
            if words[0] == "accelerate":  # launch --config_file FILE
                words = ["python", *words[4:], "--train_batch_size", "2"]
            words = [re.sub("^runs/", f"{tmp_path}/", word).replace("8000", port) for word in words]
            if "http.server" in words:
                command = [sys.executable, *words[1:]]
                servers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
                wait_for_port(int(port))
            else:
                more = ("--workers", "1") if words[1] in (PACK, INDEX) else ()
                assert run_script(*words[1:], *more) == 0, capsys.readouterr().err
                ran.append(words[1])
    finally:
        for server in servers:
            server.kill()
            server.wait()
    both = ["train_global.py", "train_local.py"]
    latents = ["data_scripts/cache_latents.py", "train_global.py"]
    assert ran == [PACK, *both, INDEX, "train_global.py", *latents]
    assert list((tmp_path / "shard_cache").glob("*.tar"))
    assert list((tmp_path / "shard_cache").glob("*.safetensors"))


def wait_for_port(port):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("no server came")
