"""Textual inversion of single pictures of the small world, the baseline of `reproduce`."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from elite.files import remove_whole, write_atomically, write_json
from elite.loading import load_stable_diffusion, side_in_pixels
from elite.run_state import checkpoints
from elite.training import fit, make_accelerator
from small_world.captions import CLASS_WORD
from small_world.models import digest_weight_files
from small_world.pretrain import base_pipeline
from small_world.score import Case, draw_prompts
from textual_inversion.files import load_embeddings, load_into
from textual_inversion.objective import TextualInversionObjective, initial_rows
from textual_inversion.pictures import PictureFolder

LEARNING_RATE, BATCH_SIZE = 5e-3, 4


def placeholder(case: Case) -> str:
    return f"<critter-{case.seed}>"


def way_of(model: Path) -> dict[str, object]:
    """What embeddings depend on besides their picture."""
    return {
        "weights": digest_weight_files(*(model / part for part in ("text_encoder", "unet", "vae"))),
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
    }


def invert(model: Path, case: Case, folder: Path, step_counts: Sequence[int]) -> dict[int, float]:
    """Learns one vector for the case's one picture, from its class word on, as its user would.

    Leaves the embedding after each number of steps in `folder/STEPS`; does nothing where they are,
    learned with the same weights in the same way.

    Returns:
        Seconds of training by number of steps.
    """
    way = {**way_of(model), "picture": hashlib.sha256(case.source[0].tobytes()).hexdigest()[:16]}
    times = folder / "seconds.json"
    found = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
    seconds = found.pop("seconds", {})
    if found != way or seconds.keys() != {str(steps) for steps in step_counts}:
        write_atomically(folder / "picture" / "0.png", Image.fromarray(case.source[0]).save)
        seconds, spent = {}, 0.0
        for unfinished in checkpoints(folder):  # its time is not known
            remove_whole(unfinished)
        for steps in step_counts:
            spent += _train(model, case, folder, steps, resume=bool(seconds))
            seconds[str(steps)] = spent
        write_json(times, {**way, "seconds": seconds})
    return {int(steps): value for steps, value in seconds.items()}


def _train(model: Path, case: Case, folder: Path, steps: int, resume: bool) -> float:
    """Trains up to `steps`, goes on where the last call ended. Returns its seconds."""
    parts = load_stable_diffusion(model)
    embedding = parts["text_encoder"].get_input_embeddings()
    start = initial_rows(embedding, parts["tokenizer"], 1, initializer=CLASS_WORD)
    pictures = PictureFolder(
        folder / "picture",
        resolution=side_in_pixels(parts["unet"], parts["vae"]),
        placeholder=placeholder(case),
    )
    objective = TextualInversionObjective(parts, placeholder(case), {"text_encoder": start})
    started = time.monotonic()
    fit(
        objective,
        pictures,
        make_accelerator(cpu=not torch.cuda.is_available()),
        output_dir=folder,
        max_steps=steps,
        batch_size=BATCH_SIZE,
        seed=case.seed,
        learning_rate=LEARNING_RATE,
        save_steps=0,
        checkpoints_total_limit=1,
        resume="latest" if resume else None,
    )
    objective.save_pretrained(folder / str(steps))
    return time.monotonic() - started


def invert_all(
    model: Path, cases: Sequence[Case], folder: Path, step_counts: Sequence[int]
) -> dict[int, float]:
    """Inverts each case. Returns the mean seconds by number of steps."""
    found = [
        invert(model, case, folder / str(case.seed), step_counts)
        for case in tqdm(cases, "textual inversion", unit="concept")
    ]
    return {steps: sum(times[steps] for times in found) / len(found) for steps in step_counts}


def draw_inverted(model: Path, folder: Path, steps: int, cases: list[Case], **options) -> Tensor:
    """The stock pipeline with the words of these cases after so many steps."""
    pipe = base_pipeline(**load_stable_diffusion(model))
    pipe.set_progress_bar_config(disable=True)
    words: dict[str, Tensor] = {}
    for case in cases:
        words |= load_embeddings(folder / str(case.seed) / str(steps))["text_encoder"]
    load_into(pipe, {"text_encoder": words})
    return draw_prompts(
        pipe, lambda case: case.concept_prompt.replace("S", placeholder(case), 1), cases, **options
    )
