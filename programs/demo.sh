#!/bin/sh
# The demo: a vision-language model learns to read scanned digits and is examined; beside it, on the other half of the
# cores, a FLUX and a Wan learn to draw and to move them, and are judged. demo.sh RUN_FOLDER
set -eu
run=$1
python=${PYTHON:-python3}
start=$(date +%s)
export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
$python programs/digits.py --out "$run"
sh programs/drawings.sh "$run" >"$run/drawings.log" 2>&1 &
drawings=$!
trap 'pkill -P $drawings || true; kill $drawings 2>/dev/null || true' EXIT
$python programs/train.py --model "$run/model" --scratch --data "$run/data/train.jsonl" --out "$run" --mode split \
    --steps 1500 --batch 96 --lr 3e-3 --decay 0.05 --save 500 --questions "$run/data/heldout.jsonl" \
    --rows.tokens 28 --rows.patches 3072 --rows.attention 64
$python programs/evaluate.py --model "$run/export" --data "$run/data/heldout.jsonl" --out "$run" --batch 120 --new 4
echo
echo "One question about a page of scans that training never saw: what is the sum ?"
$python programs/chat.py --model "$run/export" --image "$run/data/heldout/page00007.png" --question "what is the sum ?"
echo
echo "The drawings, so far in $run/drawings.log:"
tail -n +1 -f "$run/drawings.log" &
shown=$!
trap 'pkill -P $drawings || true; kill $drawings $shown 2>/dev/null || true' EXIT
wait $drawings
sleep 1
kill $shown
trap - EXIT
echo "make demo took $(($(date +%s) - start)) s after installation. Open $run/report.html (reading)"
