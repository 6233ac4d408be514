#!/usr/bin/env bash
# From a bare machine to a table: dense, Robust Bird and Flying Bird by weights and by channels,
# Flying Bird+, on scikit-learn's digits, about 5 minutes on 2 cores. The ball is 32/255: at 8/255
# every method solves the digits.
#   bash scripts/quickstart.sh       OMP_NUM_THREADS=2 made the table in the README
# Run again, it skips finished runs; delete runs/quickstart to train again.
set -euo pipefail
source "$(dirname "$0")/help.sh"
[ $# = 0 ] || { echo "error: scripts/quickstart.sh takes no arguments but --help, not '$*'" >&2; exit 2; }
cd "$(dirname "$0")/.."
QUIET=1 bash scripts/setup.sh

out=runs/quickstart
common=(--dataset digits --arch resnet18 --width 0.25 --decreasing_lr 0.5,0.75 --batch_size 64
    --train_step 5 --train_eps 32 --train_gamma 8 --test_eps 32 --test_gamma 4 --save_dir "$out" --resume)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
folders=()
run() {
    .venv/bin/python "$@" "${common[@]}" | tee "$log"
    folders+=("$(sed -n 's/^writing to //p; s/ is finished:$//p' "$log")")
}

SECONDS=0
run main_adv.py --epochs 16
run Robust-Bird/train_eb.py --epochs1 16 --epochs2 16 --density 0.2
run Robust-Bird/train_eb.py --epochs1 16 --epochs2 16 --density 0.5 --pruning channel
run main_adv.py --epochs 16 --density 0.2 --update_frequency 20 --fb
# grown channels need longer to train than grown weights, so mask updates are rarer
run main_adv.py --epochs 16 --density 0.5 --update_frequency 60 --fb --structure channel
run main_adv.py --epochs 16 --density 0.2 --update_frequency 20 --fbp --dynamic_epoch 0.5
echo "training took $SECONDS s"
echo
.venv/bin/python scripts/report.py "${folders[@]}" --figure "$out/quickstart.png"
