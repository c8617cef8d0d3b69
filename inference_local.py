"""Draws every image + mask pair of a folder with ELITE's words and local features.

python inference_local.py                                    the small world on test_datasets/,
                                                             nothing to download
python inference_local.py --template "a {} on the beach" --llambda 0.6
python inference_local.py --concept_path outputs/concepts    the files of encode.py
python inference_local.py --concept S1=a.safetensors S2=b.safetensors \\
    --template "a S1 next to a S2"                           two concepts in one picture
accelerate launch inference_local.py ...                     the folder shared among processes
"""

from functools import partial
from pathlib import Path
from typing import Any

from elite.config import build_config, parse_config, split_named
from elite.console import quiet_libraries, run
from elite.settings import InferenceLocalConfig

# Settings that --concept has no use for.
OF_OTHERS = ("concept_path", "no_mask", "placeholder_token", "selected_data", "test_data_dir")


def main() -> int:
    config = parse_config(InferenceLocalConfig)
    if not config.concept and (config.concept_llambda or config.region):
        raise ValueError("--concept_llambda and --region belong to --concept; name the files there")
    quiet_libraries()
    from elite.drawing import draw_folder
    from elite.inference import build_pipeline, drawing_of, read_objects, report_drawn, what_to_draw

    # Stable Diffusion with both mappers; concept files need no image encoder.
    encodes = config.concept_path is None and not config.concept
    pipe = build_pipeline(config, config.local_mapper_path, encodes=encodes)
    if pipe.local_mapper is None:
        raise ValueError(
            f"{config.pretrained_model_name_or_path}: has no local_mapper/; pass "
            "--local_mapper_path, or use inference_global.py"
        )
    weight = f"l{config.llambda}".replace(".", "p")
    if config.concept:
        folder = Path(config.output_dir) / f"{config.suffix}_concepts_{weight}"
        return draw_several(config, pipe, folder)

    # The objects (pairs, or concept files), and how they are drawn: w0 and lambda times f.
    objects = read_objects(config)
    drawing = drawing_of(config, words=0, lambda_=config.llambda)
    output_dir = Path(config.output_dir) / f"{config.suffix}_{weight}"
    failures = draw_folder(pipe, objects, output_dir, drawing, **what_to_draw(config, objects))
    return report_drawn(config, objects, failures, output_dir)


def draw_several(config: InferenceLocalConfig, pipe: Any, output_dir: Path) -> int:
    """Draws the concepts of --concept in one picture. Returns the exit status."""
    from elite.drawing import metadata_of_several
    from elite.files import digest_files
    from elite.images import read_mask
    from elite.inference import draw_grid, drawing_of, model_metadata, read_concept

    defaults = build_config(InferenceLocalConfig)
    for name in OF_OTHERS:
        if getattr(config, name) != getattr(defaults, name):
            raise ValueError(f"--concept and --{name} are both given; leave one of them out")
    if "{}" in config.template:
        raise ValueError(
            f"--template {config.template!r}: with --concept, write its words in place of {{}}"
        )
    files = split_named(config.concept, "--concept")
    weights = dict.fromkeys(files, config.llambda)
    for word, value in split_named(config.concept_llambda, "--concept_llambda").items():
        if word not in files:
            raise ValueError(f"--concept_llambda {word}={value}: no such --concept")
        weights[word] = float(value)
    masks = split_named(config.region, "--region")

    drawing = drawing_of(config, words=0, lambda_=config.llambda)
    concepts = {word: read_concept(word, path) for word, path in files.items()}
    regions = {word: read_mask(path) for word, path in masks.items()}
    named = {word: f"{path} ({digest_files(Path(path))})" for word, path in masks.items()}
    draw = partial(drawing.with_concepts, pipe, concepts, weights, regions)
    metadata = {
        **drawing.metadata(pipe),
        "scheduler": config.scheduler,
        **model_metadata(config),
        **metadata_of_several(concepts, weights, named),
    }
    return draw_grid(config, draw, [config.template], output_dir, metadata, config.skip_existing)


if __name__ == "__main__":
    run(main)
