#!/usr/bin/env bash
# The paper's other networks, VGG-16 and WRN-34-10 (ARCHS="vgg16 wideresnet"): dense, Robust Bird,
# Flying Bird, Flying Bird+.
#   bash scripts/architectures.sh DATA [flags]
source "$(dirname "$0")/tables.sh"
