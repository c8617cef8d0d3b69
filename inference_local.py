"""Draws every image + mask pair of a folder with ELITE's words and local features.

python inference_local.py                                    the small world on test_datasets/,
                                                             nothing to download
python inference_local.py --template "a {} on the beach" --llambda 0.6
python inference_local.py --concept_path outputs/concepts    the files of encode.py
accelerate launch inference_local.py ...                     the folder shared among processes
"""

from elite.config import InferenceLocalConfig, parse_config
from elite.console import quiet_libraries, run


def main() -> int:
    config = parse_config(InferenceLocalConfig)
    quiet_libraries()
    from elite.inference import build_pipeline, run_inference

    pipe = build_pipeline(config, config.local_mapper_path, encodes=config.concept_path is None)
    if pipe.local_mapper is None:
        raise ValueError(
            f"{config.pretrained_model_name_or_path}: has no local_mapper/; pass "
            "--local_mapper_path, or use "
            "inference_global.py"
        )
    name = f"{config.suffix}_l{config.llambda}".replace(".", "p")
    return run_inference(config, pipe, name, lambda_=config.llambda)


if __name__ == "__main__":
    run(main)
