#!/usr/bin/env bash
# The study of results/study: dense, Robust Bird (weights and channels), Flying Bird and Flying Bird+ on 1,000 CIFAR-10 images at
# 16x16, long enough past the first decay for the dense run to overfit robustly; three seeds. About 2.5 hours on 2 cores.
#   bash scripts/study.sh FOLDER       images as train/<class>/* and test/<class>/*
# Run it again and finished runs are read, not repeated; cut ones go on.
set -euo pipefail
source "$(dirname "$0")/help.sh"
data=${1:+$(realpath -m -- "$1")}
cd "$(dirname "$0")/.."
out=${OUT:-runs/study}
bash scripts/link_images.sh "$data" "$out/images" 500 500
# 960 steps instead of 70,400: the masks are updated as often as in the paper, by epochs, and every run decays at the same epochs.
SEEDS=${SEEDS:-1 2 3} EPOCHS=120 WIDTH=0.5 UPDATE_FREQUENCY=20 SECOND_FREQUENCY=27 JOBS=${JOBS:-2} OUT=$out PAPER=cifar10 \
    exec bash scripts/table1.sh "$out/images" --cache_dir "$out/cache" --image_size 16 --train_subset 1000 --train_step 5 \
    --test_step 10 --test_every 120 --decreasing_lr 0.5,0.75 --compile off
