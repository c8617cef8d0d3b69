"""Training runs that are killed at random points and resumed, compared with uninterrupted ones.

Every run is a process of its own, forked from a server that has imported torch once, and runs the
script that a user would; "killed" is SIGKILL.
"""

import hashlib
import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._dynamo  # torch imports it with the first optimiser, which takes seconds
from accelerate.utils.other import get_free_port
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

import elite.stages  # noqa: F401  # for the server: what the scripts import
from elite.files import LEFTOVER
from elite.run_state import checkpoints
from elite.shards import INDEX, parse_index
from small_world import pretrain
from small_world.bodies import DIRECTIONS
from small_world.models import WIDTH
from small_world.samples import SIDE
from small_world.world import ATTRIBUTES
from tests import run_scripts, tiny
from tests.open_images import make_open_images
from tests.shards import make_shards
from tests.waiting import HANGS, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "stage 1": "train_global.py",
    "stage 2": "train_local.py",
    "stage 1 on shards": "train_global.py",
    "stage 2 on shards": "train_local.py",
    "textual inversion": "train_textual_inversion.py",
}
PARTS = ("vae", "image_encoder", "base")  # of the small world's pretraining, in this order
CLOCKED = {"samples_per_second", "waiting_for_data"}  # metrics that the clock makes
KINDS = (*SCRIPTS, *(f"pretraining, {part}" for part in PARTS))

Call = tuple[Callable[..., object], tuple]  # a function of this module and its arguments


# --- processes ------------------------------------------------------------------------------------


def _server() -> Any:
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.runs"])
    return context


def start(call: Call, log: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """A process that runs a call; what it prints is appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _server().Process(target=_live, args=(call, str(log), dict(environment or {})))
    process.start()
    return process


def _live(call: Call, log: str, environment: dict[str, str]) -> None:
    os.setsid()  # a group of its own, for signals that reach loader processes, too
    multiprocessing.set_start_method("fork", force=True)  # of these, as without the server
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    os.chdir(REPOSITORY)
    torch.set_num_threads(1)
    function, arguments = call
    sys.exit(function(*arguments))


def finish(process: BaseProcess, timeout: float = HANGS) -> int:
    """Waits for a process. Returns its exit status; a hang is an AssertionError."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"process {process.pid} hung for {timeout} s")
    return process.exitcode


def finish_well(process: BaseProcess, log: Path) -> None:
    status = finish(process)
    assert status == 0, f"status {status}\n{log.read_text()[-3000:]}"


# --- what is run ----------------------------------------------------------------------------------


@dataclass
class World:
    """The models and data that all runs share, tiny and random, and the settings of the runs."""

    folder: Path
    steps: int = 12
    extra: dict[str, Any] = field(default_factory=dict)  # flags of the scripts

    def __post_init__(self) -> None:
        tiny.save_model_folder(self.folder / "model")
        tiny.save_mappers(self.folder / "mappers", self.folder / "model")
        make_open_images(self.folder / "open_images", n=10)
        (self.folder / "photos").mkdir()
        for i in range(5):
            picture = Image.fromarray(tiny.picture(i, width=48, height=40)[0])
            picture.save(self.folder / "photos" / f"{i}.png")
        save_samples(self.folder / "samples", 512)
        make_shards(self.folder / "open_images", self.folder / "shards")

    def call(self, kind: str, output_dir: Path) -> Call:
        """What a user would start, or start again, to have this run in this folder."""
        if kind not in SCRIPTS:
            work_dir = self.prepared(kind.split(", ")[1], output_dir)
            return run_pretraining, (kind.split(", ")[1], str(work_dir), self.steps)
        flags = {
            "pretrained_model_name_or_path": self.folder / "model",
            "output_dir": output_dir,
            "train_data_dir": self.folder / "open_images",
            "max_train_steps": self.steps,
            "train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "dataloader_num_workers": 1,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 3,
            "ema_decay": 0.9,
            "save_steps": 2,
            "checkpoints_total_limit": 2,
        }
        if kind == "textual inversion":
            flags |= {"train_data_dir": self.folder / "photos", "placeholder_token": "<cat>"}
        else:
            flags |= {"global_mapper_path": self.folder / "mappers/global_mapper"}
            flags |= {"validation_steps": 0}
        if kind.endswith("on shards"):
            flags |= self.shard_flags()
        if kind.startswith("stage 2"):
            flags |= {"local_mapper_path": self.folder / "mappers/local_mapper"}
        if checkpoints(output_dir):
            flags |= {"resume_from_checkpoint": "latest"}
        words = [
            str(text) for key, v in {**flags, **self.extra}.items() for text in (f"--{key}", v)
        ]
        return run_scripts.run, ([SCRIPTS[kind], *words, "--ema"],)

    def shard_flags(self) -> dict[str, Any]:
        """Of runs on shards, with a cache that has room for four of the five."""
        index = parse_index((self.folder / "shards" / INDEX).read_text(), "")
        room = sum(table.bytes for table in index.tables.values())
        room += sum(sorted(shard.bytes for shard in index.shards)[-4:])
        flags = {"train_data_dir": self.folder / "shards", "shard_window": 2}
        return {**flags, "shard_cache": self.folder / "cache", "shard_cache_gb": room / 1e9}

    def prepared(self, part: str, output_dir: Path) -> Path:
        """The work folder of a part of the pretraining; its run's folder is `output_dir`."""
        work_dir = output_dir.parent
        assert output_dir.name == part
        work_dir.mkdir(parents=True, exist_ok=True)
        if not (work_dir / "samples").exists():
            (work_dir / "samples").symlink_to(self.folder / "samples")
        if part == "base" and not (work_dir / "vae").exists():
            tiny.build_models()["vae"].save_pretrained(work_dir / "vae" / "vae")
            torch.manual_seed(0)
            tiny_image_encoder().save_pretrained(work_dir / "image_encoder" / "image_encoder")
        return work_dir


def output_dir(kind: str, folder: Path) -> Path:
    """Where a run of a kind writes, inside a folder of its own."""
    return folder / kind.split(", ")[-1].replace(" ", "_")


def save_samples(folder: Path, count: int) -> None:
    """Pretraining samples of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    views = rng.integers(0, 256, (count, 2, SIDE, SIDE, 4), dtype=np.uint8)
    np.save(folder / "views.npy", views)
    template, noun = "a {} on the grass", "red heart critter"
    record = {"template": template, "noun": noun, "concept": "S", "caption": template.format(noun)}
    record |= {"framings": ["scene", "tight"], "labels": [[0] * len(ATTRIBUTES)] * 2}
    record["profile"] = [0.5] * len(DIRECTIONS)
    (folder / "records.json").write_text(json.dumps([record] * count))


def run_pretraining(part: str, work_dir: str, steps: int) -> int:
    """`python -m small_world.pretrain PART` with tiny models and a short recipe."""
    recipe = {**pretrain.RECIPES[part], "samples": 16 * steps, "batch_size": 16}
    changed = {
        "RECIPES": {part: recipe},
        "SAVE_STEPS": 2,
        "build_vae": lambda: tiny.build_models()["vae"],
        "build_image_encoder": tiny_image_encoder,
        "build_text_encoder": lambda tokenizer: tiny.build_models(text_width=WIDTH)["text_encoder"],
        "build_unet": lambda: tiny.build_models(text_width=WIDTH)["unet"],
    }
    argv = ["pretrain.py", part, "--work_dir", work_dir]
    with ExitStack() as patches:
        for name, value in changed.items():
            patches.enter_context(mock.patch.object(pretrain, name, value))
        patches.enter_context(mock.patch.object(sys, "argv", argv))
        return pretrain.main()


def tiny_image_encoder() -> CLIPVisionModel:
    """Of little depth; the heads of the objectives want its width."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1}
    return CLIPVisionModel(
        CLIPVisionConfig(image_size=SIDE, patch_size=8, num_attention_heads=2, **sizes)
    )


# --- what is compared -----------------------------------------------------------------------------


def metrics(folder: Path) -> list[dict]:
    """metrics.jsonl but for what the clock says."""
    text = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines]


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_step(folder: Path, step: int) -> None:
    wait_until(lambda: steps_done(folder) >= step, f"step {step}")


def digest(value: Any) -> str:
    """Of nested containers of tensors and numbers, bit for bit."""
    if isinstance(value, Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, Mapping):
        return str({key: digest(v) for key, v in value.items()})
    if isinstance(value, list | tuple):
        return str([digest(v) for v in value])
    return repr(value)


def outcome(folder: Path) -> dict[str, object]:
    """Final weights, optimiser state, metrics and exported files of a run."""
    newest = checkpoints(folder)[-1]
    state = torch.load(newest / "training_state.pt", weights_only=True)
    exported = {
        str(path.relative_to(folder)): digest(path.read_bytes())
        for path in sorted(folder.rglob("*.safetensors"))
    }
    assert len(exported) > len(checkpoints(folder)), "nothing was exported"
    return {"state": digest(state), "files": exported, "metrics": metrics(folder)}


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.glob(".*") if LEFTOVER.fullmatch(p.name)]


# --- killing --------------------------------------------------------------------------------------


@dataclass
class Kill:
    """Where a run was hit."""

    steps_logged: int
    while_writing: list[str]  # temporary names found: it was writing or removing these


Moment = Callable[[BaseProcess, Path], object]  # waits until a run in a folder is to be killed


def in_time(rng: random.Random, longest: float) -> Moment:
    """At a random moment of at most so many seconds, loading included."""
    return lambda process, folder: process.join(rng.uniform(0, longest))


def in_steps(rng: random.Random, steps: int, kills: int) -> Iterator[Moment]:
    """Within random steps of as many parts of a run, from the third on: each kill but the first
    finds a run that was resumed between its ends."""
    width = (steps - 3) / kills
    for number in range(kills):
        step = 3 + int(width * (number + rng.random()))
        yield partial(_wait_within_step, step=step, rng=rng)


def _wait_within_step(process: BaseProcess, folder: Path, step: int, rng: random.Random) -> None:
    while steps_done(folder) < step and process.is_alive():
        time.sleep(0.005)
    process.join(rng.uniform(0, 0.1))


def kill_and_resume(
    call: Callable[[], Call], folder: Path, moments: Iterator[Moment], kills: int
) -> list[Kill]:
    """Kills a run so many times, resuming it each time, and lets it end after the last one."""
    done: list[Kill] = []
    log = folder.parent / f"{folder.name}.log"
    while len(done) < kills:
        wait = next(moments)
        process = start(call(), log)
        wait(process, folder)
        if process.exitcode is None:
            process.kill()
            process.join()
            done.append(Kill(steps_done(folder), leftovers(folder)))
        else:  # it came to its end; the next life only exports once more
            assert process.exitcode == 0, log.read_text()[-3000:]
    finish_well(start(call(), log), log)
    return done


def time_whole(call: Call, folder: Path, log: Path) -> tuple[float, float]:
    """Lets a run end. Returns the seconds before its first step and those after it."""
    finish(start((int, ()), log))  # so that the server has its imports behind it
    started, process = time.monotonic(), start(call, log)
    while steps_done(folder) == 0 and process.is_alive():
        time.sleep(0.01)
    first = time.monotonic()
    finish_well(process, log)
    return first - started, time.monotonic() - first


def spread(kills: int, loading: float, training: float) -> float:
    """The longest life L with which, on average, so many kills reach from a run's start to its end:
    a life of u seconds, uniform in [0, L], trains for max(0, u - loading)."""
    each = training / kills
    return loading + each + (each**2 + 2 * loading * each) ** 0.5


def compare_killed(
    world: World, kind: str, folder: Path, *, kills: int, seed: int, timed: bool
) -> dict:
    """Runs a kind whole, then killed; asserts equality. Returns figures.

    Args:
        timed: kills at random times, else within random steps, so that few kills suffice.
    """
    whole, killed = (output_dir(kind, folder / name) for name in ("whole", "killed"))
    loading, training = time_whole(world.call(kind, whole), whole, folder / "whole.log")
    rng, call = random.Random(seed), partial(world.call, kind, killed)
    moments = in_steps(rng, world.steps, kills)
    if timed:
        moments = repeat(in_time(rng, spread(kills, loading, training)))
    hits = kill_and_resume(call, killed, moments, kills)
    expected, found = outcome(whole), outcome(killed)
    for part in expected:
        assert found[part] == expected[part], f"{kind}, seed {seed}: {part} differ"
    assert not leftovers(killed)
    return {
        "kills": len(hits),
        "seed": seed,
        "steps": world.steps,
        "seconds_uninterrupted": round(loading + training, 1),
        "before_first_step": sum(hit.steps_logged == 0 for hit in hits),
        "while_writing": sum(bool(hit.while_writing) for hit in hits),
        "steps_logged_at_kills": [hit.steps_logged for hit in hits],
        "bit_identical": True,
    }


# --- two processes --------------------------------------------------------------------------------


def pair_environments() -> list[dict[str, str]]:
    """Of the two processes that `accelerate launch` would start."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port()), "WORLD_SIZE": "2"}
    shared |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def start_pair(call: Call, folder: Path) -> list[BaseProcess]:
    """The two processes that `accelerate launch` would start, without it to end one for the
    other."""
    environments = enumerate(pair_environments())
    return [start(call, folder / f"{rank}.log", each) for rank, each in environments]


def finish_pair(processes: list[BaseProcess], folder: Path) -> None:
    for rank, process in enumerate(processes):
        finish_well(process, folder / f"{rank}.log")


LOST = re.compile("^error: another process of this run has ended", re.MULTILINE)


def kill_one_of_two(call: Callable[[], Call], folder: Path, logs: Path, rng: random.Random) -> dict:
    """Kills one of two processes some steps on, waits for the other to end, resumes both."""
    before, pair, victim = steps_done(folder), start_pair(call(), logs), rng.randrange(2)
    wanted = before + rng.randint(1, 4)
    wait_for_step(folder, wanted)
    time.sleep(rng.uniform(0, 0.1))
    pair[victim].kill()
    killed = time.monotonic()
    other = pair[1 - victim]
    status, text = finish(other), (logs / f"{1 - victim}.log").read_text()
    assert status == 2 and LOST.search(text), f"status {status}\n{text[-3000:]}"
    assert "Traceback" not in text, text[-3000:]
    return {
        "killed_rank": victim,
        "after_step": steps_done(folder),
        "other_ended_after_seconds": round(time.monotonic() - killed, 1),
    }


def compare_pair(world: World, kind: str, folder: Path, kills: int, seed: int) -> dict:
    """The same with two processes, of which one is killed at a time."""
    whole, killed = (output_dir(kind, folder / name) for name in ("whole", "killed"))
    finish_pair(start_pair(world.call(kind, whole), folder / "whole_logs"), folder / "whole_logs")
    rng, call = random.Random(seed), partial(world.call, kind, killed)
    hits = [kill_one_of_two(call, killed, folder / f"logs_{i}", rng) for i in range(kills)]
    finish_pair(start_pair(call(), folder / "logs"), folder / "logs")
    expected, found = outcome(whole), outcome(killed)
    difference = max(
        abs(a[key] - b[key]) / max(abs(b[key]), 1e-12)
        for a, b in zip(found["metrics"], expected["metrics"], strict=True)
        for key in b
    )
    assert difference < 1e-6, f"{kind}, seed {seed}: metrics differ by {difference}"
    return {
        "kills": hits,
        "seed": seed,
        "largest_relative_difference_of_metrics": difference,
        "largest_difference_of_weights": weights_apart(whole, killed),
        "bit_identical": expected == found,
    }


def weights_apart(one: Path, other: Path) -> float:
    """Largest absolute difference of the final weights; above 1e-6 is an AssertionError."""
    a, b = (load_file(checkpoints(run)[-1] / "weights.safetensors") for run in (one, other))
    apart = max(float((a[key] - b[key]).abs().max()) for key in a)
    assert apart < 1e-6, f"weights differ by {apart}"
    return apart
