#!/bin/sh
# Small FLUX and Wan pipelines learn to draw digits; a classifier judges their samples. drawings.sh RUN_FOLDER
set -eu
run=$1
python=${PYTHON:-python3}
$python programs/drawings.py --out "$run"
$python programs/train.py --model "$run/flux" --scratch --data "$run/drawings" --out "$run/flux-run" --mode block \
    --steps 700 --batch 128 --lr 2e-3 --decay 0.01 --ema 0.99 --save 500 --clips.sizes 8x8 --questions "$run/drawings.txt"
$python programs/judge.py --model "$run/flux-run/export" --out "$run/flux-run"
$python programs/encode.py --model "$run/wan" --data "$run/clips" --out "$run/features" --clips.sizes 9x16x16 \
    --clips.fps 8
$python programs/train.py --model "$run/wan" --scratch --data "$run/features" --out "$run/wan-run" --mode block \
    --steps 1000 --batch 64 --lr 2e-3 --decay 0.01 --ema 0.99 --save 500 --questions "$run/clips.txt"
$python programs/judge.py --model "$run/wan-run/export" --out "$run/wan-run"
echo
echo "Open $run/flux-run/report.html (drawing) and $run/wan-run/report.html (moving)"
