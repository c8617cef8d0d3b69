#!/usr/bin/env bash
# The objects of test_datasets with Stable Diffusion v1-4 and the released mappers; flags given here win.
set -euo pipefail
cd "$(dirname "$0")"
exec python inference_local.py \
    --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \
    --global_mapper_path checkpoints/global_mapper.pt \
    --local_mapper_path checkpoints/local_mapper.pt \
    --test_data_dir test_datasets --output_dir outputs/local \
    --template "a photo of a {}" --suffix object --llambda 0.8 "$@"
