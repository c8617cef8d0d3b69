#!/usr/bin/env bash
# The words alone, with Stable Diffusion v1-4 and the released global mapper; flags given here win.
set -euo pipefail
cd "$(dirname "$0")"
exec python inference_global.py \
    --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \
    --global_mapper_path checkpoints/global_mapper.pt \
    --test_data_dir test_datasets --output_dir outputs/global \
    --template "a photo of a {}" --suffix object --token_index 0 "$@"
