#!/usr/bin/env bash
# The paper's Flying Bird at density .2: bash scripts/fb.sh DATA [flags].
source "$(dirname "$0")/table.sh"
table_begin "$@"
for seed in $seeds; do
    flying --arch resnet18 --seed "$seed" --density 0.2 --fb
done
table_end
