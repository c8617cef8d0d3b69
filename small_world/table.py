"""The table of `reproduce`: draws every method's pictures once and scores them."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from elite.files import write_atomically, write_json, write_text
from small_world.claims import judge_claims
from small_world.classifier import Judge
from small_world.inversion import draw_inverted, invert_all, way_of
from small_world.methods import Method, Pictures, verdicts
from small_world.models import digest_weight_files
from small_world.report import claims_table, contact_sheet, plot_curve, score_table, summary
from small_world.score import (
    draw_concepts,
    draw_prompts,
    gallery,
    load_base,
    load_elite,
    make_cases,
    with_edits,
)

LAMBDAS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
NEW_KINDS = "new kinds, w0 + local, 0.8"
SHEET_CASES = 12
TIMED = 20  # concepts encoded for the mean time


class Table:
    """All methods on the same held-out critters, and one on as many critters of new kinds.

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
        self.model, self.folder = model, folder
        self.base, self.elite = load_base(model), load_elite(model)
        self.drawing, self.inversion_steps = drawing, inversion_steps
        self.cases = with_edits(make_cases(samples, "held out", seed))
        self.new_kinds = with_edits(make_cases(samples, "new kinds", seed))
        self.inverted = self.cases[:inversions]
        self.settings = {
            "weights": digest_weight_files(model),
            "mappers": self.elite.fingerprint,
            "samples": samples,
            "seed": seed,
            "prompts": "scene and edit",
            **drawing,
        }
        self.pictures = Pictures(folder / "drawn", self.settings, batch_size)
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
                {"inversion": way_of(self.model)},
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
        self.pictures.draw(self.methods)

    def _encoding_seconds(self) -> float:
        """Mean seconds from picture and mask to concept, after one that warms up."""
        sources = [case.source for case in self.cases[:TIMED]]
        self.elite.encode_concept(*sources[0]).to("cpu")
        started = time.monotonic()
        for image, mask in sources:
            self.elite.encode_concept(image, mask).to("cpu")  # where a GPU has to be done
        return (time.monotonic() - started) / len(sources)

    # --- report -----------------------------------------------------------------------------------

    def report(self, judge: Judge) -> str:
        """Scores all pictures and writes every file. Returns results.md."""
        pictures = {method.name: self.pictures.of(method) for method in self.methods}
        known = {id(cases): gallery(judge, cases) for cases in (self.cases, self.new_kinds)}
        rows = {
            method.name: verdicts(
                judge,
                method.tasks,
                pictures[method.name],
                known.get(id(method.tasks), known[id(self.cases)]),
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

    def _cost(self, method: Method) -> str:
        """What one new concept costs before it can be drawn; how many encodings that is."""
        if method.cost is None:
            return "-"
        seconds, encode = self.seconds[method.cost], self.seconds["encode"]
        ratio = f" ({seconds / encode:.0f} x)" if method.cost != "encode" else ""
        return f"{seconds:.3g}{ratio}"
