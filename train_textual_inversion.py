"""Learns a new word from a few pictures of one concept, the rest of the model frozen.

    accelerate launch train_textual_inversion.py --pretrained_model_name_or_path MODEL \\
        --train_data_dir PICTURES --placeholder_token "<cat>" --initializer_token cat

MODEL is a Stable Diffusion 1.x or SDXL. The result, learned_embeds.safetensors (SDXL: and
learned_embeds_2.safetensors), is read by load_textual_inversion of diffusers.
"""

from elite.config import parse_config
from elite.console import OK, quiet_libraries, run
from elite.settings import TextualInversionConfig


def main() -> int:
    config = parse_config(TextualInversionConfig)
    quiet_libraries()
    from elite.loading import load_stable_diffusion
    from elite.stages import fit_as_configured, training_side
    from textual_inversion.objective import TextualInversionObjective, starting_rows
    from textual_inversion.pictures import TEMPLATES, PictureFolder, read_templates
    from textual_inversion.preview import PromptPreview

    templates = TEMPLATES[config.learnable_property]
    if config.template_file is not None:
        templates = read_templates(config.template_file)

    # Frozen: all of Stable Diffusion.
    parts = load_stable_diffusion(
        config.pretrained_model_name_or_path, revision=config.revision, **config.model_files
    )

    # The data: squares of the concept's pictures, with captions that hold the new word.
    dataset = PictureFolder(
        config.train_data_dir,
        resolution=training_side(config, parts),
        placeholder=config.placeholder_token,
        templates=templates,
        center_crop=config.center_crop,
    )

    # Learned: the new word's rows of each token embedding, by mean((eps_hat - eps)^2).
    rows = starting_rows(
        parts,
        config.num_vectors,
        words=config.initializer_token,
        concept=config.initializer_concept,
        seed=config.seed,
    )
    objective = TextualInversionObjective(parts, config.placeholder_token, rows)
    objective.check(templates, config.template_file or config.learnable_property)

    preview = PromptPreview(config, parts)
    every = config.infer_interval if config.infer_during_train else 0
    fit_as_configured(config, objective, dataset, parts, preview, every)
    return OK


if __name__ == "__main__":
    run(main)
