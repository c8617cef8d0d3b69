"""Draws every image + mask pair of a folder with ELITE's words and local features.

python inference_local.py                                    the small world on test_datasets/,
                                                             nothing to download
python inference_local.py --template "a {} on the beach" --llambda 0.6
python inference_local.py --concept_path outputs/concepts    the files of encode.py
python inference_local.py --concept S1=a.safetensors S2=b.safetensors \\
    --template "a S1 next to a S2"                           two concepts in one picture
accelerate launch inference_local.py ...                     the folder shared among processes
"""

from elite.config import InferenceLocalConfig, parse_config
from elite.console import quiet_libraries, run


def main() -> int:
    config = parse_config(InferenceLocalConfig)
    quiet_libraries()
    from elite.inference import build_pipeline, run_inference, run_several_concepts

    encodes = config.concept_path is None and not config.concept
    pipe = build_pipeline(config, config.local_mapper_path, encodes=encodes)
    if pipe.local_mapper is None:
        raise ValueError(
            f"{config.pretrained_model_name_or_path}: has no local_mapper/; pass "
            "--local_mapper_path, or use "
            "inference_global.py"
        )
    name = f"{config.suffix}_l{config.llambda}".replace(".", "p")
    if config.concept:
        return run_several_concepts(config, pipe, name)
    return run_inference(config, pipe, name, lambda_=config.llambda)


if __name__ == "__main__":
    run(main)
