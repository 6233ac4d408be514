#!/usr/bin/env bash
# The cells of the Adversarial Pruning Benchmark (arXiv 2409.01249): METHODS="rb fb fbp" at
# DENSITIES="0.1 0.05 0.01" for ResNet-18 and VGG-16 on one data set (CIFAR-10 or SVHN), then
# AutoAttack on all test images, or on AA_IMAGES of them.
#   bash scripts/benchmark.sh DATA [flags]
source "$(dirname "$0")/tables.sh"
