"""Stage 2: trains the local mapper beside the frozen global one, masked patches to feature tokens.

    accelerate launch --config_file configs/4_gpu.json train_local.py \\
        --config configs/train_local.yaml --train_data_dir OPEN_IMAGES \\
        --global_mapper_path runs/global/global_mapper
    accelerate launch --config_file configs/cpu_2.json train_local.py \\
        --config configs/small_world_local.yaml
"""

from elite.config import parse_config
from elite.console import OK, quiet_libraries, run
from elite.settings import TrainLocalConfig


def main() -> int:
    config = parse_config(TrainLocalConfig)
    quiet_libraries()
    from elite.loading import pixels_per_latent
    from elite.mappers import GlobalMapper, LocalMapper, fingerprint_of
    from elite.objectives import LocalObjective
    from elite.open_images import OpenImagesMasks
    from elite.stages import (
        fit_as_configured,
        frozen_parts,
        mapper_to_train,
        pair_preview,
        publish,
        trained_mapper,
        training_data,
        training_side,
    )

    # Frozen: all of Stable Diffusion, CLIP, and the global mapper of stage 1.
    parts = frozen_parts(config)
    global_mapper = trained_mapper(GlobalMapper, config.global_mapper_path, parts)

    # Learned: the MLPs that give the feature tokens f, and K_l, V_l.
    mapper = mapper_to_train(LocalMapper, config.local_mapper_path, parts, config)

    # By: sum(M (eps_hat - eps)^2) / sum(M) + 0.0001 mean|V_l f| (eq. 7), with w0 in the prompt.
    objective = LocalObjective(parts, global_mapper, mapper, config.placeholder_token)

    # On: objects with their masks, at random scales.
    resolution = training_side(config, parts)
    dataset = OpenImagesMasks(
        training_data(config),
        resolution=resolution,
        clip_size=parts["image_encoder"].config.image_size,
        latent_size=resolution // pixels_per_latent(parts["vae"]),
        placeholder_token=config.placeholder_token,
    )

    preview = pair_preview(config, objective, parts, words=0)
    held = {"global_mapper": fingerprint_of(global_mapper)}
    fit_as_configured(
        config, objective, dataset, parts, preview, config.validation_steps, held=held
    )
    publish(config, objective)
    return OK


if __name__ == "__main__":
    run(main)
