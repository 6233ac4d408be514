#!/usr/bin/env bash
# The paper's Table 1 on one data set: dense, Robust Bird (weights, and channels at density .5), Flying Bird, Flying Bird+.
# CHANNELS=0 leaves out Robust Bird with channels, which the paper does not have.
#   bash scripts/table1.sh DATA [flags]
source "$(dirname "$0")/table.sh"
table_begin "$@"
for seed in $seeds; do
    adv --arch resnet18 --seed "$seed"
    bird --arch resnet18 --seed "$seed" --pruning unstructured --density 0.2
    flying --arch resnet18 --seed "$seed" --density 0.2 --fb
    flying --arch resnet18 --seed "$seed" --density 0.2 --fbp
    [ "${CHANNELS:-1}" = 0 ] || bird --arch resnet18 --seed "$seed" --pruning channel --density 0.5
done
table_end
