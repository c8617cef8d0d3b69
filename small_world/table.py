"""The table of `reproduce`: draws every method's pictures once and scores them."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from elite.files import write_atomically, write_json, write_text
from elite.images import to_pixels
from small_world.claims import Verdicts, judge_claims
from small_world.classifier import Judge
from small_world.inversion import draw_inverted, invert_all
from small_world.report import claims_table, contact_sheet, plot_curve, score_table, summary
from small_world.score import (
    Case,
    batches,
    draw_concepts,
    draw_prompts,
    gallery,
    judge_pictures,
    load_pipelines,
    make_cases,
)

LAMBDAS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
NEW_KINDS = "new kinds, w0 + local, 0.8"
SHEET_CASES = 12
TIMED = 20  # concepts encoded for the mean time


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    cases: list[Case]
    draw: Callable[[list[Case]], Tensor]  # to pixels (B, 3, H, W) in [-1, 1]
    cost: str | None = None  # which of the table's seconds a new concept takes; None: nothing

    @property
    def file(self) -> str:
        """'w0 + local, 0.8' as 'w0_local_0.8.npz'."""
        return "_".join(self.name.replace("+", "").replace(",", "").split()) + ".npz"


class Table:
    """All methods on the same held-out critters.

    Args:
        model: the small world's folder, mappers included.
        folder: receives pictures, embeddings and reports.
        samples: pictures a method.
        inversions: the first so many cases are learned by textual inversion.
        inversion_steps: ascending numbers of steps.

    Raises:
        ValueError: the model has no mappers.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        samples: int,
        inversions: int,
        inversion_steps: Sequence[int],
        seed: int,
        batch_size: int,
        **drawing,  # num_inference_steps, guidance_scale
    ) -> None:
        self.model, self.folder, self.batch_size = model, folder, batch_size
        self.base, self.elite = load_pipelines(model)
        if self.elite is None:
            raise ValueError(f"{model}: has no global_mapper/; train ELITE first")
        self.drawing, self.inversion_steps = drawing, inversion_steps
        self.cases = make_cases(samples, "held out", seed)
        self.new_kinds = make_cases(samples, "new kinds", seed)
        self.inverted = self.cases[:inversions]
        self.settings = {
            "fingerprint": self.elite.fingerprint,
            "samples": samples,
            "seed": seed,
            **drawing,
        }
        self.methods = [*self._text_methods(), *self._elite_methods(), *self._inversion_methods()]

    def _text_methods(self) -> list[Method]:
        text = partial(draw_prompts, self.base, **self.drawing)
        return [
            Method("class word", self.cases, partial(text, lambda case: case.class_prompt)),
            Method("full description", self.cases, partial(text, lambda case: case.prompt)),
        ]

    def _elite_methods(self) -> list[Method]:
        concepts = partial(draw_concepts, self.elite, **self.drawing)
        return [
            Method("all words", self.cases, partial(concepts, 0.0, words="all"), "encode"),
            Method("w0", self.cases, partial(concepts, 0.0), "encode"),
            *(
                Method(f"w0 + local, {x}", self.cases, partial(concepts, x), "encode")
                for x in LAMBDAS
            ),
            Method(NEW_KINDS, self.new_kinds, partial(concepts, 0.8), "encode"),
        ]

    def _inversion_methods(self) -> list[Method]:
        folder = self.folder / "inversion"
        return [
            Method(
                f"textual inversion, {steps} steps",
                self.inverted,
                partial(draw_inverted, self.model, folder, steps, **self.drawing),
                str(steps),
            )
            for steps in (self.inversion_steps if self.inverted else ())
        ]

    # --- pictures ---------------------------------------------------------------------------------

    def draw(self) -> None:
        """Learns and draws what is not there yet."""
        self.seconds = {"encode": self._encoding_seconds()}
        if self.inverted:
            folder = self.folder / "inversion"
            found = invert_all(self.model, self.inverted, folder, self.inversion_steps)
            self.seconds |= {str(steps): seconds for steps, seconds in found.items()}
        missing = [method for method in self.methods if self._load(method) is None]
        with tqdm(total=sum(len(method.cases) for method in missing), unit="picture") as progress:
            for method in missing:
                progress.set_description(method.name)
                self._save(method, self._draw(method, progress))

    def _draw(self, method: Method, progress: tqdm) -> np.ndarray:
        """uint8 (N, H, W, 3)."""
        parts = []
        for cases in batches(method.cases, self.batch_size):
            pixels = method.draw(cases).clamp(-1, 1).permute(0, 2, 3, 1)
            parts.append(((pixels + 1) * 127.5).round().byte().cpu().numpy())
            progress.update(len(cases))
        return np.concatenate(parts)

    def _encoding_seconds(self) -> float:
        """Mean seconds from picture and mask to concept, the first one not counted."""
        sources = [case.source for case in self.cases[: TIMED + 1]]
        self.elite.encode_concept(*sources[0])
        started = time.monotonic()
        for image, mask in sources:
            self.elite.encode_concept(image, mask)
        return (time.monotonic() - started) / len(sources)

    def _save(self, method: Method, pictures: np.ndarray) -> None:
        path = self.folder / "drawn" / method.file
        key = np.array(json.dumps(self.settings))
        write_atomically(path, lambda temporary: np.savez(temporary, pictures=pictures, key=key))

    def _load(self, method: Method) -> np.ndarray | None:
        """The method's pictures, None where they are not drawn with these settings."""
        path = self.folder / "drawn" / method.file
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as file:
            same = str(file["key"]) == json.dumps(self.settings)
            pictures = file["pictures"]
        return pictures if same and len(pictures) == len(method.cases) else None

    # --- report -----------------------------------------------------------------------------------

    def report(self, judge: Judge) -> str:
        """Scores all pictures and writes every file. Returns results.md."""
        pictures = {method.name: self._drawn(method) for method in self.methods}
        known = {id(cases): gallery(judge, cases) for cases in (self.cases, self.new_kinds)}
        rows = {
            method.name: _verdicts(
                judge,
                method.cases,
                pictures[method.name],
                known.get(id(method.cases), known[id(self.cases)]),
            )
            for method in self.methods
        }
        claims = judge_claims(rows, LAMBDAS)
        costs = {method.name: self._cost(method) for method in self.methods}
        text = f"{score_table(rows, costs)}\n\n{claims_table(claims)}"
        write_text(self.folder / "results.md", text + "\n")
        results = {
            "settings": {**self.settings, "inversions": len(self.inverted)},
            "seconds": self.seconds,
            **summary(rows, claims),
        }
        write_json(self.folder / "results.json", results)
        plot_curve(rows, self.folder / "curve.png")
        for name, cases, shown in (
            ("grid", self.inverted or self.cases, pictures.keys() - {NEW_KINDS}),
            ("grid_new_kinds", self.new_kinds, {NEW_KINDS}),
        ):
            sheet = contact_sheet(
                cases[:SHEET_CASES], {key: pictures[key] for key in pictures if key in shown}
            )
            write_atomically(self.folder / f"{name}.png", sheet.save)
        return text

    def _drawn(self, method: Method) -> np.ndarray:
        pictures = self._load(method)
        assert pictures is not None  # `draw` comes first
        return pictures

    def _cost(self, method: Method) -> str:
        """What one new concept costs before it can be drawn; how many encodings that is."""
        if method.cost is None:
            return "-"
        seconds, encode = self.seconds[method.cost], self.seconds["encode"]
        ratio = f" ({seconds / encode:.0f} x)" if method.cost != "encode" else ""
        return f"{seconds:.3g}{ratio}"


def _verdicts(judge: Judge, cases: list[Case], pictures: np.ndarray, known: Tensor) -> Verdicts:
    pixels = torch.stack([to_pixels(picture) for picture in pictures])
    found = judge_pictures(judge, cases, pixels, known)
    return {name: values.numpy() for name, values in found.items()}
