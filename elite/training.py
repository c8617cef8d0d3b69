"""The one training loop: accumulate, clip, step, log, preview, save, resume, stop. It knows nothing
of what it trains.

Everything random about a sample comes from the sample's own seed (see `stream.TrainingStream` and
`noise.seeded_noise`), so the loop has no random state to keep: resuming, previews, other batch
sizes and more processes all see the same samples and the same noise.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from elite.console import Stopped, StopSignals
from elite.hardware import computes_in_bf16, note_emulation
from elite.run_folder import RunFolder
from elite.run_state import RunState
from elite.stream import Samples, TrainingStream, read_batches, stream_loader

SHORT_SEQUENCE = 128  # positions; measured are 65, where the plain formula is faster, and 256


class Objective(Protocol):
    """What `fit` trains: a module whose forward gives {"loss": scalar, other scalars to log}."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def to(self, device: torch.device) -> Any: ...

    def train(self) -> Any: ...

    def save_pretrained(self, folder: Path) -> None:
        """Exports what was trained into `folder`, for users."""


def make_accelerator(
    mixed_precision: str | None = None, accumulation: int = 1, cpu: bool = False
) -> Accelerator:
    """An Accelerator for `fit`; None takes the precision that `accelerate launch` was given, "auto"
    is bf16 where the device computes in it.

    Raises:
        ValueError: fp16 on a CPU, or `accelerate launch` was told to shard what is trained.
    """
    for sharded in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{sharded}", "").lower() == "true":
            raise ValueError(
                f"distributed_type {sharded} of accelerate's --config_file: every process holds "
                "all that is trained; use MULTI_GPU, as configs/4_gpu.json, and --shard_optimizer"
            )
    if mixed_precision == "auto":
        mixed_precision = "bf16" if computes_in_bf16(PartialState(cpu=cpu).device) else "no"
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulation,
        cpu=cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16: trains on GPUs only; use bf16 or no on this CPU")
    note_emulation(accelerator.device, accelerator.mixed_precision)
    return accelerator


def fit(
    objective: Objective,
    dataset: Samples,
    accelerator: Accelerator,
    *,
    output_dir: Path,  # checkpoints, metrics, previews, and at the end the trained parts
    max_steps: int,  # optimiser steps
    batch_size: int,  # samples per micro-batch and process
    seed: int = 0,  # of the order of samples and of all that is random in them
    num_workers: int = 0,  # loader processes, 0 loads in this one
    learning_rate: float,  # as the optimiser gets it
    own_rates: Mapping[str, float] | None = None,  # of parameters by how their names end
    lr_scheduler: str = "constant",  # a name of diffusers.optimization
    lr_warmup_steps: int = 0,
    adam_betas: tuple[float, float] = (0.9, 0.999),
    adam_epsilon: float = 1e-8,
    weight_decay: float = 1e-2,
    max_grad_norm: float = 1.0,
    save_steps: int = 500,  # 0 saves at the end only
    checkpoints_total_limit: int | None = None,  # None keeps all
    resume: str | None = None,  # "latest", a checkpoint folder, or None to start anew
    shard_optimizer: bool = False,  # each process keeps the moments of its share of the weights
    attention_positions: int | None = None,  # of the longest sequence, where that is known
    ema_decay: float | None = None,  # None trains without EMA
    preview: Callable[[], Image.Image] | None = None,
    validation_steps: int = 0,  # optimiser steps between previews, 0 for none
    logging_dir: str = "logs",
    config: Mapping[str, Any] | None = None,  # embedded in every checkpoint
    held: Mapping[str, Any] | None = None,  # what else a resumed run must share with its checkpoint
) -> None:
    """Trains the parameters of `objective` that require gradients.

    Args:
        objective: see `Objective`.
        dataset: shown in an endless shuffled stream that every process reads its share of.
        accelerator: precision, devices, accumulation and processes.

    Raises:
        ValueError: nothing to resume, a checkpoint of another model, a folder that holds a run of
            other settings or is in use, a loss that stays not finite, too many unreadable samples
            (the message lists them), or a disk that takes no more.
        Stopped: SIGTERM or SIGINT came; the step it came in is finished and saved.
    """
    objective.to(accelerator.device)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    optimizer = _adamw(
        _by_rate(trained, learning_rate, own_rates or {}),
        sharded=shard_optimizer and accelerator.num_processes > 1,
        lr=learning_rate,  # diffusers' polynomial schedule asks for it
        betas=adam_betas,
        eps=adam_epsilon,
        weight_decay=weight_decay,
    )
    schedule = get_scheduler(
        lr_scheduler, optimizer, num_warmup_steps=lr_warmup_steps, num_training_steps=max_steps
    )
    ema = None
    if ema_decay is not None:
        ema = EMAModel(trained.values(), decay=ema_decay, use_ema_warmup=True, power=0.75)
    accumulation = accelerator.gradient_accumulation_steps
    samples_per_step = batch_size * accumulation * accelerator.num_processes
    run = RunFolder(
        output_dir, logging_dir, accelerator, dataset, samples_per_step, config or {}, held or {}
    )
    state = RunState(trained, optimizer, schedule, ema, accelerator.scaler, run.tally)
    with StopSignals() as stop, run, _attention_kernel(accelerator, attention_positions):
        step = run.start(state, resume, max_steps)
        if ema is not None:
            ema.to(accelerator.device)  # what a checkpoint gave is on the CPU
        # The optimizer's state is where the weights are, and a sharded one cannot be moved.
        model, optimizer = accelerator.prepare(objective, optimizer, device_placement=[True, False])
        model.train()
        loader = stream_loader(
            TrainingStream(dataset, seed),
            batch_size=batch_size,
            start=step * samples_per_step,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_workers=num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        batches = read_batches(loader)
        run.at_end(batches.close)  # and with it the loader's processes
        while step < max_steps:
            # Accumulate.
            started, logs, shown, failures = time.monotonic(), [], [], []
            waited = 0.0  # for data, in seconds
            for _ in range(accumulation):
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                failures += batch.pop("failures")
                shown.append(batch.pop("sample_index"))
                with accelerator.accumulate(model):
                    out = model(batch)
                    accelerator.backward(out["loss"])  # divides by the accumulation
                logs.append({key: value.detach().float() for key, value in out.items()})
            norm = float(accelerator.clip_grad_norm_(trained.values(), max_grad_norm))
            step += 1

            # Agree among the processes on what happened.
            happened = {"unreadable": len(failures), "stop": stop.asked is not None}
            metrics, anywhere = _reduce(logs, happened, accelerator)
            if anywhere["unreadable"]:
                run.note_unreadable(failures, step)
            finite = math.isfinite(metrics["loss"]) and math.isfinite(norm)
            run.note_finite(finite, step, metrics["loss"], logs, shown)

            # Step.
            if finite or accelerator.scaler is not None:  # a scaler skips by itself, and adapts
                optimizer.step()
            optimizer.zero_grad()
            rate = state.rate  # of this step
            schedule.step()
            if ema is not None and finite:
                ema.step(trained.values())

            # Log.
            seconds = time.monotonic() - started
            metrics |= {
                "grad_norm": norm,
                "lr": rate,
                "samples_per_second": samples_per_step / seconds,
                "waiting_for_data": waited / seconds,
            }
            run.log(step, metrics)

            # Preview, save and stop.
            ends = step == max_steps or anywhere["stop"]
            if preview is not None and validation_steps and step % validation_steps == 0:
                with _exported(ema, trained):
                    run.preview(step, preview)
                objective.train()  # which drawing may have switched off
            if ends or (finite and save_steps and step % save_steps == 0):
                run.save(step, state, checkpoints_total_limit)
            if ends:
                break
        run.sum_up(step)
        accelerator.wait_for_everyone()
        if step < max_steps:
            raise Stopped
        if accelerator.is_main_process:
            if ema is not None:
                ema.copy_to(trained.values())
            objective.save_pretrained(output_dir)
        accelerator.wait_for_everyone()


@contextmanager
def _exported(ema: EMAModel | None, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within it the weights are those that would be exported now."""
    if ema is None:
        yield
        return
    ema.store(trained.values())
    ema.copy_to(trained.values())
    try:
        yield
    finally:
        ema.restore(trained.values())


def _by_rate(
    trained: Mapping[str, nn.Parameter], learning_rate: float, own_rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The optimizer's groups: all parameters but those of `own_rates`, then these."""
    rates = {"": learning_rate, **own_rates}
    groups: dict[str, list[nn.Parameter]] = {ending: [] for ending in rates}
    for name, parameter in trained.items():
        ending = next((ending for ending in own_rates if name.endswith(ending)), "")
        groups[ending].append(parameter)
    return [{"params": groups[ending], "lr": rate} for ending, rate in rates.items()]


def _adamw(groups: list[dict[str, Any]], sharded: bool, **options: Any) -> Optimizer:
    """AdamW; sharded as in ZeRO's first stage (Rajbhandari et al. 2020): each process updates its
    share of the parameters, whose moments it alone holds, and sends them to the others."""
    if not sharded:
        return torch.optim.AdamW(groups, fused=True, **options)
    # Not fused: resuming leaves the step counts on the CPU, where the fused kernel wants none.
    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)


def _attention_kernel(
    accelerator: Accelerator, positions: int | None
) -> AbstractContextManager[None]:
    """In bf16 on a CPU the plain formula is faster than the fused kernel where a sequence is short,
    and up to four times as slow where it is long."""
    is_short = positions is not None and positions <= SHORT_SEQUENCE
    if is_short and accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _reduce(
    logs: list[dict[str, Tensor]], happened: Mapping[str, int], accelerator: Accelerator
) -> tuple[dict[str, float], dict[str, bool]]:
    """Means over the micro-batches and the processes, and what happened in any of them."""
    means = [torch.stack([log[key] for log in logs]).mean() for key in logs[0]]
    flags = torch.tensor([float(bool(value)) for value in happened.values()])
    both = torch.cat([torch.stack(means), flags.to(means[0])])
    reduced = accelerator.reduce(both, reduction="mean").tolist()
    anywhere = [value > 0 for value in reduced[len(means) :]]
    return (dict(zip(logs[0], reduced, strict=False)), dict(zip(happened, anywhere, strict=True)))
