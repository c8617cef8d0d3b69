"""Stage 2: trains the local mapper beside the frozen global one, masked patches to feature tokens.

    accelerate launch --config_file configs/4_gpu.json train_local.py --config
    configs/train_local.yaml \\
        --train_data_dir OPEN_IMAGES --global_mapper_path runs/global/global_mapper
    accelerate launch --config_file configs/cpu_2.json train_local.py --config
    configs/small_world_local.yaml
"""

from elite.config import TrainLocalConfig, parse_config
from elite.console import quiet_libraries, run


def main() -> int:
    config = parse_config(TrainLocalConfig)
    quiet_libraries()
    from elite.stages import train_local

    return train_local(config)


if __name__ == "__main__":
    run(main)
