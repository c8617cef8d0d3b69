"""Runs on an NVIDIA GPU, as a user would, what had only CPUs to run on.

    python -m benchmarks.gpu_check --size full     sizes of Stable Diffusion v1-4, random weights
    python -m benchmarks.gpu_check                 tiny models, on a CPU too: does it run?

In this order: the tests that need a GPU; twenty steps of stage 1 in bf16, the same killed half-way
and resumed, twenty steps of stage 2; folder inference in fp16. Random weights tell nothing of
quality: losses and pictures have to be finite, and the resumed run has to end where the whole one
does. Everything goes to a temporary folder, of some 8 GB at full size. Exit code 3: something was
not as it should be; 2: no such GPU here.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import REPOSITORY, SIZES
from benchmarks.models import MAPPERS, build_image_encoder, build_stable_diffusion
from elite.console import OK, PARTLY_FAILED, run, script_parser
from elite.hardware import pick_device
from elite.images import read_image
from elite.loading import side_in_pixels

METRICS = "metrics.jsonl"  # of a run
STEPS, KILLED_AT, SAVED_EVERY = 20, 12, 5
SAME_LOSS = 0.02  # relative: GPU kernels add in no fixed order
PATIENCE = 600  # seconds for any one command


class Check:
    """What is run, on this model folder and these pictures, in this folder."""

    def __init__(self, size: str, folder: Path, device: torch.device) -> None:
        self.size, self.folder, self.device = size, folder, device
        self.model, self.data = folder / "model", folder / "open_images"

    def prepare(self) -> str:
        """The model's folder with random weights, and pictures to train on."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        parts = build_stable_diffusion(self.size, self.device, dtype)
        parts["image_encoder"] = build_image_encoder(self.size, self.device, dtype)
        for name, part in parts.items():
            part.save_pretrained(self.model / name)
        self.side = side_in_pixels(parts["unet"], parts["vae"])
        renders = ("--count", "64", "--size", str(2 * self.side))
        self.script("data_scripts/make_small_world.py", str(self.data), *renders)
        return f"{self.side} px"

    def tests(self) -> str:
        """Those of the suite that are skipped without a GPU."""
        self.script(
            "-m", "pytest", "-q", "-n", "0", "tests/unit/test_interoperation.py", "-k", "gpu"
        )
        return "passed"

    def stage_1(self) -> str:
        return self.trained("global")

    def killed_and_resumed(self) -> str:
        """Stage 1 again, killed by force after some steps and resumed."""
        process = subprocess.Popen(
            self.training("global", "resumed"),
            cwd=REPOSITORY,
            start_new_session=True,
            stderr=subprocess.DEVNULL,  # its progress bar
            stdout=subprocess.DEVNULL,
        )
        metrics = self.folder / "resumed" / METRICS
        started = time.monotonic()
        try:
            while process.poll() is None and _steps(metrics) < KILLED_AT:
                if time.monotonic() - started > PATIENCE:
                    raise RuntimeError(f"no {KILLED_AT} steps in {PATIENCE} s")
                time.sleep(0.05)
            if process.poll() is not None:
                raise RuntimeError("the run ended before it could be killed")
        finally:  # of an interrupted check, too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.finish(self.training("global", "resumed", "--resume_from_checkpoint", "latest"))
        whole, resumed = (_losses(self.folder / name / METRICS) for name in ("global", "resumed"))
        apart = abs(resumed[-1] - whole[-1]) / abs(whole[-1])
        if len(resumed) != len(whole) or apart > SAME_LOSS:
            raise RuntimeError(f"losses {resumed} after a kill, {whole} without one")
        return f"killed after step {KILLED_AT}; last loss {apart:.1e} apart"

    def stage_2(self) -> str:
        mapper = self.folder / "global" / "global_mapper"
        return self.trained("local", "--global_mapper_path", str(mapper))

    def pictures(self) -> str:
        """The folder of test objects, in half precision on a GPU."""
        out = self.folder / "drawn"
        mappers = [
            word
            for kind, stage in (("global", "global"), ("local", "local"))
            for word in (f"--{kind}_mapper_path", str(self.folder / stage / f"{kind}_mapper"))
        ]
        half = ("--mixed_precision", "fp16") if self.device.type == "cuda" else ()
        options = ("--output_dir", str(out), "--num_inference_steps", "4", *half)
        self.script(
            "inference_local.py", "--pretrained_model_name_or_path", str(self.model), *mappers,
            *options,
        )  # fmt: skip
        found = [read_image(path) for path in sorted(out.glob("*/0*.png"))]
        if not found or any(np.ptp(picture) == 0 for picture in found):
            raise RuntimeError(f"{len(found)} pictures, some of one colour")
        return f"{len(found)} pictures"

    # --- running ----------------------------------------------------------------------------------

    def training(self, stage: str, name: str, *more: str) -> list[str]:
        """The command of a training script."""
        sizes = MAPPERS[self.size]
        options = {
            "pretrained_model_name_or_path": self.model,
            "train_data_dir": self.data,
            "output_dir": self.folder / name,
            "mapper_hidden_size": sizes["hidden_dim"],
            "resolution": self.side,
            "train_batch_size": 4 if self.size == "full" else 1,
            "gradient_accumulation_steps": 1,
            "max_train_steps": STEPS,
            "save_steps": SAVED_EVERY,
            "mixed_precision": "auto",
        }
        words = [word for flag, value in options.items() for word in (f"--{flag}", str(value))]
        layers = ["--hidden_layers", *(str(layer) for layer in sizes["hidden_layers"])]
        return [sys.executable, f"train_{stage}.py", *words, *layers, *more]

    def trained(self, stage: str, *more: str) -> str:
        """Trains a stage; what its losses were."""
        self.finish(self.training(stage, stage, *more))
        losses = _losses(self.folder / stage / METRICS)
        if len(losses) != STEPS or not all(map(math.isfinite, losses)):
            raise RuntimeError(f"losses {losses}")
        return f"{STEPS} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}"

    def script(self, *words: str) -> None:
        self.finish([sys.executable, *words])

    def finish(self, command: list[str]) -> None:
        """Runs it to its end.

        Raises:
            RuntimeError: it failed, or took too long.
        """
        try:
            subprocess.run(
                command,
                cwd=REPOSITORY,
                check=True,
                timeout=PATIENCE,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{command[1]} took more than {PATIENCE} s") from None
        except subprocess.CalledProcessError as error:
            last = (error.stderr or error.stdout).strip().splitlines()[-3:]
            raise RuntimeError(f"{command[1]} ended with {error.returncode}: {last}") from None


def _losses(metrics: Path) -> list[float]:
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _steps(metrics: Path) -> int:
    return len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    args = parser.parse_args(argv)
    device = pick_device(None)
    if args.size == "full" and device.type != "cuda":
        raise ValueError("no CUDA device here; run this on a machine with an NVIDIA GPU")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        check = Check(args.size, Path(folder), device)
        parts = [check.prepare, check.tests, check.stage_1]
        parts += [check.killed_and_resumed, check.stage_2, check.pictures]
        for part in parts:
            started = time.monotonic()
            try:
                told = part()
            except (RuntimeError, OSError, ValueError) as error:
                told, failed = f"FAILED: {error}", True
            name = part.__name__.replace("_", " ")
            print(f"{name}: {told} ({time.monotonic() - started:.0f} s)", flush=True)
            if failed and part == check.prepare:
                break
    return PARTLY_FAILED if failed else OK


if __name__ == "__main__":
    run(main, keeps=False)
