#!/usr/bin/env bash
# Baselines for Robust Bird and Flying Bird, at DENSITIES="0.2": static masks (random over all
# weights, magnitude, SNIP, GraSP, SynFlow, IGQ, ERK) and a small dense network with as many
# weights.
#   bash scripts/baselines.sh DATA [flags]
source "$(dirname "$0")/tables.sh"
