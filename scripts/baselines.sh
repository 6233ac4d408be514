#!/usr/bin/env bash
# What Robust Bird and Flying Bird are to be measured against, at DENSITIES="0.2": static masks (random over all weights,
# magnitude, SNIP, GraSP, SynFlow, IGQ, ERK) and a small dense network with as many weights.
#   bash scripts/baselines.sh DATA [flags]
source "$(dirname "$0")/table.sh"
table_begin "$@"
for seed in $seeds; do
    for density in ${DENSITIES:-0.2}; do
        for init in random_global magnitude snip grasp synflow igq erk; do
            adv --arch resnet18 --seed "$seed" --fix --sparse_init "$init" --density "$density"
        done
        # A layer has as many weights as the product of its two widths.
        adv --arch resnet18 --seed "$seed" --width "$(awk "BEGIN { printf \"%.3f\", sqrt($density) }")"
    done
done
table_end
