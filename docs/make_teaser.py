"""Make the README's teaser with the small world: python docs/make_teaser.py

No choice is made by hand: of the objects of test_datasets/ the first by name of each silhouette,
one seed, one lambda, each object in the same scenes.
"""

import sys
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found from any working directory

from elite.console import OK, quiet_libraries, run

REPOSITORY = Path(__file__).resolve().parents[1]
SCENES = ("a S on the beach", "a S at night", "a S in the snow")
SEED, LAMBDA = 42, 0.6
TILE, LABEL, GAP = 128, 168, 6  # pixels; the model's 32 are enlarged four times
COLOURS = 256  # a smaller file
TARGET = REPOSITORY / "docs/teaser.png"


def first_of_each_silhouette(names: list[str]) -> list[int]:
    """Indices of PATTERN_SILHOUETTE_COLOURS names."""
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        seen.setdefault(name.split("_")[1], index)
    return list(seen.values())


def draw_rows(scenes: tuple[str, ...] = SCENES, steps: int = 20) -> list[list[Image.Image]]:
    """Pictures, cut-outs, and one row of drawings per scene; a column is an object."""
    from elite.data import PairFolder
    from elite.drawing import Drawing
    from elite.images import cut_out
    from elite.pipeline import ElitePipeline

    pipe = ElitePipeline.from_stable_diffusion(REPOSITORY / "checkpoints/small_world")
    pipe.set_progress_bar_config(disable=True)
    folder = PairFolder(REPOSITORY / "test_datasets")
    chosen = first_of_each_silhouette([pair.name for pair in folder.pairs])
    pairs = [folder.read(index) for index in chosen]
    concepts = [pipe.encode_concept(image, mask) for image, mask in pairs]
    drawing, seeds = Drawing(lambda_=LAMBDA, num_inference_steps=steps), [SEED] * len(concepts)
    return [
        [Image.fromarray(image) for image, _ in pairs],
        [Image.fromarray(cut_out(image, mask)) for image, mask in pairs],
        *(drawing(pipe, [scene] * len(concepts), concepts, seeds) for scene in scenes),
    ]


def assemble(rows: list[list[Image.Image]], labels: list[str]) -> Image.Image:
    """Labelled rows of square pictures on white; small ones keep their pixels visible."""
    step = TILE + GAP
    sheet = Image.new("RGB", (LABEL + len(rows[0]) * step, len(rows) * step - GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(19)
    for y, (label, row) in enumerate(zip(labels, rows, strict=True)):
        pen.text((4, y * step + TILE // 2), label, "black", font, anchor="lm")
        for x, picture in enumerate(row):
            method = Image.Resampling.NEAREST if picture.width < TILE else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((TILE, TILE), method), (LABEL + x * step, y * step))
    return sheet


def main() -> int:
    quiet_libraries()
    from elite.files import write_atomically

    labels = ["one picture", "its object: S", *SCENES]
    sheet = assemble(draw_rows(), labels).quantize(COLOURS, dither=Image.Dither.NONE)
    write_atomically(TARGET, partial(sheet.save, optimize=True))
    print(f"{TARGET}: seed {SEED}, lambda {LAMBDA}")
    return OK


if __name__ == "__main__":
    run(main)
