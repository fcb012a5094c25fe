#!/bin/sh
# The demo: scans to pictures, pictures to a model, the model examined and asked. demo.sh RUN_FOLDER
set -eu
run=$1
python=${PYTHON:-python3}
start=$(date +%s)
$python programs/digits.py --out "$run"
$python programs/train.py --model "$run/model" --scratch --data "$run/data/train.jsonl" --out "$run" \
    --evaluate "$run/data/heldout.jsonl" --steps 1500 --batch 32 --lr 3e-3 --warmup 100 --tokens 56 --patches 32
$python programs/evaluate.py --model "$run/export" --data "$run/data/heldout.jsonl" --out "$run/evaluation" --batch 120
echo
echo "One question about a page that was never trained on:"
$python programs/chat.py --model "$run/export" --image "$run/data/heldout/page00007.png" --question "what is the sum ?"
echo
echo "make demo took $(($(date +%s) - start)) s after installation. Open $run/report.html"
