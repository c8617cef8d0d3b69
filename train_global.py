"""Stage 1: trains the global mapper, one picture to words, with K and V of the cross-attentions.

    accelerate launch --config_file configs/4_gpu.json train_global.py --config
    configs/train_global.yaml \\
        --train_data_dir OPEN_IMAGES
    accelerate launch --config_file configs/cpu_2.json train_global.py --config
    configs/small_world_global.yaml
"""

from elite.config import TrainGlobalConfig, parse_config
from elite.console import quiet_libraries, run


def main() -> int:
    config = parse_config(TrainGlobalConfig)
    quiet_libraries()
    from elite.stages import train_global

    return train_global(config)


if __name__ == "__main__":
    run(main)
