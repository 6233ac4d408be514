#!/usr/bin/env bash
# The paper's other networks, VGG-16 and WRN-34-10 (ARCHS="vgg16 wideresnet"): dense, Robust Bird, Flying Bird, Flying Bird+.
#   bash scripts/architectures.sh DATA [flags]
source "$(dirname "$0")/table.sh"
table_begin "$@"
for seed in $seeds; do
    for arch in ${ARCHS:-vgg16 wideresnet}; do
        adv --arch "$arch" --seed "$seed"
        bird --arch "$arch" --seed "$seed" --pruning unstructured --density 0.2
        flying --arch "$arch" --seed "$seed" --density 0.2 --fb
        flying --arch "$arch" --seed "$seed" --density 0.2 --fbp
    done
done
table_end
