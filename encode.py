"""Encodes every image + mask pair of a folder once, into concept files NAME.safetensors.

python encode.py                                             test_datasets/ into outputs/concepts/
python encode.py --test_data_dir photos --no_mask            whole pictures, without masks
python encode.py --push_to_hub --hub_model_id me/mugs        uploads them, with their pictures
accelerate launch encode.py ...                              the folder shared among processes

`python inference_local.py --concept_path outputs/concepts` draws them, as often as you like. A file
fits only the mappers that made it. Exit code 2: nothing could be encoded; 3: some pairs could not
be read (they are listed, the rest is encoded).
"""

from pathlib import Path

from elite.config import parse_config
from elite.console import quiet_libraries, run
from elite.settings import EncodeConfig


def main() -> int:
    config = parse_config(EncodeConfig)
    quiet_libraries()
    from accelerate import PartialState

    from elite.encoding import encode_folder
    from elite.inference import (
        device_and_dtype,
        load_pipeline,
        model_metadata,
        publish_concepts,
        read_pairs,
        report_failures,
    )

    pipe = load_pipeline(config, config.local_mapper_path)
    pipe.to(*device_and_dtype(config))
    pairs, output_dir = read_pairs(config), Path(config.output_dir)
    failures = encode_folder(
        pipe, pairs, output_dir, skip_existing=config.skip_existing, metadata=model_metadata(config)
    )
    count = len(pairs) - len(failures)
    done = f"{count} concepts in {output_dir}; look at {output_dir / 'grid.png'} first"
    status = report_failures(failures, len(pairs), "pairs could not be encoded", done)
    if config.push_to_hub and count and PartialState().is_main_process:
        publish_concepts(config, pairs, pipe.fingerprint)
    return status


if __name__ == "__main__":
    run(main)
