#!/usr/bin/env bash
# Stage 2 on 4 GPUs; flags given here win: ./train_local.sh --train_data_dir /path/to/open_images
set -euo pipefail
cd "$(dirname "$0")"
exec accelerate launch --config_file configs/4_gpu.json train_local.py \
    --config configs/train_local.yaml "$@"
