#!/bin/sh
# Everything that the README and the weights card say about quality, measured again: sh tools/measure.sh BENCH [SCRATCH]
#
# SCRATCH keeps the predictions (default: a temporary folder). The baseline is rendered with Cycles once and kept; it needs
# Blender's Python module. About 25 minutes on two idle cores, the baseline's first time another 15.
set -eu
bench=$1
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=${2:-$(mktemp -d)}
python="${PYTHON:-$root/.venv/bin/python}"
cd "$root"
"$python" -m near eval "$bench" --baselines --consistency --html --save "$scratch/eval" --out "$scratch/eval-dev.json"
"$python" -m near ablation "$bench" --out reports ${RENDERERS:+--renderers "$RENDERERS"}
cp "$scratch/eval-dev.json" reports/eval-dev.json
mkdir -p reports/eval-dev_sheets
cp "$scratch"/eval/sheets/*.png reports/eval-dev_sheets/
"$python" tools/weights_card.py failures "$bench" "$scratch/eval"
"$python" tools/weights_card.py write
"$python" tools/results_table.py
