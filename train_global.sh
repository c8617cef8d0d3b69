#!/usr/bin/env bash
# Stage 1 on 4 GPUs; flags given here win: ./train_global.sh --train_data_dir /path/to/open_images
set -euo pipefail
cd "$(dirname "$0")"
exec accelerate launch --config_file configs/4_gpu.json train_global.py \
    --config configs/train_global.yaml "$@"
