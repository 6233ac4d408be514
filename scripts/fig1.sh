#!/usr/bin/env bash
# The paper's Fig. 1: RA on training and test images against sparsity, for dense training and METHODS="rb fb" at
# DENSITIES="0.8 0.6 0.4 0.2 0.1 0.05".
#   bash scripts/fig1.sh DATA [flags]
source "$(dirname "$0")/table.sh"
table_begin "$@"
densities=${DENSITIES:-0.8 0.6 0.4 0.2 0.1 0.05}
[ -z "${SMOKE:-}" ] || densities=${DENSITIES:-0.6 0.2}
for seed in $seeds; do
    adv --arch resnet18 --seed "$seed"
    for density in $densities; do
        for method in ${METHODS:-rb fb}; do
            case $method in
                rb) bird --arch resnet18 --seed "$seed" --pruning unstructured --density "$density" ;;
                fb | fbp) flying --arch resnet18 --seed "$seed" --density "$density" "--$method" ;;
                *) echo "error: METHODS are rb, fb and fbp, not '$method'" >&2 && exit 2 ;;
            esac
        done
    done
done
table_end
