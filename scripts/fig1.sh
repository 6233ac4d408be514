#!/usr/bin/env bash
# The paper's Fig. 1: RA on training and test images against sparsity, for dense training and
# METHODS="rb fb" at DENSITIES="0.8 0.6 0.4 0.2 0.1 0.05".
#   bash scripts/fig1.sh DATA [flags]
source "$(dirname "$0")/tables.sh"
