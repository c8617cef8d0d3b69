"""Encodes every image + mask pair of a folder once, into concept files NAME.safetensors.

python encode.py                                             test_datasets/ into outputs/concepts/
python encode.py --test_data_dir photos --no_mask            whole pictures, without masks
accelerate launch encode.py ...                              the folder shared among processes

`python inference_local.py --concept_path outputs/concepts` draws them, as often as you like. A file
fits only the mappers that made it. Exit code 2: nothing could be encoded; 3: some pairs could not
be read (they are listed, the rest is encoded).
"""

from elite.config import EncodeConfig, parse_config
from elite.console import quiet_libraries, run


def main() -> int:
    config = parse_config(EncodeConfig)
    quiet_libraries()
    from elite.inference import load_pipeline, run_encoding

    pipe = load_pipeline(config, config.local_mapper_path)
    return run_encoding(config, pipe)


if __name__ == "__main__":
    run(main)
