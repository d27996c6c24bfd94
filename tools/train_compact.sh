#!/bin/sh
# Train the compact pack in short slots on a borrowed GPU, from the last weights to the next:
#
#   tools/train_compact.sh prepare OBJECTS... --hdris HDRIS [--wheels WHEELS] -o FOLDER
#       here: FOLDER/slot.tar.gz (data and code, at most 60 MB) and FOLDER/weights (the shipped weights, in pieces of at most 16 MB)
#   tools/train_compact.sh train FOLDER/slot.tar.gz --weights FOLDER/weights --minutes 25 -o RESULT
#       there: trains on cuda (or --device cpu), leaves RESULT/weights in pieces, curves.png, sheets.png, slot.json
#   tools/train_compact.sh train FOLDER/slot.tar.gz --weights RESULT/weights --minutes 25 -o RESULT2
#       the next slot
#   tools/train_compact.sh join RESULT2/weights -o PACK --history reports/training.json
#       here: a pack, verified; score it: near eval BENCH --pack PACK --out report.json
#
# PYTHON names the interpreter; the other machine needs torch, numba, scipy, safetensors, peft, accelerate, pillow and tqdm.
# Without this script: tar xzf slot.tar.gz, then sh slot/code/tools/train_compact.sh train slot ...
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x "$here/../.venv/bin/python" ] && PYTHON="$here/../.venv/bin/python"
fi
exec "$PYTHON" "$here/slot" "$@"
