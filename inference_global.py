"""Draws every image + mask pair of a folder with ELITE's words alone, without the local branch.

python inference_global.py                                   w0, the primary word
python inference_global.py --token_index full                all words
python inference_global.py --concept_path outputs/concepts   the files of encode.py
"""

from elite.config import InferenceGlobalConfig, parse_config
from elite.console import quiet_libraries, run


def main() -> int:
    config = parse_config(InferenceGlobalConfig)
    quiet_libraries()
    from elite.inference import build_pipeline, run_inference

    # A concept is tied to both mappers, even where only its words are drawn.
    concepts = config.concept_path is not None
    local_mapper = config.local_mapper_path if concepts else False
    pipe = build_pipeline(config, local_mapper, encodes=not concepts)
    name = f"{config.suffix}_token{config.token_index}"
    return run_inference(config, pipe, name, words=config.words)


if __name__ == "__main__":
    run(main)
