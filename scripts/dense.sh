#!/usr/bin/env bash
# The paper's dense baseline: bash scripts/dense.sh DATA [flags].
source "$(dirname "$0")/table.sh"
table_begin "$@"
for seed in $seeds; do
    adv --arch resnet18 --seed "$seed"
done
table_end
