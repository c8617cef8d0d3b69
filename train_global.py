"""Stage 1: trains the global mapper, one picture to words, with K and V of the cross-attentions.

    accelerate launch --config_file configs/4_gpu.json train_global.py \\
        --config configs/train_global.yaml --train_data_dir OPEN_IMAGES
    accelerate launch --config_file configs/cpu_2.json train_global.py \\
        --config configs/small_world_global.yaml
"""

from elite.config import parse_config
from elite.console import OK, quiet_libraries, run
from elite.settings import TrainGlobalConfig


def main() -> int:
    config = parse_config(TrainGlobalConfig)
    quiet_libraries()
    from elite.latents import CachedBoxes
    from elite.mappers import GlobalMapper
    from elite.objectives import GlobalObjective
    from elite.open_images import OpenImagesBoxes
    from elite.stages import (
        fit_as_configured,
        frozen_parts,
        mapper_to_train,
        pair_preview,
        publish,
        training_data,
        training_side,
    )

    # Frozen: CLIP, text encoder, VAE, and the UNet but for its K and V of the text.
    parts = frozen_parts(config)

    # Learned: the MLPs that give the words w (eq. 3), and K_g, V_g.
    mapper = mapper_to_train(GlobalMapper, config.global_mapper_path, parts, config)
    if config.crop_to_object:
        mapper.register_to_config(crop_to_object=True)

    # By: mean((eps_hat - eps)^2) + 0.01 mean|w| (eq. 4), with all words in the prompt.
    objective = GlobalObjective(parts, mapper, placeholder_token=config.placeholder_token)

    # On: objects in their boxes, with captions that hold the placeholder.
    boxes = OpenImagesBoxes(
        training_data(config),
        resolution=training_side(config, parts),
        clip_size=parts["image_encoder"].config.image_size,
        placeholder_token=config.placeholder_token,
    )
    cache = config.cache_latents  # of their z, so that no step needs the VAE
    dataset = boxes if cache is None else CachedBoxes(boxes, cache, parts["vae"])

    preview = pair_preview(config, objective, parts, words="all")
    kv_rate = config.kv_learning_rate
    own_rates = {f"_to_{part}.weight": kv_rate for part in "kv"} if kv_rate is not None else None
    fit_as_configured(
        config, objective, dataset, parts, preview, config.validation_steps, own_rates=own_rates
    )
    publish(config, objective)
    return OK


if __name__ == "__main__":
    run(main)
