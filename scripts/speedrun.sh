#!/usr/bin/env bash
# A robust CIFAR-10 network in hours on 2 CPU cores: N-FGSM, averaged weights and a one-cycle
# learning rate (the recipe "fast"), then AutoAttack on fixed test images. results/speedrun has the
# records.
#   bash scripts/speedrun.sh DATA [flags]       DATA as for scripts/table1.sh
# NETWORK=dense     ResNet-18 of half the width; channels: Flying Bird at half of the full one's
#                   channels, at the same cost
# EPOCHS=30         OUT=runs/speedrun         AA_IMAGES=1000 for AutoAttack (all, if
#                   there are fewer); 0 leaves it out
# DATASET says what DATA is, if its contents and name do not. Run again, it skips what is finished
# and resumes what was interrupted.
set -euo pipefail
source "$(dirname "$0")/help.sh"
network=${NETWORK:-dense} epochs=${EPOCHS:-30} images=${AA_IMAGES:-1000}
case $network in
    dense) flags=(--width 0.5) ;;
    channels) flags=(--fb --structure channel --density 0.5 --growth gradient) ;;
    *) echo "error: NETWORK is dense or channels, not '$network'" >&2; exit 2 ;;
esac
for number in "$epochs" "$images"; do
    [[ $number =~ ^[0-9]+$ ]] || { echo "error: EPOCHS and AA_IMAGES are numbers, not '$number'" >&2; exit 2; }
done
[ $# -gt 0 ] || { echo "error: the folder of the data is missing" >&2; exit 2; }
data=$([ "$1" = digits ] && echo digits || realpath -ms -- "$1")
shift
cd "$(dirname "$0")/.."
QUIET=1 bash scripts/setup.sh
[ "$data" = digits ] && source=(--dataset digits) || source=(--data "$data")
[ -z "${DATASET:-}" ] || source+=(--dataset "$DATASET")
also=() # flags that say how and where, for the evaluation too
for ((i = 1; i <= $#; i++)); do
    [[ ${!i} =~ ^--(device|gpu|cache[_-]dir|time[_-]limit|image[_-]size)(=.*)?$ ]] || continue
    also+=("${!i}")
    [[ ${!i} == *=* ]] || also+=("${@:i+1:1}")
done
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A test of the network costs as much as whole epochs of this training, and one cycle ends at its
# best: one test at the end, and the gap on 1,000 training images. The guard against catastrophic
# overfitting measures PGD-10 on 256 validation images all along.
.venv/bin/python main_adv.py "${source[@]}" --recipe fast --epochs "$epochs" --test_step 10 --eval_every "$epochs" \
    --test_every "$epochs" \
    --gap_subset 1000 --save_dir "${OUT:-runs/speedrun}" --resume "${flags[@]}" "$@" | tee "$log"
folder=$(sed -n 's/^writing to //p; s/ is finished:$//p' "$log")
available=$(.venv/bin/python -c 'import json, sys; print(json.load(open(sys.argv[1]))["images"]["test"])' "$folder/config.json")
images=$((images < available ? images : available))
[ "$images" = 0 ] || .venv/bin/python main_adv.py --eval --pretrained "$folder/model_RA_best.pth.tar" "${source[@]}" \
    --eval_attack autoattack --test_subset "$images" "${also[@]}"
