#!/usr/bin/env bash
# The paper's Robust Bird at density .2: bash scripts/rb.sh DATA [flags].
source "$(dirname "$0")/table.sh"
table_begin "$@"
for seed in $seeds; do
    bird --arch resnet18 --seed "$seed" --pruning unstructured --density 0.2
done
table_end
