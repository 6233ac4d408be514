#!/usr/bin/env bash
# The study of results/study, at the paper's ratio of weights to images: Flying Bird and Flying
# Bird+ against small dense networks with as many weights or FLOPs, channels, Robust Bird, static
# masks, other densities, and weight perturbation; each also with averaged weights. 700 CIFAR-10
# images at 16x16, 150 epochs, three seeds: about 10 hours on 2 cores.
#   bash scripts/study.sh FOLDER [flags]       images as train/<class>/* and test/<class>/*
# PARTS="main small channels others awp densities" selects what to run. Run again, it skips finished
# runs and resumes interrupted ones. The tables of results/README.md: .venv/bin/python
# scripts/study_table.py runs/study
set -euo pipefail
source "$(dirname "$0")/help.sh"
for part in ${PARTS:-}; do # before images are linked; tables.py has what they mean
    case $part in main | small | channels | others | awp | densities) ;; *)
        echo "error: PARTS are main, small, channels, others, awp, densities, not '$part'" >&2
        exit 2 ;;
    esac
done
data=${1:+$(realpath -m -- "$1")}
cd "$(dirname "$0")/.."
out=${OUT:-runs/study}
bash scripts/link_images.sh "$data" "$out/images" 500 1000
export SEEDS=${SEEDS:-1 2 3} EPOCHS=${EPOCHS:-150} WIDTH=0.125 UPDATE_FREQUENCY=60 JOBS=${JOBS:-2} OUT=$out PAPER=cifar10
QUIET=1 bash scripts/setup.sh
exec .venv/bin/python scripts/tables.py study "$out/images" --cache_dir "$out/cache" --image_size 16 --train_subset 700 \
    --batch_size 32 --train_step 5 --test_step 10 --test_every 150 --decreasing_lr 0.5,0.75 --compile off --ema .995 \
    --precision float32 "${@:2}"
