#!/usr/bin/env bash
# The paper's Flying Bird+, starting at density .2: bash scripts/fbp.sh DATA [flags].
source "$(dirname "$0")/table.sh"
table_begin "$@"
for seed in $seeds; do
    flying --arch resnet18 --seed "$seed" --density 0.2 --fbp
done
table_end
