"""Draws every image + mask pair of a folder with ELITE's words alone, without the local branch.

python inference_global.py                                   w0, the primary word
python inference_global.py --token_index full                all words
python inference_global.py --concept_path outputs/concepts   the files of encode.py
"""

from pathlib import Path

from elite.config import parse_config
from elite.console import quiet_libraries, run
from elite.settings import InferenceGlobalConfig


def main() -> int:
    config = parse_config(InferenceGlobalConfig)
    quiet_libraries()
    from elite.drawing import draw_folder
    from elite.inference import build_pipeline, drawing_of, read_objects, report_drawn, what_to_draw

    # Stable Diffusion with the global mapper. A concept file is tied to both mappers, even where
    # only its words are drawn.
    reads_files = config.concept_path is not None
    pipe = build_pipeline(
        config,
        local_mapper=config.local_mapper_path if reads_files else False,
        encodes=not reads_files,
    )

    # The objects, and how they are drawn.
    objects = read_objects(config)
    drawing = drawing_of(config, words=config.words, lambda_=0.0)
    output_dir = Path(config.output_dir) / f"{config.suffix}_token{config.token_index}"
    failures = draw_folder(pipe, objects, output_dir, drawing, **what_to_draw(config, objects))
    return report_drawn(config, objects, failures, output_dir)


if __name__ == "__main__":
    run(main)
