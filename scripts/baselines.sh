#!/usr/bin/env bash
# What Robust Bird and Flying Bird are to be measured against, at DENSITIES="0.2": static masks (random over all weights,
# magnitude, SNIP, GraSP, SynFlow, IGQ, ERK) and a small dense network with as many weights.
#   bash scripts/baselines.sh DATA [flags]
source "$(dirname "$0")/tables.sh"
