"""Learns a new word from a few pictures of one concept, the rest of the model frozen.

    accelerate launch train_textual_inversion.py --pretrained_model_name_or_path MODEL \\
        --train_data_dir PICTURES --placeholder_token "<cat>" --initializer_token cat

MODEL is a Stable Diffusion 1.x or SDXL. The result, learned_embeds.safetensors (SDXL: and
learned_embeds_2.safetensors), is read by load_textual_inversion of diffusers.
"""

from elite.config import TextualInversionConfig, parse_config
from elite.console import quiet_libraries, run


def main() -> int:
    config = parse_config(TextualInversionConfig)
    quiet_libraries()
    from elite.stages import train_textual_inversion

    return train_textual_inversion(config)


if __name__ == "__main__":
    run(main)
