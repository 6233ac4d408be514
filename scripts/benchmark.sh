#!/usr/bin/env bash
# The cells of the Adversarial Pruning Benchmark (arXiv 2409.01249): METHODS="rb fb fbp" at DENSITIES="0.1 0.05 0.01" for
# ResNet-18 and VGG-16 on one data set (CIFAR-10 or SVHN), then AutoAttack on all test images, or on AA_IMAGES of them.
#   bash scripts/benchmark.sh DATA [flags]
source "$(dirname "$0")/table.sh"
table_begin "$@"
densities=${DENSITIES:-0.1 0.05 0.01}
[ -z "${SMOKE:-}" ] || densities=${DENSITIES:-0.5}  # at toy size a tenth of the weights is a dead network
for seed in $seeds; do
    for arch in ${ARCHS:-resnet18 vgg16}; do
        for density in $densities; do
            for method in ${METHODS:-rb fb fbp}; do
                case $method in
                    rb) bird --arch "$arch" --seed "$seed" --pruning unstructured --density "$density" ;;
                    fb | fbp) flying --arch "$arch" --seed "$seed" --density "$density" "--$method" ;;
                    *) echo "error: METHODS are rb, fb and fbp, not '$method'" >&2 && exit 2 ;;
                esac
            done
        done
    done
done
subset=${AA_IMAGES:-}
[ -z "${SMOKE:-}" ] || subset=${AA_IMAGES:-10}
check --eval_attack autoattack ${subset:+--test_subset "$subset"}
table_end
