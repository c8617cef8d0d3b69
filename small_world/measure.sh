#!/usr/bin/env bash
# Measures the shipped weights: every table and picture that the pages show of the small world.
#
#   bash small_world/measure.sh                  hours
#   bash small_world/measure.sh score couples    these parts alone
#   ART=FOLDER bash small_world/measure.sh art    of what data_scripts/fetch_art.py left in FOLDER
#
# Everything lands in a folder of runs/measured that is named after weights, configs and the code of the world and of
# its scores; what took long and is there already is kept. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
run=runs/measured/$("$python" - <<'PYTHON'
from pathlib import Path

from elite.files import digest_files

files = [path for path in Path("checkpoints").rglob("*") if path.suffix in (".safetensors", ".json")]
code = [*Path("small_world").glob("*.py"), *Path("evaluation").glob("*.py")]
print(digest_files(*sorted(files), *sorted(code)))
PYTHON
)
results=benchmarks/results
mkdir -p "$run"

step() { printf '\n== %s\n' "$*"; "$@"; }

# Copies what a command wrote to the files that the pages show: FROM TO, FROM TO, ...
show() { while [ $# -gt 0 ]; do step cp "$run/$1" "$2"; shift 2; done; }

first() {
    step "$python" inference_local.py --output_dir "$run/first"
    show first/object_l0p8/grid.png docs/small_world_grid.png
    step "$python" docs/make_teaser.py
}
probe() {
    step "$python" -m small_world.probe --output_dir "$run/probe"
    show probe/probe.md $results/probe.md
}
score() {
    if [ ! -e "$run/score.md" ]; then
        step "$python" -m small_world.judge score --report "$run/score.json" --samples 300
    fi
    show score.md $results/score.md
}
reproduce() {
    step "$python" -m small_world.reproduce --output_dir "$run/reproduce" --samples 300 \
        --inversions 24
    show reproduce/results.md $results/reproduce.md \
        reproduce/curve.png docs/claims_curve.png reproduce/grid.png docs/claims_grid.png
}
couples() {
    step "$python" -m small_world.judge couples --output_dir "$run/couples" --samples 60
    show couples/couples.md $results/couples.md couples/grid.png docs/couples_grid.png
}
art() {
    local source
    for source in fluent google twitter openclipart stamps; do
        step "$python" -m small_world.judge art "${ART:?}/$source" --samples 100 \
            --output_dir "$run/art_$source"
        show "art_$source/art.md" "$results/art_$source.md"
    done
}
quality() {
    step "$python" -m benchmarks.quality --output_dir "$run/quality" --samples 300 --deep_every 3
    show quality/results.md $results/quality.md quality/cost.png docs/speeds.png
}
samplers() {
    step "$python" -m small_world.samplers --work_dir "$run/samplers" --num_images 1
    show samplers/samplers.md $results/samplers.md
}

[ $# -gt 0 ] || set -- first probe score reproduce couples ${ART:+art} quality samplers
for part in "$@"; do
    "$part"
done
step "$python" -m benchmarks.table
step "$python" docs/make_card.py
