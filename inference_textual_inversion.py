"""Draws prompts with learned words, one or several concepts in each.

    python inference_textual_inversion.py --pretrained_model_name_or_path MODEL \\
        --embeddings runs/cat runs/mug --prompt "a <cat> in a <mug>" --num_images 4
"""

from elite.config import TextualInversionInferenceConfig, parse_config
from elite.console import quiet_libraries, run


def main() -> int:
    config = parse_config(TextualInversionInferenceConfig)
    quiet_libraries()
    from elite.inference import run_textual_inversion

    return run_textual_inversion(config)


if __name__ == "__main__":
    run(main)
