#!/usr/bin/env bash
# The paper's Table 1 on one data set: dense, Robust Bird (weights, and channels at density .5),
# Flying Bird, Flying Bird+. CHANNELS=0 leaves out Robust Bird with channels, which the paper does
# not have.
#   bash scripts/table1.sh DATA [flags]
source "$(dirname "$0")/tables.sh"
