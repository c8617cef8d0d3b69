#!/usr/bin/env bash
# Remakes the small world from nothing: renders, base model, ELITE's two stages, judge, test objects.
#
#   bash small_world/remake.sh                             hours; test_datasets/ anew, too
#   SCALE=0.002 bash small_world/remake.sh FOLDER          minutes: does all of it still run?
#
# FOLDER (default: the repository) gets runs/small_world (logs, previews, checkpoints), the fp16
# weights in checkpoints/, and test_datasets/. A part that was interrupted goes on from its last
# checkpoint, a part that is done is left as it is; remove runs/small_world to begin anew. SCALE is
# the share of all samples and steps, PYTHON chooses the interpreter.
set -euo pipefail
scale=${SCALE:-1}
if [ "$scale" != 1 ] && [ $# = 0 ]; then
    echo "error: SCALE=$scale: expected a FOLDER, so that what is shipped stays as it is" >&2
    exit 2
fi
root=${1:-$(dirname "$0")/..}
mkdir -p "$root"
root=$(cd "$root" && pwd)
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
run=$root/runs/small_world
target=$root/checkpoints/small_world

scaled() { "$python" -c "from small_world.flags import scaled; print(scaled($1, $scale))"; }
step() { printf '\n== %s\n' "$*"; "$@"; }
launch() { step "$python" -m accelerate.commands.launch --config_file configs/cpu_2.json "$@"; }

# The base model.
step "$python" -m small_world.pretrain samples --work_dir "$run" --scale "$scale"
for part in vae vae_decoder image_encoder base; do
    launch -m small_world.pretrain "$part" --work_dir "$run" --scale "$scale"
done
step "$python" -m small_world.pretrain assemble --work_dir "$run" --target "$target"

# The judge.
step "$python" -m small_world.judge train --work_dir "$run" --target "${target}_judge" \
    --scale "$scale"

# ELITE, with the scripts and the data layout of the real thing.
step "$python" data_scripts/make_small_world.py --test_datasets "$root/test_datasets"
if [ ! -d "$run/open_images" ]; then
    step "$python" data_scripts/make_small_world.py "$run/open_images" --count "$(scaled 40000)"
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
    config=configs/small_world_$stage.yaml
    steps=$(awk '/^max_train_steps:/ { print $2 }' "$config")
    launch "train_$stage.py" --config "$config" --max_train_steps "$(scaled "$steps")" \
        --pretrained_model_name_or_path "$target" --train_data_dir "$run/open_images" \
        --validation_data_dir "$root/test_datasets" --output_dir "$run/$stage" \
        "${mapper[@]}" "${resume[@]}"
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
    --samples "$(scaled 500)" --report "$run/score.json"
