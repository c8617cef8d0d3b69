#!/usr/bin/env bash
# Remakes the small world from nothing: renders, base model, ELITE's two stages, judge, test objects.
#
#   bash small_world/remake.sh [RUN_DIR] [TARGET_DIR]
#
# RUN_DIR (default runs/small_world) gets logs, previews and checkpoints, TARGET_DIR (default
# checkpoints/small_world) the fp16 weights. A part that was interrupted goes on from its last
# checkpoint, a part that is done is left as it is; remove RUN_DIR to begin anew. PYTHON chooses the
# interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
run=${1:-runs/small_world}
target=${2:-checkpoints/small_world}

step() { printf '\n== %s\n' "$*"; "$@"; }
launch() { step "$python" -m accelerate.commands.launch --config_file configs/cpu_2.json "$@"; }

# The base model.
for part in samples vae vae_decoder image_encoder base; do
    step "$python" -m small_world.pretrain "$part" --work_dir "$run"
done
step "$python" -m small_world.pretrain assemble --work_dir "$run" --target "$target"

# The judge.
step "$python" -m small_world.judge train --work_dir "$run" --target "${target}_judge"

# ELITE, with the scripts and the data layout of the real thing.
step "$python" data_scripts/make_small_world.py --test_datasets test_datasets
if [ ! -d "$run/open_images" ]; then
    step "$python" data_scripts/make_small_world.py "$run/open_images" --count 20000
fi
for stage in global local; do
    resume=()
    if compgen -G "$run/$stage/checkpoint-*" > /dev/null; then
        resume=(--resume_from_checkpoint latest)
    fi
    mapper=()
    if [ "$stage" = local ]; then
        mapper=(--global_mapper_path "$run/global/global_mapper")
    fi
    launch "train_$stage.py" --config "configs/small_world_$stage.yaml" \
        --pretrained_model_name_or_path "$target" --train_data_dir "$run/open_images" \
        --output_dir "$run/$stage" "${mapper[@]}" "${resume[@]}"
done
step "$python" - "$run" "$target" <<'PYTHON'
"""Copies the mappers beside the base model, as fp16."""
import sys
from pathlib import Path

from elite import GlobalMapper, LocalMapper

run, target = map(Path, sys.argv[1:])
for stage, kind in (("global", GlobalMapper), ("local", LocalMapper)):
    name = f"{stage}_mapper"
    kind.from_pretrained(run / stage / name).half().save_pretrained(target / name)
PYTHON

step "$python" -m small_world.judge score --model "$target" --judge "${target}_judge" \
    --report "$run/score.json"
