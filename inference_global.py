"""Draws every image + mask pair of a folder with ELITE's words alone, without the local branch.

python inference_global.py                                   w0, the primary word
python inference_global.py --token_index full                all words
"""

from elite.config import InferenceGlobalConfig, parse_config
from elite.console import quiet_libraries, run


def main() -> int:
    config = parse_config(InferenceGlobalConfig)
    quiet_libraries()
    from elite.inference import build_pipeline, run_inference

    pipe = build_pipeline(config, local_mapper=False)
    folder = f"{config.suffix}_token{config.token_index}"
    return run_inference(config, pipe, folder, words=config.words)


if __name__ == "__main__":
    run(main)
